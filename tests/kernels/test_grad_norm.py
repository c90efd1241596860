"""The sum of squares of every gradient: against fp64, over mixed dtypes and places, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastjepa.kernels import grad_norm
from fastjepa.kernels.grad_norm import MAX_PARTIALS, grad_norm_config, grad_norm_launch
from fastjepa.kernels.multi_tensor import DTYPE_CODES, LaunchConfig, chunk_table, host_table, is_aligned
from tests.kernels.multi_tensor_checks import Placed
from tests.kernels.row_checks import DEVICE, assert_compiles_well

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def norm_of(grads: list[Tensor], absent: int = 0, config: LaunchConfig | None = None) -> Tensor:
    """The norm of `grads`, with `absent` elements of a tensor that has no gradient in front of them."""
    config = config or grad_norm_config(80)
    table = host_table([[absent], *([g.numel()] for g in grads)]).to(DEVICE)
    rows = [[0, 0, 0, 0], *([g.data_ptr(), DTYPE_CODES[g.dtype], is_aligned(g), 0] for g in grads)]
    chunks = chunk_table([absent, *(g.numel() for g in grads)], config.chunk, at_least=1).to(DEVICE)
    partials = torch.zeros(MAX_PARTIALS, device=DEVICE)
    grad_norm_launch(table, host_table(rows).to(DEVICE), chunks, partials, config)
    return partials.sum().sqrt()


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "off by one"])
def test_norm_of_mixed_gradients(aligned: bool):
    grads = [Placed(torch.randn(n), d, aligned, written=False).tensor for n in (0, 1, 2048, 40_001) for d in DTYPES]
    exact = torch.cat([g.double() for g in grads]).norm()
    ours, torchs = norm_of(grads, absent=5000), torch.nn.utils.get_total_norm([g.float() for g in grads])
    # Of a single number torch may happen to round it right.
    allowed = max(2 * (torchs - exact).abs(), torch.finfo(torch.float32).eps * exact)
    assert (ours - exact).abs() <= allowed


def test_few_programs_take_many_chunks_in_turn():
    grads = [torch.randn(n, device=DEVICE) for n in (1000, 700, 3)]
    few = LaunchConfig(block=128, chunk=256, num_warps=4, programs=3)
    assert torch.isclose(norm_of(grads, config=few), torch.cat(grads).norm(), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float):
    grad = torch.ones(3000, device=DEVICE)
    grad[2999] = bad
    assert not norm_of([torch.ones(5, device=DEVICE), grad]).isfinite()


def test_the_same_bits_every_time():
    grads = [torch.randn(n, device=DEVICE) for n in (70_001, 33)]
    assert torch.equal(norm_of(grads), norm_of(grads))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_partial_sums_fit(arch: int):
    config = grad_norm_config(arch)
    assert config.programs <= MAX_PARTIALS
    assert config.chunk % config.block == 0
    assert config.chunk >= 16384


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills_and_with_wide_loads(arch: int):
    for case in assert_compiles_well("grad_norm", arch, "", 1):
        assert case["registers"] <= 48, case  # five programs to a multiprocessor


@pytest.mark.gpu
def test_another_set_of_gradients_compiles_nothing():
    for sizes in ([5], [1000, 7], [100_000]):
        norm_of([torch.randn(n, device="cuda", dtype=d) for n in sizes for d in DTYPES])
    assert sum(len(cache[0]) for cache in grad_norm._grad_norm_kernel.device_caches.values()) == 1
