"""The bias and the GELU of the MLP, and their peers."""

from __future__ import annotations

import torch

from benchmarks.operations import Operation, Sizes, both, compiled, exactly
from benchmarks.peers import peers
from fastjepa import ops
from fastjepa.kernels.gelu import bias_gelu_cost
from fastjepa.kernels.reference import bias_gelu_ref


def operations(sizes: Sizes) -> list[Operation]:
    """Over the contexts' tokens, with both gradients."""
    torch.manual_seed(0)
    tokens, width = sum(sizes.lengths(sizes.context, sizes.spread, sizes.images)), 4 * sizes.width
    inputs, upstream = [sizes.randn(tokens, width), sizes.randn(width)], [sizes.randn(tokens, width)]
    found = peers(
        {
            "torch": lambda: bias_gelu_ref,
            "torch.compile": lambda: compiled(bias_gelu_ref),
            "fastjepa": lambda: ops.bias_gelu,
        },
        inputs,
        upstream,
    )
    cost = both(*(bias_gelu_cost(tokens, width, sizes.dtype, backward=back) for back in (False, True)))
    case = f"{tokens} rows of {width}"
    return [Operation("bias + GELU fwd+bwd", case, cost, exactly(bias_gelu_ref, inputs, upstream), found,
                      "the published code does the same, its bias in the product before")]  # fmt: skip


def test_gelu(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
