"""Effective rank of features."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """exp of the entropy of the normalised singular values of features [n, D]: between 1 and min(n, D).

    Stays on the features' device; a scalar tensor.

    Source: equation 1 of Garrido et al. 2023 (arXiv 2210.02885).
    """
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp(min=eps) + eps
    return torch.exp(-(share * share.log()).sum())
