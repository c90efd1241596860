"""The residual's addition and the LayerNorm after it, and their peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operations import Operation, Run, Sizes, both, compiled, exactly, with_gradients
from benchmarks.peers import peer, peers
from fastjepa import ops
from fastjepa.kernels.layer_norm import add_layer_norm_cost
from fastjepa.kernels.reference import add_layer_norm_ref

Pair = tuple[Tensor, Tensor]  # what is normalised, and the sum before


def operations(sizes: Sizes) -> list[Operation]:
    """Over the contexts' tokens, with every gradient: all of one dtype, and in 16 bits also as under autocast."""
    wide = torch.float32
    return [_operation(sizes, sizes.dtype)] + ([_operation(sizes, wide)] if sizes.dtype != wide else [])


def _operation(sizes: Sizes, stream: torch.dtype) -> Operation:
    """x and y in the sizes' dtype, the residual, the sum and the parameters in `stream`."""
    torch.manual_seed(0)
    tokens = sum(sizes.lengths(sizes.context, sizes.spread, sizes.images))
    inputs = [sizes.randn(tokens, sizes.width), sizes.randn(tokens, sizes.width).to(stream)]
    inputs += [sizes.randn(sizes.width).to(stream), sizes.randn(sizes.width).to(stream)]
    upstream = [sizes.randn(tokens, sizes.width), sizes.randn(tokens, sizes.width).to(stream)]

    def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        out_dtype = sizes.dtype if x.dtype == sizes.dtype else None  # nothing of the fp64 answer is rounded
        return add_layer_norm_ref(x, residual, weight, bias, 1e-6, out_dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        return ops.add_layer_norm(x, residual, weight, bias, 1e-6, sizes.dtype)

    def official() -> Run:
        """As under autocast: the residual, the sum and what is normalised are fp32."""
        return with_gradients(torchs, [inputs[0], *(t.float() for t in inputs[1:])], [g.float() for g in upstream])

    found = peers(
        {
            "torch": lambda: torchs,
            "torch.compile": lambda: compiled(torchs),
            "Liger LayerNorm": _liger,
            "fastjepa": lambda: ours,
        },
        inputs,
        upstream,
    )
    found.insert(1, peer("eager, as published", official, sizes.device))
    y = sizes.dtype
    cost = both(
        *(
            add_layer_norm_cost(
                tokens, sizes.width, y, backward=back, residual_dtype=stream, out_dtype=y, weight_dtype=stream
            )
            for back in (False, True)
        )
    )
    case = f"{tokens} rows of {sizes.width}" + (", fp32 stream" if stream != sizes.dtype else "")
    return Operation("residual + LayerNorm fwd+bwd", case, cost, exactly(torchs, inputs, upstream), found)


def _liger() -> Callable[[Tensor, Tensor, Tensor, Tensor], Pair]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        total = x + residual
        return LigerLayerNormFunction.apply(total, weight, bias, 1e-6), total

    return run


def test_layer_norm(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
