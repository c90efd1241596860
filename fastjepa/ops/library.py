"""The Triton kernels as operators of `torch.library`, for graphs, and as autograd functions, for eager code.

A graph of `torch.compile` holds the operators `fastjepa::*`: opaque, with fake and autograd rules. Eager code calls the
kernels' own autograd functions, which skips the dispatcher. Both launch the same kernels. They are imported when first
used, so that machines without Triton have everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def takes_kernels(x: Tensor) -> bool:
    """Whether operations on `x` launch Triton kernels: where it lies on CUDA. Others take the PyTorch reference."""
    return x.is_cuda


def call(operation: Callable, *arguments: Any) -> Any:
    """A kernel's `operation`: as the operator of its name in a graph, itself in eager code."""
    name = operation.__name__
    if torch.compiler.is_compiling():
        result = getattr(torch.ops.fastjepa, name)(*arguments)
        return result[0] if name in SAVES else result
    return operation(*arguments)


SAVES = {"ragged_attention", "jepa_loss"}  # operators that also give what their backward needs, after the result


def _operator(function: Callable) -> Any:
    return torch.library.custom_op(f"fastjepa::{function.__name__}", function, mutates_args=())


@_operator
def gather_rows(x: Tensor, rows: Tensor, pos_embed: Tensor | None = None, unique: bool = False) -> Tensor:
    """`kernels.gather.gather_rows_fwd`; `unique` says that no row is named twice, which the backward makes use of."""
    from fastjepa.kernels import gather as kernels

    return kernels.gather_rows_fwd(x, rows, pos_embed)


@gather_rows.register_fake
def _(x, rows, pos_embed=None, unique=False):
    return x.new_empty(rows.shape[0], x.shape[1])


def _gather_context(ctx, inputs, output):
    x, rows, pos_embed, ctx.unique = inputs
    ctx.save_for_backward(rows)
    ctx.table = x.shape[0]
    ctx.pos = None if pos_embed is None else (pos_embed.shape[0], pos_embed.dtype)


def _gather_backward(ctx, dy):
    (rows,) = ctx.saved_tensors
    dx = dpos = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.fastjepa.scatter_rows(dy, rows, ctx.table, ctx.unique)
    if ctx.needs_input_grad[2]:
        patches, dtype = ctx.pos
        dpos = torch.ops.fastjepa.scatter_rows(dy, rows % patches, patches).to(dtype)
    return dx, None, dpos, None


gather_rows.register_autograd(_gather_backward, setup_context=_gather_context)


@_operator
def scatter_rows(x: Tensor, rows: Tensor, num_rows: int, unique: bool = False) -> Tensor:
    """`kernels.gather.scatter_rows_fwd`, with the inverse made here; negative rows are left out unless `unique`."""
    from fastjepa.kernels import gather

    return gather.scatter_rows_fwd(x, gather.row_inverse(rows, num_rows, unique), num_rows)


@scatter_rows.register_fake
def _(x, rows, num_rows, unique=False):
    return x.new_empty(num_rows, x.shape[1])


def _scatter_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, dy):
    return torch.ops.fastjepa.gather_rows(dy, ctx.saved_tensors[0]), None, None, None


scatter_rows.register_autograd(_scatter_backward, setup_context=_scatter_context)


@_operator
def assemble_predictor(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor, source: Tensor, patches: Tensor
) -> Tensor:
    """`kernels.gather.assemble_predictor_fwd`."""
    from fastjepa.kernels import gather as kernels

    return kernels.assemble_predictor_fwd(context, mask_token, pos_embed, source, patches)


@assemble_predictor.register_fake
def _(context, mask_token, pos_embed, source, patches):
    return context.new_empty(source.shape[0], context.shape[1])


@_operator
def mask_token_bwd(dy: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """`kernels.gather.mask_token_bwd`."""
    from fastjepa.kernels import gather as kernels

    return kernels.mask_token_bwd(dy, source, dtype)


@mask_token_bwd.register_fake
def _(dy, source, dtype):
    return dy.new_empty(dy.shape[1], dtype=dtype)


def _assemble_context(ctx, inputs, output):
    context, mask_token, pos_embed, source, patches = inputs
    ctx.save_for_backward(source, patches)
    ctx.table, ctx.token, ctx.pos = context.shape[0], mask_token.dtype, (pos_embed.shape[0], pos_embed.dtype)


def _assemble_backward(ctx, dy):
    source, patches = ctx.saved_tensors
    dcontext = dtoken = dpos = None
    if ctx.needs_input_grad[0]:
        dcontext = torch.ops.fastjepa.scatter_rows(dy, source, ctx.table)
    if ctx.needs_input_grad[1]:
        dtoken = torch.ops.fastjepa.mask_token_bwd(dy, source, ctx.token)
    if ctx.needs_input_grad[2]:
        dpos = torch.ops.fastjepa.scatter_rows(dy, patches, ctx.pos[0]).to(ctx.pos[1])
    return dcontext, dtoken, dpos, None, None


assemble_predictor.register_autograd(_assemble_backward, setup_context=_assemble_context)


@_operator
def ragged_attention(qkv: Tensor, offsets: Tensor, max_length: int, scale: float) -> tuple[Tensor, Tensor]:
    """`kernels.attention.attention_fwd`: (out [T, H, d], lse [H, T])."""
    from fastjepa.kernels import attention as kernels

    return kernels.attention_fwd(qkv, offsets, max_length, scale)


@ragged_attention.register_fake
def _(qkv, offsets, max_length, scale):
    total, _, heads, width = qkv.shape
    return qkv.new_empty(total, heads, width), qkv.new_empty(heads, total, dtype=torch.float32)


@_operator
def ragged_attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, max_length: int, scale: float
) -> Tensor:
    """`kernels.attention_bwd.attention_bwd`: dqkv."""
    from fastjepa.kernels import attention as kernels

    return kernels.attention_bwd(dout, qkv, out, lse, offsets, max_length, scale)


@ragged_attention_bwd.register_fake
def _(dout, qkv, out, lse, offsets, max_length, scale):
    return qkv.new_empty(qkv.shape)


def _attention_context(ctx, inputs, output):
    qkv, offsets, ctx.max_length, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, offsets)


def _attention_backward(ctx, dout, dlse):
    qkv, out, lse, offsets = ctx.saved_tensors
    dqkv = torch.ops.fastjepa.ragged_attention_bwd(dout, qkv, out, lse, offsets, ctx.max_length, ctx.scale)
    return dqkv, None, None, None


ragged_attention.register_autograd(_attention_backward, setup_context=_attention_context)


@_operator
def jepa_loss(prediction: Tensor, features: Tensor, rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.jepa_loss.jepa_loss_fwd`: (loss, slope [T, D])."""
    from fastjepa.kernels import jepa_loss as kernels

    return kernels.jepa_loss_fwd(prediction, features, rows, eps, store_slope=True)


@jepa_loss.register_fake
def _(prediction, features, rows, eps):
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(prediction.shape)


@_operator
def jepa_loss_bwd(slope: Tensor, dloss: Tensor) -> Tensor:
    """`kernels.jepa_loss.jepa_loss_bwd`: dprediction [T, D]."""
    from fastjepa.kernels import jepa_loss as kernels

    return kernels.jepa_loss_bwd(slope, dloss)


@jepa_loss_bwd.register_fake
def _(slope, dloss):
    return torch.empty_like(slope)


def _loss_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _loss_backward(ctx, dloss, dslope):
    return torch.ops.fastjepa.jepa_loss_bwd(ctx.saved_tensors[0], dloss), None, None, None


jepa_loss.register_autograd(_loss_backward, setup_context=_loss_context)


@_operator
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`kernels.gelu.gelu_fwd`."""
    from fastjepa.kernels import gelu as kernels

    return kernels.gelu_fwd(x, bias)


@bias_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@_operator
def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.gelu.gelu_bwd`: (dx, dbias)."""
    from fastjepa.kernels import gelu as kernels

    return kernels.gelu_bwd(dy, x, bias)


@bias_gelu_bwd.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape), torch.empty_like(bias)


def _gelu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx, dy):
    return torch.ops.fastjepa.bias_gelu_bwd(dy, *ctx.saved_tensors)


bias_gelu.register_autograd(_gelu_backward, setup_context=_gelu_context)


@_operator
def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.layer_norm.layer_norm_fwd`: (y, s, mean, rstd); s is a copy of x where there is no residual."""
    from fastjepa.kernels import layer_norm as kernels

    y, s, mean, rstd = kernels.layer_norm_fwd(x, residual, weight, bias, eps, out_dtype)
    return y, s.clone() if residual is None else s, mean, rstd  # an operator must not give its input back


@layer_norm.register_fake
def _(x, residual, weight, bias, eps, out_dtype=None):
    dtype = x.dtype if residual is None or residual.dtype == x.dtype else torch.float32
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    y, s = x.new_empty(x.shape, dtype=out_dtype or dtype), x.new_empty(x.shape, dtype=dtype)
    return y, s, statistics, torch.empty_like(statistics)


@_operator
def layer_norm_bwd(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.layer_norm.layer_norm_bwd`: (dx, dresidual, dweight, dbias); dresidual is empty where dx serves."""
    from fastjepa.kernels import layer_norm as kernels

    dx, dresidual, dweight, dbias = kernels.layer_norm_bwd(dy, ds, s, weight, mean, rstd, x_dtype, residual_dtype)
    if dresidual is dx:
        dresidual = dx.new_empty(0)
    return dx, dresidual, dweight.clone(), dbias.clone()  # two halves of one tensor, which an operator must not give


@layer_norm_bwd.register_fake
def _(dy, ds, s, weight, mean, rstd, x_dtype, residual_dtype):
    shape = 0 if x_dtype == residual_dtype else s.shape
    dx, dresidual = s.new_empty(s.shape, dtype=x_dtype), s.new_empty(shape, dtype=residual_dtype)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(weight)


def _norm_context(ctx, inputs, output):
    x, residual, weight = inputs[:3]
    _, s, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(s, weight, mean, rstd)
    ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
    ctx.has_residual = residual is not None


def _norm_backward(ctx, dy, ds, dmean, drstd):
    dx, dresidual, dweight, dbias = torch.ops.fastjepa.layer_norm_bwd(dy, ds, *ctx.saved_tensors, *ctx.dtypes)
    if ctx.dtypes[0] == ctx.dtypes[1]:
        dresidual = dx
    return dx, dresidual if ctx.has_residual else None, dweight, dbias, None, None


layer_norm.register_autograd(_norm_backward, setup_context=_norm_context)
