"""What the lanes of a warp do together: shuffles, matrices of 8 x 8 from and to shared memory, copies on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.emulator.arithmetic import Array
from benchmarks.emulator.memory import Fault
from benchmarks.emulator.ptx import Address, Operand

if TYPE_CHECKING:
    from benchmarks.emulator.machine import Machine, Step

ROW = 16  # bytes of a row of a matrix of 8 x 8


def whole_warps(lanes: Array) -> int:
    """How many warps these lanes are.

    Raises:
        Fault: some lanes of a warp are missing.
    """
    if len(lanes) % 32 or (lanes[31::32] - lanes[::32] != 31).any():
        raise Fault("an instruction for whole warps that some lanes do not come to")
    return len(lanes) // 32


def nothing(words: list[str], operands: Sequence[Operand]) -> Step:
    """What does nothing here, where all is done in order."""
    return lambda machine, lanes: None


def _shuffle(words: list[str], operands: Sequence[Operand]) -> Step:
    into, source, places, bounds, _ = operands
    across = {"bfly": True, "idx": False}[words[2]]
    assert bounds == 31, bounds

    def shuffle(machine: Machine, lanes: Array) -> None:
        count = whole_warps(lanes)
        value = np.broadcast_to(machine.value(source, "b32", lanes), lanes.shape).reshape(count, 32)
        by = np.broadcast_to(machine.value(places, "u32", lanes), lanes.shape).reshape(count, 32).astype(np.int64)
        mine = np.arange(32)[None]
        machine.set(str(into), np.take_along_axis(value, (mine ^ by if across else by) % 32, axis=1).ravel(), lanes)

    return shuffle


def _reduce(words: list[str], operands: Sequence[Operand]) -> Step:
    into, source, _ = operands
    kind = words[-1]
    function = {"max.s32": np.fmax, "max.f32": np.fmax}[".".join(words[2:])]

    def reduce(machine: Machine, lanes: Array) -> None:
        count = whole_warps(lanes)
        value = np.broadcast_to(machine.value(source, kind, lanes), lanes.shape).reshape(count, 32)
        whole = np.ascontiguousarray(function.reduce(value, axis=1).astype(value.dtype)).view(np.uint32)
        machine.set(str(into), whole.repeat(32), lanes)

    return reduce


def _rows(machine: Machine, place: Operand, matrices: int, lanes: Array, what: str) -> tuple[Array, Array, Array]:
    """(where each row is, its program, its warp), [warps, matrices, 8]: lane 8 m + r has row r of matrix m's."""
    assert isinstance(place, Address)
    count = whole_warps(lanes)
    addresses = machine.address(place, lanes).reshape(count, 32)[:, : 8 * matrices]
    givers = lanes.reshape(count, 32)[:, : 8 * matrices]
    machine.shared.count(what, addresses.ravel(), ROW, givers.ravel())
    programs, warps = machine.programs(givers), machine.warps(givers)
    places = machine.shared.places(addresses.ravel(), programs.ravel(), ROW)
    return places.reshape(count, matrices, 8), programs.reshape(count, matrices, 8), warps.reshape(count, matrices, 8)


def _load_matrices(words: list[str], operands: Sequence[Operand]) -> Step:
    into, place = operands
    names = into if isinstance(into, tuple) else (into,)
    transposed = "trans" in words

    def load(machine: Machine, lanes: Array) -> None:
        places, programs, warps = _rows(machine, place, len(names), lanes, "load")
        words_of_rows = machine.shared.load(places.ravel(), 2, 8, programs.ravel(), warps.ravel())
        matrices = np.stack(words_of_rows, axis=-1).reshape(*places.shape, 8)  # [warps, matrices, row, column]
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(*places.shape[:2], 32)
        for i, name in enumerate(names):
            machine.set(str(name), pairs[:, i].ravel(), lanes)

    return load


def _store_matrices(words: list[str], operands: Sequence[Operand]) -> Step:
    place, source = operands
    names = source if isinstance(source, tuple) else (source,)
    transposed = "trans" in words

    def store(machine: Machine, lanes: Array) -> None:
        places, programs, warps = _rows(machine, place, len(names), lanes, "store")
        pairs = np.stack([machine.value(n, "b32", lanes).reshape(-1, 32) for n in names], axis=1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(*places.shape, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        columns = [matrices[..., i].ravel() for i in range(8)]
        machine.shared.store(places.ravel(), columns, 2, programs.ravel(), warps.ravel())

    return store


class Copies:
    """Copies from global to shared memory that a lane has asked for and not waited for.

    They are done as late as may be, and until then the place is all ones: who does not wait reads NaN.
    """

    def __init__(self, lanes: int):
        self.group = np.zeros(lanes, dtype=np.int64)  # that a lane's next copy belongs to
        self.pending: list[tuple[Array, Array, Array, Array, int]] = []  # lanes, group, from, to, bytes

    def ask(self, machine: Machine, lanes: Array, addresses: Array, places: Array, size: int, taken: Array) -> None:
        """Of `size` bytes each, where `taken`; zeros elsewhere."""
        if taken.any():
            machine.memory.check(addresses[taken], size)
        programs, warps = machine.programs(lanes), machine.warps(lanes)
        ones = [np.full(len(lanes), 0xFFFFFFFF, dtype=np.uint32)] * (size // 4)
        machine.shared.store(places, ones, 4, programs, warps)
        self.pending.append((lanes, self.group[lanes].copy(), np.where(taken, addresses, 0), places, size))

    def commit(self, lanes: Array) -> None:
        """The copies so far are a group."""
        self.group[lanes] += 1

    def wait(self, machine: Machine, lanes: Array, but: int) -> None:
        """Until all groups but the latest few are done."""
        here = np.zeros(len(self.group), dtype=bool)
        here[lanes] = True
        left = []
        for who, group, addresses, places, size in self.pending:
            done = here[who] & (group < self.group[who] - but)
            if done.any():
                self._do(machine, who[done], addresses[done], places[done], size)
            if not done.all():
                left.append((who[~done], group[~done], addresses[~done], places[~done], size))
        self.pending = left

    def _do(self, machine: Machine, lanes: Array, addresses: Array, places: Array, size: int) -> None:
        words = [np.zeros(len(lanes), dtype=np.uint32) for _ in range(size // 4)]
        taken = addresses != 0
        if taken.any():
            for word, found in zip(
                words, machine.memory.load(addresses[taken], 4, size // 4, lanes[taken]), strict=True
            ):
                word[taken] = found
        machine.shared.store(places, words, 4, machine.programs(lanes), machine.warps(lanes))


def _copy(words: list[str], operands: Sequence[Operand]) -> Step:
    if words[2] == "commit_group":
        return lambda machine, lanes: machine.copies.commit(lanes)
    if words[2] == "wait_group":
        (but,) = operands
        assert isinstance(but, int)
        return lambda machine, lanes: machine.copies.wait(machine, lanes, but)
    into, source, size, *taken = operands
    assert isinstance(into, Address)
    assert isinstance(source, Address)
    assert isinstance(size, int)

    def ask(machine: Machine, lanes: Array) -> None:
        bytes_taken = machine.value(taken[0] if taken else size, "u32", lanes)
        if not np.isin(bytes_taken, (0, size)).all():
            raise NotImplementedError("a copy of a part")
        addresses, programs = machine.address(into, lanes), machine.programs(lanes)
        machine.shared.count("store", addresses, size, lanes)
        places = machine.shared.places(addresses, programs, size)
        machine.copies.ask(machine, lanes, machine.address(source, lanes), places, size, bytes_taken > 0)

    return ask


STEPS: dict[str, Callable[[list[str], Sequence[Operand]], Step]] = {
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "cp.async": _copy,
}
