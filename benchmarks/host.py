"""The `host` suite: what an eager call costs the processor that launches it, forward and backward, on any machine.

Ours runs with Triton's launches replaced by nothing, on tensors of a few rows: what is left is our Python, autograd
and the allocator. PyTorch's own operation on the same tensors stands beside it, its arithmetic included. What Triton
itself takes for a launch is in neither; on a GPU the `kernels` suite has it, in its column `host`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import offsets_of, with_gradients
from benchmarks.tables import columns
from benchmarks.timing import clock

LENGTHS = [3, 2]
WIDTH, HEADS, TENSORS = 384, 6, 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeats", type=int, default=300)


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each operation."""
    return measure(arguments.repeats)


table = columns


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """None: there is nothing to be right or wrong."""
    return []


def measure(repeats: int = 300) -> list[dict]:
    """A row for each operation: microseconds a call, ours and PyTorch's in turn, and the kernels that ours launches.

    Raises:
        ValueError: Triton was imported without its interpreter, so its launches cannot be left out.
    """
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from fastjepa.kernels.launch import is_interpreted

    if not is_interpreted():
        raise ValueError("the host suite needs TRITON_INTERPRET=1, set before triton is imported")
    rows = []
    for name, ours, torchs in _operations():
        with _no_launches() as count:
            ours()
            launches = len(count)
        times: dict[str, list[float]] = {"ours": [], "torch": []}
        for number in range(repeats + 20):
            with _no_launches():
                mine = _seconds(ours)
            theirs = _seconds(torchs)
            if number >= 20:
                times["ours"].append(mine)
                times["torch"].append(theirs)
        mine, theirs = (1e6 * statistics.median(times[who]) for who in ("ours", "torch"))
        rows.append({"operation": name, "ours_us": mine, "torch_us": theirs, "launches": launches})
    return rows


def _operations() -> Iterator[tuple[str, Callable, Callable]]:
    """(name, ours, PyTorch's) of each operation that eager code calls once or more in every layer or step."""
    from fastjepa.kernels import attention, gather, gelu, jepa_loss, layer_norm

    tokens = sum(LENGTHS)
    x, residual, dy = (torch.randn(tokens, WIDTH) for _ in range(3))
    weight, bias = torch.randn(WIDTH), torch.randn(WIDTH)
    rows = torch.arange(tokens, dtype=torch.int32)
    offsets = offsets_of(LENGTHS, torch.device("cpu"))
    qkv = torch.randn(tokens, 3, HEADS, WIDTH // HEADS)
    dense = torch.randn(1, HEADS, tokens, WIDTH // HEADS)
    upstream = [torch.randn(tokens, HEADS, WIDTH // HEADS)]

    def pair(name: str, ours: Callable, torchs: Callable, inputs: list[Tensor], grads: list[Tensor]):
        return name, with_gradients(ours, inputs, grads), with_gradients(torchs, inputs, grads)

    yield pair(
        "residual + LayerNorm",
        lambda x, r, w, b: layer_norm.add_layer_norm(x, r, w, b, 1e-6),
        _add_layer_norm,
        [x, residual, weight, bias],
        [dy, dy],
    )
    yield pair("bias + GELU", gelu.bias_gelu, lambda x, b: F.gelu(x + b), [x, bias], [dy])
    yield (
        "attention",
        with_gradients(lambda x: attention.ragged_attention(x, offsets, 3), [qkv], upstream),
        with_gradients(F.scaled_dot_product_attention, [dense, dense, dense], [dense]),
    )
    yield pair(
        "take rows", lambda x: gather.gather_rows(x, rows, None, True), lambda x: x.index_select(0, rows), [x], [dy]
    )
    yield pair(
        "loss",
        lambda p: jepa_loss.jepa_loss(p, residual, rows),
        lambda p: F.smooth_l1_loss(p, F.layer_norm(residual, (WIDTH,)).index_select(0, rows)),
        [x],
        [torch.ones(())],
    )
    yield from _optimizers()


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, (WIDTH,), weight, bias, 1e-6), total


def _optimizers() -> Iterator[tuple[str, Callable, Callable]]:
    """Over as many tensors as twelve layers have."""
    from fastjepa.kernels.ema import MultiTensorEMA
    from fastjepa.optim import AdamWEMA

    class OnKernels(AdamWEMA):
        """Takes the path of CUDA tensors."""

        def _takes_kernels(self) -> bool:
            return True

    def leaves() -> list[Tensor]:
        ours: list[Tensor] = [torch.nn.Parameter(torch.zeros(8)) for _ in range(TENSORS)]
        for p in ours:
            p.grad = torch.zeros(8)
        return ours

    params, targets = leaves(), [torch.zeros(8) for _ in range(TENSORS)]
    kept = MultiTensorEMA(targets, params)
    yield f"EMA of {TENSORS} tensors", lambda: kept.update(0.99), lambda: _lerp(targets, params)
    ours = OnKernels(params, target_params=targets)
    theirs, averaged = leaves(), [torch.zeros(8) for _ in range(TENSORS)]
    stock = torch.optim.AdamW(theirs, fused=True)

    def stocks() -> None:
        stock.step()
        _lerp(averaged, theirs)

    yield f"AdamW + EMA of {TENSORS} tensors", ours.step, stocks


def _lerp(targets: list[Tensor], params: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(targets, params, 0.01)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def _no_launches() -> Iterator[list[str]]:
    """Triton's launches do nothing, and are counted."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    run = InterpretedFunction.run
    InterpretedFunction.run = lambda self, *args, **kwargs: launched.append(self.fn.__name__)
    try:
        yield launched
    finally:
        InterpretedFunction.run = run


def _seconds(call: Callable) -> float:
    start = clock()
    call()
    return clock() - start
