"""Bias add and exact GELU in one pass: y = u * cdf(u), u = x + bias, cdf the normal distribution's.

Saved for backward: x and bias, nothing else; u, cdf and its density pdf are computed again.

    dx = dy * (cdf(u) + u * pdf(u)),   dbias = sum_T(dx)

The pass that makes them can write y once more, for whoever did not keep it.

In fp32 cdf is 0.5 * (1 + erf(u / sqrt(2))). In 16 bit that costs more instructions than the memory leaves time for, so
cdf(-a) is exp(-a^2 / 2) * polynomial(a) for a = |u|, within 1.1e-6 of the exact one; the rounding unit of fp16 is 400
times that. dbias is summed in fp32, by programs first, then over programs in a fixed order.

Legend: T rows (tokens), D width, P chunks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv
from .rows import DTYPES, HIDDEN_WIDTHS, LaunchConfig, check_dtype, row_case, row_major, sum_partials, tile_config

_TILES = 16  # of the rows that one program of the backward sums


def gelu_fwd_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """Four 16-byte accesses of each table to a lane. Unmeasured: chosen from compiled resources."""
    return tile_config(width, dtype)


def gelu_bwd_config(width: int, dtype: torch.dtype, arch: int, again: bool = False) -> LaunchConfig:
    """Two 16-byte accesses of each table to a lane and tile: with four, the registers end on a limit and spill.

    One where y is made `again`, which for two of fp16 spills two registers on sm80.
    """
    return tile_config(width, dtype, vectors=1 if again else 2)


@triton.jit
def _tail(u, SLOPE: tl.constexpr):
    """(a, exp(-a^2 / 2) * polynomial(a)), a = |u|: cdf(-a), or cdf(-a) - a * pdf(a) where SLOPE.

    The polynomial is erfcx(a / sqrt(2)) / 2, minimax of degree 8 under the weight exp(-a^2 / 2) on 0..6; the density is
    one more term of degree 1.
    """
    # Beyond 16 the tail is 0 and the polynomial could overflow. A NaN stays one.
    a = tl.minimum(tl.abs(u), 16.0, propagate_nan=tl.PropagateNan.ALL)
    p = tl.fma(a, 3.790293818451867e-05, -6.153806924790743e-04)
    p = tl.fma(p, a, 4.3997765039277634e-03)
    p = tl.fma(p, a, -1.8824909361109764e-02)
    p = tl.fma(p, a, 5.614905398807419e-02)
    p = tl.fma(p, a, -1.2997206180223728e-01)
    p = tl.fma(p, a, 2.492791146372677e-01)
    p = tl.fma(p, a, -0.7978181049585607 if SLOPE else -0.398875824557128)  # 1 / sqrt(2 pi) more
    p = tl.fma(p, a, 4.9999899378561097e-01)
    return a, p * tl.exp2(a * a * -0.7213475204444817)  # log2(e) / 2


@triton.jit
def _gelu(u, EXACT: tl.constexpr):
    if EXACT:
        y = u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))
    else:
        a, tail = _tail(u, SLOPE=False)
        y = tl.fma(-a, tail, tl.maximum(u, 0.0))
    return y


@triton.jit
def _dgelu(u, EXACT: tl.constexpr):
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        slope = cdf + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    else:
        _, tail = _tail(u, SLOPE=True)
        slope = tl.where(u > 0, 1.0 - tail, tail)
    return slope


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_fwd_kernel(
    x_ptr,  # [T, D]
    bias_ptr,  # [D]
    y_ptr,  # [T, D]
    n_rows,
    stride_x_row,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    row = pid // PIECES * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = (row < n_rows)[:, None] & (cols < D)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * stride_x_row + cols[None, :], mask=keep, other=0.0)
    u = x.to(tl.float32) + bias[None, :]
    tl.store(y_ptr + row[:, None] * D + cols[None, :], _gelu(u, EXACT), mask=keep)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_bwd_kernel(
    dy_ptr,  # [T, D]
    x_ptr,  # [T, D]
    bias_ptr,  # [D]
    dx_ptr,  # [T, D]
    y_ptr,  # [T, D]
    part_ptr,  # [P, D]
    n_rows,
    stride_dy_row,
    stride_x_row,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_Y: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // PIECES
    cols = pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        keep = (row < n_rows)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x_row + cols[None, :], mask=keep, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + cols[None, :], mask=keep, other=0.0)
        u = x.to(tl.float32) + bias[None, :]
        dx = dy.to(tl.float32) * _dgelu(u, EXACT)  # 0 where not kept
        tl.store(dx_ptr + row[:, None] * D + cols[None, :], dx, mask=keep)
        if HAS_Y:
            tl.store(y_ptr + row[:, None] * D + cols[None, :], _gelu(u, EXACT), mask=keep)
        dbias += dx
    tl.store(part_ptr + chunk * D + cols, tl.sum(dbias, axis=0), mask=cols < D)


def gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) [T, D]."""
    n_rows, width = x.shape
    config = gelu_fwd_config(width, x.dtype, arch_of(x.device))
    x = row_major(x)
    y = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    if y.numel():
        _gelu_fwd_kernel[(cdiv(n_rows, config.block_t) * cdiv(width, config.block_d),)](
            x_ptr=x,
            bias_ptr=bias,
            y_ptr=y,
            n_rows=n_rows,
            stride_x_row=x.stride(0),
            D=width,
            EXACT=x.dtype == torch.float32,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(dx [T, D], dbias [D]); y [T, D], contiguous, is given the values of the forward pass again."""
    n_rows, width = x.shape
    config = gelu_bwd_config(width, x.dtype, arch_of(x.device), y is not None)
    dy, x = row_major(dy), row_major(x)
    chunks = cdiv(n_rows, config.block_t * _TILES)
    dx = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    part = torch.empty((chunks, width), dtype=torch.float32, device=x.device)
    if dx.numel():
        _gelu_bwd_kernel[(chunks * cdiv(width, config.block_d),)](
            dy_ptr=dy,
            x_ptr=x,
            bias_ptr=bias,
            dx_ptr=dx,
            y_ptr=y,
            part_ptr=part,
            n_rows=n_rows,
            stride_dy_row=dy.stride(0),
            stride_x_row=x.stride(0),
            D=width,
            EXACT=x.dtype == torch.float32,
            HAS_Y=y is not None,
            TILES=_TILES,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return dx, sum_partials(part, torch.empty_like(bias))


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return gelu_fwd(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return gelu_bwd(dy, *ctx.saved_tensors)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU.

    Shapes:
        x: [T, D], what the linear gives without its bias; bias: [D], its dtype may be wider than x's.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes other than these.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    if x.dim() != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"expected x [T, D] and bias [D], got {list(x.shape)} and {list(bias.shape)}")
    check_dtype(x=x, bias=bias)
    return _BiasGelu.apply(x, bias.contiguous())


def bias_gelu_cost(tokens: int, width: int, dtype: torch.dtype, backward: bool = False, again: bool = False) -> Cost:
    """Forward: read x, write y. Backward: read x and dy, write dx, and y `again`. The bias is counted in x's dtype."""
    table, row = tokens * width * dtype.itemsize, width * dtype.itemsize
    if backward:
        return Cost((4 if again else 3) * table + 2 * row, (35 if again else 30) * tokens * width, 2)
    return Cost(2 * table + row, 25 * tokens * width, 1)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration."""
    cases = []
    for width in HIDDEN_WIDTHS:
        for dtype, bias in [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)]:
            rows, cols = f"*{TRITON_DTYPE[dtype]}", f"*{TRITON_DTYPE[bias]}"
            label = f"d{width} {rows[1:]} bias {cols[1:]}"
            exact = dtype == torch.float32
            signature = {"x_ptr": rows, "bias_ptr": cols, "y_ptr": rows, "n_rows": "i32", "stride_x_row": "i32"}
            fwd = gelu_fwd_config(width, dtype, arch)
            cases.append(row_case("gelu_fwd", label, _gelu_fwd_kernel, signature, fwd, D=width, EXACT=exact))
            signature = {"dy_ptr": rows, "x_ptr": rows, "bias_ptr": cols, "dx_ptr": rows, "y_ptr": rows}
            signature |= {"part_ptr": "*fp32"} | dict.fromkeys(("n_rows", "stride_dy_row", "stride_x_row"), "i32")
            for again in (False, True):
                bwd = gelu_bwd_config(width, dtype, arch, again)
                constexprs = {"D": width, "EXACT": exact, "TILES": _TILES, "HAS_Y": again}
                constexprs |= {} if again else {"y_ptr": None}
                name = label + " and y" * again
                cases.append(row_case("gelu_bwd", name, _gelu_bwd_kernel, signature, bwd, **constexprs))
    return cases
