"""Tokens by row: out of a table, back into it, and into the predictor's input.

    gather_rows:         y[t] = x[rows[t]] (+ pos_embed[rows[t] % N])
    scatter_rows:        y[rows[t]] += x[t] over zeros, its transpose
    assemble_predictor:  y[t] = (context[source[t]] or the mask token where source[t] < 0) + pos_embed[patches[t]]

Saved for backward: the rows, nothing of width D. A transpose runs by destination, over the inverse of the rows: no
atomics, every row of the result written once, repeated rows added in fp32 in the order of t. Where rows are unique the
inverse is one number a destination; where they repeat it is a stable sort.

Legend: T tokens, R rows of a table, N patches of an image, D width, P chunks of tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv
from .rows import DTYPES, WIDTHS, LaunchConfig, check_dtype, row_case, row_major, sum_partials, tile_config

_PLACE_CONFIG = LaunchConfig(1024, 1, num_warps=4)  # eight tokens to a lane
_PATCH_OF_14 = 3 * 14 * 14  # pixels, which no power of two above 4 divides; those of 8 and 16 are among the widths
_TILES = 8  # of the tokens whose mask-token gradient one program sums


class RowInverse(NamedTuple):
    """The tokens of each destination row.

    starts is None: rows are unique; order int32 [R] is the token of each row, or -1.
    Otherwise row r takes the tokens order[starts[r]:starts[r + 1]]; order int32 [T], starts int32 [R + 1].
    """

    order: Tensor
    starts: Tensor | None


def gather_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """Four 16-byte accesses of each table to a lane, two in fp32. Unmeasured: chosen from compiled resources."""
    return tile_config(width, dtype, vectors=4 if dtype.itemsize == 2 else 2)


def scatter_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """Four 16-byte accesses to a lane and tile; on Blackwell, where the sums of four would spill, two.

    Unmeasured: chosen from compiled resources.
    """
    return tile_config(width, dtype, vectors=2 if arch >= 100 and dtype.itemsize == 2 else 4)


@triton.jit(do_not_specialize=["n_tokens", "n_patches"])
def _gather_kernel(
    x_ptr,  # [R, D]
    rows_ptr,  # [T]
    pos_ptr,  # [N, D]
    y_ptr,  # [T, D]
    n_tokens,
    n_patches,
    stride_x_row,
    stride_pos_row,
    D: tl.constexpr,
    HAS_POS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    t = pid // PIECES * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    keep = (t < n_tokens)[:, None] & (cols < D)
    rows = tl.load(rows_ptr + t, mask=t < n_tokens, other=0)
    y = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_x_row + cols, mask=keep)
    if HAS_POS:
        patches = (rows % n_patches).to(tl.int64)
        pos = tl.load(pos_ptr + patches[:, None] * stride_pos_row + cols, mask=keep)
        y = y.to(tl.float32) + pos.to(tl.float32)
    tl.store(y_ptr + t[:, None] * D + cols, y, mask=keep)


@triton.jit(do_not_specialize=["n_tokens"])
def _assemble_kernel(
    context_ptr,  # [Tc, D]
    token_ptr,  # [D]
    pos_ptr,  # [N, D]
    source_ptr,  # [T]
    patches_ptr,  # [T]
    y_ptr,  # [T, D]
    n_tokens,
    stride_context_row,
    stride_pos_row,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    t = pid // PIECES * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    keep = (t < n_tokens)[:, None] & (cols < D)
    source = tl.load(source_ptr + t, mask=t < n_tokens, other=0).to(tl.int64)[:, None]
    patches = tl.load(patches_ptr + t, mask=t < n_tokens, other=0).to(tl.int64)[:, None]
    pos = tl.load(pos_ptr + patches * stride_pos_row + cols, mask=keep)
    context = tl.load(context_ptr + source * stride_context_row + cols, mask=keep & (source >= 0), other=0.0)
    token = tl.load(token_ptr + source * 0 + cols, mask=keep & (source < 0), other=0.0)
    tl.store(
        y_ptr + t[:, None] * D + cols, context.to(tl.float32) + token.to(tl.float32) + pos.to(tl.float32), mask=keep
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _place_kernel(
    rows_ptr,  # [T]
    order_ptr,  # [R]
    n_tokens,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.load(rows_ptr + t, mask=t < n_tokens, other=0).to(tl.int64)
    tl.store(order_ptr + rows, t.to(tl.int32), mask=t < n_tokens)


@triton.jit(do_not_specialize=["n_rows"])
def _scatter_kernel(
    x_ptr,  # [T, D]
    order_ptr,  # [R] where UNIQUE, else [T]
    starts_ptr,  # [R + 1]
    y_ptr,  # [R, D]
    n_rows,
    stride_x_row,
    D: tl.constexpr,
    UNIQUE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    row = pid // PIECES * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    row_keep = row < n_rows
    if UNIQUE:
        t = tl.load(order_ptr + row, mask=row_keep, other=-1).to(tl.int64)[:, None]
        y = tl.load(x_ptr + t * stride_x_row + cols, mask=(t >= 0) & (cols < D), other=0.0)
    else:
        start = tl.load(starts_ptr + row, mask=row_keep, other=0)
        count = tl.load(starts_ptr + row + 1, mask=row_keep, other=0) - start
        y = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for step in range(tl.max(count)):
            more = step < count
            t = tl.load(order_ptr + start + step, mask=more, other=0).to(tl.int64)[:, None]
            x = tl.load(x_ptr + t * stride_x_row + cols, mask=more[:, None] & (cols < D), other=0.0)
            y += x.to(tl.float32)
    tl.store(y_ptr + row[:, None] * D + cols, y, mask=row_keep[:, None] & (cols < D))


@triton.jit(do_not_specialize=["n_tokens"])
def _mask_token_kernel(
    dy_ptr,  # [T, D]
    source_ptr,  # [T]
    part_ptr,  # [P, D]
    n_tokens,
    stride_dy_row,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // PIECES
    cols = pid % PIECES * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        t = (chunk * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        keep = tl.load(source_ptr + t, mask=t < n_tokens, other=0) < 0
        dy = tl.load(
            dy_ptr + t[:, None] * stride_dy_row + cols[None, :], mask=keep[:, None] & (cols < D)[None, :], other=0.0
        )
        acc += dy.to(tl.float32)
    tl.store(part_ptr + chunk * D + cols, tl.sum(acc, axis=0), mask=cols < D)


def row_inverse(rows: Tensor, num_rows: int, unique: bool = False) -> RowInverse:
    """The tokens of each of num_rows rows, in the order of t; rows below 0 belong to none.

    `unique` is the caller's word that no row occurs twice (and none is below 0). Nothing is read from the device.
    """
    n_tokens = rows.shape[0]
    if unique:
        order = torch.full((num_rows,), -1, dtype=torch.int32, device=rows.device)
        if n_tokens:
            _place_kernel[(cdiv(n_tokens, _PLACE_CONFIG.block_t),)](
                rows_ptr=rows,
                order_ptr=order,
                n_tokens=n_tokens,
                BLOCK_T=_PLACE_CONFIG.block_t,
                num_warps=_PLACE_CONFIG.num_warps,
                num_stages=_PLACE_CONFIG.num_stages,
                enable_fp_fusion=False,
            )
        return RowInverse(order, None)
    ordered, order = torch.sort(rows, stable=True)
    bounds = torch.arange(num_rows + 1, dtype=rows.dtype, device=rows.device)
    return RowInverse(order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True))


def gather_rows_fwd(x: Tensor, rows: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """y [T, D] in x's dtype."""
    width, n_tokens = x.shape[1], rows.shape[0]
    config = gather_config(width, x.dtype, arch_of(x.device))
    x = row_major(x)
    pos_embed = None if pos_embed is None else row_major(pos_embed)
    y = torch.empty((n_tokens, width), dtype=x.dtype, device=x.device)
    if y.numel():
        _gather_kernel[(cdiv(n_tokens, config.block_t) * cdiv(width, config.block_d),)](
            x_ptr=x,
            rows_ptr=rows,
            pos_ptr=pos_embed,
            y_ptr=y,
            n_tokens=n_tokens,
            n_patches=1 if pos_embed is None else pos_embed.shape[0],
            stride_x_row=x.stride(0),
            stride_pos_row=0 if pos_embed is None else pos_embed.stride(0),
            D=width,
            HAS_POS=pos_embed is not None,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return y


def scatter_rows_fwd(x: Tensor, inverse: RowInverse, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """y [num_rows, D] in `dtype` (x's unless given): the sum of the tokens of each row, 0 where there is none."""
    width = x.shape[1]
    config = scatter_config(width, x.dtype, arch_of(x.device))
    x = row_major(x)
    y = torch.empty((num_rows, width), dtype=dtype or x.dtype, device=x.device)
    if y.numel():
        _scatter_kernel[(cdiv(num_rows, config.block_t) * cdiv(width, config.block_d),)](
            x_ptr=x,
            order_ptr=inverse.order,
            starts_ptr=inverse.starts,
            y_ptr=y,
            n_rows=num_rows,
            stride_x_row=x.stride(0),
            D=width,
            UNIQUE=inverse.starts is None,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return y


def assemble_predictor_fwd(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor, source: Tensor, patches: Tensor
) -> Tensor:
    """y [T, D] in context's dtype."""
    width, n_tokens = context.shape[1], source.shape[0]
    config = gather_config(width, context.dtype, arch_of(context.device))
    context, pos_embed = row_major(context), row_major(pos_embed)
    y = torch.empty((n_tokens, width), dtype=context.dtype, device=context.device)
    if y.numel():
        _assemble_kernel[(cdiv(n_tokens, config.block_t) * cdiv(width, config.block_d),)](
            context_ptr=context,
            token_ptr=mask_token,
            pos_ptr=pos_embed,
            source_ptr=source,
            patches_ptr=patches,
            y_ptr=y,
            n_tokens=n_tokens,
            stride_context_row=context.stride(0),
            stride_pos_row=pos_embed.stride(0),
            D=width,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return y


def mask_token_bwd(dy: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """dmask_token [D]: the sum of dy over the tokens whose source is below 0."""
    n_tokens, width = dy.shape
    config = scatter_config(width, dy.dtype, arch_of(dy.device))
    dy = row_major(dy)
    chunks = cdiv(n_tokens, config.block_t * _TILES)
    part = torch.empty((chunks, width), dtype=torch.float32, device=dy.device)
    if part.numel():
        _mask_token_kernel[(chunks * cdiv(width, config.block_d),)](
            dy_ptr=dy,
            source_ptr=source,
            part_ptr=part,
            n_tokens=n_tokens,
            stride_dy_row=dy.stride(0),
            D=width,
            TILES=_TILES,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return sum_partials(part, torch.empty(width, dtype=dtype, device=dy.device))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, pos_embed, unique, inverse):
        ctx.save_for_backward(rows, *(inverse or ()))
        ctx.unique, ctx.table, ctx.dtype = unique, x.shape[0], x.dtype
        ctx.pos = None if pos_embed is None else (pos_embed.shape[0], pos_embed.dtype)
        return gather_rows_fwd(x, rows, pos_embed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, *inverse = ctx.saved_tensors
        dx = dpos = None
        if ctx.needs_input_grad[0]:
            inverse = RowInverse(*inverse) if inverse else row_inverse(rows, ctx.table, ctx.unique)
            dx = scatter_rows_fwd(dy, inverse, ctx.table)
        if ctx.needs_input_grad[2]:
            n_patches, dtype = ctx.pos
            dpos = scatter_rows_fwd(dy, row_inverse(rows % n_patches, n_patches), n_patches, dtype)
        return dx, None, dpos, None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, num_rows, inverse):
        ctx.save_for_backward(rows)
        return scatter_rows_fwd(x, inverse, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        return gather_rows_fwd(dy, rows), None, None, None


class _AssemblePredictor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, mask_token, pos_embed, source, patches, inverse):
        ctx.save_for_backward(source, patches, *(inverse or ()))
        ctx.table, ctx.pos, ctx.token = context.shape[0], (pos_embed.shape[0], pos_embed.dtype), mask_token.dtype
        return assemble_predictor_fwd(context, mask_token, pos_embed, source, patches)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        source, patches, *inverse = ctx.saved_tensors
        dcontext = dtoken = dpos = None
        if ctx.needs_input_grad[0]:
            inverse = RowInverse(*inverse) if inverse else row_inverse(source, ctx.table)
            dcontext = scatter_rows_fwd(dy, inverse, ctx.table)
        if ctx.needs_input_grad[1]:
            dtoken = mask_token_bwd(dy, source, ctx.token)
        if ctx.needs_input_grad[2]:
            n_patches, dtype = ctx.pos
            dpos = scatter_rows_fwd(dy, row_inverse(patches, n_patches), n_patches, dtype)
        return dcontext, dtoken, dpos, None, None, None


def gather_rows(
    x: Tensor,
    rows: Tensor,
    pos_embed: Tensor | None = None,
    unique: bool = False,
    inverse: RowInverse | None = None,
) -> Tensor:
    """y[t] = x[rows[t]] (+ pos_embed[rows[t] % N]).

    Shapes:
        x: [R, D]; rows: int32 or int64 [T] in 0..R-1 (not checked); pos_embed: [N, D], dtypes may differ.
        unique: the caller's word that no row occurs twice, which makes the backward cheaper.
        inverse: `row_inverse(rows, R, unique)` where it is at hand; made in the backward otherwise.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check_index(rows=rows)
    check_dtype(x=x, pos_embed=pos_embed)
    if x.dim() != 2 or (pos_embed is not None and pos_embed.shape[1:] != x.shape[1:]):
        shape = None if pos_embed is None else list(pos_embed.shape)
        raise ValueError(f"expected x [R, D] and pos_embed [N, D], got {list(x.shape)} and {shape}")
    return _GatherRows.apply(x, rows.contiguous(), pos_embed, unique, inverse)


def scatter_rows(
    x: Tensor, rows: Tensor, num_rows: int, unique: bool = False, inverse: RowInverse | None = None
) -> Tensor:
    """y[rows[t]] += x[t] over zeros, the transpose of `gather_rows`.

    Shapes:
        x: [T, D]; rows: int32 or int64 [T] in 0..num_rows-1 (not checked).
        unique, inverse: as for `gather_rows`; the inverse is needed in the forward here.

    Returns:
        [num_rows, D] in x's dtype; repeated rows are added in fp32 in the order of t.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check_index(rows=rows)
    check_dtype(x=x)
    if x.dim() != 2 or rows.shape != x.shape[:1]:
        raise ValueError(f"expected x [T, D] and rows [T], got {list(x.shape)} and {list(rows.shape)}")
    rows = rows.contiguous()
    return _ScatterRows.apply(x, rows, num_rows, inverse or row_inverse(rows, num_rows, unique))


def assemble_predictor(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    source: Tensor,
    patches: Tensor,
    inverse: RowInverse | None = None,
) -> Tensor:
    """y[t] = (context[source[t]] if source[t] >= 0 else mask_token) + pos_embed[patches[t]].

    Shapes:
        context: [Tc, D]; mask_token: [D]; pos_embed: [N, D]; dtypes may differ.
        source: int32 or int64 [T] in -1..Tc-1; patches: int32 or int64 [T] in 0..N-1 (neither is checked).
        inverse: `row_inverse(source, Tc)` where it is at hand; made in the backward otherwise.

    Returns:
        [T, D] in context's dtype.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check_index(source=source, patches=patches)
    check_dtype(context=context, mask_token=mask_token, pos_embed=pos_embed)
    row = context.shape[1:]
    if context.dim() != 2 or mask_token.shape != row or pos_embed.dim() != 2 or pos_embed.shape[1:] != row:
        raise ValueError(
            f"expected context [Tc, D], mask_token [D] and pos_embed [N, D], got {list(context.shape)}, "
            f"{list(mask_token.shape)} and {list(pos_embed.shape)}"
        )
    if source.shape != patches.shape:
        raise ValueError(f"source and patches must both be [T], got {list(source.shape)} and {list(patches.shape)}")
    index = source.contiguous(), patches.contiguous()
    return _AssemblePredictor.apply(context, mask_token.contiguous(), pos_embed, *index, inverse)


def _check_index(**indices: Tensor) -> None:
    for name, index in indices.items():
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64 [T], got {index.dtype} {list(index.shape)}")


def gather_rows_cost(tokens: int, width: int, dtype: torch.dtype, num_patches: int = 0, index_bytes: int = 4) -> Cost:
    """Read the rows and pos_embed [num_patches, D] (0: none), write y. The backward is scatter_rows_cost."""
    row = width * dtype.itemsize
    flops = tokens * width if num_patches else 0
    return Cost((2 * tokens + num_patches) * row + index_bytes * tokens, flops, 1)


def scatter_rows_cost(
    tokens: int,
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    unique: bool = False,
    inverse: bool = False,
    index_bytes: int = 4,
) -> Cost:
    """Read the tokens and the inverse, write every row of y. Backward: gather_rows_cost.

    Without an `inverse` at hand its making is in the launches: two where rows are unique, else four operations of
    torch (a sort, which may be several kernels, a cast, an arange and a search), and rows are read once more.
    """
    numbers = num_rows if unique else tokens + num_rows + 1
    moved = (tokens + num_rows) * width * dtype.itemsize + 4 * numbers + (0 if inverse else index_bytes * tokens)
    making = 0 if inverse else (2 if unique else 4)
    return Cost(moved, 0 if unique else tokens * width, 1 + making)


def assemble_predictor_cost(
    tokens: int,
    context_tokens: int,
    num_patches: int,
    width: int,
    dtype: torch.dtype,
    index_bytes: int = 4,
    backward: bool = False,
) -> Cost:
    """Forward: read the tables and two indices, write y. Backward, the inverse at hand: read dy, write dcontext."""
    row = width * dtype.itemsize
    if backward:
        index = index_bytes * tokens + 4 * (tokens + context_tokens + 1)
        return Cost((tokens + context_tokens + 1) * row + index, tokens * width, 3)
    return Cost((tokens + context_tokens + num_patches + 1) * row + 2 * index_bytes * tokens, tokens * width, 1)


def _patches_of_14(arch: int) -> CompileCase:
    """Pixels of patches: that a step of 588 numbers keeps to 16 bytes Triton does not see, and loads 8 at once."""
    config = gather_config(_PATCH_OF_14, torch.float32, arch)
    signature = {"x_ptr": "*fp32", "rows_ptr": "*i64", "y_ptr": "*fp32"}
    signature |= dict.fromkeys(("n_tokens", "n_patches", "stride_x_row", "stride_pos_row"), "i32")
    constexprs = {"D": _PATCH_OF_14, "HAS_POS": False, "pos_ptr": None}
    label = f"d{_PATCH_OF_14} fp32"
    case = row_case("gather_patches", label, _gather_kernel, signature, config, **constexprs)
    return replace(case, aligned=tuple(name for name in case.aligned if name != "stride_x_row"))


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration, with int64 indices, which are those of `Ragged`."""
    cases = []
    index = dict.fromkeys(("source_ptr", "patches_ptr"), "*i64")
    for width in WIDTHS:
        for dtype in DTYPES:
            rows = f"*{TRITON_DTYPE[dtype]}"
            label = f"d{width} {rows[1:]}"
            fwd, bwd = gather_config(width, dtype, arch), scatter_config(width, dtype, arch)
            gather = {"x_ptr": rows, "rows_ptr": "*i64", "pos_ptr": rows, "y_ptr": rows}
            gather |= dict.fromkeys(("n_tokens", "n_patches", "stride_x_row", "stride_pos_row"), "i32")
            for has_pos in (False, True):
                constexprs = {"D": width, "HAS_POS": has_pos} | ({} if has_pos else {"pos_ptr": None})
                name = label + (" pos" if has_pos else "")
                cases.append(row_case("gather_rows", name, _gather_kernel, gather, fwd, **constexprs))
            scatter = {"x_ptr": rows, "order_ptr": "*i32", "starts_ptr": "*i32", "y_ptr": rows, "n_rows": "i32"}
            scatter |= {"stride_x_row": "i32"}
            for unique in (False, True):
                constexprs = {"D": width, "UNIQUE": unique} | ({"starts_ptr": None} if unique else {})
                name = label + (" unique" if unique else "")
                cases.append(row_case("scatter_rows", name, _scatter_kernel, scatter, bwd, **constexprs))
            for own, name in {rows: label, "*fp32": f"{label} own fp32"}.items():  # own: parameters
                signature = {"context_ptr": rows, "token_ptr": own, "pos_ptr": own} | index | {"y_ptr": rows}
                signature |= dict.fromkeys(("n_tokens", "stride_context_row", "stride_pos_row"), "i32")
                cases.append(row_case("assemble_predictor", name, _assemble_kernel, signature, fwd, D=width))
            signature = {"dy_ptr": rows, "source_ptr": "*i64", "part_ptr": "*fp32"}
            signature |= {"n_tokens": "i32", "stride_dy_row": "i32"}
            cases.append(row_case("mask_token_bwd", label, _mask_token_kernel, signature, bwd, D=width, TILES=_TILES))
    cases.append(_patches_of_14(arch))
    signature = {"rows_ptr": "*i64", "order_ptr": "*i32", "n_tokens": "i32"}
    cases.append(row_case("row_inverse", "i64", _place_kernel, signature, _PLACE_CONFIG))
    return cases
