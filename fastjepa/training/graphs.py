"""Training steps as CUDA graphs: one call launches a whole step, where a processor launches slower than a GPU runs.

A graph holds the launches of one set of shapes, and reads its input from where that lay at capture. So there is a
graph for each set of shapes that training meets, few because `Batch.padded` rounds them up, and images and masks of a
step are copied into the input of its graph. Places behind them keep the patches of earlier steps: padding all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastjepa.data import Batch
from fastjepa.optim import AdamWEMA
from fastjepa.ragged import Ragged, padded_length, rounded

LARGEST = 256  # graphs; steps of further shapes are launched one by one

Part = tuple[Batch, float]
Result = tuple[Tensor, Tensor | None]


class Recorder(Protocol):
    """How a graph is made."""

    def within(self) -> Any:
        """A context that all of a step is taken in, launched or replayed."""

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
        """(what runs the launches of `take` again, its result, which that writes anew)."""
        ...

    def forget(self) -> None:
        """All graphs are gone."""


class StepGraphs:
    """Takes whole steps, forward to optimizer, from graphs: the numbers of a step that is launched on padded masks.

    The first step of each set of shapes is launched, and `capture` makes its graph. Launched are also the steps whose
    features are watched, and those before which others have written weights. What a step from a graph gives is written
    over by the next one. Where memory does not suffice, graphs are given up, which is said.

    Attributes:
        take: launches a step on parts of a batch with their shares and moves the weights; (loss, features of whole
            images where they are watched). optimizer: of that step.
        held: input, replay and result, by shapes. given_up: whether no more are made.
    """

    def __init__(self, take: Callable[[Sequence[Part], bool], Result], optimizer: AdamWEMA, recorder: Recorder):
        self.take, self.optimizer, self.recorder = take, optimizer, recorder
        self.held: dict[Hashable, tuple[list[Part], Callable[[], Any], Result]] = {}
        self.given_up = False
        self._first: tuple[Hashable, list[Part]] | None = None  # of its shapes: the step just taken
        self._images: dict[Hashable, Tensor] = {}  # one for all graphs
        self._tables: object = None  # of the optimizer, as the graphs hold them

    def step(self, parts: Sequence[Part], watched: bool, device: torch.device) -> Result:
        """(loss, features) of a step on these parts of a batch, which lie on the CPU, with their shares."""
        with self.recorder.within():
            self._follow()
            key = tuple(_shapes(part) for part, _ in parts)
            if watched or not self.optimizer.copies_are_current():
                return self._launch([(part.padded(), share) for part, share in parts], watched)
            if key in self.held:
                inputs, replay, result = self.held[key]
                for (ours, _), (part, _) in zip(inputs, parts, strict=True):
                    _fill(ours, part)
                self.optimizer.sync_hyperparameters()
                replay()
                self.optimizer.note_replay()
                return result
            inputs = [(self._input(number, part, device), share) for number, (part, share) in enumerate(parts)]
            taken = self._launch(inputs, watched)
            if not self.given_up and len(self.held) < LARGEST:
                self._first = key, inputs
            return taken

    def capture(self) -> None:
        """Make the graph of the step just taken, if it was the first of its shapes: before anything else happens.

        Nothing runs, so whoever is interrupted here has taken the step.
        """
        if self._first is None:
            return
        (key, inputs), self._first = self._first, None
        try:
            with self.recorder.within():
                self.held[key] = inputs, *self.recorder.capture(partial(self.take, inputs, False))
        except torch.OutOfMemoryError as error:
            self._give_up(error)

    def _launch(self, parts: Sequence[Part], watched: bool) -> Result:
        try:
            taken = self.take(parts, watched)
        except torch.OutOfMemoryError as error:
            if not self.held:
                raise
            self._give_up(error)
            taken = None
        if taken is None:  # by now the error has let go of what the step had made
            taken = self.take(parts, watched)
        self._follow()
        return taken

    def _give_up(self, error: torch.OutOfMemoryError) -> None:
        """Go on without graphs, from before the step that found no memory."""
        warnings.warn(f"steps are launched from here on, without {len(self.held)} CUDA graphs: {error}", stacklevel=5)
        self.optimizer.zero_grad(set_to_none=True)
        self.given_up = True
        self._forget()

    def _follow(self) -> None:
        """Forget graphs that would update what the optimizer does not any more."""
        if self._tables is not self.optimizer.tables:
            self._forget()
            self._tables = self.optimizer.tables

    def _forget(self) -> None:
        self.held.clear()
        self._first = None
        self.recorder.forget()

    def _input(self, number: int, part: Batch, device: torch.device) -> Batch:
        """A batch in memory of our own that holds `part`, padded."""
        name = number, part.images.shape, part.images.dtype
        if name not in self._images:
            self._images[name] = torch.empty_like(part.images, device=device)
        self._images[name].copy_(part.images, non_blocking=True)
        return replace(part.padded(), images=self._images[name]).to(device)


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
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outside.wait_stream(self.stream)

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], Any], Result]:
        """Nothing runs meanwhile; other threads, such as the loader's that pins memory, go on."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = take()
        return graph.replay, result

    def forget(self) -> None:
        """What graphs held is free for others, and graphs that come have a pool of their own."""
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


def _shapes(part: Batch) -> Hashable:
    """What tells one graph from another: all that is known on the host of `part.padded()`, without making it."""
    found: list[Hashable] = [
        part.images.shape,
        len(part.targets.place),
        rounded(len(part.targets.kept), part.row_multiple),
    ]
    for masks, multiple in ((part.masks_enc, part.token_multiple), (part.masks_pred, 1)):
        if isinstance(masks, Ragged):
            found += [rounded(len(masks.values), multiple), len(masks), padded_length(masks.max_length, multiple)]
        else:
            found += [mask.shape for mask in masks]
    return tuple(found)


def _fill(inputs: Batch, part: Batch) -> None:
    """Copy a batch into the padded one of a graph. The offsets behind its own say where the padding ends, for good."""
    for ours, theirs in zip(inputs.tensors(), part.tensors(), strict=True):
        ours[: len(theirs)].copy_(theirs, non_blocking=True)
