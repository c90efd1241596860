"""What attention's forward and backward share: the launch table, and tiles of a head of any width.

A tile is some tokens of one head, as a tuple of power-of-two parts D0 and perhaps D1 columns wide: Triton's blocks are
powers of two and most head widths are not. 80 = 64 + 16 costs 5/8 of the matrix work of one block of 128. Each part
takes a dot of its own; those over the head width add up in one block of scores. Columns beyond D read as zero.

All that fixes an address within a tile is a compile-time constant, the number of heads and the strides among it. The
rows that a thread reads are then immediate offsets from one pointer; strides known only at run time would keep a
pointer for each row alive across the loops, some fifty registers. Lengths and counts of tokens, sequences and tiles
are never constants, so new lengths compile nothing.

Legend: T packed tokens, S sequences, H heads, d (D in kernels) head width, R rows and C columns of a block of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

SHORT = 192  # tokens: the blocks of a masked image, and the predictor's sequences but for a few
MEDIUM = 256  # tokens: a whole image of 16 x 16 patches


@dataclass(frozen=True)
class LaunchConfig:
    """A program keeps `rows` tokens of a head on chip and passes the sequence by them, `stream` tokens at a time."""

    rows: int
    stream: int
    num_warps: int
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.stream} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class AttentionConfig:
    """`one_launch`: a program of the backward takes a whole sequence of a head, all three gradients of it."""

    fwd: LaunchConfig
    bwd: LaunchConfig
    one_launch: bool


# {chips: {widest: (forward up to SHORT tokens, forward beyond, backward)}}: `widest` in columns of both parts, choices
# as (rows, stream, num_warps, num_stages if not 2). Unmeasured: from compiled resources (no spills; registers and
# shared memory against programs on a multiprocessor) and these estimates, of ViT-H/14 on 128 masked images:
#
#   Context, 110 +- 18 tokens, d = 80: 64 rows compute 1.25 times the queries there are, 128 rows 1.35, 32 rows 1.15.
#   An A100 needs 96 us for forward's bytes and 36 us for its products, tiles at their peak; 192 us and 130 us in
#   backward. Both lack bytes in flight before they lack tensor cores, so programs side by side count, not big tiles:
#   with 64x32 three of four warps fit in forward and two in backward.
#   Predictor, 154 +- 18 tokens, d = 24 as 32: 64 rows compute 1.25 times the queries, 128 rows 1.66.
#   Target, 256 tokens, forward only: 64 and 128 rows both fit exactly. With 128 the keys come from L2 half as often,
#   which Hopper needs (64 would ask 9 TB/s of it at 600 TFLOP/s, 128 half of that); Ampere's L2 keeps up with 64.
#
# Ampere's and Ada's tensor cores give a warp 16 rows, so fewer than 16 * num_warps rows would be computed twice; the
# two differ only in what the compiler fits into registers. Hopper's give four warps 64 rows, Blackwell's a program
# 128. fp32 is multiplied exactly, without tensor cores.
_TABLE = {
    "ampere": {
        32: ((64, 32, 4), (64, 32, 4), (64, 32, 4)),
        80: ((64, 32, 4), (64, 64, 4), (64, 32, 4)),
        96: ((64, 32, 4), (64, 64, 4), (64, 16, 4)),
        128: ((128, 32, 8), (128, 32, 8), (128, 16, 8)),
    },
    "ada": {  # and what else is not named here
        32: ((64, 32, 4), (64, 32, 4), (64, 32, 4)),
        64: ((64, 32, 4), (64, 64, 4), (64, 32, 4)),
        80: ((64, 32, 4), (64, 64, 4), (64, 16, 4)),
        96: ((64, 32, 4), (64, 64, 4), (64, 16, 4, 1)),
        128: ((128, 32, 8), (128, 32, 8), (128, 16, 8)),
    },
    "hopper": {
        32: ((64, 64, 4), (64, 64, 4), (64, 32, 4)),
        64: ((64, 64, 4), (128, 64, 8), (64, 32, 4)),
        96: ((64, 64, 4), (128, 32, 8), (64, 32, 4)),
        128: ((64, 64, 4), (128, 32, 8), (64, 16, 4)),
    },
    "blackwell": {
        32: ((64, 64, 4), (64, 64, 4), (64, 32, 4)),
        80: ((128, 64, 8), (128, 64, 8), (64, 32, 4)),
        128: ((128, 64, 8), (128, 64, 8), (64, 16, 4)),
    },
    "fp32": {  # what neither the oldest nor the newest Triton makes spill on any chip
        32: ((32, 16, 8), (32, 16, 8), (16, 16, 4, 1)),
        64: ((32, 16, 8), (32, 16, 8), (32, 16, 4)),
        80: ((32, 16, 8), (32, 16, 8), (16, 16, 4, 1)),
        96: ((32, 16, 8), (32, 16, 8), (16, 16, 2)),
        128: ((32, 16, 8), (32, 16, 8), (32, 16, 4, 3)),
    },
}
HEAD_DIMS = (24, 32, 64, 80, 88, 96, 128)  # of the predictor, ViT-T/S/B/L, ViT-H and ViT-g; 128 for completeness
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REGIMES = ("short", "medium", "long")


def regime_of(max_length: int) -> str:
    """The only thing that a length decides, three ways: "short", "medium" or "long"."""
    return "short" if max_length <= SHORT else "medium" if max_length <= MEDIUM else "long"


@cache
def attention_config(head_dim: int, dtype: torch.dtype, arch: int, regime: str) -> AttentionConfig:
    """The launch choice for a head width, a dtype, a chip (80, 90, ...) and a regime of sequence lengths."""
    width = sum(head_parts(head_dim))
    chips = "ampere" if arch == 80 else {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(arch // 10, "ada")
    table = _TABLE["fp32" if dtype == torch.float32 else chips]
    short, beyond, bwd = next(row for widest, row in table.items() if width <= widest)
    fwd = short if regime == "short" else beyond
    return AttentionConfig(LaunchConfig(*fwd), LaunchConfig(*bwd), one_launch=regime != "long")


@cache
def head_parts(head_dim: int) -> tuple[int, int]:
    """The columns of a head as two powers of two, of at least the 16 that a dot takes; the second is 0 if not needed.

    Raises:
        ValueError: a head width that is not a multiple of 8 in 8..128.

    >>> [head_parts(d) for d in (24, 64, 80, 88)]
    [(32, 0), (64, 0), (64, 16), (64, 32)]
    """
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"the head width must be a multiple of 8 in 8..128, got {head_dim}")
    first = max(16, 1 << (head_dim.bit_length() - 1))
    if first >= head_dim:
        return first, 0
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (first, second) if second < first else (2 * first, 0)


def tile_constants(qkv: Tensor, tiles: LaunchConfig) -> dict[str, int]:
    """The compile-time constants of a kernel that reads qkv [T, 3, H, d]."""
    _, _, heads, head_dim = qkv.shape
    stride_token, stride_part, stride_head, _ = qkv.stride()
    first, second = head_parts(head_dim)
    return {
        "STRIDE_TOKEN": stride_token,
        "STRIDE_PART": stride_part,
        "STRIDE_HEAD": stride_head,
        "N_HEADS": heads,
        "D": head_dim,
        "ROWS": tiles.rows,
        "STREAM": tiles.stream,
        "D0": first,
        "D1": second,
    }


@triton.jit
def locate(offsets_ptr, n_tiles, N_HEADS: tl.constexpr):
    """(first token, head, tile, length of the sequence). Tiles vary fastest: neighbours share their keys in L2."""
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // n_tiles // N_HEADS
    start = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - start
    return start.to(tl.int64), pid // n_tiles % N_HEADS, (pid % n_tiles).to(tl.int32), length


@triton.jit
def load_tile(ptr, n_rows, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """R rows from ptr on, STRIDE apart, as (part,) or (part, part); zero from row n_rows and column D on."""
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, D0)[None, :]
    x = (tl.load(ptr + rows * STRIDE + cols, mask=(rows < n_rows) & (cols < D), other=0.0),)
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)[None, :]
        x += (tl.load(ptr + rows * STRIDE + cols, mask=(rows < n_rows) & (cols < D), other=0.0),)
    return x


@triton.jit
def store_tile(
    ptr, x, n_rows, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """The counterpart of `load_tile`; rows and columns that were padding are not written."""
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, D0)[None, :]
    tl.store(ptr + rows * STRIDE + cols, x[0], mask=(rows < n_rows) & (cols < D))
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptr + rows * STRIDE + cols, x[1], mask=(rows < n_rows) & (cols < D))


@triton.jit
def zero_tile(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """fp32 zeros in the parts of a tile of R rows."""
    x = (tl.zeros([R, D0], dtype=tl.float32),)
    if D1 > 0:
        x += (tl.zeros([R, D1], dtype=tl.float32),)
    return x


@triton.jit
def scale_tile(x, factor, D1: tl.constexpr):
    """Each part times `factor`, a number or a column."""
    y = (x[0] * factor,)
    if D1 > 0:
        y += (x[1] * factor,)
    return y


@triton.jit
def dot_widths(a, b, D1: tl.constexpr):
    """[R, d] @ [C, d]^T -> fp32 [R, C]."""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if D1 > 0:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def dot_tokens(a, b, acc, D1: tl.constexpr):
    """[R, C] @ [C, d] + acc -> fp32 [R, d]; `a` is rounded to b's dtype."""
    a = a.to(b[0].dtype)
    y = (tl.dot(a, b[0], acc[0], input_precision="ieee"),)
    if D1 > 0:
        y += (tl.dot(a, b[1], acc[1], input_precision="ieee"),)
    return y
