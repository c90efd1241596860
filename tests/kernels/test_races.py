"""What the kernels compute does not hang on the order of programs, nor on that of the threads of one.

Interpreted, because only there is every access seen; compute-sanitizer's racecheck looks at shared memory alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.codegen import kernel_modules
from fastjepa.kernels import fp8, gather, gelu, layer_norm
from tests.kernels.races import Meetings, watch
from tests.kernels.row_checks import DEVICE, compiled, randn
from tests.kernels.test_adamw_ema import Run
from tests.kernels.test_memory import OPERATIONS

pytestmark = pytest.mark.interpreted

# Kernels that write over what they read: of each the module, and enough of its shipped configurations.
IN_PLACE = {
    "_ema_kernel": ("ema", "."),
    "_adamw_ema_kernel": ("adamw_ema", "clip"),
    "_layer_norm_bwd_kernel": ("layer_norm", r"bwd d(192|1280) (bf16|fp32) .*again"),
}


def _updates() -> None:
    """Two steps, the second clipped under a scaler; aligned tensors, and those that go one element a thread."""
    one, none = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    for aligned in (True, False):
        run = Run.start(aligned=aligned)
        run.tables.update(run.gradients(aligned=aligned))
        run.tables.update(run.gradients(aligned=aligned), norm=True, grad_scale=one, found_inf=none)


def _made_again() -> None:
    """Backwards that write their layer's output again, over the gradient of it where that may be."""
    for width in (200, 1280):
        x, residual, dy, ds = randn(9, width, dtype=torch.float16), randn(9, width), randn(9, width), randn(9, width)
        dy, (weight, bias) = dy.half(), (randn(width), randn(width))
        _, _, mean, rstd = layer_norm.layer_norm_fwd(x, residual, weight, bias, 1e-6, torch.float16)
        for kept in ((x, residual), x):
            layer_norm.layer_norm_bwd(dy, ds, kept, weight, mean, rstd, None, torch.float32, bias=bias, y=dy)
        gelu.gelu_bwd(dy, x, bias, torch.empty_like(dy))


def _rest() -> None:
    """Eight-bit rows, and the inverse of rows that are all different."""
    fp8.quantise_rows(randn(9, 200, dtype=torch.float16))
    gather.row_inverse(torch.randperm(3000, device=DEVICE), 3001, unique=True)


@pytest.fixture(scope="module")
def meetings() -> Meetings:
    """Of all kernels, each in the ways it is called."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        for operation in OPERATIONS:
            for dtype in (torch.float32, torch.float16):
                operation(lambda x: x.clone(), dtype)
        _updates()
        _made_again()
        _rest()
    modules = [importlib.import_module(f"fastjepa.kernels.{name}") for name in kernel_modules()]
    assert seen.launched == {case.kernel.__name__ for module in modules for case in module.compile_cases(100)}
    return seen


def test_no_program_touches_what_another_writes(meetings: Meetings):
    assert not meetings.programs
    assert not meetings.twice


def test_what_is_overwritten_is_read_by_the_thread_that_writes(meetings: Meetings):
    """As far as the source decides: elements stand alike in blocks of one shape. Then layouts decide."""
    assert not meetings.moved
    assert {kernel for kernel, _, _ in meetings.threads} == set(IN_PLACE)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("kernel", IN_PLACE)
def test_what_is_overwritten_is_read_in_the_layout_it_is_written_in(kernel: str, sm: int, meetings: Meetings):
    """So that one thread has both, and nothing need wait. Without alignments the layouts are others."""
    pairs = [(first, then) for name, first, then in meetings.threads if name == kernel]
    module, pattern = IN_PLACE[kernel]
    found = compiled(module, sm, pattern, by="tests.kernels.races")
    assert len(found) >= 4
    for name, rows in found:
        assert name == kernel
        layouts = {(file, line): set(seen) for file, line, *seen in rows}
        for first, then in pairs:
            assert len(layouts[first]) == 1, (first, layouts[first])
            assert layouts[first] == layouts[then], (first, then)
            assert not any("every thread" in layout or "copies" in layout for layout in layouts[first]), first


@triton.jit
def _add_neighbour(x_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + places, tl.load(x_ptr + places) + tl.load(x_ptr + places + BLOCK))


@triton.jit
def _turn_round(x_ptr, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + BLOCK - 1 - places)
    if WAIT:
        tl.debug_barrier()
    tl.store(x_ptr + places, x)


@triton.jit
def _halve_places(x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(x_ptr + places // 2, places.to(tl.float32))


def _seen(call: Callable[[], object]) -> Meetings:
    with pytest.MonkeyPatch.context() as patch:
        found = watch(patch)
        call()
    return found


def test_races_are_seen():
    x = torch.zeros(64)
    neighbours = _seen(lambda: _add_neighbour[(3,)](x, BLOCK=16))
    assert neighbours.programs
    assert neighbours.threads
    assert not neighbours.moved
    turned = _seen(lambda: _turn_round[(1,)](x, BLOCK=64, WAIT=False))
    assert turned.moved
    assert not turned.programs
    waited = _seen(lambda: _turn_round[(1,)](x, BLOCK=64, WAIT=True))
    assert not waited.moved
    assert not waited.threads
    assert _seen(lambda: _halve_places[(1,)](x, BLOCK=64)).twice
