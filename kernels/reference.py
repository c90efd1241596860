"""Plain PyTorch of every kernel: the oracle of its test, and the path on machines without CUDA.

Legend: B images, N patches an image, T packed tokens, S sequences, H heads, d head width, D width.
A *row* is a token's place in a [B * N, D] table: `image * N + patch`, so `row % N` is the patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_rows_ref(x: Tensor, rows: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """y[t] = x[rows[t]] (+ pos_embed[rows[t] % N]).

    Shapes: x [R, D]; rows int [T] in 0..R-1; pos_embed [N, D] -> [T, D] in x's dtype.
    """
    y = x.index_select(0, rows)
    return y if pos_embed is None else (y + pos_embed.index_select(0, rows % pos_embed.shape[0])).to(x.dtype)


def scatter_rows_ref(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """y[rows[t]] += x[t] over zeros, the transpose of `gather_rows_ref`.

    Shapes: x [T, D]; rows int [T] in 0..num_rows-1 -> [num_rows, D].
    """
    return x.new_zeros(num_rows, x.shape[1]).index_add(0, rows, x)


def assemble_predictor_ref(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor, source: Tensor, patches: Tensor
) -> Tensor:
    """y[t] = (context[source[t]] if source[t] >= 0 else mask_token) + pos_embed[patches[t]].

    Shapes: context [Tc, D]; mask_token [D]; pos_embed [N, D]; source int [T] in -1..Tc-1; patches int [T] -> [T, D] in
    context's dtype.
    """
    table = torch.cat([context, mask_token.to(context.dtype).view(1, -1)])  # the mask token is row -1
    return (table.index_select(0, source % table.shape[0]) + pos_embed.index_select(0, patches)).to(context.dtype)


def ragged_attention_ref(
    qkv: Tensor, offsets: Tensor, max_length: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence; an empty sequence is fine.

    Equal lengths are a plain batch (T == S * max_length tells, with nothing read from the device); others are padded
    to max_length and masked.

    Shapes: qkv [T, 3, H, d]; offsets int32 [S + 1] -> [T, H, d].
    """
    total, _, heads, width = qkv.shape
    count = offsets.shape[0] - 1
    if total == 0:
        return qkv.new_zeros(0, heads, width) + qkv.sum()
    if total == count * max_length:
        q, k, v = qkv.view(count, max_length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).reshape(total, heads, width)
    lengths = offsets.diff()
    steps = torch.arange(max_length, device=qkv.device)
    valid = steps < lengths.view(-1, 1)  # [S, L]
    gathered = (offsets[:-1].view(-1, 1) + steps).clamp(max=total - 1)  # [S, L]
    padded = qkv.index_select(0, gathered.view(-1)).view(count, max_length, 3, heads, width)
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    # An empty sequence attends to one padded key, so that no row is empty; nothing of it is kept.
    mask = (valid | (steps == 0)).view(count, 1, 1, max_length)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    sequence = torch.arange(count, device=qkv.device).repeat_interleave(lengths, output_size=total)
    place = torch.arange(total, device=qkv.device) - offsets.index_select(0, sequence)
    return out.transpose(1, 2).reshape(-1, heads, width).index_select(0, sequence * max_length + place)


def jepa_loss_ref(prediction: Tensor, features: Tensor, rows: Tensor, eps: float = 1e-5) -> Tensor:
    """mean smooth-L1 (beta 1) between prediction[t] and layer_norm(features[rows[t]]), no affine.

    16-bit inputs are compared in fp32. No gradient reaches `features`.

    Shapes: prediction [T, D]; features [R, D], rows int [T] in 0..R-1 -> scalar, fp32 (fp64 from fp64).
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target = features.detach().index_select(0, rows).to(dtype)
    return F.smooth_l1_loss(prediction.to(dtype), F.layer_norm(target, features.shape[-1:], eps=eps))


def ema_update_ref_(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """t = momentum * t + (1 - momentum) * s in place, over two lists of tensors of equal shapes."""
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        ours, theirs = groups.setdefault((target.dtype, source.dtype), ([], []))
        ours.append(target)
        theirs.append(source)
    for (dtype, _), (ours, theirs) in groups.items():
        torch._foreach_lerp_(ours, [s.to(dtype) for s in theirs], 1.0 - momentum)


def add_layer_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x alone where there is none); y = layer_norm(s) * weight + bias; returns (y, s).

    Shapes: x, residual [T, D]; weight, bias [D]; y is cast to `out_dtype` where one is given.
    """
    total = x if residual is None else x + residual
    if weight.dtype in (total.dtype, torch.float32) and total.dtype != torch.float64:  # what torch takes together
        y = F.layer_norm(total, weight.shape, weight, bias, eps)
    else:
        wide = torch.promote_types(total.dtype, weight.dtype)
        y = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(total.dtype)
    return y if out_dtype is None else y.to(out_dtype), total


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU. Shapes: x [T, D]; bias [D]."""
    return F.gelu(x + bias).to(x.dtype)


def quantise_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with q * scale nearest to x, scale = max |row| / 448.

    Shapes: x [T, D] -> q [T, D] float8_e4m3fn, scale fp32 [T, 1].
    """
    x = x.float()
    most = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    inverse = torch.full_like(most, 448.0) / torch.where(most > 1e-30, most, 1.0)
    return (x * inverse).to(torch.float8_e4m3fn), most / 448.0
