"""Learning rate, weight decay and EMA momentum as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastjepa.config import OptimizationConfig


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run of `epochs` epochs of `steps_per_epoch` steps; steps count from 0.

    Source: the published training code: linear warm-up from start_lr to lr and cosine to final_lr, cosine weight decay,
    linear momentum. Past their end all three stay where they are.

    >>> s = Schedules(OptimizationConfig(epochs=2, warmup=1, lr=1e-3, start_lr=2e-4), steps_per_epoch=4)
    >>> [round(s.lr(i), 7) for i in (0, 3, 7)], s.momentum(0)
    ([0.0004, 0.001, 1e-06], 0.996)
    """

    settings: OptimizationConfig
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Steps that the schedules span."""
        return int(self.settings.ipe_scale * self.settings.epochs * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """Learning rate of step `step`."""
        o, now = self.settings, step + 1
        warmup = int(o.warmup * self.steps_per_epoch)
        if now < warmup:
            return o.start_lr + now / max(1, warmup) * (o.lr - o.start_lr)
        return max(o.final_lr, _cosine(o.lr, o.final_lr, (now - warmup) / max(1, self.total - warmup)))

    def weight_decay(self, step: int) -> float:
        """Weight decay of step `step`."""
        o = self.settings
        return _cosine(o.weight_decay, o.final_weight_decay, (step + 1) / max(1, self.total))

    def momentum(self, step: int) -> float:
        """EMA momentum of the target encoder after step `step`."""
        start, end = self.settings.ema
        span = self.steps_per_epoch * self.settings.epochs * self.settings.ipe_scale
        return start + min(step, span) * (end - start) / span


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
