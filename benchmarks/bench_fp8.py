"""Rows in 8 bits, as the target encoder's products take them, and their peers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.operations import Operation, Sizes, compiled
from benchmarks.peers import peers
from fastjepa import ops
from fastjepa.kernels.fp8 import quantise_rows_cost
from fastjepa.kernels.reference import quantise_rows_ref


def operations(sizes: Sizes) -> list[Operation]:
    """Over the hidden layer of the target encoder's MLP, forward alone; the right answer is not rounded to 8 bits."""
    torch.manual_seed(0)
    tokens, width = sizes.images * sizes.patches, 4 * sizes.width
    x = sizes.randn(tokens, width)

    def exact() -> Sequence[Tensor]:
        scale = x.double().abs().amax(1, keepdim=True) / 448
        return [x.double() / scale, scale]

    found = peers(
        {
            "torch": lambda: quantise_rows_ref,
            "torch.compile": lambda: compiled(quantise_rows_ref),
            "fastjepa": lambda: ops.quantise_rows,
        },
        [x],
        (),
    )
    cost = quantise_rows_cost(tokens, width, sizes.dtype)
    return [Operation("rows in 8 bits", f"{tokens} rows of {width}", cost, exact, found)]


def test_fp8(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
