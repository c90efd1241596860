"""Exponential moving average of many tensors at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastjepa.kernels.reference import ema_update_ref_
from fastjepa.ops import library
from fastjepa.ops.checks import is_expanded


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """t = momentum * t + (1 - momentum) * s for every pair, in place.

    Shapes:
        targets, sources: two lists of floating tensors, equal in number and shape pair by pair; dtypes may be mixed.
        momentum: in 0..1.

    Raises:
        ValueError: lists of different lengths, a pair of different shapes or devices or of other dtypes, a target
            that is given twice or whose elements share memory, or a momentum outside 0..1.

    >>> t, s = torch.zeros(2), torch.ones(2)
    >>> ema_update_([t], [s], 0.75); t.tolist()
    [0.25, 0.25]
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(f"as many targets as sources are needed, got {len(targets)} and {len(sources)}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in 0..1, got {momentum}")
    for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(f"pair {place} has shapes {list(target.shape)} and {list(source.shape)}")
        if not target.is_floating_point() or not source.is_floating_point():
            raise ValueError(f"pair {place} must be of floating dtypes, got {target.dtype} and {source.dtype}")
        if target.device != source.device:
            raise ValueError(f"pair {place} is on {target.device} and {source.device}")
        if is_expanded(target):
            raise ValueError(f"target {place} is expanded: its elements share memory, strides {list(target.stride())}")
    if len({id(target) for target in targets}) < len(targets):
        raise ValueError("a target is given twice")
    if targets and all(library.takes_kernels(t) for t in targets):
        from fastjepa.kernels.ema import ema_update_ as kernel

        kernel(targets, sources, momentum)
    else:
        ema_update_ref_(targets, sources, momentum)
