"""The host suite: launches are left out and counted, and nothing is left changed."""

from __future__ import annotations

import pytest

from benchmarks import host
from tests.kernels.row_checks import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="needs Triton's interpreter; GPUs time it in `kernels`")


def test_rows():
    rows = {row["operation"]: row for row in host.measure(repeats=2)}
    assert {name: row["launches"] for name, row in rows.items()} == {
        "residual + LayerNorm": 3,  # forward, backward, and the sum of its partial sums
        "bias + GELU": 3,
        "attention": 2,
        "take rows": 3,  # forward; the inverse of the rows, and backward
        "loss": 3,  # rows, their mean, and backward
        "EMA of 150 tensors": 1,
        "AdamW + EMA of 150 tensors": 1,
    }
    assert all(row["ours_us"] > 0 and row["torch_us"] > 0 for row in rows.values())


def test_launches_are_back_afterwards():
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run
    with host._no_launches():
        assert InterpretedFunction.run is not run
    assert InterpretedFunction.run is run
