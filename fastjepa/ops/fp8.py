"""Linear maps whose products are taken in 8 bits (e4m3), rows of both factors scaled each for itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.kernels.reference import quantise_rows_ref
from fastjepa.ops import library

MAX_WIDTH = 8192  # the kernel holds a row at once
CAPABILITY = (8, 9)  # of the first GPUs with 8-bit floating numbers: L40S and 4090; H100 and B200 are newer


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with q * scale nearest to x, scale = max |row| / 448.

    Rows whose largest entry is below 1e-30 come out as zeros; what is not finite makes NaNs, in its row alone.

    Shapes: x [T, D] floating -> q [T, D] float8_e4m3fn, scale fp32 [T, 1].

    Raises:
        ValueError: another shape.

    Source: Micikevicius et al. 2022 (arXiv 2209.05433).

    >>> q, scale = quantise_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> (q.float() * scale).tolist()
    [[1.0, -2.0], [0.0, 0.0]]
    """
    if x.dim() != 2:
        raise ValueError(f"expected x [T, D], got {list(x.shape)}")
    if not library.takes_kernels(x) or x.dtype == torch.float64 or not 0 < x.shape[1] <= MAX_WIDTH:
        return quantise_rows_ref(x)
    from fastjepa.kernels.fp8 import quantise_rows as kernel

    return kernel(x)


def quantised_linear(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(q * scale) @ (weight * weight_scale)^T + bias in bf16, summed in fp32.

    Shapes: q [T, K] and weight [N, K] float8_e4m3fn, scale fp32 [T, 1], weight_scale fp32 [N, 1], bias bf16 [N] ->
    bf16 [T, N]. On CUDA K and N are multiples of 16.
    """
    if q.is_cuda and len(q):
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            q, weight.t(), scale_a=scale, scale_b=weight_scale.t(), bias=bias, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
    y = (q.float() @ weight.float().t()) * scale * weight_scale.t()
    return (y if bias is None else y + bias.float()).bfloat16()
