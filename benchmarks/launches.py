"""The `launches` suite: what training launches, as Triton's own launcher sees it, held to what is shipped.

Nothing runs and nothing is compiled. Steps are taken on the meta device under CUDA's rules of bf16 autocast, as `count`
takes them, with a driver that says it is a chip that need not be here. Triton then works out of the arguments of each
launch what it would compile for it. That has to be a shipped configuration (`compile_cases`), which `codegen` compiles
and looks at; and a step after the first has to bring nothing new. Few layers show all that many would.

AdamW + EMA and EMA are given addresses, which meta tensors have not: they are taken with a small model on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastjepa.kernels
from benchmarks.codegen import CHIPS, kernel_modules
from benchmarks.count import CPU, META
from benchmarks.counter import CudaAutocast, as_on_a_gpu, replaced
from benchmarks.step import MOMENTUM, Work, build
from benchmarks.tables import columns
from benchmarks.ways import Fast
from fastjepa import EMA
from fastjepa.kernels.launch import CompileCase, is_interpreted
from fastjepa.plan.settings import Settings
from fastjepa.training.models import ENCODERS, build_optimizer

STEPS, BATCH = 3, 32
DEPTH = 3  # a first layer, one between, a last one
ROWS = ("fastjepa truncated", "fastjepa ragged")
HEADS = {"N_HEADS", "STRIDE_HEAD", "STRIDE_PART", "STRIDE_TOKEN"}  # how many: addresses follow from them, no tiles
SMALL = Work("vit_tiny", 16, 32, 2, (192, 1), {"depth": 1}, device=CPU)


@dataclass(frozen=True)
class Build:
    """What Triton compiles: arguments' types, constants, those known to be divisible by 16, and how it is scheduled."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    fused: bool = False  # whether a product and a sum may become one instruction unasked

    def __str__(self) -> str:
        tables = [f"{name.removesuffix('_ptr')} {kind[1:]}" for name, kind in self.types if kind.startswith("*")]
        numbers = [f"{name} {value}" for name, value in self.constants if value != "None"]
        return ", ".join(tables + numbers) + f", {self.num_warps} warps" + ", fused" * self.fused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its precision, and chips."""
    parser.add_argument("--model", default="vit_huge", choices=ENCODERS, metavar="NAME", help=", ".join(ENCODERS))
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--crop-size", type=int, default=224, help="pixels")
    parser.add_argument("--pred-emb-dim", type=int, default=384)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast")
    parser.add_argument("--narrow-stream", action="store_true", help="with a bf16 residual stream")
    parser.add_argument("--sm", type=int, action="append", choices=CHIPS, help="default: all")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each thing that Triton compiles, chip by chip.

    Raises:
        ValueError: sizes that do not go together, or kernels that are interpreted.
    """
    patch, pixels, width = arguments.patch_size, arguments.crop_size, arguments.pred_emb_dim
    if min(patch, pixels, width) < 1:
        raise ValueError("--patch-size, --crop-size and --pred-emb-dim must be at least 1")
    bf16, settings = arguments.dtype == "bf16", Settings(narrow_stream=arguments.narrow_stream)
    sizes = patch, pixels, BATCH, (width, DEPTH), {"depth": DEPTH}
    work = Work(arguments.model, *sizes, bf16=bf16, settings=settings, device=META)
    return [row for sm in arguments.sm or CHIPS for row in measure(work, sm)]


def table(rows: Sequence[dict]) -> str:
    """For a person to read."""
    return columns([row | {"shipped": "yes" if row["shipped"] else "NO"} for row in rows])


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """What is launched and not shipped, so that nobody has seen it compiled; and what is compiled in mid-training.

    Attention's tiles go by the lengths of the masks, which may call for others at any step.
    """
    found = []
    for row in rows:
        what = f"{row['kernel']}: {row['build']} on sm {row['sm']}"
        found += [f"{what} is not among compile_cases"] * (not row["shipped"])
        found += [f"{what} is compiled first in step {row['first']}"] * (
            row["first"] > 1 and not row["kernel"].startswith("_attention")
        )
    return found


def measure(work: Work, sm: int) -> list[dict]:
    """What `STEPS` steps of either kind of masks, an evaluation's features and the optimizers launch on a chip.

    Keys: sm; kernel; build, in words; shipped: whether `compile_cases` has it; launches: of all of that; first: the
    step that brought it, from 1 on, where a step of other masks before has not; of: where it was launched.

    Raises:
        ValueError: kernels that are interpreted, or sizes that do not go together.
    """
    if is_interpreted():
        raise ValueError("kernels are interpreted here, not compiled: unset TRITON_INTERPRET")
    modules = [importlib.import_module(f"fastjepa.kernels.{name}") for name in kernel_modules()]
    shipped = {_shipped(case) for module in modules for case in module.compile_cases(sm)}
    rows: dict[Build, dict[str, Any]] = {}
    for of, step, take in (*_steps(work), *_optimizers()):
        with seen(sm) as builds:
            take()
        for one, launches in Counter(builds).items():
            known = {"sm": sm, "kernel": one.kernel, "build": str(one), "shipped": one in shipped}
            row = rows.setdefault(one, known | {"launches": 0, "first": step, "of": of})
            row["launches"] += launches
            row["of"] = row["of"] if of in row["of"] else f"{row['of']}, {of}"
    return list(rows.values())


@contextmanager
def seen(sm: int) -> Iterator[list[Build]]:
    """Every launch within, as what Triton would compile for it on such a chip; nothing is compiled or run."""
    builds: list[Build] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        builds.append(_asked(fn.jit_function, compile))
        return True  # it is seen to, as far as Triton goes

    with as_on_a_gpu(), launched_on(Chip(sm, sm)), replaced([(knobs.runtime, "jit_cache_hook", hook)]):
        yield builds


@contextmanager
def launched_on(chip: Chip) -> Iterator[None]:
    """Kernels that are launched within, from tensors on any device, go to that chip, as far as Triton can tell."""
    names = [info.name for info in pkgutil.iter_modules(fastjepa.kernels.__path__)]
    modules = [importlib.import_module(f"fastjepa.kernels.{name}") for name in names]
    changes: list[tuple[Any, str, Any]] = [(driver, "_active", chip)]
    changes += [(module, "arch_of", lambda device: chip.sm) for module in modules if hasattr(module, "arch_of")]
    with replaced(changes):
        yield


class Chip:
    """What Triton's launcher asks a driver for, of a chip that is not there.

    device: what Triton keeps apart by what it has compiled.
    """

    def __init__(self, sm: int, device: Hashable):
        self.sm, self.device = sm, device

    def get_current_device(self) -> Hashable:
        return self.device

    def get_current_stream(self, device: Hashable) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def _steps(work: Work) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(what, which, how to take it): steps whose tensors have no values, then the features of an evaluation."""
    way: Any = None
    for name in ROWS:
        way = build(replace(work, bf16=False), name)
        way.optimizer = build_optimizer(way.model, work.bf16)  # gives the weights their copies
        for step in range(STEPS):
            yield name, step + 1, lambda way=way, name=name, step=step: _take(work, way, name, step)

    def features() -> object:
        with torch.no_grad(), CudaAutocast() if work.bf16 else nullcontext():
            return way.model.target_encoder(work.images(work.batch))

    yield "features", 1, features


def _take(work: Work, way: Fast, name: str, seed: int) -> None:
    """Forward and backward. The optimizer's kernels are given addresses, and there are none here."""
    masks = work.masks(work.batch, seed, ragged=name == "fastjepa ragged")
    inputs = way.inputs(*masks, work.batch)
    with CudaAutocast() if work.bf16 else nullcontext():
        loss = way.objective(work.images(work.batch), *inputs)
    way.backward(loss)
    for model in way.models:
        model.zero_grad(set_to_none=True)


def _optimizers() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """The same of AdamW + EMA, as training has it, and of an EMA alone."""
    way: Any = build(SMALL, "fastjepa truncated")
    way.optimizer = build_optimizer(way.model, bf16=True)
    for group in way.optimizer.param_groups:
        group["fused"] = None  # as it is where parameters lie on a GPU
    average = EMA(way.model.encoder)

    def update() -> None:
        for group in way.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        way.optimizer.momentum = MOMENTUM
        way.optimizer.step()

    for step in range(STEPS):
        yield "AdamW + EMA", step + 1, update
        yield "EMA", step + 1, lambda: average.update(way.model.encoder)


def _asked(function: JITFunction, compile: dict[str, Any]) -> Build:
    """From what Triton's hook is given."""
    names = function.arg_names
    attributes = {names[path[0]]: dict(map(tuple, found)) for path, found in compile["configs"][0].items()}
    return Build(
        function.__name__,
        tuple((name, kind) for name, kind in compile["signature"].items() if kind != "constexpr"),
        _constants({names[path[0]]: value for path, value in compile["constants"].items()}),
        tuple(sorted(name for name, known in attributes.items() if known.get("tt.divisibility") == 16)),
        compile["num_warps"],
        compile["num_stages"],
        compile["enable_fp_fusion"],
    )


def _shipped(case: CompileCase) -> Build:
    return Build(
        case.kernel.__name__,
        tuple((name, kind) for name, kind in case.signature.items() if kind != "constexpr"),
        _constants(case.constexprs),
        tuple(sorted(case.aligned)),
        case.num_warps,
        case.num_stages,
    )


def _constants(values: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in values.items() if name not in HEADS))
