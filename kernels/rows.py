"""What the row kernels share: how rows lie over the threads, and the fixed-order sum of partial sums.

A row of D columns is read in pieces of BLOCK_D columns, a 16-byte access to each lane, so that a width such as 1280 or
1408 costs 5 or 6 pieces of 256 and not one of 2048. Where a kernel needs a whole row, its pieces stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TRITON_DTYPE, CompileCase, cdiv

WIDTHS = (192, 384, 768, 1024, 1280, 1408)  # of the encoders vit_tiny .. vit_giant; 384 is the predictor's too
HIDDEN_WIDTHS = (768, 1536, 3072, 4096, 5120, 6144)  # of their MLPs
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}  # A100, RTX 3090, RTX 4090, H100 and H200, B200


@dataclass(frozen=True)
class LaunchConfig:
    """block_t rows by block_d columns are one tile; `programs` is the most programs launched (0: one for each tile)."""

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int = 1
    programs: int = 0

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_d} w{self.num_warps}" + (f" p{self.programs}" if self.programs else "")


_SUM_CONFIG = LaunchConfig(64, 32, num_warps=4)  # partial sums by columns: pieces of 128 bytes


@cache
def tile_config(width: int, dtype: torch.dtype, vectors: int = 4) -> LaunchConfig:
    """Tiles for kernels that treat columns apart: `vectors` 16-byte accesses to each of 128 lanes, none beyond D.

    Unmeasured: chosen from compiled resources and the bytes in flight that reach the memory's bandwidth.
    """
    vector, width = 16 // dtype.itemsize, max(width, 1)  # nothing is launched for no columns
    block_d = min(32 * vector, width & -width)  # the largest power of two that divides D
    if block_d < 8 * vector:
        block_d = min(32 * vector, triton.next_power_of_2(width))  # masked
    return LaunchConfig(max(1, 128 * vectors * vector // block_d), block_d, num_warps=4)


@cache
def whole_row_config(width: int, dtype: torch.dtype, values: int, num_warps: int) -> LaunchConfig:
    """Tiles of whole rows: the fewest warps a row so that a lane holds at most `values` of its columns.

    Unmeasured: chosen from compiled resources (registers, spills, warps a multiprocessor).
    """
    vector = 16 // dtype.itemsize
    row_warps = 1
    while row_warps < 16 and width > values * 32 * row_warps:
        row_warps *= 2
    num_warps = max(num_warps, row_warps)
    block_d = min(32 * row_warps * vector, max(16, triton.next_power_of_2(width)))
    for lanes in (16, 8):  # a fraction of a warp fits narrow widths such as 384 = 3 * 16 * 8 exactly
        if width % block_d and width % (lanes * vector) == 0 and width <= values * lanes:
            block_d = lanes * vector
    rows_at_once = max(1, 32 * num_warps * vector // block_d)
    return LaunchConfig(rows_at_once, block_d, num_warps)


def row_major(x: Tensor) -> Tensor:
    """x [T, D] itself where a row's columns lie side by side, else a copy in which they do."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype of a sum of two tables, each fp32, fp16 or bf16. No dispatch, unlike PyTorch's own."""
    return first if first == second else torch.float32


def check_dtype(**tables: Tensor | None) -> None:
    """ValueError unless every table given is fp32, fp16 or bf16: sums are fp32, too few bits for fp64."""
    for name, table in tables.items():
        if table is not None and table.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp32, fp16 or bf16, got {table.dtype}")


def row_case(
    name: str, label: str, kernel: Any, signature: dict[str, str], config: LaunchConfig, **constexprs: Any
) -> CompileCase:
    """A compile case of a row kernel: tables that start and step by multiples of 16, as the shipped widths do."""
    constexprs |= {"BLOCK_T": config.block_t, "BLOCK_D": config.block_d}
    constexprs = {a: constexprs[a] for a in kernel.arg_names if a in constexprs}
    signature = {a: "constexpr" if a in constexprs else signature[a] for a in kernel.arg_names}
    return CompileCase(
        name=name,
        config=f"{label} {config}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(
            a
            for a, kind in signature.items()
            if kind != "constexpr" and (a.endswith("_ptr") or a.startswith("stride_") or a == "width")
        ),
    )


@triton.jit(do_not_specialize=["n_parts"])
def _sum_partials_kernel(
    part_ptr,  # [P, D]
    out_ptr,  # [D]
    n_parts,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for start in range(0, n_parts, BLOCK_T):
        parts = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        keep = (parts < n_parts)[:, None] & (cols < width)[None, :]
        acc += tl.load(part_ptr + parts[:, None] * width + cols[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + cols, tl.sum(acc, axis=0), mask=cols < width)


def sum_partials(part: Tensor, out: Tensor) -> Tensor:
    """out[c] = sum over p of part[p, c], always added in the same order. Shapes: part fp32 [P, D]; out [D]."""
    n_parts, width = part.shape
    _sum_partials_kernel[(cdiv(width, _SUM_CONFIG.block_d),)](
        part_ptr=part,
        out_ptr=out,
        n_parts=n_parts,
        width=width,
        BLOCK_T=_SUM_CONFIG.block_t,
        BLOCK_D=_SUM_CONFIG.block_d,
        num_warps=_SUM_CONFIG.num_warps,
        num_stages=_SUM_CONFIG.num_stages,
        enable_fp_fusion=False,
    )
    return out


def sum_cases() -> list[CompileCase]:
    """The shipped configurations of the sum; the same for every chip."""
    cases = []
    for dtype in DTYPES:
        signature = {"part_ptr": "*fp32", "out_ptr": f"*{TRITON_DTYPE[dtype]}", "n_parts": "i32", "width": "i32"}
        cases.append(row_case("sum_partials", TRITON_DTYPE[dtype], _sum_partials_kernel, signature, _SUM_CONFIG))
    return cases
