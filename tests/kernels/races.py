"""Who meets whom in memory: every access of an interpreted launch, and in which threads a compiled kernel has it.

The interpreter runs one program after another and one operation after another, so a result that is right there may
still depend on their order, which a chip does not keep: programs run at once, and so do the threads of one program
between two barriers.

Run as a module it compiles shipped configurations and prints the layouts of what meets:
`python -m tests.kernels.races ema 80 momentum`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import pytest
from triton.runtime import interpreter

import fastjepa.kernels
from benchmarks.codegen import build
from fastjepa.kernels.launch import CompileCase
from tests.kernels.row_checks import matching

KERNELS = Path(fastjepa.kernels.__file__).parent
Place = tuple[str, int]  # file and line of a kernel
Meeting = tuple[str, Place, Place]  # kernel, the earlier access, the later one


class Access(NamedTuple):
    """What one operation of one program did.

    since: barriers before it in the launch. bytes: addresses. elements: where in the block the element of each stands.
    """

    writes: bool
    program: tuple[int, ...]
    since: int
    place: Place
    shape: tuple[int, ...]
    bytes: np.ndarray
    elements: np.ndarray


class Meetings:
    """What `watch` saw, over all launches: accesses to one byte of which one writes.

    programs: by two programs. twice: by one operation, from two elements of its block.
    threads: by two operations of one program with no barrier between, for elements that stand alike in blocks of one
    shape, so that in equal layouts it is one thread that has both. moved: the same, for elements that stand elsewhere.
    """

    def __init__(self) -> None:
        self.launched: set[str] = set()
        self.programs: set[Meeting] = set()
        self.twice: set[Meeting] = set()
        self.threads: set[Meeting] = set()
        self.moved: set[Meeting] = set()

    def judge(self, kernel: str, accesses: Sequence[Access]) -> None:
        """Take in one launch."""
        self.launched.add(kernel)
        if not any(a.writes for a in accesses):
            return
        written = np.unique(np.concatenate([a.bytes for a in accesses if a.writes]))
        found = []
        for i, access in enumerate(accesses):
            touched, first = np.unique(access.bytes, return_index=True)
            if access.writes and len(touched) < len(access.bytes):
                self.twice.add((kernel, access.place, access.place))
            at = np.searchsorted(written, touched).clip(max=len(written) - 1)
            here = written[at] == touched
            found.append(np.stack([at[here], np.full(here.sum(), i), access.elements[first[here]]], axis=1))
        each = np.concatenate(found)
        each = each[np.lexsort((each[:, 1], each[:, 0]))]  # by byte, then by time
        for apart in range(1, len(accesses)):
            earlier, later = each[:-apart], each[apart:]
            together = earlier[:, 0] == later[:, 0]
            if not together.any():
                break
            moved = earlier[:, 2] != later[:, 2]
            pairs = np.stack([earlier[:, 1], later[:, 1], moved], axis=1)[together]
            for first, then, stands_elsewhere in np.unique(pairs, axis=0):
                self._meet(kernel, accesses[first], accesses[then], bool(stands_elsewhere))

    def _meet(self, kernel: str, first: Access, then: Access, stands_elsewhere: bool) -> None:
        if not (first.writes or then.writes):
            return
        meeting = (kernel, first.place, then.place)
        if first.program != then.program:
            self.programs.add(meeting)
        elif first.since == then.since:
            (self.moved if stands_elsewhere or first.shape != then.shape else self.threads).add(meeting)


def watch(patch: pytest.MonkeyPatch) -> Meetings:
    """Note every load, store and barrier of every interpreted launch until `patch` is undone."""
    builder, meetings = type(interpreter.interpreter_builder), Meetings()
    accesses: list[Access] = []
    barriers = 0

    def noted(operation: Callable, writes: bool) -> Callable:
        def note(self, pointers, *operands):
            mask = operands[1] if writes else operands[0]
            places, kept = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            touched = (places[kept].astype(np.int64)[:, None] + np.arange(width)).ravel()
            elements = np.flatnonzero(kept).repeat(width)
            place = _place(sys._getframe(1))
            accesses.append(Access(writes, tuple(self.grid_idx), barriers, place, kept.shape, touched, elements))
            return operation(self, pointers, *operands)

        return note

    def barrier(self):
        nonlocal barriers
        barriers += 1

    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        accesses.clear()
        run(self, *args, **kwargs)
        meetings.judge(self.fn.__name__, accesses)

    patch.setattr(builder, "create_masked_load", noted(builder.create_masked_load, False))
    patch.setattr(builder, "create_masked_store", noted(builder.create_masked_store, True))
    patch.setattr(builder, "create_barrier", barrier)
    patch.setattr(interpreter.GridExecutor, "__call__", launch)
    return meetings


def _place(frame: FrameType | None) -> Place:
    """The innermost line of a kernel."""
    while frame is not None and Path(frame.f_code.co_filename).parent.name != KERNELS.name:
        frame = frame.f_back
    assert frame is not None
    return Path(frame.f_code.co_filename).name, frame.f_lineno


def layouts(case: CompileCase, sm: int, aligned: bool = True) -> dict[Place, set[str]]:
    """Of every line that loads or stores, the layouts in which it does, with "copies" where threads share an element.

    `aligned`: with the alignments that Triton finds for shipped widths, or with none.
    """
    text = build(case, sm, aligned).asm["ttgir"]
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    encodings = dict(re.findall(r"^#(\w+) = (#ttg\..*)$", text, re.MULTILINE))
    found: dict[Place, set[str]] = {}
    for line in text.splitlines():
        access = re.search(r"\btt\.(?:load|store)\b.* : (.*) loc\((#loc\d*)\)$", line)
        if access:
            kind = re.match(r"tensor<([\dx]+)x.*#(\w+)>", access[1])
            layout = encodings[kind[2]] if kind else "every thread"  # loads the one element, and one thread stores it
            shared = kind and _has_copies([int(n) for n in kind[1].split("x")], layout)
            found.setdefault(_source_place(locations, access[2]), set()).add(layout + " copies" * bool(shared))
    return found


def _source_place(locations: dict[str, str], name: str) -> Place:
    """The innermost file and line of a location; a call's is named before its caller's."""
    described = locations[name]
    place = re.match(r'"([^"]+\.py)":(\d+)', described)
    if place:
        return Path(place[1]).name, int(place[2])
    return _source_place(locations, re.findall(r"#loc\d*", described)[0])


def _has_copies(shape: Sequence[int], encoding: str) -> bool:
    """Whether a block has fewer elements than a blocked layout has threads for them."""
    taken = [
        [int(n) for n in part.split(",")] for part in re.findall(r"(?:PerThread|PerWarp|PerCTA) = \[(.*?)\]", encoding)
    ]
    assert len(taken) == 3, encoding
    return any(n < a * b * c for n, a, b, c in zip(shape, *taken, strict=True))


if __name__ == "__main__":
    for shipped, chip in matching(*sys.argv[1:]):
        for alignment in (True, False):
            seen_at = layouts(shipped, chip, alignment)
            print(json.dumps([shipped.kernel.__name__, [[*place, *sorted(seen)] for place, seen in seen_at.items()]]))
