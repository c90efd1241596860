"""Tensor memory of sm 100, and what works on it: products asked for by one thread, and a barrier that tells of them.

Products are done when they are asked for, so a wait that is missing does not show. Source: PTX ISA, "tcgen05".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.emulator.arithmetic import Array, read
from benchmarks.emulator.memory import Fault
from benchmarks.emulator.ptx import Address, Operand
from benchmarks.emulator.tensor_cores import bits, from_shared, product
from benchmarks.emulator.warps import nothing, whole_warps

if TYPE_CHECKING:
    from benchmarks.emulator.machine import Machine, Step

LANES, COLUMNS = 128, 512  # of 32 bits each
DEPTH = 16  # columns of A that one instruction multiplies, in 16 bits
_SHAPES = {"32x32b": 32, "16x32bx2": 16}  # lanes that the first half of a warp, or all of it, comes to
_KINDS = {0: "f16", 1: "bf16"}


class TensorMemory:
    """Of several programs: an address is a lane in its upper half and a column in its lower; all ones at first.

    columns: that each program has been given, from the first on.
    """

    def __init__(self, programs: int):
        self.words = np.full((programs, LANES, COLUMNS), 0xFFFFFFFF, dtype=np.uint32)
        self.columns = np.zeros(programs, dtype=np.int64)

    def check(self, programs: Array, columns: Array) -> None:
        """
        Raises:
            Fault: a column that the program has not been given.
        """
        if (columns >= self.columns[programs]).any():
            raise Fault("an access beyond the tensor memory that was asked for")

    def places(self, shape: str, machine: Machine, place: Operand, apart: int, lanes: Array, count: int) -> tuple:
        """Where the `count` words of each lane are. A warp has 32, or its halves share 16, `apart` columns apart."""
        assert isinstance(place, Address)
        whole_warps(lanes)
        address = machine.address(place, lanes)
        lane, column = (address >> 16) + lanes % _SHAPES[shape], address & 0xFFFF
        column = (column + lanes % 32 // _SHAPES[shape] * apart)[:, None] + np.arange(count)
        if (lane // 32 != machine.warps(lanes) % 4).any():
            raise Fault("a warp comes to lanes of tensor memory that are another's")
        self.check(machine.programs(lanes)[:, None], column)
        return machine.programs(lanes)[:, None], lane[:, None], column


def _rows(count: int) -> Array:
    """The lanes of a matrix's rows: 64 of them are spread by 16."""
    row = np.arange(count)
    return row if count == LANES else row // 16 * 32 + row % 16


def _move(words: list[str], operands: Sequence[Operand]) -> Step:
    """Between registers and tensor memory, either way."""
    registers = next(o for o in operands if isinstance(o, tuple) and not isinstance(o, Address))
    place = next(o for o in operands if isinstance(o, Address))
    apart = next((o for o in operands if isinstance(o, int)), 0)
    shape = words[4]
    if shape not in _SHAPES:
        raise NotImplementedError(f"the emulator does not know {'.'.join(words)}")

    def move(machine: Machine, lanes: Array) -> None:
        memory = machine.tensor_memory
        places = memory.places(shape, machine, place, apart, lanes, len(registers))
        if words[1] == "st":
            found = [np.broadcast_to(machine.value(name, "b32", lanes), lanes.shape) for name in registers]
            memory.words[places] = np.stack(found, axis=-1)
        else:
            found = memory.words[places]
            for i, name in enumerate(registers):
                machine.set(str(name), found[:, i], lanes)

    return move


def _multiply(words: list[str], operands: Sequence[Operand]) -> Step:
    into, left, right, form, keeps = operands
    if words[2:] != ["cta_group::1", "kind::f16"]:
        raise NotImplementedError(f"the emulator does not know {'.'.join(words)}")

    def multiply(machine: Machine, lanes: Array) -> None:
        assert isinstance(into, Address)
        (how,) = np.unique(machine.value(form, "u32", lanes))
        field = partial(bits, how)
        rows, columns, kind = int(field(24, 5)) * 16, int(field(17, 6)) * 8, _KINDS[int(field(7, 3))]
        if field(4, 2) != 1 or field(10, 3) != field(7, 3) or field(13, 2) or field(0, 4):
            raise NotImplementedError(f"an instruction descriptor of {how:#x}")
        memory, programs = machine.tensor_memory, machine.programs(lanes)[:, None, None]
        lane, address = _rows(rows)[None, :, None], machine.address(into, lanes)[:, None, None]
        if isinstance(left, Address):
            at = machine.address(left, lanes)[:, None, None]
            column = (at & 0xFFFF) + np.arange(DEPTH // 2)
            memory.check(programs, column)
            pairs = memory.words[programs, lane + (at >> 16), column]
            a = read(pairs, f"{kind}x2").reshape(len(lanes), rows, DEPTH)
        else:
            a = from_shared(machine, left, kind, rows, lanes, not field(15, 1), warps=0)
        b = from_shared(machine, right, kind, columns, lanes, not field(16, 1), warps=0).swapaxes(-1, -2)
        place = programs, lane + (address >> 16), (address & 0xFFFF) + np.arange(columns)
        memory.check(programs, place[2])
        kept = np.broadcast_to(machine.value(keeps, "pred", lanes), lanes.shape)[:, None, None]
        c = np.where(kept, memory.words[place].view(np.float32), np.float32(0))
        memory.words[place] = product(a, b, c).view(np.uint32)

    return multiply


def _allocate(words: list[str], operands: Sequence[Operand]) -> Step:
    place, columns = operands
    assert isinstance(place, Address)

    def allocate(machine: Machine, lanes: Array) -> None:
        whole_warps(lanes)
        first = lanes[::32]
        programs = machine.programs(first)
        if machine.tensor_memory.columns[programs].any():
            raise NotImplementedError("the emulator gives tensor memory once")
        machine.tensor_memory.columns[programs] = columns
        places = machine.shared.places(machine.address(place, lanes)[::32], programs, 4)
        machine.shared.store(places, [np.zeros(len(first), dtype=np.uint32)], 4, programs, machine.warps(first))

    return allocate


def _elect(words: list[str], operands: Sequence[Operand]) -> Step:
    into, _ = operands
    assert isinstance(into, tuple)

    def elect(machine: Machine, lanes: Array) -> None:
        whole_warps(lanes)
        machine.set(str(into[0]), np.zeros(len(lanes), dtype=np.uint32), lanes)
        machine.set(str(into[1]), lanes % 32 == 0, lanes)

    return elect


def _barrier(words: list[str], operands: Sequence[Operand]) -> Step:
    """mbarrier: its phase, by place. A phase ends with the one arrival that it waits for."""
    if words[1] not in ("init", "inval", "try_wait"):
        raise NotImplementedError

    def change(machine: Machine, lanes: Array) -> None:
        if words[1] == "init":
            assert operands[1] == 1, operands
            for place in _places(machine, operands[0], lanes):
                machine.phases[place] = 0
        elif words[1] == "inval":
            for place in _places(machine, operands[0], lanes):
                del machine.phases[place]
        elif words[1] == "try_wait":
            into, place, parity = operands
            phases = np.array([machine.phases[p] for p in _places(machine, place, lanes)])
            machine.set(str(into), phases % 2 != machine.value(parity, "u32", lanes), lanes)

    return change


def _commit(words: list[str], operands: Sequence[Operand]) -> Step:
    def commit(machine: Machine, lanes: Array) -> None:
        for place in _places(machine, operands[0], lanes):
            machine.phases[place] += 1

    return commit


def _places(machine: Machine, place: Operand, lanes: Array) -> list[int]:
    assert isinstance(place, Address)
    return machine.shared.places(machine.address(place, lanes), machine.programs(lanes), 8).tolist()


STEPS: dict[str, Callable[[list[str], Sequence[Operand]], Step]] = {
    "tcgen05.alloc": _allocate,
    "tcgen05.dealloc": nothing,
    "tcgen05.relinquish_alloc_permit": nothing,
    "tcgen05.ld": _move,
    "tcgen05.st": _move,
    "tcgen05.wait::ld": nothing,
    "tcgen05.wait::st": nothing,
    "tcgen05.mma": _multiply,
    "tcgen05.commit": _commit,
    "elect": _elect,
    "mbarrier": _barrier,
}
