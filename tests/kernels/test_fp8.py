"""Rows in 8 bits against the reference: nearest numbers, scales, extremes, layouts, launches, compiled code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels.fp8 import FIRST_ARCH, compile_cases, quantise_rows, quantise_rows_cost
from fastjepa.kernels.reference import quantise_rows_ref
from tests.kernels.multi_tensor_checks import round_as_a_chip
from tests.kernels.row_checks import DEVICE, MANY, ON_A_CHIP, SM, assert_compiles_well, launches, randn, strange_layouts

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(SM is not None and SM < FIRST_ARCH, reason="numbers in 8 bits need sm 89 or newer"),
]


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_as_a_chip(monkeypatch)


def check(x: torch.Tensor) -> None:
    """Each number within half a unit of its last place: 2^-4 of itself, or 2^-10 of the scale where that is more."""
    q, scale = quantise_rows(x)
    wanted, wanted_scale = quantise_rows_ref(x)
    assert q.dtype == torch.float8_e4m3fn
    assert q.shape == x.shape
    assert scale.shape == (len(x), 1)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= 1.001 * torch.maximum(x.double().abs() / 16, scale.double() / 1024)).all()
    if DEVICE.type == "cpu":  # a chip divides by other means
        assert torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 100, 1280, 6144])
def test_values(width: int, dtype: torch.dtype):
    check(randn(13, width, dtype=dtype, scale=3.0))


def test_rows_of_several_programs():
    check(randn(300, 128))


def test_the_largest_of_a_row_is_exact():
    x = randn(40, 64)
    q, scale = quantise_rows(x)
    torch.testing.assert_close((q.float() * scale).abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)


def test_zeros_and_what_is_not_finite():
    """A row of zeros is one; a NaN stays one and an infinity becomes one, in its row alone."""
    x = torch.tensor([[0.0, -0.0], [1.0, float("nan")], [float("inf"), 1.0], [2.0, -4.0]], device=DEVICE)
    q, scale = quantise_rows(x)
    made = q.float() * scale
    assert made[0].tolist() == [0.0, 0.0]
    assert scale[0] == 0
    assert made[1, 1].isnan()
    assert made[2, 0].isnan()
    assert made[3].tolist() == [2.0, -4.0]


@pytest.mark.parametrize("layout", ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"])
def test_strange_layouts(layout: str):
    check(strange_layouts(randn(13, 192))[layout])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 150), width=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_shape(rows: int, width: int, dtype: torch.dtype):
    check(randn(rows, width, dtype=dtype))


def test_declared_launches_and_bytes(monkeypatch: pytest.MonkeyPatch):
    """ViT-H's hidden layer, 128 images of 256 tokens: two bytes read and one written of each of 32,768 x 5120."""
    x = randn(40, 64)
    cost = quantise_rows_cost(32768, 5120, torch.bfloat16)
    assert launches(monkeypatch, lambda: quantise_rows(x)) == cost.launches == 1
    assert cost.bytes == pytest.approx(3 * 32768 * 5120, rel=1e-3)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"\[T, D\].*got \[4\]"):
        quantise_rows(randn(4))
    with pytest.raises(ValueError, match="8192"):
        quantise_rows(torch.zeros(1, 8193, device=DEVICE))
    with pytest.raises(ValueError, match="float64"):
        quantise_rows(torch.zeros(1, 8, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("arch", [89, 90])
def test_compiled_code(arch: int):
    """Loads of 16 bytes and so stores of 8: a number that is read in two bytes is written in one."""
    assert_compiles_well("fp8", arch, r"d(1280|5120) (bf16|fp16)", expected=4)


def test_chips_without_8_bits_compile_nothing():
    assert compile_cases(80) == compile_cases(86) == []


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("width", [1280, 5120, 100])
def test_on_a_chip(width: int, dtype: torch.dtype):
    check(randn(MANY, width, dtype=dtype))
