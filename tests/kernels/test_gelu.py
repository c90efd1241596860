"""Bias + exact GELU against its reference: values, gradients, extremes, layouts, launches, compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels.gelu import bias_gelu, bias_gelu_cost, gelu_bwd, gelu_fwd
from fastjepa.kernels.reference import bias_gelu_ref
from tests.kernels.row_checks import (
    DEVICE,
    MANY,
    ON_A_CHIP,
    assert_compiles_well,
    compare,
    launches,
    randn,
    strange_layouts,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poison")


def inputs(rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Pre-activations from -8 to 8 or so."""
    return [randn(rows, width, dtype=dtype, scale=2.0), randn(width, dtype=dtype)]


def check(tables: list[torch.Tensor], upstream: torch.Tensor | None = None, few: bool = False) -> None:
    upstream = randn(*tables[0].shape, dtype=tables[0].dtype) if upstream is None else upstream
    compare(bias_gelu, bias_gelu_ref, tables, [upstream], few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [100, 1536, 6144])
def test_values_and_gradients(width: int, dtype: torch.dtype):
    check(inputs(37, width, dtype))


def test_rows_of_several_programs():
    check(inputs(300, 128, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_point_of_the_curve(dtype: torch.dtype):
    """Absolute error along -12..12, where the norm of a random batch would not look."""
    x = torch.linspace(-12, 12, 24000, dtype=torch.float64).view(100, 240).to(dtype).to(DEVICE)
    bias = torch.zeros(240, dtype=dtype, device=DEVICE)
    y, dx, _ = value_and_gradients(bias_gelu, [x, bias], [torch.ones_like(x)])
    exact, slope, _ = value_and_gradients(bias_gelu_ref, [x, bias], [torch.ones_like(x)], torch.float64)
    cdf_error = 1.1e-6 if dtype == torch.float16 else 1.2e-7  # of 0..1
    rounding = torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + cdf_error * x.double().abs()).all()
    assert ((dx.double() - slope).abs() <= rounding * slope.abs() + cdf_error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extremes(dtype: torch.dtype):
    """Large values go to x and 0, with slopes 1 and 0; a NaN stays one, forward and backward."""
    x = torch.tensor([[float("nan"), 6e4, -6e4, 20.0, -20.0, 0.0]], dtype=dtype, device=DEVICE)
    bias = torch.zeros(6, dtype=dtype, device=DEVICE)
    y, dx, _ = value_and_gradients(bias_gelu, [x, bias], [torch.ones_like(x)])
    nan = float("nan")
    torch.testing.assert_close(y, F.gelu(x), equal_nan=True)
    torch.testing.assert_close(dx.tolist(), [[nan, 1.0, 0.0, 1.0, 0.0, 0.5]], equal_nan=True)


def test_bias_wider_than_rows():
    x, bias = inputs(37, 384, torch.float16)
    compare(bias_gelu, lambda x, b: bias_gelu_ref(x, b.to(x.dtype)), [x, bias.float()], [randn(37, 384).half()])


@pytest.mark.parametrize("layout", ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"])
def test_strange_layouts(layout: str):
    x, bias = inputs(13, 192, torch.float32)
    upstream = strange_layouts(randn(13, 192))[layout]
    check([strange_layouts(x)[layout], strange_layouts(bias[None])[layout][0]], upstream)
    check([x, bias], randn(192)[None].expand(13, 192))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 150), width=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_shape(rows: int, width: int, dtype: torch.dtype):
    torch.manual_seed(1000 * rows + width)
    # Upstream of one sign, so that dbias is not what is left of numbers that cancel.
    check(inputs(rows, width, dtype), randn(rows, width, dtype=dtype).abs(), few=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(37, 100), (300, 384), (0, 64), (1, 6144)])
def test_backward_can_write_the_values_again(rows: int, width: int, dtype: torch.dtype):
    x, bias = inputs(rows, width, dtype)
    dy, y = randn(rows, width, dtype=dtype), torch.empty(rows, width, dtype=dtype, device=DEVICE)
    found, wanted = gelu_bwd(dy, x, bias, y), gelu_bwd(dy, x, bias)
    torch.testing.assert_close(y, gelu_fwd(x, bias), rtol=0, atol=0)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], wanted[1])  # summed in other pieces


def test_repeats_bitwise():
    tables, upstream = inputs(300, 384, torch.float16), [randn(300, 384, dtype=torch.float16)]
    first, second = (value_and_gradients(bias_gelu, tables, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_declared_launches(monkeypatch: pytest.MonkeyPatch):
    x, bias = inputs(40, 64, torch.float32)
    assert launches(monkeypatch, lambda: gelu_fwd(x, bias)) == bias_gelu_cost(40, 64, x.dtype).launches
    backward = bias_gelu_cost(40, 64, x.dtype, backward=True)
    assert launches(monkeypatch, lambda: gelu_bwd(x, x, bias)) == backward.launches


def test_declared_bytes():
    """ViT-H's hidden layer, 128 images of 110 tokens: two and three tables of 14,080 x 5120 in bf16."""
    table = 14080 * 5120 * 2
    assert 2 * table < bias_gelu_cost(14080, 5120, torch.bfloat16).bytes < 2.01 * table
    assert 3 * table < bias_gelu_cost(14080, 5120, torch.bfloat16, backward=True).bytes < 3.01 * table
    assert 4 * table < bias_gelu_cost(14080, 5120, torch.bfloat16, backward=True, again=True).bytes < 4.01 * table


def test_refuses_what_it_cannot_do():
    x, bias = inputs(4, 16, torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 16\] and \[15\]"):
        bias_gelu(x, bias[:15])
    with pytest.raises(ValueError, match="float64"):
        bias_gelu(x.double(), bias)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code(arch: int):
    assert_compiles_well("gelu", arch, r"d(1536|6144) (bf16 bias bf16|fp16)", expected=12)


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("width", [768, 1536, 3072, 4096, 5120, 6144, 100])
def test_on_a_chip(width: int, dtype: torch.dtype):
    tables, upstream = inputs(MANY, width, dtype), [randn(MANY, width, dtype=dtype)]
    first = compare(bias_gelu, bias_gelu_ref, tables, upstream)
    second = value_and_gradients(bias_gelu, tables, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
