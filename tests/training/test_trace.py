"""What is read from a profiler's trace: written by hand as a GPU's would be, for what no CPU shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastjepa.training.trace import MIB, PARTS, StepTrace

MAIN, ENGINE, GPU = (7, 7), (7, 8), (0, 20)
NODE = "autograd::engine::evaluate_function: "


def event(name, kind, start, end, where=MAIN, **arguments):
    dims = {"Input Dims": arguments.pop("dims")} if "dims" in arguments else {}
    names = {"number": "Sequence number", "allocated": "Total Allocated", "size": "Bytes"}
    args = {names.get(key, key): value for key, value in arguments.items()} | dims
    pid, tid = where
    return {
        "ph": "X",
        "cat": kind,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": float(start),
        "dur": float(end - start),
        "args": args,
    }


def ran(number, launched, start, end, where=MAIN, name="gemm", kind="cuda_runtime"):
    """A kernel and its launch."""
    return [
        event("cudaLaunchKernel", kind, launched, launched + 1, where, correlation=number),
        event(name, "kernel", start, end, GPU, correlation=number),
    ]


def memory(time, size, allocated, where=MAIN, device=1):
    found = event("[memory]", "cpu_instant_event", time, time, where, size=size, allocated=allocated)
    del found["dur"]
    found["args"] |= {"Device Type": device, "Device Id": 0}
    return found


def gpu_step():
    """One step of 1000 us: the CPU is ahead of the GPU, and backward's operators are on another thread."""
    parts = [("data", 0, 100), ("to device", 100, 150), ("target", 150, 200), ("context", 200, 300),
             ("predictor", 300, 350), ("loss", 350, 400), ("backward", 400, 600), ("optimizer", 600, 650),
             ("rest", 650, 700), ("wait for the device", 700, 1000)]  # fmt: skip
    return [
        event("ProfilerStep#5", "user_annotation", 0, 1000),
        *(event(name, "user_annotation", start, end) for name, start, end in parts),
        event("ProfilerStep#5", "gpu_user_annotation", 110, 990, GPU),  # must not be taken for another step
        event("aten::to", "cpu_op", 110, 140, dims=[[4, 3]]),
        event("aten::linear", "cpu_op", 210, 240, number=30, dims=[[8, 2], [2, 2]]),
        event("aten::mm", "cpu_op", 215, 235, number=30, dims=[[8, 2], [2, 2]]),
        event("aten::mm", "cpu_op", 310, 330, number=31, dims=[[4, 2], [2, 2]]),
        event("fastjepa::jepa_loss", "cpu_op", 360, 390, number=33),
        event(f"{NODE}LossBackward", "cpu_op", 410, 420, ENGINE, number=33),
        event(f"{NODE}MmBackward0", "cpu_op", 430, 470, ENGINE, number=31),
        event(f"{NODE}torch::autograd::AccumulateGrad", "cpu_op", 470, 480, ENGINE),
        event(f"{NODE}MmBackward0", "cpu_op", 490, 560, ENGINE, number=30),
        event(f"{NODE}torch::autograd::AccumulateGrad", "cpu_op", 560, 570, ENGINE),
        *ran(1, 120, 130, 140, name="Memcpy"),
        *ran(2, 220, 240, 340),  # context, half of it while the CPU is in the predictor
        *ran(3, 320, 340, 400, name="attention", kind="cuda_driver"),
        *ran(4, 370, 400, 420, name="loss"),
        *ran(5, 415, 420, 440, ENGINE, name="loss"),
        *ran(6, 475, 440, 500, ENGINE),
        *ran(7, 500, 500, 700, ENGINE),
        *ran(8, 620, 700, 800, name="adamw"),
        event("cudaStreamSynchronize", "cuda_runtime", 660, 690, correlation=9),
        event("cudaDeviceSynchronize", "cuda_runtime", 701, 999, correlation=10),
    ]  # fmt: skip


def by(rows, key):
    return {row[key]: row for row in rows}


def test_kernels_belong_to_the_part_that_launched_them():
    trace = StepTrace({"traceEvents": gpu_step()}, cuda=True)
    assert trace.on_device
    rows = by(trace.times(), "part")
    ms = {part: round(1000 * row["ms"]) for part, row in rows.items()}
    assert ms == {
        "data": 0,
        "to device": 10,
        "target": 0,
        "context": 100,
        "predictor": 60,
        "loss": 20,
        "backward: loss": 20,
        "backward: predictor": 60,
        "backward: context": 200,
        "optimizer": 100,
        "rest": 0,
        "wait for the device": 0,
        "GPU idle": 1000 - 570,
    }
    assert sum(ms.values()) == 1000
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    on_cpu = {part: round(1000 * row["CPU ms"]) for part, row in rows.items() if "CPU ms" in row}
    assert sum(on_cpu.values()) == 1000
    assert [on_cpu[f"backward: {part}"] for part in ("loss", "predictor", "context")] == [30, 60, 110]


def test_kernels_and_who_launched_them():
    first, second, *_ = StepTrace({"traceEvents": gpu_step()}, cuda=True).kernels()
    assert (first["kernel"], first["calls"], round(1000 * first["ms"])) == ("gemm", 3, 360)
    assert first["launched by, largest shapes"] == f"{NODE}MmBackward0"
    assert second["kernel"] == "adamw"
    assert second["launched by, largest shapes"] == ""
    assert len(StepTrace({"traceEvents": gpu_step()}, cuda=True).kernels(count=2)) == 2


def test_syncs_are_the_steps_own():
    """The profiler's wait at the end of its window is not among them."""
    (row,) = StepTrace({"traceEvents": gpu_step()}, cuda=True).syncs()
    assert (row["call"], row["part"], row["calls"], round(1000 * row["ms"])) == ("cudaStreamSynchronize", "rest", 1, 30)


def test_what_is_outside_the_steps_does_not_count():
    before = [*ran(90, -50, -40, -20), event("aten::mm", "cpu_op", -50, -40), memory(-5, MIB, 9 * MIB)]
    after = [event("cudaDeviceSynchronize", "cuda_runtime", 1001, 1010, correlation=91)]
    plain, more = (StepTrace({"traceEvents": e}, cuda=True) for e in (gpu_step(), [*before, *gpu_step(), *after]))
    for ask in ("times", "kernels", "syncs", "memory", "makers", "peak"):
        assert getattr(plain, ask)() == getattr(more, ask)()


def test_memory_of_a_gpu():
    """The allocator's own count; a part that allocates nothing holds what the one before left."""
    events = [
        memory(120, 2 * MIB, 12 * MIB),
        memory(216, 5 * MIB, 17 * MIB),  # in aten::mm within aten::linear
        memory(230, -5 * MIB, 12 * MIB),
        memory(435, 8 * MIB, 20 * MIB, ENGINE),
        memory(500, -8 * MIB, 12 * MIB, ENGINE),
        memory(436, 64 * MIB, 99 * MIB, ENGINE, device=0),  # the host's
    ]
    trace = StepTrace({"traceEvents": gpu_step() + events}, standing=10 * MIB, cuda=True)
    rows = by(trace.memory(), "part")
    peaks = {part: row["peak MiB"] for part, row in rows.items()}
    assert (peaks["to device"], peaks["context"], peaks["predictor"]) == (12, 17, 12)
    assert (peaks["backward: predictor"], peaks["backward: context"], peaks["optimizer"]) == (20, 20, 12)
    assert rows["context"]["made MiB"] == 5
    assert trace.peak() == 20 * MIB
    makers = by(trace.makers(), "operator")
    assert makers["aten::mm"] == {"operator": "aten::mm", "MiB": 5, "calls": 1, "shapes": "8x2, 2x2"}
    assert makers[f"{NODE}MmBackward0"]["MiB"] == 8


def test_memory_of_the_cpu_is_added_up():
    """The processor's allocator counts from the first profile of the process on, so its own count is of no use."""
    events = [memory(211, 4 * MIB, 77 * MIB, device=0), memory(310, -3 * MIB, 78 * MIB, device=0)]
    trace = StepTrace({"traceEvents": gpu_step() + events}, standing=10 * MIB)
    rows = by(trace.memory(), "part")
    assert (rows["data"]["peak MiB"], rows["context"]["peak MiB"], rows["loss"]["peak MiB"]) == (10, 14, 11)
    assert trace.peak() == 14 * MIB


def test_memory_belongs_to_the_operator_that_asked():
    """aten::empty makes memory for others, and is named where nobody else is."""
    empty = [event("aten::empty", "cpu_op", s, s + 4, dims=[]) for s in (216, 650)]
    events = [*empty, memory(217, 2, 2, device=0), memory(652, 3, 5, device=0), memory(680, 4, 9, device=0)]
    trace = StepTrace({"traceEvents": gpu_step() + events})
    found = {row["operator"]: round(row["MiB"] * MIB) for row in trace.makers()}
    assert found == {"aten::mm": 2, "aten::empty": 3, "no operator": 4}


def test_operators_own_time():
    trace = StepTrace({"traceEvents": gpu_step()})
    rows = by(trace.kernels(count=99), "operator")
    assert not trace.on_device
    assert round(1000 * rows["aten::linear"]["ms"]) == 10  # 30, less the aten::mm within
    assert (round(1000 * rows["aten::mm"]["ms"]), rows["aten::mm"]["calls"]) == (40, 2)
    assert trace.unexplained() == pytest.approx(1 - (30 + 30 + 20 + 30) / 1000)


def test_a_gpu_that_the_trace_does_not_tell_of():
    events = [e for e in gpu_step() if e["cat"] not in ("kernel", "cuda_runtime", "cuda_driver")]
    trace = StepTrace({"traceEvents": events}, cuda=True)
    assert not trace.on_device
    assert "GPU idle" not in by(trace.times(), "part")


def test_backward_that_cannot_be_split():
    events = [e for e in gpu_step() if "Sequence number" not in e["args"]]
    trace = StepTrace({"traceEvents": events}, cuda=True)
    assert round(1000 * by(trace.times(), "part")["backward"]["ms"]) == 280
    assert trace.backward == []


def test_what_is_shown_with_the_trace():
    events = [memory(120, 2 * MIB, 12 * MIB)]
    added = StepTrace({"traceEvents": gpu_step() + events}, cuda=True).additions()
    shown = [(e["cat"], e["name"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in added if e["ph"] == "X"]
    assert sorted(shown) == [
        ("gpu_user_annotation", "backward: context", 20, 500, 700),
        ("gpu_user_annotation", "backward: loss", 20, 420, 440),
        ("gpu_user_annotation", "backward: predictor", 20, 440, 500),
        ("user_annotation", "backward: context", 8, 490, 570),
        ("user_annotation", "backward: loss", 8, 410, 420),
        ("user_annotation", "backward: predictor", 8, 430, 480),
    ]
    (curve,) = [e for e in added if e["ph"] == "C"]
    assert (curve["ts"], curve["args"]) == (120, {"held": 12})


def test_every_part_is_explained():
    text = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")
    explained = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    assert not [part for part in (*PARTS, "GPU idle") if not any(part in cell for cell in explained)]


def test_no_whole_step():
    with pytest.raises(ValueError, match="no whole step"):
        StepTrace({"traceEvents": [e for e in gpu_step() if not e["name"].startswith("ProfilerStep")]})
