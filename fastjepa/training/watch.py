"""Watches the target features for collapse and says in plain words what it sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.evaluation.rank import rankme

TOKENS = 2048  # tokens that a look is taken at
SAME = 0.01  # deviation between pictures below which they are as good as one picture
FALL = 0.25  # part of its best rank below which the features have lost directions


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
        tokens = features.flatten(0, 1)
        tokens = tokens[:: math.ceil(len(tokens) / TOKENS)]
        return torch.stack([rankme(tokens).float(), features.std(dim=0, correction=0).mean()])

    def judge(self, rank: float, spread: float) -> str | None:
        """A warning, once for each kind, or None."""
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
