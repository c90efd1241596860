"""The model held to what was measured: every measured step predicted from the others of its machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastjepa.plan.measured import Measured
from fastjepa.plan.predict import fractions_of, parts

ALLOWED = 0.10


@dataclass(frozen=True)
class Compared:
    """A measured step, and its prediction. `basis`: what it was predicted from."""

    measured: Measured
    predicted_ms: float
    basis: str

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_ms / self.measured.ms

    def within(self, allowed: float = ALLOWED) -> bool:
        """Whether the prediction is off by no more."""
        return abs(self.ratio - 1) <= allowed


def check(measured: Sequence[Measured]) -> list[Compared]:
    """Each step predicted from others of its machine, implementation and precision: from other work, never from itself.

    Where there are no others it is predicted from its own parts, and says so.
    """
    found = []
    for one in measured:
        others = [m for m in measured if _kin(m) == _kin(one) and _work(m) != _work(one)]
        fractions = fractions_of(others or [one], one.step, one.row, one.peak, one.bandwidth)
        predicted = sum(part.seconds for part in parts(one.step, one.peak, one.bandwidth, fractions).values())
        basis = "other steps of the machine" if others else "its own parts: there is no other step"
        found.append(Compared(one, 1e3 * predicted, basis))
    return found


def comparison(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """As plain values."""
    return [
        {
            "step": str(c.measured),
            "measured_ms": c.measured.ms,
            "predicted_ms": c.predicted_ms,
            "predicted_over_measured": c.ratio,
            "basis": c.basis,
        }
        for c in found
    ]


def _kin(measured: Measured) -> tuple:
    return measured.device, measured.implementation, measured.dtype


def _work(measured: Measured) -> tuple:
    return measured.row, measured.batch, measured.step.models
