"""Programs run as a chip runs them: lanes in step, several programs at once, memory watched.

Every register is an array with an element for each lane. Lanes part at branches; those that are furthest behind go on
first, so that they meet again. All lanes of a program run together up to a barrier, so what depends on one warp being
ahead of another shows as a `Fault` of shared memory, not as a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np

from benchmarks.emulator import tensor_cores, tensor_memory, warps
from benchmarks.emulator.arithmetic import RAW, Array, bits_of, operation, read, write
from benchmarks.emulator.memory import Fault, Global, Shared
from benchmarks.emulator.ptx import Address, Guard, Instruction, Operand, Program

LANES = 1 << 14  # that run at once: registers of so many stay in a processor's cache
SHARED = 1 << 26  # bytes of shared memory at once
Step = Callable[["Machine", Array], None]


class Code:
    """A program, and what to call for each instruction of each block; which blocks ask whether a product is done.

    Raises:
        NotImplementedError: an instruction that the emulator does not know, with the kernel's line.
    """

    def __init__(self, program: Program):
        self.program = program
        self.steps = [[(self._known(i), i) for i in block.instructions] for block in program.blocks]
        self.tries = [any(i.op.startswith("mbarrier.try_wait") for i in block.instructions) for block in program.blocks]

    def _known(self, instruction: Instruction) -> Step:
        try:
            return _step(instruction)
        except (NotImplementedError, AssertionError, KeyError, ValueError) as error:
            raise NotImplementedError(
                f"{self.program.name}: the emulator does not know {instruction}: {error}"
            ) from error


def launch(code: Code, grid: Sequence[int], values: Sequence[int], shared: int, memory: Global) -> None:
    """Run a grid of programs with these parameters, as raw bits, and so many bytes of shared memory each.

    Raises:
        Fault: what a chip would punish, with the kernel's line.
    """
    number = int(np.prod(grid))
    at_once = max(1, min(LANES // code.program.threads, SHARED // max(shared, 1)))
    for first in range(0, number, at_once):
        programs = np.arange(first, min(first + at_once, number))
        Machine(code, grid, programs, values, shared, memory).run()


class Machine:
    """Some programs of a grid, on their way.

    lanes of them are numbered through: those of a program are together, and so are those of a warp.
    """

    def __init__(
        self,
        code: Code,
        grid: Sequence[int],
        programs: Array,
        values: Sequence[int],
        shared: int,
        memory: Global,
    ):
        self.code, self.program, self.memory, self.threads = code, code.program, memory, code.program.threads
        self.shared = Shared(len(programs), shared, memory.moved)
        self.params = {
            name: np.array(value, dtype=RAW[bits])
            for (name, bits), value in zip(self.program.params.items(), values, strict=True)
        }
        self.lanes = np.arange(len(programs) * self.threads)
        self.everyone = len(self.lanes)
        self.registers: dict[str, Array] = {}
        x, y, z = np.unravel_index(programs, tuple(grid), order="F")
        at = {"x": x, "y": y, "z": z}
        self.special = {f"%ctaid.{axis}": at[axis].repeat(self.threads).astype(np.uint32) for axis in at}
        self.special |= {f"%nctaid.{axis}": np.array(n, dtype=np.uint32) for axis, n in zip("xyz", grid, strict=True)}
        self.special["%tid.x"] = (self.lanes % self.threads).astype(np.uint32)
        self.copies = warps.Copies(self.everyone)
        self.parked = np.full(self.everyone, -1)  # at a barrier: the block behind it
        self.phases: dict[int, int] = {}  # of barriers in shared memory

    @cached_property
    def tensor_memory(self) -> tensor_memory.TensorMemory:
        """Of all these programs, once it is asked for."""
        return tensor_memory.TensorMemory(self.everyone // self.threads)

    def run(self) -> None:
        """To the end.

        Raises:
            Fault: what a chip would punish, or lanes that wait for what does not come.
        """
        waiting: dict[int, list[Array]] = {0: [self.lanes]}
        tried: set[int] = set()  # blocks in which lanes have just asked in vain whether a product is done
        with np.errstate(all="ignore"):
            while waiting:
                if not waiting.keys() - tried:
                    raise Fault(f"{self._place(min(waiting))}: a wait for what does not come")
                at = min(waiting.keys() - tried)
                here, block = waiting.pop(at), self.program.blocks[at]
                lanes = here[0] if len(here) == 1 else np.sort(np.concatenate(here))
                for step, instruction in self.code.steps[at]:
                    try:
                        step(self, lanes)
                    except Fault as fault:
                        raise Fault(f"{self.program.name}, {instruction.place}, {instruction.op}: {fault}") from None
                if block.barrier:
                    for behind, free in self.met(lanes, at + 1):
                        waiting.setdefault(behind, []).append(free)
                    continue
                there, on = self.parted(lanes, block.guard)
                if block.target is not None:
                    if len(there):
                        waiting.setdefault(block.target, []).append(there)
                elif not block.ends:
                    on = lanes
                if block.falls and len(on):
                    waiting.setdefault(at + 1, []).append(on)
                tried = tried | {at} if block.target == at and len(there) and self.code.tries[at] else set()
        if (self.parked >= 0).any():
            raise Fault(
                f"{self._place(self.parked.max() - 1)}: a barrier that some threads of a program do not come to"
            )

    def _place(self, block: int) -> str:
        return f"{self.program.name}, {self.program.blocks[block].instructions[-1].place}"

    def met(self, lanes: Array, behind: int) -> Iterator[tuple[int, Array]]:
        """Lanes come to a barrier, and go on with a block behind it: those of programs that are whole, by block."""
        warps.whole_warps(lanes)
        self.parked[lanes] = behind
        programs = np.unique(self.programs(lanes))
        by_program = self.parked.reshape(-1, self.threads)
        programs = programs[(by_program[programs] >= 0).all(axis=1)]
        self.shared.epoch[programs] += 1
        free = self.lanes.reshape(-1, self.threads)[programs].ravel()
        to = self.parked[free]
        self.parked[free] = -1
        for block in np.unique(to):
            yield int(block), free[to == block]

    def parted(self, lanes: Array, guard: Guard | None) -> tuple[Array, Array]:
        """(lanes where it holds, the others)"""
        if guard is None:
            return lanes, lanes[:0]
        holds = self.get(guard.name, lanes) ^ guard.negated
        if holds.all():
            return lanes, lanes[:0]
        return lanes[holds], lanes[~holds]

    def get(self, name: str, lanes: Array) -> Array:
        """Raw bits of a register or of a special one."""
        if name in self.special:
            found = self.special[name]
            return found if found.ndim == 0 or len(lanes) == self.everyone else found[lanes]
        if name not in self.registers:  # a compiler may move what nobody will look at
            self.registers[name] = np.full(self.everyone, -1).astype(RAW[self.program.registers[name]])
        found = self.registers[name]
        return found if len(lanes) == self.everyone else found[lanes]

    def set(self, name: str, raw: Array, lanes: Array) -> None:
        """Raw bits into a register, never into an array that another may hold."""
        if name == "_":
            return
        dtype = RAW[self.program.registers[name]]
        if len(lanes) == self.everyone:
            self.registers[name] = np.broadcast_to(raw, lanes.shape).astype(dtype)
            return
        before = self.registers.get(name)
        after = np.full(self.everyone, -1).astype(dtype) if before is None else before.copy()
        after[lanes] = raw
        self.registers[name] = after

    def value(self, operand: Operand, kind: str, lanes: Array) -> Array:
        """The numbers of an operand."""
        raw = RAW[bits_of(kind)]
        if isinstance(operand, int):
            if kind == "pred":
                return np.array(operand != 0)
            return read(np.array(operand & ((1 << bits_of(kind)) - 1), dtype=raw), kind)
        assert isinstance(operand, str), operand
        if operand == "global_smem":
            return np.array(0, dtype=raw)  # where shared memory begins
        return read(self.get(operand, lanes).astype(raw, copy=False), kind)

    def address(self, place: Address, lanes: Array) -> Array:
        """Of every lane."""
        kind = "u32"
        if place.base.startswith("%") and self.program.registers[place.base] == 64:
            kind = "u64"
        return np.broadcast_to(self.value(place.base, kind, lanes).astype(np.int64) + place.offset, lanes.shape)

    def programs(self, lanes: Array) -> Array:
        """Which each lane belongs to."""
        return lanes // self.threads

    def warps(self, lanes: Array) -> Array:
        """Which of its program's each lane belongs to."""
        return lanes % self.threads // 32


def _step(instruction: Instruction) -> Step:
    step, guard = _unguarded(instruction), instruction.guard
    if guard is None:
        return step

    def guarded(machine: Machine, lanes: Array) -> None:
        there = machine.parted(lanes, guard)[0]
        if len(there):
            step(machine, there)

    return guarded


def _unguarded(instruction: Instruction) -> Step:
    words, operands = instruction.words, instruction.operands
    known = operation(instruction.op)
    if known is not None:
        into, *inputs = operands
        assert isinstance(into, str)
        takes = known.takes[: len(inputs)]

        def compute(machine: Machine, lanes: Array) -> None:
            numbers = known.function(*(machine.value(o, k, lanes) for o, k in zip(inputs, takes, strict=True)))
            machine.set(into, write(np.asarray(numbers), known.gives), lanes)

        return compute
    family = ".".join(words[:2]) if words[0] in ("ld", "st", "cp", "bar", "barrier", "wgmma", "tcgen05") else words[0]
    for table in (_STEPS, warps.STEPS, tensor_cores.STEPS, tensor_memory.STEPS):
        if family in table:
            return table[family](words, operands)
    raise NotImplementedError(f"the emulator does not know {instruction.op}")


def _moves(words: list[str], operands: Sequence[Operand]) -> Step:
    kind = words[-1] if words[-1] == "pred" else f"b{bits_of(words[-1])}"
    into, source = operands

    def move(machine: Machine, lanes: Array) -> None:
        if isinstance(source, tuple):  # from the low part up
            part = bits_of(kind) // len(source)
            parts = [machine.value(s, f"b{part}", lanes).astype(RAW[bits_of(kind)]) for s in source]
            whole = sum(p << p.dtype.type(i * part) for i, p in enumerate(parts))
            machine.set(str(into), np.asarray(whole), lanes)
        elif isinstance(into, tuple):
            part = bits_of(kind) // len(into)
            whole = machine.value(source, kind, lanes)
            for i, name in enumerate(into):
                machine.set(str(name), (whole >> whole.dtype.type(i * part)).astype(RAW[part]), lanes)
        else:
            machine.set(str(into), machine.value(source, kind, lanes), lanes)

    return move


def _list(operand: Operand) -> tuple[str | int, ...]:
    assert not isinstance(operand, Address)
    return operand if isinstance(operand, tuple) else (operand,)


def _width(words: list[str]) -> int:
    if words[-1][0] != "b":
        raise NotImplementedError("a load of numbers, whose sign may have to be extended")
    return bits_of(words[-1]) // 8


def _load_global(words: list[str], operands: Sequence[Operand]) -> Step:
    width, (into, place) = _width(words), operands

    def load(machine: Machine, lanes: Array) -> None:
        assert isinstance(place, Address)
        names = _list(into)
        for name, word in zip(
            names, machine.memory.load(machine.address(place, lanes), width, len(names), lanes), strict=True
        ):
            machine.set(str(name), word, lanes)

    return load


def _store_global(words: list[str], operands: Sequence[Operand]) -> Step:
    width, (place, source) = bits_of(words[-1]) // 8, operands

    def store(machine: Machine, lanes: Array) -> None:
        assert isinstance(place, Address)
        parts = [machine.value(s, f"b{8 * width}", lanes) for s in _list(source)]
        machine.memory.store(machine.address(place, lanes), parts, width, lanes)

    return store


def _load_shared(words: list[str], operands: Sequence[Operand]) -> Step:
    width, (into, place) = _width(words), operands

    def load(machine: Machine, lanes: Array) -> None:
        assert isinstance(place, Address)
        names, addresses, programs = _list(into), machine.address(place, lanes), machine.programs(lanes)
        machine.shared.count("load", addresses, width * len(names), lanes)
        places = machine.shared.places(addresses, programs, width * len(names))
        found = machine.shared.load(places, width, len(names), programs, machine.warps(lanes))
        for name, word in zip(names, found, strict=True):
            machine.set(str(name), word, lanes)

    return load


def _store_shared(words: list[str], operands: Sequence[Operand]) -> Step:
    width, (place, source) = bits_of(words[-1]) // 8, operands

    def store(machine: Machine, lanes: Array) -> None:
        assert isinstance(place, Address)
        parts = [np.broadcast_to(machine.value(s, f"b{8 * width}", lanes), lanes.shape) for s in _list(source)]
        addresses, programs = machine.address(place, lanes), machine.programs(lanes)
        machine.shared.count("store", addresses, width * len(parts), lanes)
        places = machine.shared.places(addresses, programs, width * len(parts))
        machine.shared.store(places, parts, width, programs, machine.warps(lanes))

    return store


def _load_param(words: list[str], operands: Sequence[Operand]) -> Step:
    into, place = operands

    def load(machine: Machine, lanes: Array) -> None:
        assert isinstance(place, Address)
        assert place.offset == 0, place
        machine.set(str(into), machine.params[place.base], lanes)

    return load


_STEPS: dict[str, Callable[[list[str], Sequence[Operand]], Step]] = {
    "mov": _moves,
    "ld.param": _load_param,
    "ld.global": _load_global,
    "st.global": _store_global,
    "ld.shared": _load_shared,
    "st.shared": _store_shared,
    "bar.sync": warps.nothing,  # its block ends with it
    "barrier.sync": warps.nothing,
    "bar.warp": warps.nothing,
    "fence": warps.nothing,
}
