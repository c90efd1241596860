"""Stock against patched: outputs and gradients of the same inputs, judged by stock's distance from its fp64 self."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ALLOWED = 2.0  # times the stock code's own distance from fp64
ROUNDS, SECONDS = 15, 2.0  # that are timed, fewer where they take longer than this in all


class Result(NamedTuple):
    """Outputs, and gradients of them by parameters and inputs, None where there are none."""

    outputs: list[Tensor]
    gradients: list[Tensor] | None


class Distances(NamedTuple):
    """Of ours from stock, of stock from fp64, and of ours from fp64; norms of differences over norms."""

    ours: float
    stock: float
    ours_exact: float

    def fault(self, name: str, dtype: torch.dtype) -> str:
        """What is wrong, "" where ours is at most twice as far from fp64 as stock is."""
        allowed = ALLOWED * max(self.stock, torch.finfo(dtype).eps)
        if self.ours_exact <= allowed:
            return ""
        return f"its {name} are {self.ours_exact:.1e} from fp64, and the stock code's {self.stock:.1e}"


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Run modules in eval mode, and leave their modes and the random states as they were."""
    modes = {m: m.training for module in modules for m in module.modules()}
    devices = sorted({p.device.index for m in modules for p in m.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def exact_copy(module: nn.Module) -> nn.Module:
    """The module in fp64."""
    return copy.deepcopy(module).double()


def run(module: nn.Module, arguments: Sequence[Any], first: bool = False) -> Result:
    """Outputs (or the first alone) and gradients of a call: those of a fixed random projection of the outputs."""
    torch.manual_seed(0)
    arguments = tree_map(_leaf, list(arguments))
    with torch.enable_grad():
        outputs = [t for t in tree_leaves(module(*arguments)) if isinstance(t, Tensor) and t.is_floating_point()]
        outputs = outputs[:1] if first else outputs
        graph = [y for y in outputs if y.requires_grad]
        leaves = [t for t in (*module.parameters(), *tree_leaves(arguments)) if isinstance(t, Tensor)]
        wanted = [t for t in leaves if t.requires_grad]
        if not graph or not wanted:
            return Result([y.detach() for y in outputs], None)
        gradients = torch.autograd.grad(graph, wanted, [_direction(y) for y in graph], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]
    return Result([y.detach() for y in outputs], filled)


def distances(ours: Result, stock: Result, exact: Result) -> dict[str, Distances]:
    """Those of the outputs, and of the gradients where there are some."""
    found = {}
    for name, a, b, c in zip(Result._fields, ours, stock, exact, strict=True):
        if a is not None and b is not None and c is not None:
            found[name] = Distances(_distance(a, b), _distance(b, c), _distance(a, c))
    return found


def times(ways: Sequence[Callable[[], Any]], call: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds of a call after each of some preparations, the shortest of several rounds.

    What else a machine does makes a call slower, never faster. With one thread the time is the processor's, which other
    programs hardly touch.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in ways]
    begin = time.perf_counter()
    while len(found[0]) < ROUNDS and (not found[0] or time.perf_counter() - begin < SECONDS):
        for prepare, kept in zip(ways, found, strict=True):
            prepare()
            _wait(device)
            start = clock()
            call()
            _wait(device)
            kept.append(1e3 * (clock() - start))
    return [min(kept) for kept in found]


def in_double(arguments: Sequence[Any]) -> list[Any]:
    """Arguments with their floating tensors in fp64."""
    return tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, list(arguments))


def _leaf(argument: Any) -> Any:
    """A tensor that can take a gradient of its own."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.is_floating_point())


def _direction(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of b, over all tensors together."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    difference = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    norm = sum(float(y.double().square().sum()) for y in b)
    return (difference / max(norm, 1e-60)) ** 0.5


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
