"""Linear maps in 8 bits: near the exact ones, and the same on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastjepa.ops import quantise_rows, quantised_linear


def both(rows: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 64), (48, 64), (48,)))
    exact = F.linear(x.double(), weight.double(), bias.bfloat16().double())
    x, weight, bias = x.to(device, torch.bfloat16), weight.to(device), bias.to(device, torch.bfloat16)
    return quantised_linear(*quantise_rows(x), *quantise_rows(weight), bias), exact


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_near_the_exact_product(rows: int):
    """Two factors rounded to 4 bits of mantissa, 64 products summed: 2^-4 / sqrt(3) * sqrt(2) each, about 4 %."""
    y, exact = both(rows)
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert (y.double() - exact).norm() <= 0.05 * exact.norm()


def test_without_bias():
    x, weight = torch.eye(16), torch.arange(32.0).view(2, 16)
    y = quantised_linear(*quantise_rows(x), *quantise_rows(weight), None)
    torch.testing.assert_close(y.float().t(), weight, rtol=1 / 16, atol=0.05)


def test_wide_and_double_rows_take_the_reference():
    for x in (torch.randn(2, 9000), torch.randn(2, 8, dtype=torch.float64), torch.randn(3, 0)):
        q, scale = quantise_rows(x)
        assert q.shape == x.shape
        assert scale.dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[T, D\]"):
        quantise_rows(torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 37, 5000])
def test_on_a_gpu(rows: int):
    y, exact = both(rows, "cuda")
    assert (y.cpu().double() - exact).norm() <= 0.05 * exact.norm()
