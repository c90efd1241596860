"""Residual add + LayerNorm, and bias + GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.kernels.reference import add_layer_norm_ref, bias_gelu_ref
from fastjepa.ops import library
from fastjepa.ops.checks import check_tensors

MAX_WIDTH = 8192  # the kernels hold a row at once


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x alone where there is none), y = layer_norm(s) * weight + bias.

    Shapes:
        x, residual: [T, D] floating; weight, bias: [D].

    Returns:
        (y, s), both [T, D]; s in the wider of x's and residual's dtypes, y in `out_dtype`. Unless given that is the
        dtype in which a linear map after it takes y: autocast's where autocast is on, else s's. Statistics are taken
        in fp32, and y is rounded once.

    Raises:
        ValueError: shapes other than these.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).

    >>> y, s = add_layer_norm(torch.ones(1, 4), torch.tensor([[0.0, 0, 2, 2]]), torch.ones(4), torch.zeros(4))
    >>> y.round(decimals=2).tolist(), s.tolist()
    ([[-1.0, -1.0, 1.0, 1.0]], [[1.0, 1.0, 3.0, 3.0]])
    """
    check_add_layer_norm(x, residual, weight, bias)
    total_dtype = sum_dtype(x, residual)
    out_dtype = out_dtype or linear_dtype(x.device, total_dtype)
    if not library.takes_kernels(x) or total_dtype == torch.float64 or x.shape[1] > MAX_WIDTH:
        return add_layer_norm_ref(x, residual, weight, bias, eps, None if out_dtype == total_dtype else out_dtype)
    if torch.compiler.is_compiling():
        y, s, _, _ = torch.ops.fastjepa.layer_norm(x, residual, weight, bias, eps, out_dtype)
        return y, s
    from fastjepa.kernels.layer_norm import add_layer_norm as kernel

    return kernel(x, residual, weight, bias, eps, out_dtype)


def check_add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """ValueError unless x and residual are [T, D], weight and bias [D] of one dtype, floating and on one device."""
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != weight.shape:
        raise ValueError(
            f"expected x [T, D], weight [D] and bias [D], got {list(x.shape)}, {list(weight.shape)} and "
            f"{list(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    check_tensors({"x": x, "residual": residual, "weight": weight, "bias": bias})
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must share a dtype, got {weight.dtype} and {bias.dtype}")
    if not x.shape[1]:
        raise ValueError(f"x must have at least one column, got {list(x.shape)}")


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of x + residual (x alone where there is none), both floating."""
    if residual is None or residual.dtype == x.dtype:
        return x.dtype
    return torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32


def linear_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `F.linear` takes a tensor of `dtype`: autocast's where it is on for the device, else its own.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     linear_dtype(torch.device("cpu"), torch.float32), linear_dtype(torch.device("cpu"), torch.float64)
    (torch.bfloat16, torch.float64)
    """
    # By name: torch.compile cannot trace torch.amp.is_autocast_available before PyTorch 2.12.
    if dtype == torch.float64 or device.type == "meta":
        return dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU.

    Shapes: x [T, D] floating, what a linear map gives without its bias; bias [D] -> [T, D] in x's dtype.

    Raises:
        ValueError: shapes other than these.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    check_bias_gelu(x, bias)
    if library.takes_kernels(x) and x.dtype != torch.float64:
        from fastjepa.kernels.gelu import bias_gelu as kernel

        return library.call(kernel, x, bias)
    return bias_gelu_ref(x, bias)


def check_bias_gelu(x: Tensor, bias: Tensor) -> None:
    """ValueError unless x is [T, D] and bias [D], floating and on one device."""
    if x.dim() != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"expected x [T, D] and bias [D], got {list(x.shape)} and {list(bias.shape)}")
    check_tensors({"x": x, "bias": bias})
