"""The PTX that Triton writes for one kernel, as instructions in basic blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}
_STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+)$")


class Address(NamedTuple):
    """[base + offset]"""

    base: str
    offset: int


Operand = str | int | Address | tuple["str | int", ...]  # a name, raw bits, a place, several of the first two


class Guard(NamedTuple):
    """Which lanes: those where a predicate holds, or those where it does not."""

    name: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """op: with all its suffixes. place: file and line of the kernel, for a person."""

    op: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    place: str

    @property
    def words(self) -> list[str]:
        """The parts of `op`."""
        return self.op.split(".")

    def __str__(self) -> str:
        return f"{self.op} {self.operands} at {self.place}"


@dataclass
class Block:
    """Instructions that are run one after another. target: the block after it where its guard, if any, holds.

    ends: the program ends there instead. falls: those that do not go there go on with the next block. barrier: not
    before all threads of the program have come to one.
    """

    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None
    guard: Guard | None = None
    ends: bool = False
    falls: bool = True
    barrier: bool = False


@dataclass(frozen=True)
class Program:
    """params: name -> width in bits, in order. registers: name of each -> width in bits. threads: of a program."""

    name: str
    params: dict[str, int]
    registers: dict[str, int]
    blocks: list[Block]
    threads: int


def parse(text: str) -> Program:
    """The one kernel of a PTX text.

    Raises:
        ValueError: a text with something else in it.
    """
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = re.sub(r"//.*", "", text)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if head is None:
        raise ValueError("no kernel in this PTX")
    params = {name: int(bits) for bits, name in re.findall(r"\.param\s+\.\D(\d+)[^,]*?(\w+)\s*(?:,|$)", head[2])}
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise ValueError(f"{head[1]} does not say how many threads it has")
    registers: dict[str, int] = {}
    parser = _Blocks()
    for scopes, place, statement in _statements(text[head.end() :], files):
        if statement.startswith(".reg"):
            registers |= _declared(statement)
        elif statement.endswith(":"):
            parser.label((scopes[-1], statement[:-1]))
        elif not statement.startswith("."):
            parser.add(scopes, _instruction(statement, place))
    return Program(head[1], params, registers, parser.finish(), int(threads[1]))


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(scopes it stands in, place, statement) up to the kernel's closing brace."""
    scopes, opened, place, rest = (0,), 0, "", ""
    for line in body.splitlines():
        loc = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if loc:
            place = f"{files.get(loc[1], '?')}:{loc[2]}"
            continue
        rest += line + "\n"
        while True:
            rest = rest.lstrip()
            if rest.startswith("{"):
                opened += 1
                scopes, rest = (*scopes, opened), rest[1:]
            elif rest.startswith("}"):
                scopes, rest = scopes[:-1], rest[1:]
                if not scopes:
                    return
            elif label := re.match(r"[\w$]+:(?!:)", rest):
                rest = rest[label.end() :]
                yield scopes, place, label[0]
            elif ";" in rest:
                statement, rest = rest.split(";", 1)
                yield scopes, place, statement.strip()
            else:
                break
    raise ValueError("the kernel's PTX does not end")


def _declared(statement: str) -> dict[str, int]:
    words = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL)
    assert words is not None, statement
    found = {}
    for name in words[2].split(","):
        many = re.fullmatch(r"\s*(\S+?)(?:<(\d+)>)?\s*", name)
        assert many is not None, statement
        names = [many[1]] if many[2] is None else [f"{many[1]}{n}" for n in range(int(many[2]))]
        found |= dict.fromkeys(names, WIDTHS[words[1]])
    return found


def _instruction(statement: str, place: str) -> Instruction:
    parts = _STATEMENT.fullmatch(statement)
    assert parts is not None, statement
    guard = Guard(parts[2], bool(parts[1])) if parts[2] else None
    return Instruction(parts[3], tuple(_operand(o.strip()) for o in _OPERAND.findall(parts[4])), guard, place)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_plain(part.strip()) for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset, 0) if offset.strip() else 0)
    return tuple(_plain(part) for part in text.split("|")) if "|" in text else _plain(text)


def _plain(text: str) -> str | int:
    """A name, or the bits of a number."""
    if not _NUMBER.match(text):
        return text
    return int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text, 0)


class _Blocks:
    """Instructions cut where something goes to, and behind what goes."""

    def __init__(self) -> None:
        self.blocks = [Block()]
        self.labels: dict[tuple[int, str], int] = {}
        self.jumps: list[tuple[int, tuple[int, ...], str]] = []

    def label(self, name: tuple[int, str]) -> None:
        if self.blocks[-1].instructions:
            self.blocks.append(Block())
        self.labels[name] = len(self.blocks) - 1

    def add(self, scopes: tuple[int, ...], instruction: Instruction) -> None:
        block, op = self.blocks[-1], instruction.words[0]
        if op not in ("bra", "ret"):
            block.instructions.append(instruction)
            if instruction.words[:2] in (["bar", "sync"], ["barrier", "sync"]):
                if instruction.guard is not None or instruction.operands != (0,):
                    raise NotImplementedError(f"the emulator knows one barrier, of all threads, not {instruction}")
                block.barrier = True
                self.blocks.append(Block())
            return
        block.guard, block.ends, block.falls = instruction.guard, op == "ret", instruction.guard is not None
        if op == "bra":
            target = instruction.operands[0]
            assert isinstance(target, str)
            self.jumps.append((len(self.blocks) - 1, scopes, target))
        self.blocks.append(Block())

    def finish(self) -> list[Block]:
        self.blocks[-1].ends, self.blocks[-1].falls = True, False
        for block, scopes, name in self.jumps:
            self.blocks[block].target = next(
                self.labels[scope, name] for scope in reversed(scopes) if (scope, name) in self.labels
            )
        return self.blocks
