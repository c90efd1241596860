"""One training step, timed part by part, and what it holds in memory at most."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import clock
from benchmarks.ways import FastGraphs, Way
from fastjepa import Ragged

PARTS: tuple[str, ...] = ("target", "context", "predictor", "loss", "optimizer")


class Laps:
    """Marks in time, with events on a GPU, else by `timing.clock`; each lap is the time since the mark before."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What has passed since the last mark belongs to `part`."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, clock()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, all of its laps together, or of the whole "step"; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            found[part] = found.get(part, 0.0) + (begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin)
        return found


def spread(times: Sequence[float]) -> float:
    """90th less 10th percentile."""
    if len(times) < 2:
        return 0.0
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[8] - deciles[0]


def take_step(way: Way, images: Tensor, inputs: tuple[Any, ...], momentum: float) -> tuple[Tensor, Laps]:
    """(loss, the laps of its parts) of a step, nothing waited for but what the way itself waits for.

    A part of the forward pass ends where its module has given its output, one of the backward pass where the gradient
    of its input is there. What lies between two modules goes to the later one.
    """
    laps = Laps(way.device)
    if isinstance(way, FastGraphs):
        laps.mark("")
        loss = way.step(images, inputs, momentum)
        laps.mark("step")
        return loss, laps
    with _borders(way, laps):
        laps.mark("")
        loss = way.take(images, inputs, laps.mark)
        way.update(momentum)
        laps.mark("optimizer")
    return loss.detach(), laps


@contextmanager
def _borders(way: Way, laps: Laps) -> Iterator[None]:
    """Marks at the ends of the target encoder, the encoder and the predictor, and of what is behind them."""

    def border(part: str, behind: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor | Ragged) -> None:
            laps.mark(part)
            tensor = output.values if isinstance(output, Ragged) else output
            if behind and tensor.requires_grad:
                tensor.register_hook(lambda gradient: laps.mark(behind))

        return hook

    places = (
        (way.target_encoder, "target", ""),
        (way.encoder, "context", "predictor"),
        (way.predictor, "predictor", "loss"),
    )
    handles = [module.register_forward_hook(border(part, behind)) for module, part, behind in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(way: Way, images: Tensor, inputs: tuple[Any, ...], momentum: float) -> int | None:
    """What a step holds in memory at most, its parameters and optimizer state included; None of one from a graph.

    On a GPU what torch's allocator has handed out; on the CPU what the profiler saw of it in this step, on top of what
    stays between steps.
    """
    if isinstance(way, FastGraphs):
        return None  # a graph's memory is its own, whether it runs or not
    if way.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(way.device)
        take_step(way, images, inputs, momentum)
        torch.cuda.synchronize(way.device)
        return torch.cuda.max_memory_allocated(way.device)
    stays = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in way.tensors()}
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        take_step(way, images, inputs, momentum)
    found: Any = profile.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    changes = [(e.start_ns(), e.nbytes()) for e in found.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return sum(stays.values()) + most if changes else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to standard error at its start and stop."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
