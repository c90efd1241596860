"""The host suite: launches are made ready, run nothing and are counted, and nothing is left changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host
from fastjepa.kernels.launch import is_interpreted

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks import host
from fastjepa.kernels.gather import _gather_kernel
from fastjepa.ops import library

host.STEPS = {"vit_tiny": 2}
before = driver._active, JITFunction._do_compile, library.takes_kernels
rows = host.measure(repeats=2)
after = driver._active, JITFunction._do_compile, library.takes_kernels
print(json.dumps([rows, before == after, list(map(str, _gather_kernel.device_caches))]))
"""


@pytest.fixture(scope="module")
def measured():
    """[rows, whether all is as it was, devices that Triton has kernels of], from a process that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows(measured):
    rows = {row["operation"]: row for row in measured[0]}
    launches = {name: row["launches"] for name, row in rows.items()}
    truncated, ragged = launches.pop("step of vit_tiny, truncated"), launches.pop("step of vit_tiny, ragged")
    assert launches == {
        "residual + LayerNorm": 3,  # forward, backward, and the sum of its partial sums
        "bias + GELU": 3,
        "attention": 2,
        "take rows": 3,  # forward; the inverse of the rows, and backward
        "loss": 3,  # rows, their mean, and backward
        "EMA of 150 tensors": 1,
        "AdamW + EMA of 150 tensors": 1,
        "step of vit_tiny, ragged, from a graph": 0,
    }
    # a layer: 4 of the target, 4 and 8 of the context encoder; the predictor's 2 layers; ends, loss, optimizer
    assert truncated == ragged
    assert 12 * 16 + 2 * 12 < truncated < 12 * 16 + 2 * 12 + 60
    assert all(row["ours_us"] > 0 and row["torch_us"] > 0 for row in rows.values())
    graph = rows["step of vit_tiny, ragged, from a graph"]["ours_us"]
    assert graph < rows["step of vit_tiny, ragged"]["ours_us"] / 4


def test_all_is_as_before_afterwards(measured):
    _, same, devices = measured
    assert same
    assert len(devices) == 1, "what was launched by nobody is kept under a device of its own"
    assert devices[0].startswith("<object object")


@pytest.mark.skipif(not is_interpreted(), reason="kernels are interpreted where there is no GPU")
def test_interpreted_kernels_are_refused():
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        host.measure(1)
