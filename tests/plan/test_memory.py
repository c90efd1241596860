"""What the planner says is kept for the backward pass and held at most, against what autograd and a step hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import laps
from benchmarks.count import CPU, META, most_held
from benchmarks.counter import Counter, CudaAutocast, Held, as_on_a_gpu, kernel_path
from benchmarks.step import SET, Work, build, is_ragged
from fastjepa import Ragged
from fastjepa.flops import Tokens
from fastjepa.nn import keep_copies
from fastjepa.pairing import TargetRows
from fastjepa.plan import Order, find_chip, recipe
from fastjepa.plan.cost import Step
from fastjepa.plan.layers import AUTOCAST, FP32
from fastjepa.plan.measured import OURS
from fastjepa.plan.memory import memory
from fastjepa.plan.planning import MOST_IMAGES, largest_batch
from fastjepa.plan.settings import Settings
from fastjepa.plan.work import Batch, Models, draw

WORK = Work("vit_tiny", 8, 96, 4, (96, 2), {"depth": 3})


def step_of(row: str, masks: tuple, precision, work: Work = WORK) -> Step:
    kept = TargetRows.build(masks[1], work.batch, (work.pixels // work.patch) ** 2).kept
    models = Models.of(replace(work, device=META).model())
    tokens = Batch(Tokens.of(work.batch, *masks), float(len(kept)))
    return Step(models, tokens, row.split()[0], precision, Settings.of_row(row))


def on_meta(masks: list[torch.Tensor] | Ragged) -> list[torch.Tensor] | Ragged:
    return masks.to("meta") if isinstance(masks, Ragged) else [m.to("meta") for m in masks]


def saved_bytes(row: str, masks: tuple, mixed: bool) -> int:
    """Of storages that autograd holds as the backward pass begins, the models' own left out.

    On the meta device, ours through its kernels' autograd functions, under CUDA's rules of autocast where `mixed`.
    """
    way = build(replace(WORK, device=META), row)
    kept = (
        [copy for model in (*way.models, way.target_encoder) for copy in keep_copies(model).values()] if mixed else []
    )
    own = {t.untyped_storage()._cdata for t in (*way.tensors(), *kept)}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage
        return tensor

    contexts, targets = masks
    lengths = {}
    for packed in (contexts, targets):
        if isinstance(packed, Ragged):
            lengths[len(packed.values), packed.num_sequences] = packed.lengths.long()
    counter = _Unasked(lengths)
    rows = TargetRows.build(targets, WORK.batch, 144).to("meta")
    inputs = (*map(on_meta, masks), *([rows] if row != "eager" else []))
    with kernel_path(counter), saved_tensors_hooks(pack, lambda tensor: tensor):
        images = torch.empty(WORK.batch, 3, WORK.pixels, WORK.pixels, device=META)
        if mixed:
            with CudaAutocast():
                loss = way.objective(images, *inputs)
        else:
            loss = way.objective(images, *inputs)
    assert loss.requires_grad
    own.add(images.untyped_storage()._cdata)
    return sum(storage.nbytes() for place, storage in held.items() if place not in own)


class _Unasked(Counter):
    """Launches that do nothing and are not counted."""

    def launch(self, name, arguments):
        pass


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("row", ["eager", "fastjepa truncated", "fastjepa ragged"])
def test_what_is_kept_is_what_autograd_keeps(row: str, mixed: bool):
    """Within 10 %, the bf16 copies of eager's weights among it; images are the caller's."""
    masks = WORK.masks(WORK.batch, 1, ragged=row.endswith("ragged"))
    found = memory(step_of(row, masks, AUTOCAST if mixed else FP32))
    images = 4 * WORK.batch * 3 * WORK.pixels**2
    assert found.copies + found.activations - images == pytest.approx(saved_bytes(row, masks, mixed), rel=0.10)


def test_peak_is_what_a_step_holds():
    """Eager on the CPU in fp32, where the profiler sees every allocation: within 10 %."""
    work = replace(WORK, batch=16, device=torch.device("cpu"))
    masks = work.masks(work.batch, 1, ragged=False)
    way = build(work, "eager")
    inputs = way.inputs(*masks, work.batch)
    laps.take_step(way, work.images(work.batch), inputs, 0.9)
    measured = laps.peak_bytes(way, work.images(work.batch), inputs, 0.9)
    images = 4 * work.batch * 3 * work.pixels**2  # made before, so not in what was measured
    assert memory(step_of("eager", masks, FP32, work)).peak - images == pytest.approx(measured, rel=0.10)


def test_what_is_held_by_count_is_what_is_allocated():
    """A step of ours through its kernels, interpreted, as the profiler sees it: the meta device's within 4 %."""
    work = replace(WORK, batch=2, sizes={"embed_dim": 16, "num_heads": 1, "depth": 2}, predictor=(16, 1), device=CPU)
    masks = work.masks(work.batch, 1, ragged=False)
    way = build(work, "fastjepa truncated")
    images, inputs = work.images(work.batch), way.inputs(*masks, work.batch)
    with as_on_a_gpu():
        laps.take_step(way, images, inputs, 0.9)
        allocated = laps.peak_bytes(way, images, inputs, 0.9)
    there = replace(work, device=META)
    way = build(there, "fastjepa truncated")
    images, inputs = there.images(work.batch), way.inputs(*masks, work.batch)

    def step() -> None:
        way.backward(way.objective(images, *inputs))
        way.update(0.9)

    with kernel_path(_Unasked()):
        step()
        with Held([images, *way.tensors()]) as held:
            step()
    made_before = 4 * work.batch * 3 * work.pixels**2  # the images, not in what was allocated
    assert held.most - made_before == pytest.approx(allocated, rel=0.04)


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in ("vit_small", "vit_large") for row in ("eager", "fastjepa truncated", "fastjepa ragged")]
    + [("vit_large", row) for row in SET]
    + [(name, f"{row}, checkpointing") for name in ("vit_tiny", "vit_base") for row in OURS]
    + [(name, f"{row}, predictor checkpointing") for name in ("vit_tiny", "vit_base") for row in OURS],
)
def test_peak_is_what_a_step_in_bf16_holds(name: str, row: str):
    """By the tensors that are there on the meta device, ours through its kernels: within 6 %."""
    work = Work(name, batch=32, predictor=(384, 4), bf16=True, device=META)
    masks = work.masks(work.batch, 0, is_ragged(row))
    assert memory(step_of(row, masks, AUTOCAST, work)).peak == pytest.approx(most_held(work, row), rel=0.06)


def test_peak_may_be_at_the_optimizer():
    """A batch of one image: gradients of all parameters are more than what the forward pass keeps."""
    masks = replace(WORK, batch=1).masks(1, 0, ragged=False)
    tiny = memory(step_of("fastjepa", WORK.masks(WORK.batch, 0, ragged=False), AUTOCAST))
    huge = memory(replace(step_of("fastjepa", masks, AUTOCAST, replace(WORK, batch=1)), models=Models.build(recipe())))
    assert tiny.at_backward
    assert tiny.peak == tiny.state + tiny.copies + tiny.activations + tiny.workspace
    assert not huge.at_backward
    assert huge.peak == huge.state + huge.gradients


def test_the_largest_batch_fits_and_not_much_more():
    order = Order(recipe(), find_chip("a100-40g"))
    models = Models.build(order.config)
    most = largest_batch(order, models, ragged=True)

    def peak(count: int) -> float:
        drawn = draw(order.config, count, ragged=True, count=20).drawn
        return max(memory(Step(models, batch, "fastjepa")).peak for batch in drawn)

    room = 0.92 * order.chip.memory
    assert 8 < most < MOST_IMAGES
    assert peak(most) <= room < peak(int(1.06 * most))
    assert largest_batch(replace(order, chip=order.chip._replace(memory=1 << 30)), models, ragged=False) == 0
