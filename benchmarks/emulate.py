"""The `emulate` suite: every operation of ours on a chip that is emulated, held to fp64, and what its kernels move.

Kernels are compiled for the chip, and a processor runs the PTX instruction by instruction (`benchmarks.emulator`). So
what is compiled is seen to be right, tensor cores and all, where no GPU is; and what it asks of memory is counted: in
sectors of 32 bytes, of which a chip moves whole ones, and in passes over the banks of shared memory. It says nothing of
time. Widths are those of ViT-H/14 with its predictor, in bf16; images are few.
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import count, step
from benchmarks.emulator import emulated
from benchmarks.emulator.memory import SECTOR
from benchmarks.kernels import FILES, Judge
from benchmarks.operations import Sizes
from benchmarks.step import Work
from benchmarks.tables import columns
from fastjepa.kernels.fp8 import FIRST_ARCH
from fastjepa.kernels.launch import is_interpreted

CHIPS = (80, 90, 100)  # sm 86 and 89 run the instructions of 80
SIZES = Sizes(torch.device("cpu"), torch.bfloat16, 2, 256, 1280, 16, 384, 16, 1)
WORK = Work("vit_tiny", 8, 96, 3, (96, 2), {"depth": 2}, bf16=True, device=SIZES.device)
MARKERS = ("<!-- emulated -->", "<!-- end of emulated -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which operations, for which chips."""
    parser.add_argument("--operation", action="append", choices=FILES, metavar="NAME", help=f"of {', '.join(FILES)}")
    parser.add_argument("--sm", type=int, action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the table between the markers there")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each kernel of each operation.

    Raises:
        ValueError: kernels that are interpreted, or a document without its markers.
    """
    if is_interpreted():
        raise ValueError("kernels are interpreted here, not compiled: unset TRITON_INTERPRET")
    if arguments.document:
        count.put("", arguments.document, MARKERS, write=False)
    rows = [row for sm in arguments.sm or CHIPS for row in measure(sm, arguments.operation or FILES)]
    if not arguments.operation:
        rows += [row for sm in arguments.sm or CHIPS for row in steps(sm)]
    if arguments.document:
        count.put(markdown(rows), arguments.document, MARKERS)
    return rows


def measure(sm: int, files: Sequence[str] = FILES, sizes: Sizes = SIZES) -> Iterator[dict]:
    """The rows of these files' operations on one chip.

    Keys: sm, operation, case, error or wrong; of each kernel: read MB and written MB as it asks for them; read x and
    written x, the sectors that are moved for it over those that would hold it; banks x, passes over the banks of shared
    memory over the least, operands left out that tensor cores read by themselves. Caches are not told from memory.
    """
    for file in files:
        if file == "fp8" and sm < FIRST_ARCH:
            continue
        for operation in import_module(f"benchmarks.bench_{file}").operations(sizes):
            (peer,) = [p for p in operation.peers if p.name == "fastjepa"]
            judge, moved = Judge(operation), {}
            with emulated(sm, moved) as launched:
                found = judge.row(peer, lambda peer, call: {})
            found |= {} if launched else {"wrong": "launches nothing"}
            common = {"sm": sm, "operation": operation.name, "case": operation.case} | found
            yield from ([common | _moved(kernel, moved[kernel]) for kernel in moved] or [common])
        gc.collect()


def steps(sm: int) -> Iterator[dict]:
    """Rows of whole training steps, forward and backward under bf16 autocast; error: of all gradients together."""
    exact = step.exact_gradients(WORK)
    eager = step.errors(WORK, step.build(WORK, "eager"), exact)
    case = f"{WORK.name}/{WORK.patch}, {WORK.batch} images; eager PyTorch's error {eager['gradients']:.3e}"
    for name in ("fastjepa truncated", "fastjepa ragged"):
        with emulated(sm) as launched:
            found = step.errors(WORK, step.build(WORK, name), exact)
        row = {"sm": sm, "operation": f"training step, {name}", "case": case, "error": found["gradients"]}
        if found["gradients"] > 2 * eager["gradients"]:
            row["wrong"] = f"its gradients are {found['gradients']:.1e} from fp64"
        yield row | ({} if launched else {"wrong": "launches nothing"})


def _moved(kernel: str, of: Counter[str]) -> dict:
    row: dict = {"kernel": kernel}
    for what, name in (("load", "read"), ("store", "written")):
        row[f"{name} MB"] = of[f"{what} bytes"] / 1e6
        if of[f"{what} bytes"]:
            row[f"{name} x"] = of[f"{what} sectors"] * SECTOR / of[f"{what} bytes"]
    best = of["shared load passes at best"] + of["shared store passes at best"]
    if best:
        row["banks x"] = (of["shared load passes"] + of["shared store passes"]) / best
    return row


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """The operations that are wrong."""
    return [f"sm {row['sm']} {row['operation']}: {row['wrong']}" for row in rows if "wrong" in row]


table = columns


def markdown(rows: Sequence[dict]) -> str:
    """A table for the document."""
    heads = ["operation", "case", "kernel", "sm", "error", "read MB", "read x", "written MB", "written x", "banks x"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = (
            "" if row.get(h) is None else f"{row[h]:.3g}" if isinstance(row[h], float) else str(row[h]) for h in heads
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
