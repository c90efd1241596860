"""Residual add + LayerNorm, and bias + GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.kernels.reference import add_layer_norm_ref, bias_gelu_ref
from fastjepa.ops import library

MAX_WIDTH = 8192  # the kernels hold a row at once


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x alone where there is none), y = layer_norm(s) * weight + bias.

    Shapes:
        x, residual: [T, D] floating; weight, bias: [D].

    Returns:
        (y, s), both [T, D]; s in the wider of x's and residual's dtypes. Statistics are taken in fp32.

    Raises:
        ValueError: shapes other than these.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).

    >>> y, s = add_layer_norm(torch.ones(1, 4), torch.tensor([[0.0, 0, 2, 2]]), torch.ones(4), torch.zeros(4))
    >>> y.round(decimals=2).tolist(), s.tolist()
    ([[-1.0, -1.0, 1.0, 1.0]], [[1.0, 1.0, 3.0, 3.0]])
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != weight.shape:
        raise ValueError(
            f"expected x [T, D], weight [D] and bias [D], got {list(x.shape)}, {list(weight.shape)} and "
            f"{list(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    if not library.takes_kernels(x) or x.dtype == torch.float64 or x.shape[1] > MAX_WIDTH:
        return add_layer_norm_ref(x, residual, weight, bias, eps)
    if residual is not None and residual.dtype != x.dtype:  # under autocast: a bf16 branch, an fp32 stream
        x, residual = x + residual, None
    if torch.compiler.is_compiling():
        y, s, _, _ = torch.ops.fastjepa.layer_norm(x, residual, weight, bias, eps)
        return y, s
    from fastjepa.kernels.layer_norm import add_layer_norm as kernel

    return kernel(x, residual, weight, bias, eps)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU.

    Shapes: x [T, D] floating, what a linear map gives without its bias; bias [D] -> [T, D] in x's dtype.

    Raises:
        ValueError: shapes other than these.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    if x.dim() != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"expected x [T, D] and bias [D], got {list(x.shape)} and {list(bias.shape)}")
    if library.takes_kernels(x) and x.dtype != torch.float64:
        from fastjepa.kernels.gelu import bias_gelu as kernel

        return library.call(kernel, x, bias)
    return bias_gelu_ref(x, bias)
