"""What the callbacks share: an EMA that is made once the model is there, and moves once a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from fastjepa.ema import EMA

Decay = float | Callable[[int], float]


class Follower:
    """An `EMA` of a whole model, or of one part of it held by another part.

    Arguments:
        decay: in 0..1, or a function from the number of optimizer steps to it.
        student, teacher: names of submodules: the teacher follows the student where it lies. None: a copy follows the
            whole model.
        options: keywords of `EMA`; those of its warm-up are for copies, a teacher's decay is what `decay` says.

    Raises:
        ValueError: one of student and teacher without the other.
    """

    def __init__(self, decay: Decay, student: str | None = None, teacher: str | None = None, **options: Any):
        if (student is None) != (teacher is None):
            raise ValueError("student and teacher are names of two submodules: give both, or neither for a copy")
        self.decay, self.student, self.teacher, self.options = decay, student, teacher, options
        self.ema: EMA | None = None
        self.steps = 0  # that it has followed
        self._pending: dict[str, Any] | None = None
        self._applied = ExitStack()

    @property
    def is_copy(self) -> bool:
        """Whether the average is a model of its own, not a part of the one that is trained."""
        return self.teacher is None

    def start(self, model: nn.Module) -> EMA:
        """Make the average, now that the model is where it trains.

        Raises:
            ValueError: no such submodules, or two that do not fit.
        """
        state, self._pending = self._pending or {"steps": 0, "ema": None}, None
        self.steps = int(state["steps"])
        first = self.decay(self.steps + 1) if callable(self.decay) else self.decay
        module = None if self.teacher is None else _part(model, self.teacher)
        self.ema = EMA(self._source(model), first, module=module, **self.options)
        if state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        return self.ema

    def follow(self, model: nn.Module, steps: int) -> None:
        """Move on if the model has had an optimizer step since the last call: `steps` is their number."""
        if self.ema is None or steps <= self.steps:
            return
        if callable(self.decay):
            self.ema.decay = self.decay(steps)
        self.ema.update(self._source(model), steps if self.is_copy else None)
        self.steps = steps

    def show(self, model: nn.Module) -> None:
        """Have the model hold the average until `hide`."""
        if self.ema is not None and self.is_copy:
            self._applied.close()
            self._applied.enter_context(self.ema.applied_to(model))

    def hide(self) -> None:
        """Give the model its own weights back."""
        self._applied.close()

    def state_dict(self) -> dict[str, Any]:
        """Of the copy; a teacher is in the model's own state."""
        held = self.ema.state_dict() if self.ema is not None and self.is_copy else None
        return {"steps": self.steps, "ema": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next `start` go on from a state."""
        self._pending = state

    def _source(self, model: nn.Module) -> nn.Module:
        return model if self.student is None else _part(model, self.student)


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = ", ".join(n for n, _ in model.named_children())
        raise ValueError(f"the model has no submodule {name!r}; it has {known}") from None
