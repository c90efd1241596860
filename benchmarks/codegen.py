"""Compile every kernel in every shipped configuration for chips that need not be here, and read what came of it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import fastjepa.kernels
from fastjepa.kernels.launch import CompileCase

CHIPS = (80, 86, 89, 90, 100)
MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|DMMA|IMMA|QGMMA)\b")
LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.[\w.]*")
STORE = re.compile(r"\bSTG\.[\w.]*")


class Chip(NamedTuple):
    """What a multiprocessor has (CUDA C++ programming guide, technical specifications per compute capability).

    warps, programs: at most resident. shared: bytes in all; shared_of_one: of one program at most.
    """

    warps: int
    programs: int
    shared: int
    shared_of_one: int


# Kernels of small sums or indices, which move no rows.
SCALAR_LOADS = {"jepa_loss_mean", "row_inverse"}
SCALAR_LOADS |= {"gather_patches"}  # rows that Triton does not know to begin at 16 bytes
SCALAR_STORES = {"grad_norm", "jepa_loss_mean", "mask_token_bwd", "row_inverse", "sum_partials"}
SCALAR_STORES |= {"quantise_rows"}  # what it reads 16 bytes of it writes in 8 or 4
REGISTERS = 65536  # 32-bit, of a multiprocessor of any of them; a warp gets them 256 at a time
RESERVED = 1024  # bytes of shared memory that the system takes for each program
LIMITS = {
    80: Chip(64, 32, 164 << 10, 163 << 10),
    86: Chip(48, 16, 100 << 10, 99 << 10),
    89: Chip(48, 24, 100 << 10, 99 << 10),
    90: Chip(64, 32, 228 << 10, 227 << 10),
    100: Chip(64, 32, 228 << 10, 227 << 10),
    120: Chip(48, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel configuration became on one chip.

    registers: of a thread. spill_bytes: stack and local memory of a thread. shared_bytes: of a program.
    mma_instructions: tensor-core instructions by kind, as they stand in the code. load_bits, store_bits: the widest
    global ones. occupancy: warps resident on a multiprocessor over the most that there can be.
    """

    kernel: str
    config: str
    sm: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma_instructions: dict[str, int]
    load_bits: int
    num_warps: int
    num_stages: int
    store_bits: int
    occupancy: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Chips, and a table to compare with."""
    parser.add_argument("--sm", type=int, action="append", choices=tuple(LIMITS), help="default: 80 to 100")
    parser.add_argument(
        "--check", type=Path, metavar="TABLE", help="fail where this differs from a table printed before"
    )


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row, as plain values, for each configuration and chip.

    Raises:
        ValueError: a table to compare with that cannot be read.
    """
    if arguments.check and not arguments.check.is_file():
        raise ValueError(f"--check: no such file: {arguments.check}")
    return [asdict(row) for row in compile_all(tuple(arguments.sm or CHIPS))]


def table(rows: Sequence[dict]) -> str:
    """The rows for a person to read, under a line that says which compiler made them."""
    return listing([Compiled(**row) for row in rows])


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """What no shipped configuration may have, and what differs from the table that was named."""
    compiled = [Compiled(**row) for row in rows]
    wrong = shortcomings(compiled)
    return wrong + (differences(compiled, arguments.check.read_text(encoding="utf-8")) if arguments.check else [])


def kernel_modules() -> list[str]:
    """Names of the modules of `fastjepa.kernels` that ship configurations."""
    names = [info.name for info in pkgutil.iter_modules(fastjepa.kernels.__path__)]
    return [n for n in names if hasattr(importlib.import_module(f"fastjepa.kernels.{n}"), "compile_cases")]


def compile_all(chips: Sequence[int] = CHIPS, jobs: int = 2) -> list[Compiled]:
    """Every shipped configuration for each chip, `jobs` processes at a time."""
    work = [
        (module, sm, place)
        for module in kernel_modules()
        for sm in chips
        for place in range(len(importlib.import_module(f"fastjepa.kernels.{module}").compile_cases(sm)))
    ]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_compile, work, chunksize=4))


def build(case: CompileCase, sm: int, aligned: bool = True) -> CompiledKernel:
    """One configuration as Triton compiles it for a chip, with the alignments that it states or without."""
    order = list(case.signature)
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned if aligned}
    source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def compile_case(case: CompileCase, sm: int) -> Compiled:
    """Compile one configuration for one chip."""
    built = build(case, sm)
    usage, code = _disassemble(built.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        kernel=case.name,
        config=case.config,
        sm=sm,
        registers=resources["REG"],
        spill_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=built.metadata.shared,
        mma_instructions=dict(sorted(Counter(MMA.findall(code)).items())),
        load_bits=_widest(LOAD.findall(code)),
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        store_bits=_widest(STORE.findall(code)),
        occupancy=_occupancy(LIMITS[sm], case.num_warps, resources["REG"], built.metadata.shared),
    )


def listing(rows: Sequence[Compiled]) -> str:
    """The rows for a person to read, under a line that says which compiler made them."""
    kernel, config = (max((len(getattr(r, key)) for r in rows), default=0) for key in ("kernel", "config"))
    head = f"{'kernel':<{kernel}} {'config':<{config}}  sm regs spill shared load store occup. mma"
    lines = [
        f"{r.kernel:<{kernel}} {r.config:<{config}} {r.sm:>3} {r.registers:>4} {r.spill_bytes:>5} {r.shared_bytes:>6} "
        f"{r.load_bits:>4} {r.store_bits:>5} {r.occupancy:>6.2f} "
        + " ".join(f"{kind}:{count}" for kind, count in r.mma_instructions.items())
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in [_compiler(), head, *lines])


def shortcomings(rows: Sequence[Compiled]) -> list[str]:
    """What no shipped configuration may have, a line each.

    That is spills, more shared memory than there is, 16-bit attention without tensor cores, rows not moved by 16 bytes.
    """
    found = []
    for row in rows:
        attends = row.kernel.startswith("attention") and "fp32" not in row.config
        wrong = {
            f"spills {row.spill_bytes} bytes": row.spill_bytes > 0,
            f"needs {row.shared_bytes} bytes of shared memory": row.occupancy == 0,
            "has no tensor-core instruction": attends and not row.mma_instructions,
            f"loads {row.load_bits} bits at most": row.load_bits < 128 and row.kernel not in SCALAR_LOADS,
            f"stores {row.store_bits} bits at most": row.store_bits < 128 and row.kernel not in SCALAR_STORES,
        }
        found += [f"{row.kernel} {row.config} sm{row.sm} {what}" for what, holds in wrong.items() if holds]
    return found


def differences(rows: Sequence[Compiled], committed: str) -> list[str]:
    """How the rows differ from a table printed before, as lines with - and +; none where another compiler made it."""
    before, chips = committed.splitlines(), {row.sm for row in rows}
    if before[0] != _compiler():
        return []
    old = {" ".join(line.split()) for line in before[2:]}
    new = {" ".join(line.split()) for line in listing(rows).splitlines()[2:]}
    gone = sorted(line for line in old - new if _chip(line) in chips)
    return [f"- {line}" for line in gone] + [f"+ {line}" for line in sorted(new - old)]


def _chip(line: str) -> int:
    """The sm of a line of the table: the seventh cell from the end, the counts of instructions left out."""
    return int([cell for cell in line.split() if ":" not in cell][-7])


def _compiler() -> str:
    return f"triton {triton.__version__}"


def _compile(work: tuple[str, int, int]) -> Compiled:
    module, sm, place = work
    return compile_case(importlib.import_module(f"fastjepa.kernels.{module}").compile_cases(sm)[place], sm)


def _widest(accesses: list[str]) -> int:
    """Bits of the widest of these instructions: 32 unless they say more, 0 if there is none."""
    return max((int(bits) for access in accesses for bits in re.findall(r"\.(64|128)\b", access)), default=0) or (
        32 if accesses else 0
    )


def _occupancy(chip: Chip, num_warps: int, registers: int, shared: int) -> float:
    of_a_warp = -(-registers * 32 // 256) * 256
    programs = min(chip.programs, chip.warps // num_warps, REGISTERS // (of_a_warp * num_warps))
    programs = min(programs, chip.shared // (shared + RESERVED)) if shared <= chip.shared_of_one else 0
    return round(programs * num_warps / chip.warps, 3)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) by the cuobjdump in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
