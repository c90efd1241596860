"""The I-JEPA objective against its reference: loss, gradient, layouts, launches, compiled code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels.jepa_loss import jepa_loss, jepa_loss_bwd, jepa_loss_cost, jepa_loss_fwd
from fastjepa.kernels.reference import jepa_loss_ref
from tests.kernels.row_checks import (
    DEVICE,
    MANY,
    ON_A_CHIP,
    assert_as_near_as_torch,
    assert_compiles_well,
    launches,
    randn,
    strange_layouts,
)

pytestmark = pytest.mark.usefixtures("poison")
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(tokens: int, width: int, dtype: torch.dtype, index: torch.dtype = torch.int32) -> Inputs:
    """Features of mean 1 and deviation 3; differences on both sides of the smooth-L1's knee; rows repeat."""
    rows = torch.randint(max(1, tokens), (tokens,), dtype=index).to(DEVICE)
    return randn(tokens, width, dtype=dtype), 1 + randn(max(1, tokens), width, dtype=dtype, scale=3.0), rows


def value_and_gradient(function, tables: Inputs, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The loss, and the gradient of 1000 times it, as a loss scaler would have it."""
    prediction, features, rows = tables
    dtype = dtype or prediction.dtype
    prediction = prediction.detach().to(dtype).requires_grad_()
    features = features if dtype != torch.float64 else features.double()
    loss = function(prediction, features, rows)
    scale = torch.tensor(1000.0, dtype=loss.dtype, device=loss.device)
    return [loss.detach(), torch.autograd.grad(loss, prediction, scale)[0]]


def check(batches: list[Inputs], few: bool = False) -> None:
    """Over several batches at once, since one scalar may happen to be rounded right."""
    found = []
    for function, dtype in ((jepa_loss, None), (jepa_loss_ref, None), (jepa_loss_ref, torch.float64)):
        losses, gradients = zip(*(value_and_gradient(function, tables, dtype) for tables in batches), strict=True)
        found.append([torch.stack(losses), torch.cat([g.flatten() for g in gradients])])
    assert_as_near_as_torch(*found, few=few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [100, 384, 1280, 1408])
def test_value_and_gradient(width: int, dtype: torch.dtype):
    check([inputs(19, width, dtype) for _ in range(8)])


def test_many_programs():
    check([inputs(300, 64, torch.float32, torch.int64) for _ in range(6)])


def test_dtypes_may_differ():
    prediction, features, rows = inputs(19, 384, torch.float16)
    check([(prediction, features.float(), rows)] * 2)
    check([(prediction.float(), features, rows)] * 2)


def test_loss_is_fp32_and_features_take_no_gradient():
    prediction, features, rows = inputs(19, 64, torch.float16)
    loss = jepa_loss(prediction.requires_grad_(), features.requires_grad_(), rows)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    loss.backward()
    assert prediction.grad is not None
    assert features.grad is None


def test_no_gradient_asked_for():
    prediction, features, rows = inputs(19, 64, torch.float32)
    loss, slope = jepa_loss_fwd(prediction, features, rows, 1e-5, store_slope=False)
    assert slope.numel() == 0
    assert torch.equal(loss, jepa_loss(prediction, features, rows))


def test_no_token_is_nan_as_in_torch():
    prediction, features, rows = inputs(0, 64, torch.float32)
    ours, reference = (value_and_gradient(f, (prediction, features, rows)) for f in (jepa_loss, jepa_loss_ref))
    for loss, gradient in (ours, reference):
        assert loss.isnan()
        assert gradient.shape == (0, 64)


def test_gradient_of_two_backwards():
    prediction, features, rows = inputs(19, 64, torch.float32)
    loss = jepa_loss(prediction.requires_grad_(), features, rows)
    first, second = (torch.autograd.grad(loss, prediction, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"])
def test_strange_layouts(layout: str):
    prediction, features, rows = inputs(13, 192, torch.float32)
    odd = strange_layouts(prediction)[layout], strange_layouts(features)[layout], torch.stack([rows, rows], 1)[:, 0]
    for got, want in zip(
        value_and_gradient(jepa_loss, odd), value_and_gradient(jepa_loss, (prediction, features, rows)), strict=True
    ):
        torch.testing.assert_close(got, want)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 60),
    width=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape(tokens: int, width: int, dtype: torch.dtype, index: torch.dtype):
    check([inputs(tokens, width, dtype, index)], few=True)


def test_repeats_bitwise():
    tables = inputs(300, 100, torch.float16)
    first, second = (value_and_gradient(jepa_loss, tables) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_declared_launches(monkeypatch: pytest.MonkeyPatch):
    prediction, features, rows = inputs(40, 64, torch.float32)
    loss, slope = jepa_loss_fwd(prediction, features, rows, 1e-5)
    forward, backward = (jepa_loss_cost(40, 64, prediction.dtype, backward=b).launches for b in (False, True))
    assert forward == launches(monkeypatch, lambda: jepa_loss_fwd(prediction, features, rows, 1e-5)) == 2
    assert backward == launches(monkeypatch, lambda: jepa_loss_bwd(slope, loss))


def test_declared_bytes():
    """ViT-H, 128 images with 4 targets of 44 patches: three and two tables of 22,528 x 1280 in bf16."""
    table = 22528 * 1280 * 2
    assert 3 * table < jepa_loss_cost(22528, 1280, torch.bfloat16).bytes < 3.01 * table
    assert 2 * table < jepa_loss_cost(22528, 1280, torch.bfloat16, backward=True).bytes < 2.01 * table


def test_refuses_what_it_cannot_do():
    prediction, features, rows = inputs(4, 16, torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 16\], \[4, 15\] and \[4\]"):
        jepa_loss(prediction, features[:, :15], rows)
    with pytest.raises(ValueError, match="bool"):
        jepa_loss(prediction, features, rows.bool())
    with pytest.raises(ValueError, match="float64"):
        jepa_loss(prediction.double(), features, rows)
    with pytest.raises(ValueError, match="got 9000"):
        jepa_loss(torch.zeros(4, 9000), torch.zeros(4, 9000), rows)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code(arch: int):
    assert_compiles_well("jepa_loss", arch, r"jepa_loss_(fwd d(768|1024|1280|1408)|bwd) bf16", expected=9)


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280, 1408, 8192])
def test_on_a_chip(width: int, dtype: torch.dtype):
    batches = [inputs(MANY, width, dtype) for _ in range(4)]
    check(batches)
    first, second = (value_and_gradient(jepa_loss, batches[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
