"""Watches a run and says in plain words what it sees: features that collapse, a loss that leaps, skipped steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.evaluation.rank import rankme

TOKENS = 2048  # tokens that a look is taken at
SAME = 0.01  # deviation between pictures below which they are as good as one picture
FALL = 0.25  # part of its best rank below which the features have lost directions

DECAY = 0.99  # of the running mean of the loss, at each step
SETTLED = 100  # steps until it says something
LEAP = 8.0  # deviations above it that are a spike
LEAST = 0.01  # of the mean, the least deviation


@dataclass
class CollapseWatch:
    """Rank and spread of the target features, and the warnings they give.

    RankMe: exp of the entropy of the singular values of the token features, between 1 and D (Garrido et al. 2023, arXiv
    2210.02885). Spread: standard deviation between pictures at the same patch, averaged over patches and channels.
    """

    best_rank: float = 0.0
    warned: str = ""

    @staticmethod
    @torch.no_grad()
    def look(features: Tensor) -> Tensor:
        """fp32 [2] (RankMe, spread) of features [B, N, D], on their device: nothing is read back."""
        features = features.float()
        tokens = features.flatten(0, 1).nan_to_num()  # singular values of NaN are an error
        tokens = tokens[:: math.ceil(len(tokens) / TOKENS)]
        return torch.stack([rankme(tokens).float(), features.std(dim=0, correction=0).mean()])

    def judge(self, rank: float, spread: float) -> str | None:
        """A warning, once for each kind, or None; features that are not finite are none to judge by."""
        if not math.isfinite(spread):
            return None
        self.best_rank = max(self.best_rank, rank)
        kind, said = "", None
        if spread < SAME:
            kind, said = (
                "spread",
                (
                    f"the target features hardly differ between pictures (standard deviation {spread:.4f}): the "
                    "encoder gives the same answer for every picture, and a falling loss means nothing"
                ),
            )
        elif rank < max(2.0, FALL * self.best_rank):
            kind, said = (
                "rank",
                (
                    f"the target features have fallen to {rank:.1f} effective directions, "
                    f"from {self.best_rank:.1f} at best"
                ),
            )
        fresh = kind not in ("", self.warned)
        self.warned = kind
        if not fresh:
            return None
        return f"possible collapse: {said}. Lower optimization.lr, or raise the first value of optimization.ema."


@dataclass
class SpikeWatch:
    """Running mean and deviation of the loss, and a warning where it leaps above them.

    Both forget with weight `DECAY` (0.99) at each step. After `SETTLED` (100) losses, one more than `LEAP` (8)
    deviations above the mean is a spike, a deviation being at least `LEAST` (1 %) of the mean. A spike enters them as
    the limit that it exceeded, so that one alone hides no other and a loss that stays high comes to be the mean. One
    warning is given for consecutive spikes. Losses that are not finite are left out: their steps are skipped. Losses
    are judged when they are read back, at reports. The watch starts anew in a run that is taken up again, and changes
    nothing in it.
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    above: bool = False

    def judge(self, step: int, loss: float) -> str | None:
        """A warning of the loss of a step, or None."""
        if not math.isfinite(loss):
            return None
        deviation = max(math.sqrt(self.variance), LEAST * abs(self.mean))
        limit = self.mean + LEAP * deviation
        was, self.above = self.above, self.seen >= SETTLED and loss > limit
        said = None
        if self.above and not was:
            said = (
                f"the loss leapt to {loss:.4g} at step {step}, {(loss - self.mean) / deviation:.0f} deviations above "
                f"its running mean {self.mean:.4g}. If it does not come back, go on from the last checkpoint with a "
                "lower optimization.lr"
            )
        weight = max(1 - DECAY, 1 / (self.seen + 1))  # a plain mean at first
        change = (limit if self.above else loss) - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change * change)
        self.seen += 1
        return said


@dataclass
class SkippedSteps:
    """Counts the steps that were skipped because their loss or gradient is not finite: `total`, and `in_a_row` now."""

    limit: int
    total: int = 0
    in_a_row: int = 0

    def add(self, loss: float, norm: float) -> str | None:
        """Note a step by its loss and gradient norm; why it was skipped, or None.

        >>> steps = SkippedSteps(limit=2)
        >>> steps.add(0.5, 1.0), steps.add(float("nan"), float("nan")), steps.is_over
        (None, 'loss nan, gradient norm nan (1 skipped so far, 1 in a row)', False)
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return None
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return f"loss {loss:.4g}, gradient norm {norm:.4g} ({self.total} skipped so far, {self.in_a_row} in a row)"

    @property
    def is_over(self) -> bool:
        """Whether there are too many in a row."""
        return self.in_a_row >= self.limit
