"""The codegen suite: what it calls wrong, and the committed table against what the kernels ship."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import codegen
from benchmarks.codegen import Compiled
from fastjepa.kernels.rows import MULTIPROCESSORS

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "codegen.txt"
GOOD = Compiled("attention_fwd", "d80 bf16 64x32 w4 s2", 80, 168, 0, 16384, {"HMMA": 80}, 128, 4, 2, 128, 0.188)


@pytest.mark.parametrize(
    ("chip", "num_warps", "registers", "shared", "occupancy"),
    [
        (80, 8, 128, 0, 0.25),  # two programs of 32768 registers
        (80, 4, 32, 0, 1.0),
        (80, 4, 33, 0, 0.75),  # registers come 8 at a time: 12 programs
        (80, 4, 32, 80 << 10, 0.125),  # two programs' shared memory
        (86, 4, 32, 100 << 10, 0.0),  # more than a program may have
        (86, 1, 32, 0, 0.333),  # as many programs as there can be
    ],
)
def test_occupancy(chip: int, num_warps: int, registers: int, shared: int, occupancy: float):
    assert codegen._occupancy(codegen.LIMITS[chip], num_warps, registers, shared) == occupancy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"occupancy": 0.0}, "needs 16384 bytes of shared memory"),
        ({"mma_instructions": {}}, "has no tensor-core instruction"),
        ({"load_bits": 64}, "loads 64 bits at most"),
        ({"store_bits": 32}, "stores 32 bits at most"),
    ],
)
def test_faults(change: dict, said: str):
    assert codegen.shortcomings([GOOD]) == []
    assert codegen.shortcomings([GOOD, replace(GOOD, **change)]) == [f"attention_fwd d80 bf16 64x32 w4 s2 sm80 {said}"]


def test_small_kernels_and_fp32_are_let_off():
    assert codegen.shortcomings([replace(GOOD, config="d80 fp32", mma_instructions={})]) == []
    assert (
        codegen.shortcomings([replace(GOOD, kernel="row_inverse", load_bits=32, store_bits=32, mma_instructions={})])
        == []
    )


def test_differences():
    other = replace(GOOD, sm=90, mma_instructions={})
    committed = codegen.listing([GOOD, other])
    assert codegen.differences([GOOD], committed) == []  # only the chips that were compiled
    changed = codegen.differences([replace(GOOD, registers=170)], committed)
    assert [line[:2] for line in changed] == ["- ", "+ "]
    assert "168" in changed[0]
    assert "170" in changed[1]
    assert codegen.differences([replace(GOOD, registers=170)], "triton 0\n" + committed.split("\n", 1)[1]) == []


def test_the_committed_table_has_every_shipped_configuration():
    lines = TABLE.read_text(encoding="utf-8").splitlines()[2:]
    listed = sorted(" ".join(line.split()) for line in lines)
    shipped = sorted(
        f"{case.name} {case.config} {chip} "
        for module in codegen.kernel_modules()
        for chip in codegen.CHIPS
        for case in importlib.import_module(f"fastjepa.kernels.{module}").compile_cases(chip)
    )
    assert len(listed) == len(shipped)
    missing = [a for a, b in zip(shipped, listed, strict=True) if not b.startswith(a)]
    assert not missing, f"make the table again: python -m benchmarks codegen > {TABLE.relative_to(ROOT)}"


def test_every_program_of_a_persistent_kernel_has_a_place_on_the_chip():
    """By the registers of the committed table, which come in eights."""
    seen = 0
    for line in TABLE.read_text(encoding="utf-8").splitlines()[2:]:
        if launch := re.match(r"layer_norm_bwd .* w(\d+) p(\d+) +(\d+) +(\d+) ", line):
            warps, programs, chip, registers = map(int, launch.groups())
            resident = codegen.REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
            assert programs <= MULTIPROCESSORS[chip] * resident, line
            seen += 1
    assert seen > 100


@pytest.mark.parametrize("chip", codegen.CHIPS)
def test_the_committed_table_is_what_compiles(chip: int):
    """A few kernels of each chip, in a process where kernels are compiled and not interpreted; CI takes all of them."""
    program = (
        "import json, importlib; from benchmarks import codegen; from dataclasses import asdict\n"
        f"chip, sample = {chip}, []\n"
        "for module in ('attention', 'gather', 'jepa_loss'):\n"
        "    cases = importlib.import_module(f'fastjepa.kernels.{module}').compile_cases(chip)\n"
        "    sample.append(codegen.compile_case(cases[7 * chip % len(cases)], chip))\n"
        f"table = open({str(TABLE)!r}).read()\n"
        "gone = codegen.differences(sample, table)\n"
        "print(json.dumps([codegen.shortcomings(sample), [line for line in gone if line.startswith('+')]]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], []]
