"""Residual add and LayerNorm in one pass: s = x + residual; y = (s - mean) * rstd * weight + bias.

Saved for backward: s, and mean and rstd in fp32. With xhat = (s - mean) * rstd and g = dy * weight,

    ds_total = rstd * (g - mean_D(g) - xhat * mean_D(g * xhat)) + ds        (the gradient of x and of residual)
    dweight = sum_T(dy * xhat),   dbias = sum_T(dy)

Each program of the backward adds its rows' share of dweight and dbias in registers; a second kernel adds the programs'
sums in a fixed order. Statistics and sums are fp32.

Legend: T rows (tokens), D width, P programs. A row's columns are pieces of BLOCK_D, all of them in registers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of
from .rows import (
    DTYPES,
    MULTIPROCESSORS,
    WIDTHS,
    LaunchConfig,
    check_dtype,
    row_case,
    row_major,
    sum_cases,
    sum_partials,
    whole_row_config,
)

MAX_WIDTH = 8192


def layer_norm_fwd_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """One row to a warp up to D = 1536. Unmeasured: chosen from compiled resources."""
    return whole_row_config(width, dtype, values=48, num_warps=4)


def layer_norm_bwd_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """As many programs as the chip holds at once, each over many rows. Unmeasured: chosen from compiled resources.

    A lane keeps three values for each of its columns (row, dweight, dbias), so it is given fewer than in forward.
    """
    config = whole_row_config(width, dtype, values=40 if dtype.itemsize == 2 else 24, num_warps=4)
    columns = triton.cdiv(width, config.block_d) * config.block_d * config.block_t // (32 * config.num_warps)
    resident = 3 if columns <= 24 else 2  # groups of four warps, by registers: at most 168 and 248 a lane
    programs = MULTIPROCESSORS.get(arch, 108) * max(1, 4 * resident // config.num_warps)
    return replace(config, programs=programs)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [T, D]
    s_ptr,  # [T, D]
    mean_ptr,  # [T]
    rstd_ptr,  # [T]
    n_rows,
    stride_x_row,
    stride_residual_row,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_keep = (row < n_rows)[:, None]
    s = ()
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        keep = row_keep & (cols < D)
        piece = tl.load(x_ptr + row[:, None] * stride_x_row + cols, mask=keep, other=0.0)
        if HAS_RESIDUAL:
            other = tl.load(residual_ptr + row[:, None] * stride_residual_row + cols, mask=keep, other=0.0)
            # Rounded before the statistics: backward sees s as it is stored.
            piece = (piece.to(tl.float32) + other.to(tl.float32)).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + row[:, None] * D + cols, piece, mask=keep)
        total += piece.to(tl.float32)
        s += (piece,)
    mean = tl.sum(total, axis=1) / D  # [BT]
    square = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        centred = tl.where(cols < D, s[i].to(tl.float32) - mean[:, None], 0.0)
        square += centred * centred
    rstd = tl.rsqrt(tl.sum(square, axis=1) / D + eps)
    tl.store(mean_ptr + row, mean, mask=row < n_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        # Spread over the rows of the tile, weight and bias are read in the tile's own layout, with no exchange.
        spread = tl.zeros([BLOCK_T, 1], dtype=tl.int32) + cols
        weight = tl.load(weight_ptr + spread, mask=spread < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + spread, mask=spread < D, other=0.0).to(tl.float32)
        y = (s[i].to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(y_ptr + row[:, None] * D + cols, y, mask=row_keep & (cols < D))


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [T, D]
    ds_ptr,  # [T, D]
    s_ptr,  # [T, D]
    weight_ptr,  # [D]
    mean_ptr,  # [T]
    rstd_ptr,  # [T]
    dx_ptr,  # [T, D]
    part_ptr,  # [P, 2, D]: dweight, dbias of each program
    n_rows,
    stride_dy_row,
    stride_ds_row,
    stride_s_row,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DS: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    dw = ()
    db = ()
    for _ in tl.static_range(PIECES):
        dw += (tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32),)
        db += (tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32),)
    for tile in range(pid, tl.cdiv(n_rows, BLOCK_T), tl.num_programs(0)):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        row_keep = (row < n_rows)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)
        s = ()
        dy = ()
        for i in tl.static_range(PIECES):
            cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            keep = row_keep & (cols < D)
            s += (tl.load(s_ptr + row[:, None] * stride_s_row + cols, mask=keep, other=0.0),)
            dy += (tl.load(dy_ptr + row[:, None] * stride_dy_row + cols, mask=keep, other=0.0),)
        g_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        gx_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        dw_next = ()
        db_next = ()
        for i in tl.static_range(PIECES):
            spread = tl.zeros([BLOCK_T, 1], dtype=tl.int32) + (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            weight = tl.load(weight_ptr + spread, mask=spread < D, other=0.0).to(tl.float32)
            xhat = (s[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
            dy_i = dy[i].to(tl.float32)  # 0 beyond D and beyond T
            g_sum += dy_i * weight
            gx_sum += dy_i * weight * xhat
            dw_next += (dw[i] + dy_i * xhat,)
            db_next += (db[i] + dy_i,)
        dw = dw_next
        db = db_next
        g_mean = (tl.sum(g_sum, axis=1) / D)[:, None]
        gx_mean = (tl.sum(gx_sum, axis=1) / D)[:, None]
        for i in tl.static_range(PIECES):
            cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            keep = row_keep & (cols < D)
            spread = tl.zeros([BLOCK_T, 1], dtype=tl.int32) + cols
            weight = tl.load(weight_ptr + spread, mask=spread < D, other=0.0).to(tl.float32)
            xhat = (s[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
            dx = (dy[i].to(tl.float32) * weight - g_mean - xhat * gx_mean) * rstd[:, None]
            if HAS_DS:
                dx += tl.load(ds_ptr + row[:, None] * stride_ds_row + cols, mask=keep, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row[:, None] * D + cols, dx, mask=keep)
    for i in tl.static_range(PIECES):
        cols = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(part_ptr + pid * 2 * D + cols, tl.sum(dw[i], axis=0), mask=cols < D)
        tl.store(part_ptr + pid * 2 * D + D + cols, tl.sum(db[i], axis=0), mask=cols < D)


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [T, D], s [T, D], mean [T], rstd [T]); without a residual s is x itself."""
    n_rows, width = x.shape
    config = layer_norm_fwd_config(width, x.dtype, arch_of(x.device))
    x = row_major(x)
    residual = None if residual is None else row_major(residual)
    y = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    s = x if residual is None else torch.empty_like(y)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows:
        _layer_norm_fwd_kernel[(triton.cdiv(n_rows, config.block_t),)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            s_ptr=s,
            mean_ptr=mean,
            rstd_ptr=rstd,
            n_rows=n_rows,
            stride_x_row=x.stride(0),
            stride_residual_row=0 if residual is None else residual.stride(0),
            eps=eps,
            D=width,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            HAS_RESIDUAL=residual is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, D], dweight [D], dbias [D]); dx is the gradient of the residual too."""
    n_rows, width = s.shape
    config = layer_norm_bwd_config(width, s.dtype, arch_of(s.device))
    programs = min(triton.cdiv(n_rows, config.block_t), config.programs)
    dy = row_major(dy)
    ds = None if ds is None else row_major(ds)
    dx = torch.empty((n_rows, width), dtype=s.dtype, device=s.device)
    part = torch.empty((programs, 2 * width), dtype=torch.float32, device=s.device)
    if n_rows:
        _layer_norm_bwd_kernel[(programs,)](
            dy_ptr=dy,
            ds_ptr=ds,
            s_ptr=s,
            weight_ptr=weight,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dx_ptr=dx,
            part_ptr=part,
            n_rows=n_rows,
            stride_dy_row=dy.stride(0),
            stride_ds_row=0 if ds is None else ds.stride(0),
            stride_s_row=s.stride(0),
            D=width,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            HAS_DS=ds is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    dweight, dbias = sum_partials(part, torch.empty((2, width), dtype=weight.dtype, device=s.device)).unbind(0)
    return dx, dweight, dbias


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        ctx.set_materialize_grads(False)
        y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, eps)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.has_residual = residual is not None
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        if dy is None:  # only the sum was used
            return ds, ds if ctx.has_residual else None, None, None, None
        dx, dweight, dbias = layer_norm_bwd(dy, ds, *ctx.saved_tensors)
        return dx, dx if ctx.has_residual else None, dweight, dbias, None


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x where there is none); y = layer_norm(s) * weight + bias.

    Shapes:
        x, residual: [T, D] of one dtype, D at most 8192; weight, bias: [D] of one dtype, which may be wider than x's.

    Returns:
        (y, s), both [T, D] in x's dtype; the statistics are those of s as it is rounded to that dtype.

    Raises:
        ValueError: shapes or dtypes other than these.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != weight.shape or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"expected x [T, D], weight [D] and bias [D] with D in 1..{MAX_WIDTH}, got {list(x.shape)}, "
            f"{list(weight.shape)} and {list(bias.shape)}"
        )
    check_dtype(x=x, weight=weight)
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must share a dtype, got {weight.dtype} and {bias.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)} as x is, got {residual.dtype} {list(residual.shape)}"
        )
    return _AddLayerNorm.apply(x, residual, weight.contiguous(), bias.contiguous(), eps)


def add_layer_norm_cost(
    tokens: int, width: int, dtype: torch.dtype, residual: bool = True, backward: bool = False
) -> Cost:
    """Forward: read x (and residual), write y (and s). Backward: read s, dy and ds, write dx.

    The weight and bias are taken to have x's dtype; without a residual no gradient of s is counted.
    """
    table = tokens * width * dtype.itemsize
    if backward:
        return Cost((4 if residual else 3) * table + 8 * tokens + 3 * width * dtype.itemsize, 16 * tokens * width, 2)
    return Cost((4 if residual else 2) * table + 8 * tokens + 2 * width * dtype.itemsize, 9 * tokens * width, 1)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration, at its fullest: a residual in forward, a gradient of s in backward."""
    cases = sum_cases()
    for width in WIDTHS:
        for dtype, weight in [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)]:
            rows, cols = f"*{TRITON_DTYPE[dtype]}", f"*{TRITON_DTYPE[weight]}"
            label = f"d{width} {rows[1:]} weight {cols[1:]}"
            fwd = layer_norm_fwd_config(width, dtype, arch)
            signature = dict.fromkeys(("x_ptr", "residual_ptr"), rows) | dict.fromkeys(("weight_ptr", "bias_ptr"), cols)
            signature |= dict.fromkeys(("y_ptr", "s_ptr"), rows) | dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
            signature |= {"n_rows": "i32", "stride_x_row": "i32", "stride_residual_row": "i32", "eps": "fp32"}
            cases.append(
                row_case("layer_norm_fwd", label, _layer_norm_fwd_kernel, signature, fwd, D=width, HAS_RESIDUAL=True)
            )
            bwd = layer_norm_bwd_config(width, dtype, arch)
            signature = dict.fromkeys(("dy_ptr", "ds_ptr", "s_ptr"), rows) | {"weight_ptr": cols}
            signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": rows, "part_ptr": "*fp32"}
            signature |= dict.fromkeys(("n_rows", "stride_dy_row", "stride_ds_row", "stride_s_row"), "i32")
            cases.append(
                row_case("layer_norm_bwd", label, _layer_norm_bwd_kernel, signature, bwd, D=width, HAS_DS=True)
            )
    return cases
