"""Products of the tensor cores: exact sums of exact products, rounded once an instruction to fp32.

A chip cuts where this rounds, in the last bits of fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.emulator.arithmetic import Array, read
from benchmarks.emulator.memory import Fault
from benchmarks.emulator.ptx import Operand
from benchmarks.emulator.warps import nothing, whole_warps

if TYPE_CHECKING:
    from benchmarks.emulator.machine import Machine, Step


def product(a: Array, b: Array, c: Array) -> Array:
    """a b + c of many matrices, in fp32."""
    found = torch.bmm(torch.from_numpy(a.astype(np.float64)), torch.from_numpy(b.astype(np.float64)))
    return (found.numpy() + c).astype(np.float32)


def _gather(machine: Machine, names: Operand, kind: str, lanes: Array, warps: int) -> Array:
    """Registers of a list, of every lane: [warps, lane, register]."""
    assert isinstance(names, tuple)
    found = [np.broadcast_to(machine.value(n, "b32", lanes), lanes.shape) for n in names]
    raw = np.stack(found, axis=-1).reshape(warps, 32, len(names))
    return read(raw, kind)


def _tile_of_16_rows(numbers: Array) -> Array:
    """[warps, lane, 4 n] sums -> [warps, 16, 8 n]: lane 4 r + c has columns 2 c, 2 c + 1 of rows r and r + 8."""
    warps, _, count = numbers.shape
    parts = numbers.reshape(warps, 8, 4, count // 4, 2, 2)  # row, column pair, tile, upper half, which of the pair
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 2 * count)


def _lanes_of_16_rows(tile: Array) -> Array:
    """The way back."""
    warps, _, columns = tile.shape
    parts = tile.reshape(warps, 2, 8, columns // 8, 4, 2)
    return parts.transpose(0, 2, 4, 3, 1, 5).reshape(warps, 32, columns // 2)


def _mma(words: list[str], operands: Sequence[Operand]) -> Step:
    into, left, right, before = operands
    takes = words[7]
    if words[3:7] != ["m16n8k16", "row", "col", "f32"] or takes not in ("f16", "bf16"):
        raise NotImplementedError(f"the emulator does not know {'.'.join(words)}")

    def multiply(machine: Machine, lanes: Array) -> None:
        warps = whole_warps(lanes)
        # A register of A holds a pair of columns, as two accumulators do: registers are rows r, r + 8, and columns + 8.
        a = _tile_of_16_rows(_gather(machine, left, f"{takes}x2", lanes, warps).reshape(warps, 32, 8))
        b = _gather(machine, right, f"{takes}x2", lanes, warps)  # lane 4 n + k has rows 2 k, 2 k + 1 and 8 more
        b = b.reshape(warps, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)
        c = _tile_of_16_rows(_gather(machine, before, "f32", lanes, warps))
        _scatter(machine, into, _lanes_of_16_rows(product(a, b, c)), lanes)

    return multiply


def _scatter(machine: Machine, into: Operand, numbers: Array, lanes: Array) -> None:
    assert isinstance(into, tuple)
    raw = np.ascontiguousarray(numbers).view(np.uint32).reshape(len(lanes), len(into))
    for i, name in enumerate(into):
        machine.set(str(name), raw[:, i], lanes)


def bits(words: Array, first: int, count: int) -> Array:
    """A field of each word."""
    return (words.astype(np.uint64) >> np.uint64(first)).astype(np.int64) & ((1 << count) - 1)


_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row within which 16-byte pieces are exchanged


def described(descriptor: Array, rows: int, columns: int, along: bool) -> Array:
    """Addresses of the 16-bit elements of a matrix in shared memory, [matrices, rows, columns].

    rows are those of M or N, columns those of K; `along`: K runs along memory. Source: PTX ISA, "Matrix descriptor".
    """
    start, leading, stride = (bits(descriptor, first, 14) * 16 for first in (0, 16, 32))
    modes = np.unique(bits(descriptor, 62, 2))
    if len(modes) != 1 or bits(descriptor, 49, 3).any():
        raise NotImplementedError("matrix descriptors that differ in their swizzle, or have a base offset")
    wide = _SWIZZLES[int(modes[0])]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
    if along:
        inner, outer = 2 * column % wide, 2 * column // wide
        address = start + row // 8 * stride + row % 8 * wide + inner + outer * leading
    else:
        inner, outer = 2 * row % wide, 2 * row // wide
        address = start + column // 8 * stride + column % 8 * wide + inner + outer * leading
    return address ^ ((address >> 7 & (wide // 16 - 1)) << 4)


def _wgmma(words: list[str], operands: Sequence[Operand]) -> Step:
    size = re.fullmatch(r"m64n(\d+)k16", words[4])
    into, left, right, keeps, *signs = operands
    if size is None or words[5] != "f32" or words[6] not in ("f16", "bf16") or signs[:2] != [1, 1]:
        raise NotImplementedError(f"the emulator does not know {'.'.join(words)} {signs}")
    n, kind = int(size[1]), words[6]
    turned = [bool(t) for t in signs[2:]]  # of A where it is in memory, and of B

    def multiply(machine: Machine, lanes: Array) -> None:
        warps = whole_warps(lanes)
        if warps % 4 or (lanes[127::128] - lanes[::128] != 127).any():
            raise Fault("wgmma by a part of a warpgroup")
        groups = warps // 4
        if isinstance(left, tuple):
            a = _tile_of_16_rows(_gather(machine, left, f"{kind}x2", lanes, warps).reshape(warps, 32, 8))
            a = a.reshape(groups, 64, 16)
        else:
            a = from_shared(machine, left, kind, 64, lanes, not turned[0], warps=4)
        b = from_shared(machine, right, kind, n, lanes, not turned[-1], warps=4).swapaxes(-1, -2)
        kept = np.broadcast_to(machine.value(keeps, "pred", lanes), lanes.shape).reshape(groups, 128)[:, :1, None]
        c = np.zeros((groups, 64, n), dtype=np.float32)
        if kept.any():
            before = _tile_of_16_rows(_gather(machine, into, "f32", lanes, warps)).reshape(groups, 64, n)
            c = np.where(kept, before, c)
        d = product(a, b, c)
        _scatter(machine, into, _lanes_of_16_rows(d.reshape(warps, 16, n)), lanes)

    return multiply


def from_shared(
    machine: Machine, descriptor: Operand, kind: str, rows: int, lanes: Array, along: bool, warps: int
) -> Array:
    """A matrix [those who ask, rows, 16] of each group of `warps` warps, which all read it, or of each lane if 0."""
    apart = 32 * warps or 1
    given = np.broadcast_to(machine.value(descriptor, "b64", lanes), lanes.shape)[::apart]
    addresses = described(given, rows, 16, along)
    first = lanes[::apart]
    programs = np.broadcast_to(machine.programs(first)[:, None, None], addresses.shape).ravel()
    places, found = machine.shared.places(addresses.ravel(), programs, 2), None
    for warp in range(max(warps, 1)):
        who = np.broadcast_to(machine.warps(first + 32 * warp)[:, None, None], addresses.shape).ravel()
        (found,) = machine.shared.load(places, 2, 1, programs, who)
    assert found is not None
    return read(found.reshape(addresses.shape), kind)


STEPS: dict[str, Callable[[list[str], Sequence[Operand]], Step]] = {
    "mma": _mma,
    "wgmma.mma_async": _wgmma,
    "wgmma.fence": nothing,
    "wgmma.commit_group": nothing,
    "wgmma.wait_group": nothing,
}
