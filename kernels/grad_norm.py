"""Sum of squares of every gradient in one launch, as partial sums that whoever clips adds in one order.

A fixed number of programs take the chunks in turn, so that each of them adds many squares and few sums are left: no
atomics, and the same bits at every run on one chip. Sums are fp32.

The chunks and the column of elements are those of the tables of `adamw_ema`. Row of the gradient table (int64):
address, dtype code, aligned, and a column for `adamw_ema`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import CompileCase
from .multi_tensor import BF16, FP16, FP32, LaunchConfig, load_any, typed_pointer

GRADIENT_ROW: tl.constexpr = tl.constexpr(4)
MAX_PARTIALS = 1024  # a power of two, and at least the programs of every chip


def grad_norm_config(arch: int) -> LaunchConfig:
    """Six programs for each multiprocessor. Unmeasured: chosen from compiled resources and the bytes in flight."""
    programs = {80: 648, 86: 504, 89: 768, 90: 792, 100: 888}.get(arch, 648)
    return LaunchConfig(block=2048, chunk=32768, num_warps=8, programs=programs)


@triton.jit
def _sum_squares(grad_ptr, blocks, acc, BLOCK: tl.constexpr):
    for block in range(blocks):
        g = tl.load(grad_ptr + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
        acc += g * g
    return acc


@triton.jit(do_not_specialize=["n_chunks"])
def _grad_norm_kernel(
    tensors_ptr,  # int64 [n, TENSOR_ROW]
    gradients_ptr,  # int64 [n, 4]
    chunks_ptr,  # int32 [C, 2]
    partials_ptr,  # fp32 [P]
    n_chunks,
    TENSOR_ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    rest = tl.zeros([LANES], dtype=tl.float32)
    for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
        place_ptr = chunks_ptr + 2 * chunk
        tensor = tl.load(place_ptr).to(tl.int64)
        start = tl.load(place_ptr + 1).to(tl.int64) * CHUNK
        row_ptr = gradients_ptr + tensor * GRADIENT_ROW
        grad = tl.load(row_ptr)
        code = tl.load(row_ptr + 1)
        count = tl.minimum(tl.load(tensors_ptr + tensor * TENSOR_ROW) - start, CHUNK).to(tl.int32)
        count = tl.where(grad != 0, count, 0)
        blocks = tl.where(tl.load(row_ptr + 2) != 0, count // BLOCK, 0)
        if code == FP32:
            acc = _sum_squares(typed_pointer(grad, FP32) + start, blocks, acc, BLOCK)
        elif code == FP16:
            acc = _sum_squares(typed_pointer(grad, FP16) + start, blocks, acc, BLOCK)
        else:
            acc = _sum_squares(typed_pointer(grad, BF16) + start, blocks, acc, BLOCK)
        for first in range(blocks * BLOCK, count, LANES):
            offsets = first + tl.arange(0, LANES)
            g = load_any(grad, start + offsets, offsets < count, code)
            rest += g * g
    tl.store(partials_ptr + tl.program_id(0), tl.sum(acc) + tl.sum(rest))


def grad_norm_launch(
    tensors: Tensor, gradients: Tensor, chunks: Tensor, partials: Tensor, config: LaunchConfig
) -> None:
    """partials[i] = the sum of squares of the chunks i, i + P, ...; places from P on are left as they are.

    Shapes: tensors int64 [n, columns], the first the elements; gradients int64 [n, 4]; chunks int32 [C, 2], C > 0;
    partials fp32 [MAX_PARTIALS].
    """
    _grad_norm_kernel[(min(config.programs, len(chunks)),)](
        tensors_ptr=tensors,
        gradients_ptr=gradients,
        chunks_ptr=chunks,
        partials_ptr=partials,
        n_chunks=len(chunks),
        TENSOR_ROW=tensors.shape[1],
        CHUNK=config.chunk,
        BLOCK=config.block,
        LANES=config.lanes,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=False,
    )


def compile_cases(arch: int, tensor_row: int = 12) -> list[CompileCase]:
    """The shipped configuration for a chip, with tensor tables of `tensor_row` columns."""
    config = grad_norm_config(arch)
    constexprs = {"TENSOR_ROW": tensor_row, "CHUNK": config.chunk, "BLOCK": config.block, "LANES": config.lanes}
    pointers = {"tensors_ptr": "*i64", "gradients_ptr": "*i64", "chunks_ptr": "*i32", "partials_ptr": "*fp32"}
    return [
        CompileCase(
            name="grad_norm",
            config=str(config),
            kernel=_grad_norm_kernel,
            signature=pointers | {"n_chunks": "i32"} | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            num_warps=config.num_warps,
            num_stages=1,
            aligned=tuple(pointers),
        )
    ]
