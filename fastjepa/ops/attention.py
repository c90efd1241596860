"""Attention within each sequence of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.kernels.reference import ragged_attention_ref
from fastjepa.ops import library


def ragged_attention(
    qkv: Tensor, offsets: Tensor, max_length: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T * scale) v, each packed sequence on its own.

    Shapes:
        qkv: [T, 3, H, d] floating; query, key and value of each token.
        offsets: int32 [S + 1]; sequence s is tokens `offsets[s]:offsets[s + 1]`. Empty sequences are fine.
        max_length: tokens of the longest sequence (or a bound on it), a host int.
        scale: d ** -0.5 unless given.
        dropout: probability of dropping an attention weight (training only; the caller says when). Dropout, fp64, and
            head widths that 8 does not divide or above 128 run on torch's scaled_dot_product_attention everywhere.

    Returns:
        [T, H, d] in qkv's dtype.

    Raises:
        ValueError: shapes or dtypes other than these.

    Source: equation 1 of Vaswani et al. 2017 (arXiv 1706.03762).

    >>> qkv = torch.randn(5, 3, 2, 8)
    >>> ragged_attention(qkv, torch.tensor([0, 2, 5], dtype=torch.int32), 3).shape
    torch.Size([5, 2, 8])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be a floating [T, 3, H, d], got {qkv.dtype} {list(qkv.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be int32 [S + 1], got {offsets.dtype} {list(offsets.shape)}")
    if offsets.device != qkv.device:
        raise ValueError(f"qkv is on {qkv.device} and offsets on {offsets.device}")
    if qkv.shape[0] > (offsets.shape[0] - 1) * max_length:
        raise ValueError(
            f"{offsets.shape[0] - 1} sequences of at most max_length={max_length} tokens cannot hold {qkv.shape[0]}"
        )
    factor = qkv.shape[3] ** -0.5 if scale is None else scale
    if library.takes_kernels(qkv) and dropout == 0.0 and _kernel_takes(qkv, factor):
        from fastjepa.kernels.attention import ragged_attention as kernel

        return library.call(kernel, qkv, offsets, max_length, factor)
    return ragged_attention_ref(qkv, offsets, max_length, factor, dropout)


def _kernel_takes(qkv: Tensor, scale: float) -> bool:
    """What the kernel has: 16- and 32-bit floats, head widths that 8 divides up to 128, a positive scale."""
    width = qkv.shape[3]
    return qkv.dtype != torch.float64 and width % 8 == 0 and 8 <= width <= 128 and scale > 0
