"""The `roofline` suite: what the operations of a ViT-H/14 step have to cost at least, by count and data sheet.

Nothing runs. Bytes, FLOPs and launches are the declared ones (`*_cost` of each kernel file, which tests hold to what is
launched); a floor is the larger of bytes over a chip's bandwidth and FLOPs over its dense bf16 peak. An estimate takes
SHARE of the bandwidth or peak, an assumption written here and measured nowhere yet. Beside each stand the bytes that
PyTorch moves for the same result, each of its kernels reading its inputs and writing its outputs once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.kernels import CHIPS
from benchmarks.operations import Sizes
from fastjepa.kernels.attention import attention_cost
from fastjepa.kernels.attention_tiles import head_parts
from fastjepa.kernels.fp8 import quantise_rows_cost
from fastjepa.kernels.gather import assemble_predictor_cost, gather_rows_cost, scatter_rows_cost
from fastjepa.kernels.gelu import bias_gelu_cost
from fastjepa.kernels.jepa_loss import jepa_loss_cost
from fastjepa.kernels.launch import Cost
from fastjepa.kernels.layer_norm import add_layer_norm_cost

SHARE = {"bandwidth": 0.85, "tensor cores": 0.40}  # assumed: of the data sheet's figures
PARAMETERS = 630_434_560  # of ViT-H/14 without its fixed position embedding


class Row(NamedTuple):
    """One operation: our cost, and the bytes that plain PyTorch moves for the same result (0: not counted).

    padded: columns that a head's products compute over those it has, 0 where there are no products.
    """

    name: str
    cost: Cost
    torch_bytes: int
    padded: float = 0.0


def rows(sizes: Sizes | None = None) -> list[Row]:
    """The operations of one step of ViT-H/14 at 128 images, ragged, in bf16; forward and backward where it has both."""
    s = sizes or Sizes(torch.device("meta"), torch.bfloat16, 128, 256, 1280, 16, 384, 16, 32)
    lengths = s.lengths(s.context, s.spread, s.images)
    pairs = [n + s.target for n in lengths for _ in range(4)]
    context, targets, predicted = sum(lengths), 4 * s.images * s.target, sum(pairs)
    size = s.dtype.itemsize
    wide, hidden, narrow = (context * w * size for w in (s.width, 4 * s.width, s.predictor_width))
    every, put = s.images * s.patches * s.width * size, predicted * s.predictor_width * size
    loss = targets * s.width * size

    def both(ahead: Cost, back: Cost) -> Cost:
        return Cost(ahead.bytes + back.bytes, ahead.flops + back.flops, ahead.launches + back.launches)

    def attention(name: str, of: Sequence[int], heads: int, width: int, backward: bool = True) -> Row:
        head_dim = width // heads
        cost = attention_cost(of, heads, head_dim, size)
        if backward:
            cost = both(cost, attention_cost(of, heads, head_dim, size, backward=True))
        return Row(name, cost, 0, sum(head_parts(head_dim)) / head_dim)

    return [
        Row("gather + position", gather_rows_cost(context, s.width, s.dtype, s.patches), 2 * every + 2 * wide),
        Row(
            "take rows fwd+bwd",
            both(
                gather_rows_cost(targets, s.predictor_width, s.dtype, index_bytes=8),
                scatter_rows_cost(targets, predicted, s.predictor_width, s.dtype, unique=True, index_bytes=8),
            ),
            5 * targets * s.predictor_width * size + put,  # gather; back: zeros, an indexed sum
        ),
        Row(
            "predictor input fwd+bwd",
            both(
                assemble_predictor_cost(predicted, context, s.patches, s.predictor_width, s.dtype, 8),
                assemble_predictor_cost(predicted, context, s.patches, s.predictor_width, s.dtype, 8, backward=True),
            ),
            2 * put + 2 * put + 3 * put + 2 * put + narrow,  # two gathers, a sum; back: its copy, an indexed sum
        ),
        Row(
            "loss fwd+bwd",
            both(*(jepa_loss_cost(targets, s.width, s.dtype, backward=back) for back in (False, True))),
            2 * every + 2 * loss + 2 * loss + 3 * loss,  # LayerNorm of all, gather, smooth-L1 and its backward
        ),
        Row(
            "residual + LayerNorm fwd+bwd",
            both(*(add_layer_norm_cost(context, s.width, s.dtype, backward=back) for back in (False, True))),
            3 * wide + 2 * wide + 3 * wide + 3 * wide,  # sum, LayerNorm; its backward, the sum of two gradients
        ),
        Row(
            "bias + GELU fwd+bwd",
            both(*(bias_gelu_cost(context, 4 * s.width, s.dtype, backward=back) for back in (False, True))),
            2 * hidden + 3 * hidden + hidden,  # the bias in the product's epilogue; GELU, its backward, dbias
        ),
        Row(
            "rows in 8 bits",
            quantise_rows_cost(s.images * s.patches, 4 * s.width, s.dtype),
            5 * s.images * s.patches * 4 * s.width,  # read for the largest, read again, a byte written
        ),
        attention("attention, context, fwd+bwd", lengths, s.heads, s.width),
        attention("attention, predictor, fwd+bwd", pairs, s.predictor_heads, s.predictor_width),
        attention("attention, target, fwd", [s.patches] * s.images, s.heads, s.width, backward=False),
        Row("EMA", Cost(12 * PARAMETERS, 3 * PARAMETERS, 1), 12 * PARAMETERS),
        Row("AdamW + EMA", Cost(36 * PARAMETERS, 19 * PARAMETERS, 1), 40 * PARAMETERS),
        Row("AdamW + EMA + 2 bf16 copies", Cost(40 * PARAMETERS, 19 * PARAMETERS, 1), 52 * PARAMETERS),
        Row("clip + AdamW + EMA + 2 bf16 copies", Cost(44 * PARAMETERS, 21 * PARAMETERS, 2), 64 * PARAMETERS),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each operation."""
    return measure()


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """None: there is nothing to be right or wrong."""
    return []


def measure() -> list[dict]:
    """The rows as plain values: microseconds at least and as estimated on each chip, none of it measured."""
    found = []
    for name, cost, torchs, padded in rows():
        row = {"operation": name, "MB": cost.bytes / 1e6, "GFLOP": cost.flops / 1e9, "launches": cost.launches}
        matmuls = cost.flops if padded else 0  # the others' FLOPs are no tensor core's
        for chip, bandwidth, peak in ((c.name, c.bandwidth, c.flops) for c in CHIPS):
            row[f"{chip} floor us"] = 1e6 * max(cost.bytes / bandwidth, matmuls / peak)
            estimated = cost.bytes / bandwidth / SHARE["bandwidth"], padded * matmuls / peak / SHARE["tensor cores"]
            row[f"{chip} estimate us"] = 1e6 * max(estimated)
            row[f"{chip} bound by"] = "memory" if estimated[0] >= estimated[1] else "tensor cores"
        row["torch bytes over ours"] = torchs / cost.bytes if torchs else None
        found.append(row)
    return found


def table(found: Sequence[dict]) -> str:
    """As Markdown."""
    chips = [f"{chip.name} {what}" for chip in CHIPS for what in ("floor us", "estimate us", "bound by")]
    columns = ["operation", "MB", "GFLOP", "launches", *chips, "torch bytes over ours"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in found]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
