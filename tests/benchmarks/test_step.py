"""The step suite: every way takes the same step, a wrong one has no time, parts add up to the whole."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import nullcontext

import pytest
import torch

from benchmarks import laps, scaling, step, ways
from benchmarks.__main__ import _Parser
from benchmarks.step import Work
from fastjepa import IJEPA, Ragged

CPU = torch.device("cpu")
SMALL = Work("vit_tiny", 8, 96, 3, (96, 2), {"depth": 2}, device=CPU)
ROWS = ["eager", "fastjepa truncated", "fastjepa ragged"]  # a compiler takes long


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A ceiling that needs no measuring."""
    monkeypatch.setattr(step, "matmul_rate", lambda device: 1e12)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    patch = pytest.MonkeyPatch()
    patch.setattr(step, "matmul_rate", lambda device: 1e12)
    found = step.measure(SMALL, 2, ROWS)
    patch.undo()
    return found


def test_rows(rows: list[dict]):
    assert [row["row"] for row in rows] == ROWS
    for row in rows:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["ms"], rel=0.5)
        assert all(row["parts_ms"][part] > 0 for part in laps.PARTS)
        assert row["images_per_second"] == pytest.approx(3e3 / row["ms"])
        assert row["of_matmul_rate"] == pytest.approx(row["flops_per_image"] * row["images_per_second"] / 1e12)
        assert row["mfu"] is None
        assert row["joules_per_1000_images"] is None
        assert row["peak_memory_bytes"] > 1e7
        assert row["loss_error"] < 1e-5
        assert row["gradients_error"] < 1e-5
    eager, cut, whole = rows
    assert eager["eager_over_this"] == 1
    assert cut["context_tokens"] == eager["context_tokens"] < whole["context_tokens"]
    assert cut["flops_per_image"] == eager["flops_per_image"] < whole["flops_per_image"]
    text = step.table(rows)
    assert "fastjepa ragged" in text
    assert "WRONG" not in text


def test_rows_with_settings():
    """Checked like the others; in parts, all gradients of the batch are."""
    names = ["eager", "fastjepa truncated, checkpointing", "fastjepa ragged, predictor checkpointing"]
    names += ["fastjepa ragged, 4 parts"]
    found = step.measure(dataclasses.replace(SMALL, batch=4), 1, names)
    assert [row["row"] for row in found] == names
    assert all(row["ms"] > 0 and row["gradients_error"] < 1e-5 for row in found)


def test_a_batch_that_has_no_equal_parts_is_said():
    eager, ours = step.measure(SMALL, 1, ["eager", "fastjepa truncated, 4 parts"])
    assert eager["ms"] > 0
    assert ours["absent"] == "3 images cannot be taken in equal parts"


def test_a_setting_is_on():
    model = step.build(SMALL, "fastjepa ragged, checkpointing").model
    assert model.encoder.recompute
    assert model.target_encoder.recompute
    assert not model.encoder.narrow_stream
    model = step.build(SMALL, "fastjepa ragged, predictor checkpointing").model
    assert model.predictor.recompute
    assert not model.encoder.recompute
    assert step.build(SMALL, "fastjepa truncated, narrow stream").model.predictor.narrow_stream
    assert not step.build(SMALL, "fastjepa truncated").model.encoder.recompute


def test_a_wrong_way_has_no_time(monkeypatch):
    class Off(ways.Fast):
        def objective(self, images, *inputs):
            return 1.001 * super().objective(images, *inputs)

    monkeypatch.setitem(step.FASTS, "fastjepa truncated", Off)
    eager, ours = step.measure(SMALL, 1, ROWS[:2])
    assert "ms" in eager
    assert "ms" not in ours
    assert "from fp64" in ours["wrong"]
    assert step.faults([eager, ours], argparse.Namespace()) == [f"fastjepa truncated: {ours['wrong']}"]
    assert "WRONG" in step.table([eager, ours])


def test_a_way_that_cannot_run_says_why(monkeypatch):
    class Fails(ways.Fast):
        def objective(self, images, *inputs):
            raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(step.FASTS, "fastjepa truncated", Fails)
    _, ours = step.measure(SMALL, 1, ROWS[:2])
    assert ours["absent"] == "fails: RuntimeError: no compiler"


def test_without_eager_nothing_is_timed(monkeypatch):
    class Fails(ways.Eager):
        def backward(self, loss):
            raise torch.OutOfMemoryError("no memory")

    exact = step.exact_gradients(SMALL)
    monkeypatch.setattr(step, "exact_gradients", lambda work: exact)
    monkeypatch.setattr(step, "Eager", Fails)
    eager, ours = step.measure(SMALL, 1, ROWS[:2])
    assert eager["absent"] == "fails: OutOfMemoryError: no memory"
    assert "yardstick" in ours["absent"]
    assert "ms" not in ours


def test_a_missing_gradient_is_wrong(monkeypatch):
    class Frozen(ways.Fast):
        def __init__(self, model: IJEPA, bf16: bool = False):
            model.predictor.mask_token.requires_grad_(False)
            super().__init__(model, bf16)

    monkeypatch.setitem(step.FASTS, "fastjepa truncated", Frozen)
    _, ours = step.measure(SMALL, 1, ROWS[:2])
    assert "gradients" in ours["wrong"]


@pytest.mark.parametrize("name", [*ROWS, *(row for row in step.SET if "narrow" not in row)])
def test_every_way_trains_alike(name: str):
    """Three steps: losses of eager and ours stay together, so the updates and the EMA are the same."""
    losses = {}
    for row in ("eager", name):
        way, losses[row] = step.build(SMALL, row), []
        assert way.ragged == name.startswith("fastjepa ragged") or row == "eager"
        for number in range(3):
            torch.manual_seed(number)
            masks = [step._form(m, way.ragged) for m in SMALL.masks(4, number, ragged=False)]
            loss, lap = laps.take_step(way, SMALL.images(4), way.inputs(masks[0], masks[1], 4), 0.9)
            assert min(lap.seconds().values()) > 0
            losses[row].append(loss.item())
    assert losses[name] == pytest.approx(losses["eager"], rel=1e-4)


def test_the_compiled_way_is_the_same_step_uncompiled(monkeypatch):
    """Its models and updates, the compiler left out."""
    monkeypatch.setattr(ways.torch, "compile", lambda model: model)
    way = step.build(SMALL, "compiled")
    found = step.errors(SMALL, way, step.exact_gradients(SMALL))
    assert found["gradients"] < 1e-5
    loss, lap = laps.take_step(way, SMALL.images(3), way.inputs(*SMALL.masks(3, 0, ragged=False), 3), 0.9)
    assert loss.isfinite()
    assert all(seconds > 0 for seconds in lap.seconds().values())


def test_a_forms_masks_are_the_same_patches():
    lists, _ = SMALL.masks(3, 0, ragged=False)
    two = [lists[0], lists[0].flip(1)]
    ragged = step._form(two, ragged=True)
    assert isinstance(ragged, Ragged)
    assert ragged.per_image == 2
    sequences = ragged.unbind()
    assert len(sequences) == 6
    assert sequences[2].tolist() == lists[0][1].tolist()
    assert sequences[3].tolist() == lists[0][1].flip(0).tolist()


def test_hooks_are_gone_after_a_step():
    way = step.build(SMALL, "fastjepa truncated")
    laps.take_step(way, SMALL.images(3), way.inputs(*SMALL.masks(3, 0, ragged=False), 3), 0.9)
    assert not any(module._forward_hooks for module in (way.encoder, way.predictor, way.target_encoder))


def test_peak_memory_counts_what_a_step_holds():
    """A larger batch holds more, by about what its activations are; parameters and moments are in it."""
    small, large = (Work("vit_tiny", 8, 96, n, (96, 2), {"depth": 2}, device=CPU) for n in (4, 16))
    peaks = []
    for work in (small, large):
        way = step.build(work, "eager")
        inputs = way.inputs(*work.masks(work.batch, 0, ragged=False), work.batch)
        laps.take_step(way, work.images(work.batch), inputs, 0.9)
        stays = sum(t.numel() * t.element_size() for t in way.tensors())
        peaks.append(laps.peak_bytes(way, work.images(work.batch), inputs, 0.9))
        assert peaks[-1] > stays
    assert peaks[1] > peaks[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--patch-size", "13"], "patch_size=13 does not divide"),
        (["--row", "official"], "needs --official"),
        (["--official", "/nowhere"], "no checkout of the published code"),
        (["--steps", "-1"], "--steps must be at least 1"),
    ],
)
def test_bad_input(words: list[str], said: str):
    parser = _Parser()
    step.add_arguments(parser)
    small = ["--model", "vit_tiny", "--batch-size", "1", "--steps", "1"]
    with pytest.raises(ValueError, match=said):
        step.run(parser.parse_args(small + words))


def test_scaling_changes_one_thing_at_a_time(monkeypatch):
    asked = []

    def measure(work: Work, steps: int, names: list[str]) -> list[dict]:
        asked.append(work)
        return [{"row": name, "model": "m", "pixels": work.pixels, "batch": work.batch, "ms": 1.0} for name in names]

    monkeypatch.setattr(scaling, "measure", measure)
    base = Work("vit_tiny", batch=4, predictor=(192, 2), device=CPU)
    found = scaling.measure_all(base, ["batch", "pixels", "width", "depth"], 1)
    assert len({repr(work) for work in asked}) == len(asked)
    rows = [row for row in found if row["row"] == "eager"]
    assert [r["value"] for r in rows if r["axis"] == "batch"] == [r["batch"] for r in rows if r["axis"] == "batch"]
    assert [r["tokens"] for r in rows if r["axis"] == "pixels"] == [196, 400, 784]
    assert [r["width"] for r in rows if r["axis"] == "width"] == [192, 384, 768]
    assert [r["depth"] for r in rows if r["axis"] == "depth"] == [6, 12, 24]
    assert {r["width"] for r in rows if r["axis"] != "width"} == {192}
    assert "eager" in scaling.table(found)


def test_steps_from_graphs_have_one_lap():
    """With a recorder that captures nothing, so that each step is launched as the first of its shapes."""

    class Recorder:
        within = nullcontext

        def capture(self, take):
            return (lambda: None), (torch.zeros(()), None)

        def forget(self):
            pass

    way = ways.FastRaggedGraphs(SMALL.model(), recorder=Recorder())
    other = step.build(SMALL, "fastjepa ragged")
    images, masks = SMALL.images(3), SMALL.masks(3, 0, ragged=True)
    (loss, lap), (expected, _) = (laps.take_step(w, images, w.inputs(*masks, 3), 0.9) for w in (way, other))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(way.graphs.held) == 1
    seconds = lap.seconds()
    assert seconds.pop("step") > 0
    assert not any(seconds.values())
    assert laps.peak_bytes(way, images, way.inputs(*masks, 3), 0.9) is None


def test_rows_of_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="the row fastjepa ragged, graphs needs a GPU"):
        step.build(SMALL, "fastjepa ragged, graphs")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [row for row in step.ROWS if row != "official"])
def test_every_way_on_a_gpu(name: str):
    work = Work("vit_tiny", 16, 224, 8, (192, 2), {"depth": 2}, bf16=True, device=torch.device("cuda"))
    rows = {row["row"]: row for row in step.measure(work, 2, list(dict.fromkeys(["eager", name])))}
    assert rows[name]["ms"] > 0, rows[name]
    assert ("graphs" in name) == (not rows[name]["parts_ms"])
    assert all(seconds > 0 for seconds in rows[name]["parts_ms"].values())
