"""Backward of ragged attention; see attention.py for the forward and the legend.

With p = exp(q k^T * scale - lse), dp = do v^T and delta = rowsum(do * out):

    ds = p * (dp - delta),   dq = scale * ds k,   dk = scale * ds^T q,   dv = p^T do

"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import LOG2_E, dot_rows, dot_width, load_tile, locate, scale_tile, store_tile, zero_tile


@triton.jit
def _query_rows(
    dout, q, out, lse, delta, dq, first, length, scale,
    STRIDE_TOKEN: tl.constexpr, STRIDE_PART: tl.constexpr, N_HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STREAM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):
    left = length - first
    tokens = first + tl.arange(0, ROWS)
    k_tile = q + STRIDE_PART
    v_tile = k_tile + STRIDE_PART
    q_rows = load_tile(q + first.to(tl.int64) * STRIDE_TOKEN, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    do_rows = load_tile(dout + first.to(tl.int64) * (N_HEADS * D), left, N_HEADS * D, D, ROWS, D0, D1)
    out_rows = load_tile(out + first.to(tl.int64) * (N_HEADS * D), left, N_HEADS * D, D, ROWS, D0, D1)
    row_delta = tl.sum(do_rows[0].to(tl.float32) * out_rows[0].to(tl.float32), axis=1)
    if D1 > 0:
        row_delta += tl.sum(do_rows[1].to(tl.float32) * out_rows[1].to(tl.float32), axis=1)
    tl.store(delta + tokens, row_delta, mask=tokens < length)
    row_lse = tl.load(lse + tokens, mask=tokens < length, other=0.0) * LOG2_E
    dq_rows = zero_tile(ROWS, D0, D1)
    for start in range(0, length, STREAM):
        k = load_tile(k_tile, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        v = load_tile(v_tile, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        s = dot_width(q_rows, k, D1) * (scale * LOG2_E)  # [R, C]
        p = tl.exp2(tl.minimum(s - row_lse[:, None], 0.0))
        dp = dot_width(do_rows, v, D1)
        dq_rows = dot_rows(p * (dp - row_delta[:, None]), k, dq_rows, D1)
        k_tile += STREAM * STRIDE_TOKEN
        v_tile += STREAM * STRIDE_TOKEN
    dq_rows = scale_tile(dq_rows, scale, D1)
    store_tile(dq + first.to(tl.int64) * (3 * N_HEADS * D), dq_rows, left, 3 * N_HEADS * D, D, ROWS, D0, D1)


@triton.jit
def _key_rows(
    dout, q, lse, delta, dq, first, length, scale,
    STRIDE_TOKEN: tl.constexpr, STRIDE_PART: tl.constexpr, N_HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STREAM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):
    left = length - first
    k_ptr = q + first.to(tl.int64) * STRIDE_TOKEN + STRIDE_PART
    k = load_tile(k_ptr, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    v = load_tile(k_ptr + STRIDE_PART, left, STRIDE_TOKEN, D, ROWS, D0, D1)
    dk = zero_tile(ROWS, D0, D1)
    dv = zero_tile(ROWS, D0, D1)
    steps = tl.arange(0, STREAM)
    q_tile = q
    do_tile = dout
    for start in range(0, length, STREAM):
        q_cols = load_tile(q_tile, length - start, STRIDE_TOKEN, D, STREAM, D0, D1)
        do_cols = load_tile(do_tile, length - start, N_HEADS * D, D, STREAM, D0, D1)
        # Queries beyond the sequence are given no weight, keys beyond it are not stored.
        col_lse = tl.load(lse + start + steps, mask=steps < length - start, other=float("inf")) * LOG2_E
        col_delta = tl.load(delta + start + steps, mask=steps < length - start, other=0.0)
        p = tl.exp2(dot_width(k, q_cols, D1) * (scale * LOG2_E) - col_lse[None, :])  # [R, C], transposed
        dv = dot_rows(p, do_cols, dv, D1)
        dp = dot_width(v, do_cols, D1)
        dk = dot_rows(p * (dp - col_delta[None, :]), q_cols, dk, D1)
        q_tile += STREAM * STRIDE_TOKEN
        do_tile += STREAM * (N_HEADS * D)
    dk_ptr = dq + first.to(tl.int64) * (3 * N_HEADS * D) + N_HEADS * D
    store_tile(dk_ptr, scale_tile(dk, scale, D1), left, 3 * N_HEADS * D, D, ROWS, D0, D1)
    store_tile(dk_ptr + N_HEADS * D, dv, left, 3 * N_HEADS * D, D, ROWS, D0, D1)


@triton.jit(do_not_specialize=["offsets_ptr", "n_tokens", "n_tiles"])
def _attention_bwd_kernel(
    dout_ptr, qkv_ptr, offsets_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, scale, n_tokens, n_tiles,
    STRIDE_TOKEN: tl.constexpr, STRIDE_PART: tl.constexpr, STRIDE_HEAD: tl.constexpr, N_HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STREAM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PASS: tl.constexpr,
):
    token, head, tile, length = locate(offsets_ptr, n_tiles, N_HEADS)
    q = qkv_ptr + token * STRIDE_TOKEN + head * STRIDE_HEAD
    dout = dout_ptr + token * (N_HEADS * D) + head * D
    out = out_ptr + token * (N_HEADS * D) + head * D
    dq = dqkv_ptr + token * (3 * N_HEADS * D) + head * D
    lse = lse_ptr + head * n_tokens + token
    delta = delta_ptr + head * n_tokens + token
    if PASS == "both":
        for first in range(0, length, ROWS):
            _query_rows(dout, q, out, lse, delta, dq, first, length, scale, STRIDE_TOKEN, STRIDE_PART, N_HEADS, D, ROWS, STREAM, D0, D1)
        tl.debug_barrier()
        for first in range(0, length, ROWS):
            _key_rows(dout, q, lse, delta, dq, first, length, scale, STRIDE_TOKEN, STRIDE_PART, N_HEADS, D, ROWS, STREAM, D0, D1)
    else:
        first = tile * ROWS
        if first >= length:
            return
        if PASS == "queries":
            _query_rows(dout, q, out, lse, delta, dq, first, length, scale, STRIDE_TOKEN, STRIDE_PART, N_HEADS, D, ROWS, STREAM, D0, D1)
        else:
            _key_rows(dout, q, lse, delta, dq, first, length, scale, STRIDE_TOKEN, STRIDE_PART, N_HEADS, D, ROWS, STREAM, D0, D1)
