"""Backward of ragged attention; `attention.py` has the forward, the public function and the compile cases.

With p = exp(scale * q k^T - lse), dp = do v^T and delta = rowsum(do * out), all of them made again tile by tile:

    ds = p * (dp - delta),   dq = scale * ds k,   dk = scale * ds^T q,   dv = p^T do

dq sums over keys, dk and dv over queries. Summing both ways in one pass (5 products) needs atomics, a workspace of
dq in fp32, or the accumulators of a whole sequence in registers, where two passes (7 products, 2 exponentials) need
none of these and are deterministic as they stand. The extra products are cheaper than they look: the accumulators of
128 tokens at d = 80 fill a multiprocessor with one program, where tiles of 64 leave room for two or three to hide each
other's latency. So: first dq, a query tile at a time, which also makes delta (fp32, 1/d of dq); then dk and dv, a key
tile at a time. Sequences up to `MEDIUM` tokens take both passes in one program and one launch, reading their heads
from memory once and from cache after that; longer ones take a launch each, a program for each tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    LOG2_E,
    attention_config,
    dot_tokens,
    dot_widths,
    load_tile,
    locate,
    regime_of,
    scale_tile,
    store_tile,
    tile_constants,
    zero_tile,
)
from .launch import arch_of, cdiv


@triton.jit
def _query_tile(
    do_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    token,
    first,
    length,
    scale,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_PART: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STREAM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """dq and delta of the ROWS queries from `first` on, of the sequence that starts at `token`."""
    left = length - first
    row = token + first
    q = load_tile(qkv_ptr + row * STRIDE_TOKEN, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    do = load_tile(do_ptr + row * WIDTH, left, WIDTH, D, ROWS, D0, D1)
    out = load_tile(out_ptr + row * WIDTH, left, WIDTH, D, ROWS, D0, D1)
    delta = tl.sum(do[0].to(tl.float32) * out[0].to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(do[1].to(tl.float32) * out[1].to(tl.float32), axis=1)
    rows = tl.arange(0, ROWS)
    tl.store(delta_ptr + row + rows, delta, mask=rows < left)
    lse = tl.load(lse_ptr + row + rows, mask=rows < left, other=0.0) * LOG2_E
    k_ptr = qkv_ptr + token * STRIDE_TOKEN + STRIDE_PART
    v_ptr = k_ptr + STRIDE_PART
    dq = zero_tile(ROWS, D0, D1)
    for start in range(0, length, STREAM):
        k = load_tile(k_ptr, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        v = load_tile(v_ptr, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        scores = tl.fma(dot_widths(q, k, D1), scale * LOG2_E, -lse[:, None])  # [R, C]
        # p is at most 1. The bound is for the keys beyond the sequence: theirs must be finite to vanish against k = 0.
        p = tl.exp2(tl.minimum(scores, 0.0))
        dp = dot_widths(do, v, D1)
        dq = dot_tokens(p * (dp - delta[:, None]), k, dq, D1)
        k_ptr += STREAM * STRIDE_TOKEN
        v_ptr += STREAM * STRIDE_TOKEN
    store_tile(dqkv_ptr + row * (3 * WIDTH), scale_tile(dq, scale, D1), left, 3 * WIDTH, D, ROWS, D0, D1)


@triton.jit
def _key_tile(
    do_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    token,
    first,
    length,
    scale,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_PART: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STREAM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """dk and dv of the ROWS keys from `first` on, of the sequence that starts at `token`."""
    left = length - first
    row = token + first
    k_ptr = qkv_ptr + row * STRIDE_TOKEN + STRIDE_PART
    k = load_tile(k_ptr, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    v = load_tile(k_ptr + STRIDE_PART, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    dk = zero_tile(ROWS, D0, D1)
    dv = zero_tile(ROWS, D0, D1)
    cols = tl.arange(0, STREAM)
    q_ptr = qkv_ptr + token * STRIDE_TOKEN
    do_ptr += token * WIDTH
    lse_ptr += token
    delta_ptr += token
    for start in range(0, length, STREAM):
        q = load_tile(q_ptr, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        do = load_tile(do_ptr, length - start, WIDTH, D, STREAM, D0, D1)
        # Queries beyond the sequence add nothing, for q, do and delta are 0 there; keys beyond it are not stored.
        lse = tl.load(lse_ptr + start + cols, mask=cols < length - start, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + start + cols, mask=cols < length - start, other=0.0)
        p = tl.exp2(tl.fma(dot_widths(k, q, D1), scale * LOG2_E, -lse[None, :]))  # [R, C]: keys by queries
        dv = dot_tokens(p, do, dv, D1)
        dp = dot_widths(v, do, D1)
        dk = dot_tokens(p * (dp - delta[None, :]), q, dk, D1)
        q_ptr += STREAM * STRIDE_TOKEN
        do_ptr += STREAM * WIDTH
    dk_ptr = dqkv_ptr + row * (3 * WIDTH) + WIDTH
    store_tile(dk_ptr, scale_tile(dk, scale, D1), left, 3 * WIDTH, D, ROWS, D0, D1)
    store_tile(dk_ptr + WIDTH, dv, left, 3 * WIDTH, D, ROWS, D0, D1)


@triton.jit(do_not_specialize=["offsets_ptr", "n_tokens", "n_tiles"])
def _attention_bwd_kernel(
    do_ptr,  # [T, H, d]
    qkv_ptr,  # [T, 3, H, d], strided
    offsets_ptr,  # [S + 1]
    out_ptr,  # [T, H, d]
    lse_ptr,  # [H, T]
    delta_ptr,  # [H, T]
    dqkv_ptr,  # [T, 3, H, d]
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
    PASS: tl.constexpr,  # "both", "queries" or "keys"
):
    token, head, tile, length = locate(offsets_ptr, n_tiles, N_HEADS)
    WIDTH: tl.constexpr = N_HEADS * D
    qkv_ptr += head * STRIDE_HEAD
    do_ptr += head * D
    out_ptr += head * D
    dqkv_ptr += head * D
    lse_ptr += head * n_tokens
    delta_ptr += head * n_tokens
    if PASS == "both":
        for first in range(0, length, ROWS):
            _query_tile(
                do_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, token, first, length, scale,
                STRIDE_TOKEN, STRIDE_PART, WIDTH, D, ROWS, STREAM, D0, D1,
            )  # fmt: skip
        tl.debug_barrier()  # delta is read by other threads than those that stored it
        for first in range(0, length, ROWS):
            _key_tile(
                do_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, token, first, length, scale,
                STRIDE_TOKEN, STRIDE_PART, WIDTH, D, ROWS, STREAM, D0, D1,
            )  # fmt: skip
    elif tile * ROWS < length:
        if PASS == "queries":
            _query_tile(
                do_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, token, tile * ROWS, length, scale,
                STRIDE_TOKEN, STRIDE_PART, WIDTH, D, ROWS, STREAM, D0, D1,
            )  # fmt: skip
        else:
            _key_tile(
                do_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, token, tile * ROWS, length, scale,
                STRIDE_TOKEN, STRIDE_PART, WIDTH, D, ROWS, STREAM, D0, D1,
            )  # fmt: skip


def attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, max_length: int, scale: float
) -> Tensor:
    """dqkv, contiguous [T, 3, H, d]; `out` and `lse` as `attention_fwd` gave them."""
    n_tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty((n_tokens, 3, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if n_tokens == 0:
        return dqkv
    config = attention_config(head_dim, qkv.dtype, arch_of(qkv.device), regime_of(max_length))
    delta = torch.empty_like(lse)
    dout = dout.contiguous()
    n_tiles = 1 if config.one_launch else cdiv(max_length, config.bwd.rows)
    for part in ("both",) if config.one_launch else ("queries", "keys"):
        _attention_bwd_kernel[((offsets.shape[0] - 1) * heads * n_tiles,)](
            do_ptr=dout,
            qkv_ptr=qkv,
            offsets_ptr=offsets,
            out_ptr=out,
            lse_ptr=lse,
            delta_ptr=delta,
            dqkv_ptr=dqkv,
            scale=scale,
            n_tokens=n_tokens,
            n_tiles=n_tiles,
            **tile_constants(qkv, config.bwd),
            PASS=part,
            num_warps=config.bwd.num_warps,
            num_stages=config.bwd.num_stages,
            enable_fp_fusion=False,
        )
    return dqkv
