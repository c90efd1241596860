"""A transformer block as one autograd function on kernels.

Nothing that a block computes is kept for the backward pass twice, and the outputs of its LayerNorms and of its GELU are
not kept at all: the kernels of their gradients write them again as they go. One function for the whole block also takes
a processor far less time than one for each of its parts.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastjepa.copies import is_current
from fastjepa.kernels.attention import attention_bwd, attention_fwd
from fastjepa.kernels.gather import gather_rows_fwd, row_inverse, scatter_rows_fwd
from fastjepa.kernels.gelu import gelu_bwd, gelu_fwd
from fastjepa.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from fastjepa.nn.block import MLP, Block, DropPath, is_exact_gelu
from fastjepa.nn.linear import Linear, is_plain, parameter_gradients
from fastjepa.nn.norm import LayerNorm
from fastjepa.nn.ragged_attention import RaggedAttention
from fastjepa.ops import rows as row_ops
from fastjepa.ops.attention import check_packed, kernel_refuses
from fastjepa.ops.gather import check_rows
from fastjepa.ops.rows import check_add_layer_norm, check_bias_gelu


def fused_block(
    block: Block,
    x: Tensor,
    branch: Tensor | None,
    offsets: Tensor,
    max_length: int,
    keep: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """(s, mlp(norm2(s))) with s = r + attention(norm1(r)) and r = x + branch, x where there is none.

    With `recompute` x and branch alone are kept for the backward pass, which takes the block forward again as far as
    the MLP's hidden numbers.

    Shapes: as `Block`.

    Returns:
        None, with nothing done, where the parts have to be called one by one: in fp64 or 8 bits; where a part has
        hooks, another forward or is none of ours, or drops something; and where one would refuse what the one before
        gives.

    Raises:
        ValueError: shapes that do not fit.
    """
    # Parts and parameters are looked up once, where modules keep them: their attributes take a processor far longer.
    own: dict[str, Any] = block._modules
    attn, mlp, norms = own["attn"], own["mlp"], (own["norm1"], own["norm2"])
    if not (is_plain(attn, RaggedAttention) and is_plain(mlp, MLP) and _is_idle(own["drop_path"], DropPath)):
        return None
    own = attn._modules | mlp._modules
    if not (is_exact_gelu(own["act"]) and _is_idle(own["proj_drop"], nn.Dropout) and _is_idle(own["drop"], nn.Dropout)):
        return None
    linears = own["qkv"], own["proj"], own["fc1"], own["fc2"]
    if (attn.training and attn.attn_drop) or attn.backend not in ("auto", "triton"):
        return None
    total_dtype = row_ops.sum_dtype(x, branch)
    dtype, norm_parameters, linear_parameters, taken = row_ops.linear_dtype(x.device, total_dtype), [], [], []
    for norm in norms:
        if not is_plain(norm, LayerNorm):
            return None
        weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        if weight is None or bias is None or weight.dtype == torch.float64 or weight.numel() > row_ops.MAX_WIDTH:
            return None
        norm_parameters += weight, bias
    for linear in linears:
        if not is_plain(linear, Linear) or linear.fp8:
            return None
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        if weight is None or (bias is not None and bias.dtype != weight.dtype):
            return None
        if weight.dtype != dtype and row_ops.linear_dtype(x.device, weight.dtype) != dtype:
            return None
        linear_parameters += weight, bias
        taken += linear.parameters_in(dtype, weight, None if linear is linears[2] else bias)
    hidden_bias, head_dim = linear_parameters[5], linear_parameters[0].shape[0] // (3 * attn.num_heads)
    if hidden_bias is None or kernel_refuses(total_dtype, head_dim, attn.scale):
        return None

    taken[5] = hidden_bias.contiguous()
    max_length = check_packed(offsets, max_length, x.shape[0], x.device)
    if keep is not None:
        check_rows(x, keep)
        keep = keep.contiguous()
    given = Given(offsets.contiguous(), keep, *(p.contiguous() for p in norm_parameters), *taken)
    call = Call(max_length, attn.num_heads, attn.scale, norms[0].eps, norms[1].eps)
    if torch.is_grad_enabled():
        return _FusedBlock.apply(call, given, recompute, x, branch, *norm_parameters, *linear_parameters)
    total, kept = _to_hidden(call, given, x, branch)
    hidden = kept.hidden
    del kept  # before there is more
    return total, _from_hidden(given, hidden)


def _is_idle(module: Any, kind: type[nn.Dropout] | type[DropPath]) -> bool:
    """Whether it is of this kind, drops nothing now, and need not be called."""
    if not is_plain(module, kind):
        return False
    return not module.training or not (module.p if kind is nn.Dropout else module.probability)


class Call(NamedTuple):
    """What a block is told."""

    max_length: int
    heads: int
    scale: float
    eps1: float
    eps2: float


class Given(NamedTuple):
    """What a block is given beside its tokens; the parameters of linears in the dtype of their products."""

    offsets: Tensor
    keep: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor  # as it is: the GELU's kernel adds it
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class Kept(NamedTuple):
    """What the backward pass takes of the way to the MLP's hidden numbers."""

    first: Tensor  # x + branch, for norm1
    mean1: Tensor
    rstd1: Tensor
    qkv: Tensor  # [T, 3, H, d]
    attended: Tensor  # [T, H, d]
    lse: Tensor
    picked: Tensor | None  # [M, D]: `attended` of the tokens to keep, where not all are
    projected: Tensor | None  # what norm2 adds to `first`: kept where it is narrower than the sum,
    total: Tensor | None  # and this where it is not, or not all tokens are kept
    mean2: Tensor
    rstd2: Tensor
    hidden: Tensor  # without its bias


def _to_hidden(call: Call, given: Given, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Kept]:
    """(the stream behind attention, all that is kept)."""
    dtype = given.qkv_weight.dtype
    rows, residual = (x, None) if branch is None else (branch, x)
    norm1, norm2 = (given.norm1_weight, given.norm1_bias), (given.norm2_weight, given.norm2_bias)
    check_add_layer_norm(rows, residual, *norm1)
    y, first, mean1, rstd1 = layer_norm_fwd(rows, residual, *norm1, call.eps1, dtype)
    qkv = F.linear(y, given.qkv_weight, given.qkv_bias)
    qkv = qkv.view(len(qkv), 3, call.heads, qkv.shape[1] // (3 * call.heads))
    attended, lse = attention_fwd(qkv, given.offsets, call.max_length, call.scale)
    picked, residual = attended.flatten(1), first
    if given.keep is not None:
        picked, residual = gather_rows_fwd(picked, given.keep), gather_rows_fwd(first, given.keep)
    projected = F.linear(picked, given.proj_weight, given.proj_bias)
    check_add_layer_norm(projected, residual, *norm2)
    y, total, mean2, rstd2 = layer_norm_fwd(projected, residual, *norm2, call.eps2, dtype)
    hidden = F.linear(y, given.fc1_weight)
    apart = given.keep is None and projected.dtype.itemsize < first.dtype.itemsize
    return total, Kept(
        first,
        mean1,
        rstd1,
        qkv,
        attended,
        lse,
        None if given.keep is None else picked,
        projected if apart else None,
        None if apart else total,
        mean2,
        rstd2,
        hidden,
    )


def _from_hidden(given: Given, hidden: Tensor) -> Tensor:
    check_bias_gelu(hidden, given.fc1_bias)
    return F.linear(gelu_fwd(hidden, given.fc1_bias), given.fc2_weight, given.fc2_bias)


class _FusedBlock(torch.autograd.Function):
    """`fused_block`, whose gradients are those of x, branch and the parameters as they are."""

    @staticmethod
    def forward(ctx, call, given, recompute, x, branch, *parameters):
        total, kept = _to_hidden(call, given, x, branch)
        if recompute:  # a weight that was cast for now is cast again
            pairs = zip(given[2:], parameters, strict=True)
            copies = (p if new is None or not is_current(new, p) else new for new, p in pairs)
            ctx.save_for_backward(*given[:2], *copies, x, branch)
        else:
            ctx.save_for_backward(*given, *kept)
        ctx.call, ctx.recompute, ctx.of_linears = call, recompute, [p.dtype for p in parameters[4::2]]
        ctx.dtype = given.qkv_weight.dtype
        ctx.has_branch, ctx.dtypes = branch is not None, (x.dtype if branch is None else branch.dtype, x.dtype)
        hidden = kept.hidden
        del kept  # before there is more, where it is computed again
        return total, _from_hidden(given, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dz):
        # In the dtypes of the forward pass, whatever autocast is on by now.
        device = dz.device.type
        casts = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            return _gradients(ctx, dtotal, dz)


def _gradients(ctx: Any, dtotal: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    """Of all that `_FusedBlock.apply` is given."""
    call, saved, count = ctx.call, ctx.saved_tensors, len(Given._fields)
    if ctx.recompute:
        given = _taken(ctx.dtype, *saved[:count])
        kept = _to_hidden(call, given, *saved[count:])[1]
    else:
        given, kept = Given(*saved[:count]), Kept(*saved[count:])
    wanted, (of_qkv, of_proj, of_fc1, of_fc2) = ctx.needs_input_grad[9:], ctx.of_linears

    y = torch.empty_like(kept.hidden) if wanted[6] else None
    dhidden, dfc1_bias = gelu_bwd(dz @ given.fc2_weight, kept.hidden, given.fc1_bias, y)
    dfc2 = parameter_gradients(dz, y, of_fc2, *wanted[6:])
    del y
    second = kept.total if kept.projected is None else (kept.projected, kept.first)
    assert second is not None
    norm2 = given.norm2_weight, given.norm2_bias, kept.mean2, kept.rstd2
    dtypes = kept.qkv.dtype, kept.first.dtype
    dprojected, dfirst, dnorm2, (dfc1_weight, _) = _behind_norm(
        dhidden, dtotal, second, norm2, dtypes, given.fc1_weight, of_fc1, wanted[4], False
    )
    del dhidden

    picked = kept.attended.flatten(1) if kept.picked is None else kept.picked
    dproj = parameter_gradients(dprojected, picked, of_proj, *wanted[2:4])
    dattended = dprojected @ given.proj_weight
    del dprojected
    if given.keep is not None:
        tokens = len(kept.first)
        inverse = row_inverse(given.keep, tokens, unique=True)
        dattended, dfirst = (scatter_rows_fwd(d, inverse, tokens) for d in (dattended, dfirst))
    dattended = dattended.view(kept.attended.shape)
    of_attention = kept.qkv, kept.attended, kept.lse, given.offsets, call.max_length, call.scale
    dqkv = attention_bwd(dattended, *of_attention).flatten(1)
    del dattended
    norm1 = given.norm1_weight, given.norm1_bias, kept.mean1, kept.rstd1
    dbranch, dx, dnorm1, of_qkv = _behind_norm(
        dqkv, dfirst, kept.first, norm1, ctx.dtypes, given.qkv_weight, of_qkv, *wanted[:2]
    )
    # Without a branch the norm takes x itself, whose gradient both are.
    dbranch = dbranch if ctx.has_branch else None
    return None, None, None, dx, dbranch, *dnorm1, *dnorm2, *of_qkv, *dproj, dfc1_weight, dfc1_bias, *dfc2


def _taken(dtype: torch.dtype, offsets: Tensor, keep: Tensor | None, *parameters: Any) -> Given:
    """`Given` of parameters as they are, or of copies in the dtype of the products."""
    linears: list[Any] = [p if p is None or i == 5 else p.to(dtype) for i, p in enumerate(parameters[4:])]
    linears[5] = linears[5].contiguous()
    return Given(offsets, keep, *(p.contiguous() for p in parameters[:4]), *linears)


def _behind_norm(
    dz: Tensor,
    ds: Tensor,
    s: Tensor | tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    weight: Tensor,
    of_parameters: torch.dtype,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor | None, Tensor | None]]:
    """Gradients of what a norm with its residual and the linear behind it were given: (of x, of residual, of the norm's
    parameters, of the linear's)."""
    norm_weight, norm_bias, mean, rstd = norm
    dy = dz @ weight
    again = (norm_bias, dy) if of_weight else ()  # the norm's output, which the kernel writes over dy
    dx, dresidual, *dnorm = layer_norm_bwd(dy, ds, s, norm_weight, mean, rstd, *dtypes, *again)
    return dx, dresidual, dnorm, parameter_gradients(dz, dy, of_parameters, of_weight, of_bias)
