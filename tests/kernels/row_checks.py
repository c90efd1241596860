"""What the tests of the kernels share: the error rule, counted launches, strange layouts, compiled resources.

Run as a module it compiles shipped configurations for a chip that need not be there, and prints what came of it:
`python -m tests.kernels.row_checks gelu 80 "d5120 bf16"`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from fastjepa.kernels.launch import CompileCase, arch_of

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SM = arch_of(DEVICE) if DEVICE.type == "cuda" else int(os.environ.get("FASTJEPA_TEST_CHIP", 0)) or None  # compiled for
MANY = 5001 if DEVICE.type == "cuda" else 101  # rows where kernels are compiled, for a GPU or an emulated one
# On a GPU all of them; on an emulated one, which is slow, what the interpreter cannot have.
ON_A_CHIP = [
    pytest.param(torch.bfloat16, marks=pytest.mark.compiled, id="bf16"),
    pytest.param(torch.float16, marks=pytest.mark.gpu, id="fp16"),
    pytest.param(torch.float32, marks=pytest.mark.gpu, id="fp32"),
]
# fill_ is the poison of the tests; the library fills by torch.full and torch.zeros.
MAKES_NO_KERNEL = {"empty", "empty_like", "detach", "view", "unbind", "alias", "select", "fill_"}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in the 2-norm; 0 where both are 0, infinite where got is not finite."""
    distance = (got.double() - exact.double()).norm()
    if not distance.isfinite():
        return float("inf")
    return 0.0 if distance == 0 else (distance / exact.double().norm()).item()


def assert_as_near_as_torch(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor], few: bool = False
) -> None:
    """Each of ours is at most twice as far from the fp64 answer as torch's at the same precision.

    `few`: torch may happen to round each of a handful of numbers right, so twice the rounding unit is allowed too.
    """
    assert len(ours) == len(torchs) == len(exact)
    for place, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert a.shape == c.shape, (place, a.shape, c.shape)
        allowed = 2 * relative_error(b.to(a.dtype), c)
        if few:
            allowed = max(allowed, torch.finfo(a.dtype).eps)
        assert relative_error(a, c) <= allowed, (place, relative_error(a, c), allowed)


def value_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Outputs and then the gradient of every input, computed in `dtype` (that of the inputs unless given).

    The layout of the inputs is kept where no dtype is given: a view stays the view it is.
    """
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [g.to(y.dtype) if g.dtype != y.dtype else g for g, y in zip(upstream, outputs, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    few: bool = False,
) -> list[Tensor]:
    """`assert_as_near_as_torch` of the outputs and every gradient; gives ours back."""
    got = value_and_gradients(ours, inputs, upstream)
    torchs = value_and_gradients(reference, inputs, upstream)
    exact = value_and_gradients(reference, inputs, upstream, torch.float64)
    assert_as_near_as_torch(got, torchs, exact, few)
    return got


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device under test; the same ones in every dtype, up to rounding."""
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(DEVICE)


def strange_layouts(x: Tensor) -> dict[str, Tensor]:
    """x [T, D] with the same values: rows apart, off by one element, both, columns apart."""
    rows, width = x.shape
    apart, apart_by_odd = x.new_zeros(rows, 2 * width + 16), x.new_zeros(rows, width + 3)
    shifted = x.new_zeros(rows * width + 1)
    return {
        "rows apart": apart[:, 16 : 16 + width].copy_(x),
        "misaligned": shifted[1:].view(rows, width).copy_(x),
        "rows apart and misaligned": apart_by_odd[:, 3:].copy_(x),
        "columns apart": x.new_zeros(width, rows).copy_(x.t()).t(),
    }


class _CountOperations(TorchDispatchMode):
    """Counts the operations of torch that compute something, but not those of Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.paused and func.overloadpacket.__name__ not in MAKES_NO_KERNEL
        return func(*args, **(kwargs or {}))


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    """The kernels that `call` launches: Triton's, and the operations of torch that compute something."""
    kernels: list[object] = []
    operations = _CountOperations()
    run = GridExecutor.__call__

    def interpreted(self: GridExecutor, *args: object, **kwargs: object) -> object:
        kernels.append(self)
        operations.paused = True
        result = run(self, *args, **kwargs)
        operations.paused = False
        return result

    with monkeypatch.context() as patch, operations:
        patch.setattr(GridExecutor, "__call__", interpreted)
        triton.knobs.runtime.launch_enter_hook.add(kernels.append)
        try:
            call()
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(kernels.append)
    return len(kernels) + operations.count


def compiled(module: str, arch: int, pattern: str, by: str = "tests.kernels.row_checks") -> list:
    """What `by` prints of the shipped configurations of kernels/<module>.py that match, compiled for a chip.

    In a process of its own, for this one has its kernels interpreted where there is no GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", by, module, str(arch), pattern]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def matching(module: str, arch: str, pattern: str) -> Iterator[tuple[CompileCase, int]]:
    """Those configurations, each with the chip, from the words of a command line."""
    for case in importlib.import_module(f"fastjepa.kernels.{module}").compile_cases(int(arch)):
        if re.search(pattern, f"{case.name} {case.config}"):
            yield case, int(arch)


def assert_compiles_well(module: str, arch: int, pattern: str, expected: int) -> list[dict]:
    """No spills, 16-byte loads, and nothing compiled again when a count changes, in each of `expected` cases."""
    cases = compiled(module, arch, pattern)
    assert len(cases) == expected, [case["kernel"] for case in cases]
    for case in cases:
        assert case["spill_bytes"] == 0, case
        assert case["load_bits"] == 128, case
        assert case["specialised_counts"] == [], case
    return cases


def _compile(case: CompileCase, arch: int) -> dict:
    from benchmarks.codegen import compile_case

    counts = [p.name for p in case.kernel.params if p.name.startswith("n_") and not p.do_not_specialize]
    return asdict(compile_case(case, arch)) | {"specialised_counts": counts}


if __name__ == "__main__":
    for shipped, chip in matching(*sys.argv[1:]):
        print(json.dumps(_compile(shipped, chip)))
