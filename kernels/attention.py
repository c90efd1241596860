"""Attention over ragged sequences: out = softmax(scale * q k^T) v within each, sequences packed back to back.

Reads packed qkv [T, 3, H, d] where it lies and writes [T, H, d]; saved for backward are qkv, out and

    lse[h, t] = log sum_j exp(scale * q_t . k_j)

A program takes a tile of queries of one head of one sequence; the keys stream past it under a running maximum m and
sum l: with s the scores of a block of keys in units of log 2, m' = max(m, max s), p = exp2(s - m'),
l = exp2(m - m') l + sum p, out = exp2(m - m') out + p v, and at last out / l. Programs beyond the end of their sequence
leave at once. A rectangular batch is the case of equal lengths.

Legend: T packed tokens, S sequences, H heads, d head width. Tiles and launch choices: `attention_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_bwd import _attention_bwd_kernel, attention_bwd
from .attention_tiles import (
    DTYPES,
    HEAD_DIMS,
    LN_2,
    LOG2_E,
    REGIMES,
    LaunchConfig,
    attention_config,
    dot_tokens,
    dot_widths,
    head_parts,
    load_tile,
    locate,
    regime_of,
    scale_tile,
    store_tile,
    tile_constants,
    zero_tile,
)
from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv

__all__ = [
    "attention_bwd",
    "attention_config",
    "attention_cost",
    "attention_fwd",
    "compile_cases",
    "ragged_attention",
    "regime_of",
]


@triton.jit(do_not_specialize=["offsets_ptr", "n_tokens", "n_tiles"])
def _attention_fwd_kernel(
    qkv_ptr,  # [T, 3, H, d], strided
    offsets_ptr,  # [S + 1]
    out_ptr,  # [T, H, d]
    lse_ptr,  # [H, T]
    scale,
    n_tokens,
    n_tiles,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_PART: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    N_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STREAM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    token, head, tile, length = locate(offsets_ptr, n_tiles, N_HEADS)
    first = tile * ROWS
    if first >= length:
        return
    left = length - first
    k_ptr = qkv_ptr + token * STRIDE_TOKEN + head * STRIDE_HEAD + STRIDE_PART
    v_ptr = k_ptr + STRIDE_PART
    token += first
    q_ptr = qkv_ptr + token * STRIDE_TOKEN + head * STRIDE_HEAD
    q = load_tile(q_ptr, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    log_scale = scale * LOG2_E
    cols = tl.arange(0, STREAM)
    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    l = tl.zeros([ROWS], dtype=tl.float32)  # noqa: E741
    acc = zero_tile(ROWS, D0, D1)
    for start in range(0, length, STREAM):
        k = load_tile(k_ptr, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        v = load_tile(v_ptr, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        scores = tl.where((cols < length - start)[None, :], dot_widths(q, k, D1), float("-inf"))  # [R, C]
        m_next = tl.maximum(m, tl.max(scores, axis=1) * log_scale)
        p = tl.exp2(tl.fma(scores, log_scale, -m_next[:, None]))
        shrink = tl.exp2(m - m_next)
        l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
        acc = dot_tokens(p, v, scale_tile(acc, shrink[:, None], D1), D1)
        m = m_next
        k_ptr += STREAM * STRIDE_TOKEN
        v_ptr += STREAM * STRIDE_TOKEN
    out_ptr += token * (N_HEADS * D) + head * D
    store_tile(out_ptr, scale_tile(acc, (1.0 / l)[:, None], D1), left, N_HEADS * D, D, ROWS, D0, D1)
    rows = tl.arange(0, ROWS)
    tl.store(lse_ptr + head * n_tokens + token + rows, (m + tl.log2(l)) * LN_2, mask=rows < left)


def attention_fwd(qkv: Tensor, offsets: Tensor, max_length: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, d], lse fp32 [H, T]); qkv's last dimension must be contiguous and scale positive."""
    n_tokens, _, heads, head_dim = qkv.shape
    out = torch.empty((n_tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, n_tokens), dtype=torch.float32, device=qkv.device)
    if n_tokens == 0:
        return out, lse
    config = attention_config(head_dim, qkv.dtype, arch_of(qkv.device), regime_of(max_length)).fwd
    n_tiles = cdiv(max_length, config.rows)
    _attention_fwd_kernel[((offsets.shape[0] - 1) * heads * n_tiles,)](
        qkv_ptr=qkv,
        offsets_ptr=offsets,
        out_ptr=out,
        lse_ptr=lse,
        scale=scale,
        n_tokens=n_tokens,
        n_tiles=n_tiles,
        **tile_constants(qkv, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out, lse


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, offsets, max_length, scale):
        out, lse = attention_fwd(qkv, offsets, max_length, scale)
        ctx.save_for_backward(qkv, out, lse, offsets)
        ctx.max_length, ctx.scale = max_length, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, offsets = ctx.saved_tensors
        return attention_bwd(dout, qkv, out, lse, offsets, ctx.max_length, ctx.scale), None, None, None


def ragged_attention(qkv: Tensor, offsets: Tensor, max_length: int, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v within each sequence; sequences do not see one another, and an empty one is fine.

    Shapes:
        qkv: bf16, fp16 or fp32 [T, 3, H, d], d a multiple of 8 in 8..128; any strides, read in place where the last
            dimension is contiguous.
        offsets: int32 [S + 1], from 0 to T without falling.
        max_length: tokens of the longest sequence or a bound of it, on the host. It chooses the launch, nothing else.
        scale: positive; d ** -0.5 if None.

    Returns:
        [T, H, d], contiguous.

    Raises:
        ValueError: shapes, dtypes or a scale other than these.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), for the online softmax and the gradients from lse.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be bf16, fp16 or fp32 [T, 3, H, d], got {qkv.dtype} {list(qkv.shape)}")
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [S + 1], got {offsets.dtype} {list(offsets.shape)}")
    scale = float(qkv.shape[3] ** -0.5 if scale is None else scale)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    head_parts(qkv.shape[3])
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    return _RaggedAttention.apply(qkv, offsets.contiguous(), max_length, scale)


def attention_cost(lengths: Sequence[int], heads: int, head_dim: int, itemsize: int, backward: bool = False) -> Cost:
    """Forward: read q, k, v, write out and lse. Backward: read q, k, v, out, do and lse, write dq, dk and dv.

    FLOPs are those of the formula, 2 products forward and 5 backward, without what tiles add to them.
    """
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    if tokens == 0:
        return Cost(0, 0, 0)
    head = tokens * heads * head_dim * itemsize
    rest = 4 * tokens * heads + 4 * (len(lengths) + 1)
    if backward:
        return Cost(8 * head + rest, 10 * pairs * heads * head_dim, 2 if regime_of(max(lengths)) == "long" else 1)
    return Cost(4 * head + rest, 4 * pairs * heads * head_dim, 1)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration, for packed qkv of 16 heads."""
    cases = []
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            configs = [attention_config(head_dim, dtype, arch, regime) for regime in REGIMES]
            for tiles in dict.fromkeys(config.fwd for config in configs):
                cases.append(_case("attention_fwd", _attention_fwd_kernel, head_dim, dtype, tiles, "", {}))
            for one_launch, tiles in dict.fromkeys((config.one_launch, config.bwd) for config in configs):
                for part in ("both",) if one_launch else ("queries", "keys"):
                    constant = {"PASS": part}
                    cases.append(_case("attention_bwd", _attention_bwd_kernel, head_dim, dtype, tiles, part, constant))
    return cases


def _case(
    name: str, kernel: Any, head_dim: int, dtype: torch.dtype, tiles: LaunchConfig, label: str, more: dict[str, Any]
) -> CompileCase:
    constexprs = tile_constants(torch.empty((1, 3, 16, head_dim), device="meta"), tiles) | more
    values = {"offsets_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    values |= {"n_tokens": "i32", "n_tiles": "i32"} | dict.fromkeys(constexprs, "constexpr")
    signature = {arg: values.get(arg, f"*{TRITON_DTYPE[dtype]}") for arg in kernel.arg_names}
    return CompileCase(
        name=name,
        config=" ".join(filter(None, (f"d{head_dim}", TRITON_DTYPE[dtype], label, str(tiles)))),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        aligned=tuple(arg for arg in signature if arg.endswith("_ptr") and arg != "offsets_ptr"),
    )
