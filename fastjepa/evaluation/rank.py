"""Effective rank and spread of features: whether they have collapsed."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """exp of the entropy of the normalised singular values of features [n, D]: between 1 and min(n, D).

    Stays on the features' device; a scalar tensor.

    Raises:
        ValueError: features of another shape.

    Source: equation 1 of Garrido et al. 2023 (arXiv 2210.02885).

    >>> round(float(rankme(torch.eye(6))), 3)
    6.0
    """
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"rankme takes features [n, D], got {list(features.shape)}")
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp(min=eps) + eps
    return torch.exp(-(share * share.log()).sum())


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation between images, averaged over everything else; 0 where all images look the same.

    Shapes: [n, ...] floating -> a scalar tensor on the features' device.
    """
    return features.float().std(dim=0, correction=0).mean()
