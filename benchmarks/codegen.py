"""Compile every kernel in every shipped configuration for chips that need not be here, and read what came of it."""

from __future__ import annotations

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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastjepa.kernels
from fastjepa.kernels.launch import CompileCase

CHIPS = (80, 86, 89, 90, 100)
MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|DMMA|IMMA|QGMMA)\b")
LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.[\w.]*")


@dataclass(frozen=True)
class Compiled:
    """What one kernel configuration became on one chip.

    registers: of a thread. spill_bytes: stack and local memory of a thread. shared_bytes: of a program.
    mma_instructions: tensor-core instructions by kind, as they stand in the code. load_bits: widest global load.
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


def compile_case(case: CompileCase, sm: int) -> Compiled:
    """Compile one configuration for one chip."""
    order = list(case.signature)
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage, code = _disassemble(built.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    widths = [int(bits) for load in LOAD.findall(code) for bits in re.findall(r"\.(64|128)\b", load)]
    return Compiled(
        kernel=case.name,
        config=case.config,
        sm=sm,
        registers=resources["REG"],
        spill_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=built.metadata.shared,
        mma_instructions=dict(sorted(Counter(MMA.findall(code)).items())),
        load_bits=max(widths, default=32 if LOAD.search(code) else 0),
        num_warps=case.num_warps,
        num_stages=case.num_stages,
    )


def table(rows: Sequence[Compiled]) -> str:
    """The rows for a person to read."""
    head = f"{'kernel':<28} {'config':<40} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>6} {'load':>4} mma"
    lines = [
        f"{r.kernel:<28} {r.config:<40} {r.sm:>3} {r.registers:>4} {r.spill_bytes:>5} {r.shared_bytes:>6} "
        f"{r.load_bits:>4} {' '.join(f'{k}:{v}' for k, v in r.mma_instructions.items())}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def as_json(rows: Sequence[Compiled]) -> list[dict]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def _compile(work: tuple[str, int, int]) -> Compiled:
    module, sm, place = work
    return compile_case(importlib.import_module(f"fastjepa.kernels.{module}").compile_cases(sm)[place], sm)


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
