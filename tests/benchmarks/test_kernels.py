"""The kernels suite: right before timed, absent said, and every operation of a small model through it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, timing
from benchmarks.machine import here
from benchmarks.operations import Operation, Peer, Sizes
from benchmarks.peers import PEERS, absence, missing
from fastjepa.kernels.launch import Cost

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Sizes(CPU, torch.float32, 2, 16, 32, 2, 32, 2, 1, context=6, spread=2, target=3)


@pytest.fixture
def machine(monkeypatch):
    """Ceilings and cold caches that need no time."""
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(kernels, "matmul_rate", lambda device: 1e9)
    monkeypatch.setattr(timing, "COLD", {"cpu": 1 << 10})


def doubling(*more: Peer, **functions) -> list[dict]:
    """Rows of 2 x: torch's, then of each function, then of each peer."""
    x = torch.randn(100)
    found = [Peer("torch", lambda: lambda: [x * 2])]
    found += [Peer(name, lambda f=f: lambda: [f(x)]) for name, f in functions.items()]
    operation = Operation("double", "100", Cost(800, 100, 1), lambda: [x.double() * 2], [*found, *more], "as it is")
    return kernels.rows_of(operation, CPU, repeats=3)


@pytest.mark.usefixtures("machine")
def test_right_is_timed_and_wrong_is_not():
    wrong = {"off": lambda x: x * 2.001, "nans": lambda x: x * float("nan"), "shape": lambda x: 2 * x[None]}
    rows = doubling(fastjepa=lambda x: x + x, **wrong)
    torchs, ours, *others = rows
    assert torchs["ms"] > 0
    assert torchs["graph_ms"] is None
    assert torchs["launches"] == 1
    assert torchs["roof"] == pytest.approx(1e3 * 800 / 1e9 / torchs["ms"])
    assert ours["best_peer_over_ours"] == torchs["ms"] / ours["ms"]
    assert "best_peer_over_ours" not in torchs
    for row in others:
        assert not {"ms", "GB/s", "roof"} & set(row)
        assert "allowed" in row["wrong"]
    assert kernels.faults(rows, argparse.Namespace()) == [f"{row['peer']} double: {row['wrong']}" for row in rows[2:]]


@pytest.mark.usefixtures("machine")
def test_a_gradient_that_is_wrong_is_found():
    """A place past the first."""
    x = torch.randn(10)
    peers = [Peer("torch", lambda: lambda: [x, x]), Peer("off", lambda: lambda: [x, x * 1.001])]
    right, off = kernels.rows_of(Operation("keep", "10", Cost(80, 0, 1), lambda: [x.double()] * 2, peers), CPU, 3)
    assert "ms" in right
    assert off["wrong"].startswith("output 1 is 1.0e-03")


@pytest.mark.usefixtures("machine")
def test_what_raises_is_a_row_and_the_others_have_theirs():
    def unmade():
        raise ImportError("libcudart.so.11.0: cannot open\nand more")

    raises, ours, unimportable, absent, after = doubling(
        Peer("unimportable", unmade),
        Peer("elsewhere", unmade, absent="not installed"),
        Peer("after", lambda: lambda: [torch.zeros(100)]),
        raises=lambda x: x @ x[:3],
        fastjepa=lambda x: x @ x[:3],
    )[1:]
    assert raises["absent"].startswith("fails: RuntimeError: ")
    assert unimportable["absent"] == "fails: ImportError: libcudart.so.11.0: cannot open"
    assert absent["absent"] == "not installed"
    assert ours["wrong"].startswith("fails: RuntimeError: ")  # never passed over
    assert "allowed" in after["wrong"]


@pytest.mark.usefixtures("machine")
def test_the_table_fits_and_says_every_row():
    absent = Peer("elsewhere", lambda: list, absent="not installed: " + "no module " * 20)
    rows = doubling(absent, fastjepa=lambda x: x + x, off=lambda x: x * 2.001)
    lines = kernels.table(rows).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[-4:]] == ["torch", "fastjepa", "off", "elsewhere"]
    assert "as it is" in lines[3]
    assert lines[-3].endswith("x")
    assert "WRONG: output 0" in lines[-2]
    assert "absent: not installed" in lines[-1]


@pytest.mark.parametrize("file", kernels.FILES)
def test_every_operation_is_right(file):
    """All that can run here against the fp64 answer, as the suite does it; a compiled peer takes long and is left out.

    timm is not needed: where it is missing its row says so.
    """
    found = import_module(f"benchmarks.bench_{file}").operations(SMALL)
    assert found
    for operation in found:
        judge = kernels.Judge(operation)
        rows = {p.name: judge.row(p, lambda *_: {"ms": 1.0}) for p in operation.peers if "compile" not in p.name}
        assert "ms" in rows["fastjepa"]
        for name, row in rows.items():
            expected = absence(PEERS[name], CPU)
            assert row.get("absent") == expected, (operation.name, name)
            assert "wrong" not in row, (operation.name, name, row)


@pytest.mark.parametrize("file", kernels.FILES)
def test_no_answer_is_rounded(file: str):
    """Also of bf16 inputs, as on a GPU: what is held to a rounded answer would be allowed next to nothing."""
    small = Sizes(torch.device("cpu"), torch.bfloat16, 2, 64, 160, 2, 48, 2, 2, context=20, spread=4, target=8)
    found = import_module(f"benchmarks.bench_{file}").operations(small)
    assert found
    for operation in found:
        assert {x.dtype for x in operation.exact()} == {torch.float64}, operation.case


def test_every_kernel_with_a_cost_is_benchmarked():
    """kernels/X.py that declares a cost: benchmarks/bench_X.py, in the suite, with its test for pytest-benchmark."""
    costed = {p.stem for p in (ROOT / "kernels").glob("*.py") if "_cost(" in p.read_text(encoding="utf-8")}
    there = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")}
    assert costed == there == set(kernels.FILES)
    for file in kernels.FILES:
        assert hasattr(import_module(f"benchmarks.bench_{file}"), f"test_{file}")


def test_every_peer_of_the_registry_is_used():
    operations = [o for file in kernels.FILES for o in import_module(f"benchmarks.bench_{file}").operations(SMALL)]
    assert {peer.name for o in operations for peer in o.peers} == set(PEERS)
    assert all(len(name) < 32 for name in PEERS)  # the table's column


@pytest.mark.parametrize(
    ("operation", "repeats", "said"), [("atention", 3, "jepa_loss.*'atention'"), ("gelu", 0, "at least 1, got 0")]
)
def test_bad_arguments(operation, repeats, said):
    with pytest.raises(ValueError, match=said):
        kernels.run(argparse.Namespace(operation=[operation], repeats=repeats))


@pytest.mark.usefixtures("machine")
def test_operations_can_be_chosen(monkeypatch):
    monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, device: SMALL))
    monkeypatch.setattr("benchmarks.bench_gelu.compiled", lambda function: function)
    rows = kernels.run(argparse.Namespace(operation=["gelu"], repeats=2))
    assert {row["operation"] for row in rows} == {"bias + GELU fwd+bwd"}
    assert all(row["ms"] > 0 for row in rows)


def package(folder: Path, *files: str, text: str = "") -> None:
    """Files of a package that nobody may import."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "raise RuntimeError('imported')\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder that packages are installed in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_other_apex_is_not_taken_for_nvidias(site):
    gpu = torch.device("cuda")
    package(site, "apex/__init__.py", "apex/lib/__init__.py", "apex/models.py")
    for name in ("apex multi_tensor_axpby", "apex FusedAdam, foreach_lerp", "apex FusedAdamSWA"):
        said = absence(PEERS[name], gpu)
        assert said is not None
        assert said.startswith("not installed: no module apex.")
        assert "another package" in said
    package(site, "apex/multi_tensor_apply/__init__.py", "apex/optimizers/__init__.py", "apex/optimizers/fused_adam.py")
    assert missing("apex.optimizers.fused_adam") is None
    assert "no module amp_C" in (absence(PEERS["apex FusedAdam, foreach_lerp"], gpu) or "")  # built without CUDA


def test_flash_attn_4_alone_is_not_taken_for_2(site):
    """Each installs a part of the package flash_attn."""
    package(site, "flash_attn/cute/__init__.py")
    assert [missing(m) for m in PEERS["flash-attn 4"].modules] == [None]
    assert [missing(m) for m in PEERS["flash-attn 2"].modules] == ["flash_attn.flash_attn_interface"]
    package(site, "flash_attn/flash_attn_interface.py")
    assert [missing(m) for m in PEERS["flash-attn 2"].modules] == [None]


def test_a_gpu_that_is_too_old_is_said(monkeypatch, site):
    package(site, "flash_attn/cute/__init__.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu, entry = torch.device("cuda"), PEERS["flash-attn 4"]
    assert absence(entry, gpu) is None
    said = "needs compute capability 9.0 for its backward, this GPU has 8.0"
    assert absence(entry, gpu, gradient=True) == said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert absence(entry, gpu) == "needs compute capability 8.0, this GPU has 7.5"


def test_under_pytest_benchmark(tmp_path):
    """One file as its user runs it: what can run is timed, what cannot is skipped with the reason."""
    found = tmp_path / "found.json"
    command = ["pytest", "benchmarks/bench_layer_norm.py", "-k", "published or Liger", f"--benchmark-json={found}"]
    # pytest-benchmark does not time in a worker of pytest-xdist, which the environment would make this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (timed,) = json.loads(found.read_text(encoding="utf-8"))["benchmarks"]
    assert timed["name"] == "test_layer_norm[residual + LayerNorm fwd+bwd-0-eager, as published]"
    assert timed["group"].startswith("residual + LayerNorm fwd+bwd, ")
    assert timed["extra_info"]["bytes"] > 0
    if (reason := absence(PEERS["Liger LayerNorm"], here())) is not None:
        assert reason in done.stdout


def test_timing_on_the_cpu(monkeypatch):
    monkeypatch.setattr(timing, "COLD", {"cpu": 1 << 10})
    calls = []
    found = timing.measure(lambda: calls.append(1), CPU, repeats=4, warmup=2)
    assert len(calls) == 6
    assert found.median >= 0
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    calls.clear()
    timing.measure(lambda: calls.append(1), CPU, repeats=100, warmup=0)
    assert len(calls) == timing.ENOUGH
    assert timing.captured(lambda: None, CPU) is None


def test_roofs_are_the_best_that_was_seen(monkeypatch):
    seconds = iter([0.5, 0.2, 0.4])
    clock = iter([0.0, 0.0, 0.5, 1.5])
    monkeypatch.setattr(timing, "clock", lambda: next(clock))
    monkeypatch.setattr(timing, "measure", lambda *_, **__: timing.Timing(next(seconds), 0.0, 0.0))
    assert timing._best(lambda: None, CPU) == 0.2


def test_roofs_of_a_processor_are_those_of_the_time_of_the_steps(monkeypatch):
    monkeypatch.setattr(timing, "_best", lambda call, device: 1.0)
    roofs = timing.Roofs(CPU)
    assert (roofs.copy, roofs.matmul) == (2 * roofs.moved, 2 * roofs.side**3)
    seconds = iter([1.0, 2.0, 4.0, 8.0, 2.0, 4.0])
    monkeypatch.setattr(timing, "measure", lambda *_, **__: timing.Timing(next(seconds), 0.0, 0.0))
    for _ in range(3):
        roofs.look()
    assert (roofs.copy, roofs.matmul) == (roofs.moved, 2 * roofs.side**3 / 4)


def test_a_clock_of_one_thread_is_this_process_s():
    assert torch.get_num_threads() == 1
    began = timing.clock()
    time.sleep(0.3)
    assert timing.clock() - began < 0.2


@pytest.mark.gpu
def test_timing_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    device = x.device
    found = timing.measure(lambda: x @ x, device, repeats=5)
    assert 1e-5 < found.median < 1e-1
    assert timing.copy_bandwidth(device) > 1e11
    replay = timing.captured(lambda: x @ x, device)
    assert replay is not None
    assert timing.measure(replay, device, repeats=5).median == pytest.approx(found.median, rel=0.5)
    assert timing.captured(lambda: x.sum().item(), device) is None
    assert timing.captured(lambda: x @ x, device) is not None  # nothing is left of the one that could not be
