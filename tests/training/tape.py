"""CUDA graphs on a processor: what a step asks the device for is taped, and played again on the very same tensors.

As in a graph, whatever Python worked out while it was taped stays as it was, nothing can be read back, and taping
itself changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.counter import as_on_a_gpu, replaced
from fastjepa.kernels import adamw_ema, multi_tensor
from fastjepa.training.engine import Trainer
from fastjepa.training.graphs import Result

READ_BACK = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"}


class Tape(TorchDispatchMode):
    """A recorder for `StepGraphs`. `held`: what a step changes, which taping one is to leave as it is."""

    def __init__(self, held: Callable[[], list[Tensor]]):
        super().__init__()
        self.held, self.within = held, nullcontext
        self._played: list[Callable[[], None]] = []
        self._is_taping = False
        self.names: list[str] = []
        self.replays = 0

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """As `Recorder.capture`."""
        before = [tensor.detach().clone() for tensor in self.held()]
        played: list[Callable[[], None]] = []
        self._played, self.names = played, []
        with self._launches(), _capturing(), self:
            result = take()
        with torch.no_grad():
            for tensor, value in zip(self.held(), before, strict=True):
                tensor.copy_(value)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for play in played:
                    play()

        return replay, result

    def forget(self) -> None:
        """As `Recorder.forget`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in READ_BACK:
            raise AssertionError(f"{name} reads a value back, which no graph can do")
        if self._is_taping:
            self.names.append(name)
            self._tape(func, args, kwargs, made)
        return made

    def _tape(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in there for t in tree_leaves(made)]
        if not func._schema.is_mutable and not any(fresh):
            return  # a view
        args, kwargs, made = tree_map_only(Tensor, Tensor.detach, (args, kwargs, made))

        def play() -> None:
            for is_fresh, ours, theirs in zip(
                fresh, tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if is_fresh:
                    ours.copy_(theirs)

        self._played.append(play)

    @contextmanager
    def _launches(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def taped(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self._is_taping = False  # what the interpreter does with tensors is one launch
            out = run(kernel, *args, **kwargs)
            self._is_taping = True
            self.names.append(kernel.fn.__name__)
            self._played.append(lambda: run(kernel, *args, **kwargs))
            return out

        InterpretedFunction.run, self._is_taping = taped, True
        try:
            yield
        finally:
            InterpretedFunction.run, self._is_taping = run, False


@contextmanager
def _capturing() -> Iterator[None]:
    """The optimizer's tables take it for the capture of a graph."""
    with replaced([(module, "is_capturing", lambda device: True) for module in (multi_tensor, adamw_ema)]):
        yield


def take_as_on_a_gpu(trainer: Trainer) -> None:
    """Have the trainer's steps launch kernels on CPU tensors, and look at no value, as they do on a GPU."""
    take = trainer._take

    def taken(*arguments: Any) -> Result:
        with as_on_a_gpu():
            return take(*arguments)

    trainer._take = taken
