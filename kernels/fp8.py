"""Rows in 8 bits (e4m3), each with a scale of its own: q = round(x / scale), scale = max |row| / 448.

What a product of matrices takes whose tensor cores multiply in 8 bits. A row is read once and stays in registers.

Legend: T rows (tokens, or rows of a weight), D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv
from .rows import DTYPES, HIDDEN_WIDTHS, WIDTHS, LaunchConfig, check_dtype, row_case, row_major, whole_row_config

MAX_WIDTH = 8192
FIRST_ARCH = 89  # chips before it have no 8-bit floating numbers


def quantise_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """One row to a warp up to D = 1536. Unmeasured: chosen from compiled resources."""
    return whole_row_config(width, dtype, values=48, num_warps=4)


@triton.jit(do_not_specialize=["n_rows"])
def _quantise_kernel(
    x_ptr,  # [T, D]
    q_ptr,  # [T, D]
    scale_ptr,  # [T]
    n_rows,
    stride_x_row,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_keep = (row < n_rows)[:, None]
    pieces = ()
    most = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        piece = tl.load(x_ptr + row[:, None] * stride_x_row + cols, mask=row_keep & (cols < D), other=0.0)
        most = tl.maximum(most, tl.abs(piece.to(tl.float32)))
        pieces += (piece,)
    largest = tl.max(most, axis=1)  # [BT]
    scale = largest / 448.0
    inverse = 448.0 / tl.where(largest > 1e-30, largest, 1.0)  # finite
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        q = pieces[i].to(tl.float32) * inverse[:, None]
        tl.store(q_ptr + row[:, None] * D + cols, q.to(q_ptr.dtype.element_ty), mask=row_keep & (cols < D))
    tl.store(scale_ptr + row, scale, mask=row < n_rows)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with q * scale nearest to x: rows in 8 bits.

    Shapes:
        x: [T, D], D at most 8192; returns q [T, D] float8_e4m3fn, scale fp32 [T, 1].

    Rows whose largest entry is below 1e-30 come out as zeros; what is not finite makes NaNs, in its row alone.

    Raises:
        ValueError: another shape or dtype.

    Source: Micikevicius et al. 2022 (arXiv 2209.05433).
    """
    if x.dim() != 2 or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"expected x [T, D] with D in 1..{MAX_WIDTH}, got {list(x.shape)}")
    check_dtype(x=x)
    n_rows, width = x.shape
    config = quantise_config(width, x.dtype, arch_of(x.device))
    x = row_major(x)
    q = torch.empty((n_rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((n_rows, 1), dtype=torch.float32, device=x.device)
    if n_rows:
        _quantise_kernel[(cdiv(n_rows, config.block_t),)](
            x_ptr=x,
            q_ptr=q,
            scale_ptr=scale,
            n_rows=n_rows,
            stride_x_row=x.stride(0),
            D=width,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return q, scale


def quantise_rows_cost(tokens: int, width: int, dtype: torch.dtype) -> Cost:
    """Read x, write q and a scale for each row."""
    return Cost(tokens * (width * (dtype.itemsize + 1) + 4), 3 * tokens * width, 1)


def compile_cases(arch: int) -> list[CompileCase]:
    """The encoders' widths and hidden widths, for chips that have the type."""
    if arch < FIRST_ARCH:
        return []
    cases = []
    for width in sorted({*WIDTHS, *HIDDEN_WIDTHS}):
        for dtype in DTYPES:
            signature = {"x_ptr": f"*{TRITON_DTYPE[dtype]}", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
            signature |= {"n_rows": "i32", "stride_x_row": "i32"}
            label = f"d{width} {TRITON_DTYPE[dtype]}"
            config = quantise_config(width, dtype, arch)
            cases.append(row_case("quantise_rows", label, _quantise_kernel, signature, config, D=width))
    return cases
