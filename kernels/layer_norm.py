"""Residual add and LayerNorm in one pass: s = x + residual; y = (s - mean) * rstd * weight + bias.

Saved for backward: s, and mean and rstd in fp32. With xhat = (s - mean) * rstd and g = dy * weight,

    ds_total = rstd * (g - mean_D(g) - xhat * mean_D(g * xhat)) + ds        (the gradient of x and of residual)
    dweight = sum_T(dy * xhat),   dbias = sum_T(dy)

Each program of the backward adds its rows' share of dweight and dbias in registers; a second kernel adds the programs'
sums in a fixed order. Statistics and sums are fp32. Every table may have its own dtype: under autocast x and y are
bf16 beside an fp32 residual, s and weight, with no cast outside. Where x and residual differ in dtype the backward
writes ds_total once in each.

For whoever did not keep them the backward writes y once more, and takes x and residual in the place of s.

Legend: T rows (tokens), D width, P programs. A row's columns are pieces of BLOCK_D, all of them in registers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv
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
    wider,
)

MAX_WIDTH = 8192


def _narrowest(*dtypes: torch.dtype) -> torch.dtype:
    """Of these dtypes the smallest: 16-byte accesses to its table take the most columns."""
    return min(dtypes, key=lambda dtype: dtype.itemsize)


@cache
def layer_norm_fwd_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """One row to a warp up to D = 1536, for tables of which `dtype` is the narrowest.

    Unmeasured: chosen from compiled resources. Eight warps where Triton 3.6 spills two registers of four.
    """
    return whole_row_config(width, dtype, values=48, num_warps=8 if width == 1024 and dtype.itemsize == 2 else 4)


@cache
def layer_norm_bwd_config(
    width: int, dtype: torch.dtype, arch: int, mixed: bool = False, again: bool = False
) -> LaunchConfig:
    """As many programs as the chip holds at once, each over many rows. Unmeasured: chosen from compiled resources.

    A lane keeps three values for each of its columns (row, dweight, dbias), so it is given fewer than in forward.
    `mixed`: the rows are wider than `dtype`, the narrowest of the tables'. `again`: y is written too. Where Triton 3.6
    to 3.9 spill registers of four warps there are eight, and for narrow rows on sm80 half of them.
    """
    num_warps = 8 if (mixed and width > 1280) or (again and dtype.itemsize == 4 and width == 1280) else 4
    config = whole_row_config(width, dtype, values=40 if dtype.itemsize == 2 else 24, num_warps=num_warps)
    halved = mixed and width <= 192 and arch == 80
    if halved:
        config = replace(config, block_t=max(1, config.block_t // 2))
    columns = cdiv(width, config.block_d) * config.block_d * config.block_t // (32 * config.num_warps)
    # Groups of four warps, by registers: at most 128, 168 and 248 a lane.
    three = columns <= 24 and not mixed and not (again and dtype.itemsize == 4 and width > 1280 and arch >= 100)
    resident = 4 if halved else 3 if three else 2
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
    s_ptr,  # [T, D]: x where HAS_RESIDUAL
    residual_ptr,  # [T, D] where HAS_RESIDUAL
    weight_ptr,  # [D]
    bias_ptr,  # [D] where HAS_Y
    mean_ptr,  # [T]
    rstd_ptr,  # [T]
    dx_ptr,  # [T, D]
    dresidual_ptr,  # [T, D] where SPLIT
    y_ptr,  # [T, D] where HAS_Y; may be dy_ptr
    part_ptr,  # [P, 2, D]: dweight, dbias of each program
    n_rows,
    stride_dy_row,
    stride_ds_row,
    stride_s_row,
    stride_residual_row,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Y: tl.constexpr,
    SPLIT: tl.constexpr,
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
            piece = tl.load(s_ptr + row[:, None] * stride_s_row + cols, mask=keep, other=0.0)
            if HAS_RESIDUAL:
                other = tl.load(residual_ptr + row[:, None] * stride_residual_row + cols, mask=keep, other=0.0)
                piece = piece.to(tl.float32) + other.to(tl.float32)
            s += (piece,)
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
            if SPLIT:
                tl.store(dresidual_ptr + row[:, None] * D + cols, dx, mask=keep)
            if HAS_Y:
                bias = tl.load(bias_ptr + spread, mask=spread < D, other=0.0).to(tl.float32)
                tl.store(y_ptr + row[:, None] * D + cols, xhat * weight + bias, mask=keep)
    for i in tl.static_range(PIECES):
        cols = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(part_ptr + pid * 2 * D + cols, tl.sum(dw[i], axis=0), mask=cols < D)
        tl.store(part_ptr + pid * 2 * D + D + cols, tl.sum(db[i], axis=0), mask=cols < D)


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [T, D], s [T, D], mean [T], rstd [T]); without a residual s is x itself, without an out_dtype y has s's."""
    n_rows, width = x.shape
    s_dtype = x.dtype if residual is None else wider(x.dtype, residual.dtype)
    out_dtype = out_dtype or s_dtype
    tables = (x.dtype, out_dtype) if residual is None else (x.dtype, residual.dtype, out_dtype)
    config = layer_norm_fwd_config(width, _narrowest(*tables), arch_of(x.device))
    x = row_major(x)
    residual = None if residual is None else row_major(residual)
    y = torch.empty((n_rows, width), dtype=out_dtype, device=x.device)
    s = x if residual is None else torch.empty((n_rows, width), dtype=s_dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows:
        _layer_norm_fwd_kernel[(cdiv(n_rows, config.block_t),)](
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
            enable_fp_fusion=False,
        )
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [T, D], dresidual [T, D], dweight [D], dbias [D]); dresidual is dx itself where their dtypes agree.

    s may be a pair (x, residual) whose dtypes differ. x_dtype and residual_dtype are s's (theirs) unless given. With
    `bias`, y [T, D], contiguous, is given the values of the forward pass again; it may be dy itself.
    """
    s, residual = (s, None) if isinstance(s, Tensor) else s
    n_rows, width = s.shape
    x_dtype, residual_dtype = x_dtype or s.dtype, residual_dtype or (s if residual is None else residual).dtype
    assert residual is None or residual.dtype != s.dtype  # so that their sum is fp32
    s_dtype = s.dtype if residual is None else torch.float32
    narrow = _narrowest(dy.dtype, s.dtype, x_dtype, residual_dtype)
    config = layer_norm_bwd_config(width, narrow, arch_of(s.device), narrow != s_dtype, y is not None)
    programs = min(cdiv(n_rows, config.block_t), config.programs)
    dy, s = row_major(dy), row_major(s)
    ds = None if ds is None else row_major(ds)
    residual = None if residual is None else row_major(residual)
    split = x_dtype != residual_dtype
    dx = torch.empty((n_rows, width), dtype=x_dtype, device=s.device)
    dresidual = torch.empty((n_rows, width), dtype=residual_dtype, device=s.device) if split else dx
    part = torch.empty((programs, 2 * width), dtype=torch.float32, device=s.device)
    if n_rows:
        _layer_norm_bwd_kernel[(programs,)](
            dy_ptr=dy,
            ds_ptr=ds,
            s_ptr=s,
            residual_ptr=residual,
            weight_ptr=weight,
            bias_ptr=bias,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dx_ptr=dx,
            dresidual_ptr=dresidual if split else None,
            y_ptr=y,
            part_ptr=part,
            n_rows=n_rows,
            stride_dy_row=dy.stride(0),
            stride_ds_row=0 if ds is None else ds.stride(0),
            stride_s_row=s.stride(0),
            stride_residual_row=0 if residual is None else residual.stride(0),
            D=width,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            HAS_DS=ds is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_Y=y is not None,
            SPLIT=split,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    dweight, dbias = sum_partials(part, torch.empty((2, width), dtype=weight.dtype, device=s.device)).unbind(0)
    return dx, dresidual, dweight, dbias


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, out_dtype):
        ctx.set_materialize_grads(False)
        y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, eps, out_dtype)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
        ctx.has_residual = residual is not None
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        if dy is None:  # only the sum was used
            dx, dresidual = (None if ds is None else ds.to(dtype) for dtype in ctx.dtypes)
            return dx, dresidual if ctx.has_residual else None, None, None, None, None
        dx, dresidual, dweight, dbias = layer_norm_bwd(dy, ds, *ctx.saved_tensors, *ctx.dtypes)
        return dx, dresidual if ctx.has_residual else None, dweight, dbias, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x where there is none); y = layer_norm(s) * weight + bias.

    Shapes:
        x, residual: [T, D], each fp32, fp16 or bf16, D at most 8192; weight, bias: [D] of one dtype, any of these.

    Returns:
        (y, s), both [T, D]: s in the wider of x's and residual's dtypes, y in `out_dtype` (s's unless given); the
        statistics are those of s as it is rounded to its dtype.

    Raises:
        ValueError: shapes or dtypes other than these.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != weight.shape or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"expected x [T, D], weight [D] and bias [D] with D in 1..{MAX_WIDTH}, got {list(x.shape)}, "
            f"{list(weight.shape)} and {list(bias.shape)}"
        )
    check_dtype(x=x, residual=residual, weight=weight)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ValueError(f"out_dtype must be fp32, fp16 or bf16, got {out_dtype}")
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must share a dtype, got {weight.dtype} and {bias.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    return _AddLayerNorm.apply(x, residual, weight.contiguous(), bias.contiguous(), eps, out_dtype)


def add_layer_norm_cost(
    tokens: int,
    width: int,
    dtype: torch.dtype,
    residual: bool = True,
    backward: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    again: str = "",
) -> Cost:
    """Forward: read x (and residual), write y (and s). Backward: read s, dy and ds, write dx (and dresidual).

    `dtype` is x's and that of the residual and the weight unless given; y has s's. One gradient serves x and the
    residual where their dtypes agree; without a residual no gradient of s is counted. `again`, what the backward makes
    again: "y", which it writes too, or "y, s", for which it reads x and the residual and not s.
    """
    residual_dtype, weight_dtype = residual_dtype or dtype, weight_dtype or dtype
    s_dtype = wider(dtype, residual_dtype) if residual else dtype
    x, y, s, other = (d.itemsize for d in (dtype, out_dtype or s_dtype, s_dtype, residual_dtype))
    entries, ones = tokens * width, width * weight_dtype.itemsize
    if backward:
        each = s + y + x + (s if residual else 0) + (other if residual and residual_dtype != dtype else 0)
        each += (y if again else 0) + (x if "s" in again else 0)
        return Cost(each * entries + 8 * tokens + (4 if again else 3) * ones, (18 if again else 16) * entries, 2)
    each = x + y + (other + s if residual else 0)
    return Cost(each * entries + 8 * tokens + 2 * ones, 9 * entries, 1)


class _Tables(NamedTuple):
    """The dtypes of one configuration; residual: None where there is none."""

    x: torch.dtype
    residual: torch.dtype | None
    y: torch.dtype
    weight: torch.dtype

    @property
    def s(self) -> torch.dtype:
        return self.x if self.residual is None else wider(self.x, self.residual)

    @property
    def split(self) -> bool:
        return self.residual is not None and self.residual != self.x

    @property
    def narrowest(self) -> torch.dtype:
        return _narrowest(self.x, self.residual or self.x, self.y)

    def pointers(self) -> dict[str, str]:
        """Of all arguments of either kernel that are tables."""
        dtypes = {"x": self.x, "residual": self.residual or self.s, "y": self.y, "s": self.s, "dy": self.y}
        dtypes |= {"ds": self.s, "dx": self.x, "dresidual": self.residual or self.s}
        dtypes |= {"weight": self.weight, "bias": self.weight}
        dtypes |= dict.fromkeys(("mean", "rstd", "part"), torch.float32)
        return {f"{name}_ptr": f"*{TRITON_DTYPE[dtype]}" for name, dtype in dtypes.items()}

    def label(self, width: int) -> str:
        """For a person to read."""
        words = [f"d{width}", TRITON_DTYPE[self.x]]
        words += ["alone"] if self.residual is None else []
        words += ["residual", TRITON_DTYPE[self.residual]] if self.residual and self.split else []
        words += ["out", TRITON_DTYPE[self.y]] if self.y != self.s else []
        return " ".join([*words, "weight", TRITON_DTYPE[self.weight]])


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration: with a residual and without, of one dtype and as under autocast, where 16-bit x and
    y go beside an fp32 or a 16-bit residual, and the last norm of a model may give fp32. Nothing but y follows a last
    norm, so that its backward has no gradient of s to add. A norm that a product follows makes y again."""
    wide, narrow = torch.float32, (torch.bfloat16, torch.float16)
    kinds = [_Tables(d, d, d, d) for d in DTYPES] + [_Tables(wide, None, d, wide) for d in DTYPES]
    kinds += [_Tables(torch.bfloat16, r, torch.bfloat16, wide) for r in (torch.bfloat16, None)]
    within, last = ([_Tables(d, wide, y or d, wide) for d in narrow] for y in (None, wide))
    cases = sum_cases()
    for width in WIDTHS:
        cases += [_forward_case(arch, width, kind) for kind in (*kinds, *within, *last)]
        cases += [_backward_case(arch, width, kind, kind.residual is not None) for kind in (*kinds, *within)]
        cases += [_backward_case(arch, width, kind, False) for kind in (*within, *last)]
        cases += [_backward_case(arch, width, kind, True, "y") for kind in (*kinds, *within)]
        cases += [_backward_case(arch, width, kind, True, "y, s") for kind in within]
    return cases


def _forward_case(arch: int, width: int, tables: _Tables) -> CompileCase:
    config = layer_norm_fwd_config(width, tables.narrowest, arch)
    signature = tables.pointers() | {"eps": "fp32"}
    signature |= dict.fromkeys(("n_rows", "stride_x_row", "stride_residual_row"), "i32")
    constexprs = {"D": width, "HAS_RESIDUAL": tables.residual is not None}
    constexprs |= {"residual_ptr": None} if tables.residual is None else {}
    return row_case("layer_norm_fwd", tables.label(width), _layer_norm_fwd_kernel, signature, config, **constexprs)


def _backward_case(arch: int, width: int, tables: _Tables, has_ds: bool, again: str = "") -> CompileCase:
    config = layer_norm_bwd_config(width, tables.narrowest, arch, tables.narrowest != tables.s, bool(again))
    signature, strides = tables.pointers(), ("n_rows", "stride_dy_row", "stride_ds_row", "stride_s_row")
    signature |= dict.fromkeys((*strides, "stride_residual_row"), "i32")
    constexprs: dict[str, Any] = {"D": width, "HAS_DS": has_ds, "SPLIT": tables.split}
    constexprs |= {"HAS_RESIDUAL": "s" in again, "HAS_Y": bool(again)}
    constexprs |= {} if tables.split else {"dresidual_ptr": None}
    constexprs |= {} if has_ds else {"ds_ptr": None}
    constexprs |= {} if again else {"bias_ptr": None, "y_ptr": None}
    if "s" in again:
        signature["s_ptr"] = signature["x_ptr"]
    else:
        constexprs["residual_ptr"] = None
    label = tables.label(width) + (" last" if tables.residual is not None and not has_ds else "")
    label += f" again {again}" if again else ""
    return row_case("layer_norm_bwd", label, _layer_norm_bwd_kernel, signature, config, **constexprs)
