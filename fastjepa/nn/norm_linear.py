"""A LayerNorm and the linear behind it as one step of the backward pass, for which the norm's output is not kept."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastjepa.nn.linear import Linear, is_plain, parameter_gradients
from fastjepa.nn.norm import LayerNorm
from fastjepa.ops import library
from fastjepa.ops.rows import MAX_WIDTH, check_add_layer_norm, linear_dtype, sum_dtype


def joins(norm: nn.Module, linear: nn.Module, x: Tensor, branch: Tensor | None) -> TypeGuard[LayerNorm]:
    """Whether `norm_linear` takes these: in training on CUDA, where neither module has hooks or another forward.

    Not under `torch.compile`, nor in fp64, nor where the linear would refuse what the norm gives.
    """
    if not (library.takes_kernels(x) and is_plain(norm, LayerNorm) and is_plain(linear, Linear) and linear.trains(x)):
        return False
    if norm.weight is None or norm.bias is None or x.shape[-1] > MAX_WIDTH or torch.compiler.is_compiling():
        return False
    dtype = sum_dtype(x, branch)
    return torch.float64 not in (dtype, norm.weight.dtype) and linear.takes(x.device, dtype)


def norm_linear(
    norm: LayerNorm,
    linear: Linear,
    x: Tensor,
    branch: Tensor | None,
    with_bias: bool = True,
    x_is_kept: bool = False,
) -> tuple[Tensor, Tensor]:
    """(linear(norm(s)), s) with s = x + branch (x where there is none); without the linear's bias on wish.

    The kernel of the norm's gradient writes the norm's output again, for the gradient of the linear's weight. Where
    something else keeps x for the backward pass anyway (`x_is_kept`), and the branch is the narrower of the two, that
    is kept in the place of s, which the kernel then adds up again. Without `keep_copies` each use casts the weight.

    Shapes: x, branch [T, D] -> [T, D'], [T, D].

    Raises:
        ValueError: as `ops.add_layer_norm`.
    """
    rows, residual = (x, None) if branch is None else (branch, x)
    # Parameters once each, as who parametrizes them may make them anew at each look.
    norm_weight, norm_bias = norm.weight, norm.bias
    weight = linear.weight
    bias = linear.bias if with_bias else None
    check_add_layer_norm(rows, residual, norm_weight, norm_bias)
    weight16, bias16 = linear.parameters_in(linear_dtype(x.device, sum_dtype(rows, residual)), weight, bias)
    apart = x_is_kept and rows.dtype.itemsize < x.dtype.itemsize
    norms = norm_weight.contiguous(), norm_bias.contiguous(), norm.eps
    return _NormLinear.apply(rows, residual, *norms, weight, bias, weight16, bias16, apart)


class _NormLinear(torch.autograd.Function):
    """(F.linear(layer_norm(s), weight16, bias16), s), whose gradients are those of weight and bias.

    `apart`: x and residual are kept in the place of s.
    """

    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, eps, weight, bias, weight16, bias16, apart):
        from fastjepa.kernels.layer_norm import layer_norm_fwd

        ctx.set_materialize_grads(False)
        y, s, mean, rstd = layer_norm_fwd(x, residual, norm_weight, norm_bias, eps, weight16.dtype)
        kept = (x, residual) if apart else (s,)
        ctx.save_for_backward(mean, rstd, norm_weight, norm_bias, weight16, *kept)
        ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
        ctx.has_residual, ctx.dtype = residual is not None, weight.dtype
        return F.linear(y, weight16, bias16), s

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, ds):
        from fastjepa.kernels.layer_norm import layer_norm_bwd

        if dz is None:  # only the sum was used
            dx, dresidual = (None if ds is None else ds.to(dtype) for dtype in ctx.dtypes)
            return dx, dresidual if ctx.has_residual else None, *[None] * 8
        mean, rstd, norm_weight, norm_bias, weight16, *kept = ctx.saved_tensors
        s = kept[0] if len(kept) == 1 else tuple(kept)
        of_weight, of_bias = ctx.needs_input_grad[5:7]
        dy = dz @ weight16
        y = dy  # the kernel writes it over dy
        again = (norm_bias, y) if of_weight else ()
        dx, dresidual, *dnorm = layer_norm_bwd(dy, ds, s, norm_weight, mean, rstd, *ctx.dtypes, *again)
        dw, db = parameter_gradients(dz, y, ctx.dtype, of_weight, of_bias)
        return dx, dresidual if ctx.has_residual else None, *dnorm, None, dw, db, None, None, None
