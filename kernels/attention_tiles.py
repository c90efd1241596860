"""What attention's forward and backward share: the launch table, and tiles of a head of any width.

A tile of rows of one head is a tuple of power-of-two parts, D0 and perhaps D1 columns wide, for Triton's blocks are
powers of two and most head widths are not: 80 = 64 + 16 costs 5/8 of the matrix work of one block of 128. Each part
takes its own dot, and dots over the head width add up in one block of scores. Columns beyond D read as zero.

Everything that fixes an address within a tile is a compile-time constant, heads and strides among it: the rows that a
thread reads are then immediate offsets from one pointer, where run-time strides would hold a pointer for each, live
across the loops. Lengths, token counts and tile counts are never constants, so new lengths compile nothing.

Legend: T packed tokens, S sequences, H heads, d (D in kernels) head width, R rows of a tile, n tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class LaunchConfig:
    """A program holds `rows` tokens of a head on chip and streams the others past them, `stream` at a time."""

    rows: int
    stream: int
    num_warps: int
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.stream} w{self.num_warps} s{self.num_stages}"


def head_parts(head_dim: int) -> tuple[int, int]:
    """The columns of a head as two powers of two of at least 16, the least that a dot takes; the second may be 0.

    Raises:
        ValueError: a head width that is not a multiple of 8 in 8..128.

    >>> [head_parts(d) for d in (24, 64, 80, 88)]
    [(32, 0), (64, 0), (64, 16), (64, 32)]
    """
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head width must be a multiple of 8 in 8..128, got {head_dim}")
    first = max(16, 1 << (head_dim.bit_length() - 1))
    if first >= head_dim:
        return first, 0
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (first, second) if second < first else (2 * first, 0)


@triton.jit
def locate(offsets_ptr, n_tiles, N_HEADS: tl.constexpr):
    """This program's first token, head, tile and sequence length; tiles vary fastest, so that they share keys in L2."""
    pid = tl.program_id(0).to(tl.int64)
    head = (pid // n_tiles) % N_HEADS
    sequence = pid // (n_tiles * N_HEADS)
    start = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - start
    return start.to(tl.int64), head, (pid % n_tiles).to(tl.int32), length


@triton.jit
def load_tile(ptr, n_rows, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows ptr, ptr + STRIDE, ... as (part,) or (part, part); zero in rows beyond n_rows and columns beyond D."""
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, D0)[None, :]
    x0 = tl.load(ptr + rows * STRIDE + cols, mask=(rows < n_rows) & (cols < D), other=0.0)
    if D1 == 0:
        return (x0,)
    else:
        rest = D0 + tl.arange(0, D1)[None, :]
        return x0, tl.load(ptr + rows * STRIDE + rest, mask=(rows < n_rows) & (rest < D), other=0.0)


@triton.jit
def store_tile(
    ptr, x, n_rows, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, D0)[None, :]
    tl.store(ptr + rows * STRIDE + cols, x[0].to(ptr.dtype.element_ty), mask=(rows < n_rows) & (cols < D))
    if D1 > 0:
        rest = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptr + rows * STRIDE + rest, x[1].to(ptr.dtype.element_ty), mask=(rows < n_rows) & (rest < D))


@triton.jit
def zero_tile(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 == 0:
        return (tl.zeros([R, D0], dtype=tl.float32),)
    else:
        return tl.zeros([R, D0], dtype=tl.float32), tl.zeros([R, D1], dtype=tl.float32)


@triton.jit
def scale_tile(x, factor, D1: tl.constexpr):
    if D1 == 0:
        return (x[0] * factor,)
    else:
        return x[0] * factor, x[1] * factor


@triton.jit
def dot_width(a, b, D1: tl.constexpr):
    """[R, d] @ [C, d]^T -> fp32 [R, C]."""
    out = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if D1 > 0:
        out = tl.dot(a[1], tl.trans(b[1]), out, input_precision="ieee")
    return out


@triton.jit
def dot_rows(a, b, acc, D1: tl.constexpr):
    """[R, C] @ [C, d] + acc -> fp32 [R, d]; `a` is rounded to b's dtype."""
    a = a.to(b[0].dtype)
    x0 = tl.dot(a, b[0], acc[0], input_precision="ieee")
    if D1 == 0:
        return (x0,)
    else:
        return x0, tl.dot(a, b[1], acc[1], input_precision="ieee")
