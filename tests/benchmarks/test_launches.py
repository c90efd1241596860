"""The launches suite: everything that training launches is shipped, and so compiled by CI; what is not is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launches
from benchmarks.__main__ import _Parser, main

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, torch
from benchmarks.launches import META, faults, measure, seen
from benchmarks.step import Work
from fastjepa.kernels.gather import gather_rows
from fastjepa.plan.settings import Settings

rows = []
for name, patch, pixels, bf16, narrow in (
    ("vit_tiny", 8, 96, True, False),
    ("vit_base", 16, 224, True, True),
    ("vit_huge", 14, 224, True, False),
    ("vit_large", 16, 224, False, False),
    ("vit_giant", 16, 224, True, False),
):
    work = Work(name, patch, pixels, 8, (384, 3), {"depth": 3}, bf16=bf16, settings=Settings(narrow), device=META)
    for sm in (80, 90):
        rows += measure(work, sm)
wrong = faults(rows, None)
with seen(90) as builds:
    gather_rows(torch.empty(7, 200), torch.tensor([2, 0]))
strange = str(builds[0]), dict(builds[0].constants), builds[0].aligned
print(json.dumps([sorted({row["kernel"] for row in rows}), len(rows), wrong, strange]))
"""


def test_all_that_training_launches_is_shipped():
    """In a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, rows, wrong, (name, constants, aligned) = json.loads(done.stdout)
    assert wrong == []
    assert rows > 250
    kinds = "adamw_ema assemble attention_bwd attention_fwd ema gather gelu_bwd gelu_fwd grad_norm jepa_loss_bwd"
    kinds += " jepa_loss_fwd layer_norm_bwd layer_norm_fwd mask_token mean place scatter sum_partials"
    assert kernels == sorted(f"_{kind}_kernel" for kind in kinds.split())
    # and one that is not: its launcher's own tiles, and a step of which Triton knows nothing
    assert name.startswith("x fp32, rows i64, y fp32")
    assert constants["D"] == "200"
    assert "x_ptr" in aligned
    assert "stride_x_row" not in aligned


def test_faults():
    row = {"sm": 90, "kernel": "_gelu_fwd_kernel", "build": "x bf16", "shipped": True, "launches": 3, "first": 1}
    arguments = _Parser().parse_args([])
    assert launches.faults([row | {"of": "features"}], arguments) == []
    assert launches.faults([row | {"shipped": False}], arguments) == [
        "_gelu_fwd_kernel: x bf16 on sm 90 is not among compile_cases"
    ]
    assert launches.faults([row | {"first": 2}], arguments) == [
        "_gelu_fwd_kernel: x bf16 on sm 90 is compiled first in step 2"
    ]
    assert launches.faults([row | {"first": 2, "kernel": "_attention_fwd_kernel"}], arguments) == []


def test_bad_input(capsys: pytest.CaptureFixture[str]):
    assert main(["launches", "--patch-size", "0"]) == 2
    assert "--patch-size, --crop-size and --pred-emb-dim must be at least 1" in capsys.readouterr().err
    if launches.is_interpreted():
        assert main(["launches", "--model", "vit_tiny", "--patch-size", "16", "--sm", "80"]) == 2
        assert "unset TRITON_INTERPRET" in capsys.readouterr().err
