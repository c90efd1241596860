"""Training steps as CUDA graphs: one call launches a whole step, where a processor launches slower than a GPU runs.

A graph holds the launches of one set of shapes, and reads its input from where that lay at capture. So there is a
graph for each set of shapes that training meets, few because `Batch.padded` rounds them up, and the masks of a step
are copied into the input of its graph. Places behind them keep the patches of earlier steps: padding all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastjepa.data import Batch
from fastjepa.optim import AdamWEMA
from fastjepa.ragged import Ragged

LARGEST = 256  # graphs; steps of further shapes are launched one by one

Part = tuple[Batch, float]
Result = tuple[Tensor, Tensor]


class Recorder(Protocol):
    """How a graph is made."""

    def within(self) -> Any:
        """A context that all of a step is taken in, launched or replayed."""

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
        """(what runs the launches of `take` again, its result, which that writes anew)."""
        ...


class StepGraphs:
    """Takes whole steps, forward to optimizer, from graphs: the numbers of a step that is launched on padded masks.

    The first step of each set of shapes is launched one by one and captured after that. What a step gives is written
    over by the next one.

    Attributes:
        take: launches a step on parts of a batch and moves the weights; by whether the features of whole images are
            wanted. optimizer: of that step.
        held: input, replay and result, by shapes.
    """

    def __init__(self, take: Callable[[Sequence[Part], bool], Result], optimizer: AdamWEMA, recorder: Recorder):
        self.take, self.optimizer, self.recorder = take, optimizer, recorder
        self.held: dict[Hashable, tuple[list[Batch], Callable[[], Any], Result]] = {}

    def step(self, parts: Sequence[Part], watched: bool, device: torch.device) -> Result:
        """(loss, features) of a step on these parts of a batch, which lie on the CPU, with their shares."""
        with self.recorder.within():
            key = watched, *(_shapes(part) for part, _ in parts)
            if key in self.held:
                inputs, replay, result = self.held[key]
                for ours, (part, _) in zip(inputs, parts, strict=True):
                    _fill(ours, part)
                self.optimizer.sync_hyperparameters()
                replay()
                self.optimizer.note_replay()
                return result
            inputs = [part.padded().to(device) for part, _ in parts]
            shares = [share for _, share in parts]
            take = partial(self.take, list(zip(inputs, shares, strict=True)), watched)
            result = take()
            if len(self.held) < LARGEST:
                self.held[key] = inputs, *self.recorder.capture(take)
            return result


@dataclass
class CudaRecorder:
    """CUDA graphs that share their memory, on a stream of their own: only one of them runs at a time."""

    device: torch.device

    def __post_init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    @contextmanager
    def within(self) -> Iterator[None]:
        """On our stream, behind what was launched before and before what is launched afterwards."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
        """Nothing runs meanwhile; other threads, such as the loader's that pins memory, go on."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = take()
        return graph.replay, result


def _shapes(part: Batch) -> Hashable:
    """What tells one graph from another: all that is known on the host of `part.padded()`, without making it."""
    found: list[Hashable] = [part.images.shape, len(part.targets.place), _rounded(len(part.targets.kept), part.rows)]
    for masks, multiple in ((part.masks_enc, part.num_patches), (part.masks_pred, 1)):
        if isinstance(masks, Ragged):
            found += [_rounded(len(masks.values), multiple), len(masks), max(masks.max_length, multiple)]
        else:
            found += [mask.shape for mask in masks]
    return tuple(found)


def _rounded(count: int, multiple: int) -> int:
    return count + -count % multiple


def _fill(inputs: Batch, part: Batch) -> None:
    """Copy a batch into the padded one of a graph. The offsets behind its own say where the padding ends, for good."""
    for ours, theirs in zip(inputs.tensors(), part.tensors(), strict=True):
        ours[: len(theirs)].copy_(theirs, non_blocking=True)
