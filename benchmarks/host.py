"""The `host` suite: what eager calls and whole steps cost the processor that launches them, on any machine.

Ours runs with a driver in Triton's place that has nothing run: what is left is our Python, Triton's, autograd and the
allocator, all but the driver's own call. PyTorch's own operation on the same tensors stands beside it, arithmetic
included, on tensors of a few rows. So a GPU with the same processor waits at least as long for a step's launches.

Steps are those of the `step` suite with as many layers, but 8 wide and on one image of 16 patches, so that products
take little longer than launching them on a GPU does. PyTorch's step is the row `eager`; what it reads back is there at
once, and it launches some of what ours leaves to one kernel.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.count import CPU
from benchmarks.counter import as_on_a_gpu, replaced
from benchmarks.laps import take_step
from benchmarks.launches import Chip, launched_on
from benchmarks.operations import offsets_of, with_gradients
from benchmarks.step import MOMENTUM, Work, build
from benchmarks.tables import columns
from benchmarks.timing import clock
from benchmarks.ways import FastRaggedGraphs
from fastjepa import Ragged
from fastjepa.kernels.launch import is_interpreted
from fastjepa.training.graphs import Result

SM = 90  # for which launches are made ready; they are as many for others
LENGTHS = [3, 2]
WIDTH, HEADS, TENSORS = 384, 6, 150
STEPS = {"vit_base": 6, "vit_large": 12, "vit_huge": 12}  # layers of the predictor
STEP_REPEATS = 10  # of a call's for one of a step's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeats", type=int, default=300, help=f"of calls; of steps 1/{STEP_REPEATS} of it")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each operation and step.

    Raises:
        ValueError: kernels that are interpreted.
    """
    return measure(arguments.repeats)


table = columns


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """None: there is nothing to be right or wrong."""
    return []


def measure(repeats: int = 300) -> list[dict]:
    """A row for each operation: microseconds a call, ours and PyTorch's in turn, and the kernels that ours launches.

    Raises:
        ValueError: kernels that are interpreted, so that Triton's own part is missing.
    """
    if is_interpreted():
        raise ValueError("kernels are interpreted here, not launched: unset TRITON_INTERPRET")
    with nothing_runs() as launched:
        rows = [row for case in _operations() for row in _rows([case], repeats, launched)]
        steps = [step for model in STEPS for step in _steps(model)]
        rows += _rows(steps, max(2, repeats // STEP_REPEATS), launched)
    return rows


def _rows(cases: Sequence[tuple[str, Callable, Callable]], repeats: int, launched: list[str]) -> list[dict]:
    """They take turns, since other work on the machine comes and goes; each twice, as the first finds cold caches."""
    warm = max(2, repeats // 10)
    times: dict[tuple[str, str], list[float]] = {(name, who): [] for name, *_ in cases for who in ("ours", "torch")}
    launches = {}
    for _ in range(repeats + warm):
        for name, ours, torchs in cases:
            ours()
            launched.clear()
            times[name, "ours"].append(_seconds(ours))
            launches[name] = len(launched)
            torchs()
            times[name, "torch"].append(_seconds(torchs))
    found = {key: 1e6 * statistics.median(seconds[warm:]) for key, seconds in times.items()}
    return [
        {
            "operation": name,
            "ours_us": found[name, "ours"],
            "torch_us": found[name, "torch"],
            "launches": launches[name],
        }
        for name, *_ in cases
    ]


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

    def leaves() -> list[Tensor]:
        ours: list[Tensor] = [torch.nn.Parameter(torch.zeros(8)) for _ in range(TENSORS)]
        for p in ours:
            p.grad = torch.zeros(8)
        return ours

    params, targets = leaves(), [torch.zeros(8) for _ in range(TENSORS)]
    kept = MultiTensorEMA(targets, params)
    yield f"EMA of {TENSORS} tensors", lambda: kept.update(0.99), lambda: _lerp(targets, params)
    ours = AdamWEMA(params, target_params=targets)
    theirs, averaged = leaves(), [torch.zeros(8) for _ in range(TENSORS)]
    stock = torch.optim.AdamW(theirs, fused=True)

    def stocks() -> None:
        stock.step()
        _lerp(averaged, theirs)

    yield f"AdamW + EMA of {TENSORS} tensors", ours.step, stocks


def _lerp(targets: list[Tensor], params: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(targets, params, 0.01)  # pyright: ignore[reportPrivateImportUsage]


def _steps(model: str) -> Iterator[tuple[str, Callable, Callable]]:
    """(name, ours, PyTorch's) of whole steps, forward to optimizer: truncated, ragged, and ragged from a graph."""
    work = Work(model, 16, 64, 1, (8, STEPS[model]), {"embed_dim": 8, "num_heads": 1}, bf16=True, device=CPU)
    images, eager = work.images(work.batch), build(work, "eager")
    lists = [torch.arange(4)[None]], [torch.arange(start, start + 2)[None] for start in (4, 6, 8, 10)]
    theirs = partial(take_step, eager, images, lists, MOMENTUM)
    packed = tuple(Ragged.from_list([mask[0] for mask in masks], len(masks)) for masks in lists)
    for form, masks in (("truncated", lists), ("ragged", packed)):
        way = _on_kernels(build(work, f"fastjepa {form}"))
        yield f"step of {model}, {form}", partial(take_step, way, images, way.inputs(*masks, 1), MOMENTUM), theirs
    graphs = _on_kernels(FastRaggedGraphs(work.model(), work.bf16, _NoGraphs()))
    inputs = graphs.inputs(*packed, 1)
    yield f"step of {model}, ragged, from a graph", partial(take_step, graphs, images, inputs, MOMENTUM), theirs


def _on_kernels(way: Any) -> Any:
    for group in way.optimizer.param_groups:
        group["fused"] = None  # as it is where parameters lie on a GPU
    return way


class _NoGraphs:
    """In place of CUDA graphs: what holds a step's launches, and runs none."""

    within = nullcontext

    def capture(self, take: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        return (lambda: None), (torch.zeros(()), None)

    def forget(self) -> None:
        pass


@contextmanager
def nothing_runs() -> Iterator[list[str]]:
    """Operations launch kernels that do nothing; their names, in order."""
    launched: list[str] = []

    class Nothing:
        """A compiled kernel, as far as Triton's launcher asks it."""

        function = packed_metadata = None

        def __init__(self, name: str):
            self.name = name

        def launch_metadata(self, *arguments: Any) -> None:
            launched.append(self.name)

        def run(self, *arguments: Any) -> None:
            pass

    device = object()  # no other, so that what Triton keeps of it is found nowhere else

    def compile(self: JITFunction, key: Any, *arguments: Any) -> Nothing:
        kernel = self.device_caches[device][0][key] = Nothing(self.__name__)
        return kernel

    with as_on_a_gpu(), launched_on(Chip(SM, device)), replaced([(JITFunction, "_do_compile", compile)]):
        yield launched


def _seconds(call: Callable) -> float:
    start = clock()
    call()
    return clock() - start
