"""Profiling: what a profiled run writes and says, that it changes no number, and that nothing of it is left."""

from __future__ import annotations

import gzip
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastjepa import read_checkpoint
from fastjepa.config import Config
from fastjepa.training import profile, train
from fastjepa.training.trace import PARTS, StepTrace
from tests.helpers import make_pictures, tiny_config

RUN = {"progress": False, "save_every": 100, "device": "cpu", "profile": True}
ROWS = ("data", "to device", "target", "context", "predictor", "loss", "backward: loss", "backward: predictor",
        "backward: context", "optimizer", "rest")  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def config_of(pictures, folder, profile=True, **changes) -> Config:
    runtime = RUN | {"profile": profile} | changes.pop("runtime", {})
    return tiny_config(
        pictures, folder, mask={"patch_size": 4, "min_keep": 4, "ragged": True}, runtime=runtime, **changes
    )


@pytest.fixture(scope="module")
def profiled_run(pictures, tmp_path_factory):
    """(folder, result) of one profiled run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(config_of(pictures, folder))


def trace_of(folder: Path) -> dict:
    with gzip.open(folder / "jepa-profile.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def ranges(trace):
    """(name, thread, start, end) of each range of the user's, by time."""
    found = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    return sorted((e["name"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in found)


def hooks_of(trainer):
    model, optimizer = trainer.model, trainer.optimizer
    modules = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    tensors = [p._backward_hooks or {} for p in model.parameters()]
    own = [name for name in vars(optimizer) if name in ("step", "zero_grad")]
    return sum(map(len, [*modules, *tensors, own]))


def test_a_run_is_profiled(pictures, tmp_path, capsys):
    result = train(config_of(pictures, tmp_path))
    assert result.steps == 12
    said = capsys.readouterr().err
    text = (tmp_path / "jepa-profile.md").read_text()
    assert said.count(text) == 1
    assert f"profile: {tmp_path / 'jepa-profile.json.gz'}" in said
    assert f"profile: {tmp_path / 'jepa-profile.md'}" in said
    assert "Steps 5 to 7: vit_tiny" in text
    assert "ms under the profiler and" in text
    for part in ROWS:
        assert f"| {part} " in text
    assert text.count("| aten::addmm ") >= 1  # by memory; by time on a machine that does nothing else
    assert not list(tmp_path.glob(".*"))


def test_the_tables_are_markdown(profiled_run):
    lines = (profiled_run[0] / "jepa-profile.md").read_text().splitlines()
    tables = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert [len(table) for table in tables] == [len(ROWS) + 3, 12, len(ROWS) + 2, 12]
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert set(table[1]) == set("|-: ")


def test_ranges_of_the_trace(profiled_run):
    """Every part is a range of each of the three steps, and together they are the step."""
    found = ranges(trace_of(profiled_run[0]))
    steps = [r for r in found if r[0].startswith("ProfilerStep#")]
    assert len(steps) == 3
    told, backwards = [], []  # shares of the time: of the step that other processes disturbed least
    for _, thread, start, end in steps:
        inner = [r for r in found if r[1] == thread and start <= r[2] < end]
        parts = sorted((r for r in inner if r[0] in PARTS), key=lambda r: r[2])
        assert [r[0] for r in parts] == [part for part in PARTS if part != "wait for the device"]
        assert all(a[3] <= b[2] + 0.01 for a, b in pairwise(parts)), "parts overlap"
        assert all(r[3] <= end + 0.01 for r in parts)
        told.append(sum(r[3] - r[2] for r in parts) / (end - start))
        (backward,) = (r for r in parts if r[0] == "backward")
        split = sorted((r for r in inner if r[0].startswith("backward: ")), key=lambda r: r[2])
        assert [r[0] for r in split] == ["backward: loss", "backward: predictor", "backward: context"]
        assert all(a[3] <= b[2] + 0.01 for a, b in pairwise(split))
        assert backward[2] <= split[0][2]
        assert split[-1][3] <= backward[3] + 0.01
        backwards.append(sum(r[3] - r[2] for r in split) / (backward[3] - backward[2]))
    assert max(told) > 0.9
    assert max(backwards) > 0.5


def test_nothing_in_the_trace_overlaps_without_being_inside(profiled_run):
    """What a viewer draws as one stack on a thread has to nest."""
    events = [e for e in trace_of(profiled_run[0])["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    assert len({e["tid"] for e in events}) == 1
    ends = []
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while ends and ends[-1] <= e["ts"] + 0.01:
            ends.pop()
        assert not ends or e["ts"] + e["dur"] <= ends[-1] + 0.01, e["name"]
        ends.append(e["ts"] + e["dur"])


def test_the_times_add_up(profiled_run):
    trace = StepTrace(trace_of(profiled_run[0]))
    rows = trace.times()
    assert tuple(row["part"] for row in rows) == ROWS
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.1)
    assert sum(row["ms"] for row in rows) == pytest.approx(trace.wall / 1000, rel=0.1)
    assert all(row["ms"] > 0 for row in rows)
    operators = trace.kernels(count=10**6)
    assert sum(row["share"] for row in operators) + trace.unexplained() == pytest.approx(1, abs=0.01)


def test_backward_is_split_where_the_forward_pass_is(profiled_run):
    """Only the loss and the predictor come before the encoder: 2 of its blocks, 1 of the predictor's."""
    trace = StepTrace(trace_of(profiled_run[0]))
    counts = dict.fromkeys(ROWS, 0)
    for e in trace.trace["traceEvents"]:
        if e.get("name", "").endswith("evaluate_function: GeluBackward0"):
            counts[trace.part_of(e["ts"])] += 1
    assert {part: n for part, n in counts.items() if n} == {"backward: predictor": 3, "backward: context": 6}


def test_memory_adds_up(profiled_run):
    """What is held at most is the weights, the activations of the forward pass, and little else."""
    folder, result = profiled_run
    trace = StepTrace(trace_of(folder), standing=0)
    rows = {row["part"]: row for row in trace.memory()}
    assert trace.peak() / 2**20 == pytest.approx(max(row["peak MiB"] for row in rows.values()))
    assert rows["loss"]["peak MiB"] > rows["target"]["peak MiB"]  # the activations that backward needs
    assert rows["rest"]["peak MiB"] < 0.5 * rows["loss"]["peak MiB"]  # are gone, and the gradients too
    weights = sum(p.numel() for p in result.model.encoder.parameters())
    assert rows["backward: context"]["made MiB"] * 2**20 > 4 * weights * 0.9  # each weight's gradient is made


def test_standing_bytes(pictures, tmp_path):
    seen = []
    train(config_of(pictures, tmp_path, profile=False), on_step=lambda t: seen.append(profile.standing_bytes(t)))
    model = train(config_of(pictures, tmp_path / "more", profile=False)).model
    weights = {name: sum(4 * p.numel() for p in getattr(model, name).parameters()) for name in ("encoder", "predictor")}
    trained = sum(4 * p.numel() for m in (model.encoder, model.predictor) for p in m.parameters() if p.requires_grad)
    steps = 4 * sum(p.requires_grad for m in (model.encoder, model.predictor) for p in m.parameters())
    assert seen[-1] == 2 * weights["encoder"] + weights["predictor"] + 2 * trained + steps


@pytest.mark.parametrize("bf16", [False, True])
def test_no_number_changes(pictures, tmp_path, bf16):
    runs = []
    for on in (False, True):
        folder = tmp_path / str(on)
        meta = {"use_bfloat16": bf16}
        runs.append(train(config_of(pictures, folder, profile=on, meta=meta)))
    plain, with_profile = ([row["loss"] for row in run.rows] for run in runs)
    assert len(plain) == 12
    assert plain == with_profile
    states = [read_checkpoint(run.checkpoint) for run in runs]
    for name in ("encoder", "predictor", "target_encoder"):
        for key, tensor in states[0][name].items():
            assert torch.equal(tensor, states[1][name][key]), f"{name}.{key}"


def test_nothing_is_left_behind(pictures, tmp_path):
    hooks, active = {}, {}

    def look(trainer):
        hooks[trainer.step] = hooks_of(trainer)
        active[trainer.step] = torch._C._autograd._profiler_enabled()

    train(config_of(pictures, tmp_path), on_step=look)
    assert [step for step, count in hooks.items() if count] == [6, 7, 8]  # after the steps 5, 6 and 7
    assert [step for step, on in active.items() if on] == [6, 7, 8]
    assert not torch._C._autograd._profiler_enabled()


def test_nothing_happens_unless_asked(pictures, tmp_path, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("profiling, unasked")

    for owner, name in ((profile, "record_function"), (profile, "Parts"), (torch.profiler, "profile")):
        monkeypatch.setattr(owner, name, never)
    hooks = set()
    train(config_of(pictures, tmp_path, profile=False), on_step=lambda trainer: hooks.add(hooks_of(trainer)))
    assert hooks == {0}
    assert not list(tmp_path.glob("*profile*"))


@pytest.mark.parametrize(("steps", "warm", "active"), [(4, 1, 3), (2, 1, 1), (7, 4, 3)])
def test_short_runs(pictures, tmp_path, capsys, steps, warm, active):
    train(config_of(pictures, tmp_path, runtime={"stop_after": steps}))
    said = capsys.readouterr().err
    assert f"the run is short: {warm} steps of warm-up and {active} in the profile instead of 5 and 3" in said
    assert f"Steps {warm} to {steps - 1}" in said
    assert len(StepTrace(trace_of(tmp_path)).steps) == active


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_one_step_and_none(pictures, tmp_path, capsys):
    train(config_of(pictures, tmp_path, runtime={"stop_after": 1}))
    assert "0 steps of warm-up and 1 in the profile" in capsys.readouterr().err
    train(config_of(pictures, tmp_path, runtime={"stop_after": 1}, meta={"load_checkpoint": True}))
    assert "no profile: no step is left" in capsys.readouterr().err


def test_a_resumed_run(pictures, tmp_path, capsys):
    train(config_of(pictures, tmp_path, profile=False, runtime={"stop_after": 3}))
    result = train(config_of(pictures, tmp_path, meta={"load_checkpoint": True}))
    assert result.steps == 12
    assert "Steps 8 to 10" in capsys.readouterr().err


@pytest.mark.parametrize("at", [3, 7])  # in the warm-up and in the window
def test_a_run_that_ends_early(pictures, tmp_path, capsys, at):
    left = []

    def interrupt(trainer):
        if trainer.step == at:
            left.append(trainer)
            raise KeyboardInterrupt

    result = train(config_of(pictures, tmp_path), on_step=interrupt)
    assert result.steps == at
    assert "no profile: the run ended before the steps to be profiled were done" in capsys.readouterr().err
    assert hooks_of(left[0]) == 0
    assert not torch._C._autograd._profiler_enabled()
    train(config_of(pictures, tmp_path / "again"))  # another can begin


def test_files_that_cannot_be_written(pictures, tmp_path, capsys):
    (tmp_path / "jepa-profile.json.gz").mkdir()  # in the place of one file
    full = tmp_path / ".jepa-profile.md.part"
    # A disk that takes no more of the other, once the run has begun, which takes no links that were there.
    result = train(config_of(pictures, tmp_path), lambda trainer: trainer.step == 1 and full.symlink_to("/dev/full"))
    assert result.steps == 12
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / 'jepa-profile.json.gz'} is not written: Is a directory" in said
    assert f"warning: {tmp_path / 'jepa-profile.md'} is not written: No space left on device" in said
    assert "# Where a step's time goes" in said
    assert not list(tmp_path.glob(".*"))


def test_no_room_for_the_export(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert train(config_of(pictures, tmp_path / "run")).steps == 12
    assert "warning: no profile: the trace cannot be read" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*profile*"))


def test_a_step_that_fails_in_the_window(pictures, tmp_path):
    """Its error comes through, and the hooks are gone."""
    left = []

    def fail(trainer):
        left.append(trainer)
        if trainer.step == 6:
            trainer.model.predictor.mask_token = None

    with pytest.raises(AttributeError, match="view"):
        train(config_of(pictures, tmp_path), on_step=fail)
    assert hooks_of(left[0]) == 0
    assert not torch._C._autograd._profiler_enabled()
