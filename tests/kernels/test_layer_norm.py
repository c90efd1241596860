"""Residual add + LayerNorm against its reference: values, gradients, layouts, launches, compiled code."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels import layer_norm
from fastjepa.kernels.layer_norm import (
    MAX_WIDTH,
    add_layer_norm,
    add_layer_norm_cost,
    layer_norm_bwd,
    layer_norm_bwd_config,
    layer_norm_fwd,
)
from fastjepa.kernels.reference import add_layer_norm_ref
from fastjepa.kernels.rows import MULTIPROCESSORS
from tests.kernels.row_checks import (
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
EPS = 1e-6


def inputs(rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    weight_dtype = weight_dtype or dtype
    return [
        randn(rows, width, dtype=dtype),
        randn(rows, width, dtype=dtype, scale=2.0),
        1 + randn(width, dtype=weight_dtype, scale=0.3),
        randn(width, dtype=weight_dtype, scale=0.3),
    ]


def check(tables: list[torch.Tensor], few: bool = False, upstream: list[torch.Tensor] | None = None) -> None:
    """With and without a residual; x's dtype is that of the result where the reference would promote."""
    x, _, weight, bias = tables
    upstream = upstream or [randn(*x.shape, dtype=x.dtype), randn(*x.shape, dtype=x.dtype)]

    def reference(x, residual, weight, bias):
        y, s = add_layer_norm_ref(x, residual, weight.to(x.dtype), bias.to(x.dtype), EPS)
        return y, s + 0  # its own tensor where s is x

    def ours(x, residual, weight, bias):
        return add_layer_norm(x, residual, weight, bias, EPS)

    compare(ours, reference, tables, upstream, few)
    alone = [x, weight, bias]
    compare(lambda x, w, b: ours(x, None, w, b), lambda x, w, b: reference(x, None, w, b), alone, upstream, few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [100, 384, 1280, 1408])
def test_values_and_gradients(width: int, dtype: torch.dtype):
    check(inputs(21, width, dtype))


def test_many_rows_to_a_program(monkeypatch: pytest.MonkeyPatch):
    """More tiles than programs, so that a program of the backward loops."""
    config = replace(layer_norm_bwd_config(64, torch.float32, 80), programs=3)
    monkeypatch.setattr(layer_norm, "layer_norm_bwd_config", lambda *key: config)
    check(inputs(10 * config.block_t + 3, 64, torch.float32))
    x, residual, weight, bias = inputs(10 * config.block_t + 3, 64, torch.float32)
    y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, EPS)
    again = randn(*x.shape)
    layer_norm_bwd(again, None, s, weight, mean, rstd, bias=bias, y=again)
    assert torch.equal(again, y)


def test_weights_wider_than_rows():
    check(inputs(21, 384, torch.float16, torch.float32))


NARROW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.compiled)]  # interpreted, bf16 is cut
WIDE = torch.float32


@pytest.mark.parametrize(
    "kind",
    [
        "nwnw",  # a block under autocast
        "w-nw",  # its first norm
        "nwww",
        "wnnn",
        "wwnw",
        "nnnn",
        "nnwn",
    ],
)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("width", [100, 384, 1408])
def test_mixed_dtypes(width: int, narrow: torch.dtype, kind: str):
    """x, residual, y and weight, each narrow or wide, in one pass; y is the fp32 one rounded once."""
    x_dtype, residual_dtype, out_dtype, weight_dtype = ({"n": narrow, "w": WIDE, "-": None}[letter] for letter in kind)
    x, residual, weight, bias = inputs(13, width, x_dtype, weight_dtype)
    tables = [x, weight, bias] if residual_dtype is None else [x, residual.to(residual_dtype), weight, bias]
    s_dtype = x_dtype if residual_dtype in (None, x_dtype) else WIDE
    upstream = [randn(13, width, dtype=out_dtype), randn(13, width, dtype=s_dtype)]

    def ours(x, *rest):
        return add_layer_norm(x, *([None] if len(rest) == 2 else []), *rest, EPS, out_dtype)

    def reference(x, *rest):
        exact = x.dtype == torch.float64
        residual = rest[0] if len(rest) == 3 else None
        # Beside fp32 rows torch takes fp32 weights only.
        weight, bias = rest[-2:] if exact else (t.to(s_dtype) for t in rest[-2:])
        y, s = add_layer_norm_ref(x, residual, weight, bias, EPS, None if exact else out_dtype)
        return y, s + 0

    got = compare(ours, reference, tables, upstream)
    assert [t.dtype for t in got] == [out_dtype, s_dtype, *(t.dtype for t in tables)]
    again = value_and_gradients(ours, tables, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    if s_dtype == WIDE:
        y = add_layer_norm(x, None if residual_dtype is None else tables[1], weight, bias, EPS)[0]
        half_a_unit = 0 if out_dtype == WIDE else torch.finfo(out_dtype).eps / 2
        torch.testing.assert_close(got[0].float(), y, rtol=half_a_unit + 1e-6, atol=2e-6)


@pytest.mark.parametrize("ds", [True, False], ids=["ds", "no ds"])
@pytest.mark.parametrize("rows, width", [(0, 64), (1, 100), (21, 384), (13, 1408)])
@pytest.mark.parametrize("kind", ["nwnw", "wnnn", "wwwn", "nnnn", "w-nw"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_backward_makes_again_what_was_not_kept(narrow: torch.dtype, kind: str, rows: int, width: int, ds: bool):
    """y, in a place of its own or in dy's, and s where x and residual differ: the same numbers to the last bit."""
    x_dtype, residual_dtype, out_dtype, weight_dtype = ({"n": narrow, "w": WIDE, "-": None}[letter] for letter in kind)
    x, residual, weight, bias = inputs(rows, width, x_dtype, weight_dtype)
    residual = None if residual_dtype is None else residual.to(residual_dtype)
    y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, EPS, out_dtype)
    dy, dsum = randn(rows, width, dtype=out_dtype), randn(rows, width, dtype=s.dtype) if ds else None
    dtypes = (x_dtype, residual_dtype or x_dtype)
    wanted = layer_norm_bwd(dy, dsum, s, weight, mean, rstd, *dtypes)
    pairs = [(x, residual)] if residual is not None and residual_dtype != x_dtype else []
    for kept in [s, *pairs]:
        for again in (torch.empty_like(y), dy.clone()):
            upstream = again if torch.equal(again, dy) else dy
            found = layer_norm_bwd(upstream, dsum, kept, weight, mean, rstd, *dtypes, bias, again)
            assert torch.equal(again, y)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"])
def test_backward_from_strange_layouts(layout: str):
    x, residual, weight, bias = inputs(13, 192, torch.float32)
    x = x.half()
    y, s, mean, rstd = layer_norm_fwd(x, residual, weight, bias, EPS, torch.float16)
    dy = randn(13, 192, dtype=torch.float16)
    wanted = layer_norm_bwd(dy, None, s, weight, mean, rstd, x.dtype, residual.dtype)
    pair, again = (strange_layouts(x)[layout], strange_layouts(residual)[layout]), torch.empty_like(y)
    upstream = strange_layouts(dy)[layout]
    found = layer_norm_bwd(upstream, None, pair, weight, mean, rstd, bias=bias, y=again)
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"])
def test_strange_layouts(layout: str):
    x, residual, weight, bias = inputs(13, 192, torch.float32)
    upstream = [strange_layouts(randn(13, 192))[layout] for _ in range(2)]
    odd = [strange_layouts(x)[layout], strange_layouts(residual)[layout]]
    check([*odd, strange_layouts(weight[None])[layout][0], bias], upstream=upstream)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 40), width=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_shape(rows: int, width: int, dtype: torch.dtype):
    check(inputs(rows, width, dtype), few=True)


@pytest.mark.parametrize("width", [2048, MAX_WIDTH])
def test_wide_rows(width: int):
    check(inputs(3, width, torch.float32))


def test_large_mean_keeps_its_digits():
    """Statistics in two passes: a mean of 1000 standard deviations costs no more than it costs PyTorch."""
    x, _, weight, bias = inputs(16, 384, torch.float32)
    check([x, x + 1000, weight, bias])


def test_only_the_sum_used():
    x, residual, weight, bias = inputs(4, 64, torch.float32)
    x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    _, s = add_layer_norm(x, residual, weight, bias, EPS)
    upstream = randn(4, 64)
    dx, dresidual, dweight = torch.autograd.grad(s, (x, residual, weight), upstream, allow_unused=True)
    assert torch.equal(dx, upstream)
    assert torch.equal(dresidual, upstream)
    assert dweight is None


def test_only_the_norm_used():
    x, residual, weight, bias = inputs(21, 64, torch.float32)
    compare(
        lambda *t: add_layer_norm(*t, EPS)[0],
        lambda *t: add_layer_norm_ref(*t, EPS)[0],
        [x, residual, weight, bias],
        [randn(21, 64)],
    )


def test_upstream_gradient_that_is_expanded():
    x, residual, weight, bias = (t.requires_grad_() for t in inputs(21, 64, torch.float32))
    y, s = add_layer_norm(x, residual, weight, bias, EPS)
    dx = torch.autograd.grad(y.sum() + 2 * s.sum(), x)[0]
    y, s = add_layer_norm_ref(x, residual, weight, bias, EPS)
    torch.testing.assert_close(dx, torch.autograd.grad(y.sum() + 2 * s.sum(), x)[0])


def test_repeats_bitwise():
    tables = inputs(77, 384, torch.float16)
    upstream = [randn(77, 384, dtype=torch.float16)] * 2
    first, second = (value_and_gradients(lambda *t: add_layer_norm(*t, EPS), tables, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("residual", [True, False])
def test_declared_launches(residual: bool, monkeypatch: pytest.MonkeyPatch):
    x, other, weight, bias = inputs(40, 64, torch.float32)
    y, s, mean, rstd = layer_norm_fwd(x, other, weight, bias, EPS)
    cost = [add_layer_norm_cost(40, 64, x.dtype, residual, backward).launches for backward in (False, True)]
    assert cost[0] == launches(monkeypatch, lambda: layer_norm_fwd(x, other if residual else None, weight, bias, EPS))
    ds = s if residual else None
    assert cost[1] == launches(monkeypatch, lambda: layer_norm_bwd(y, ds, s, weight, mean, rstd))
    again = {"bias": bias, "y": torch.empty_like(y)}
    assert cost[1] == launches(monkeypatch, lambda: layer_norm_bwd(y, ds, s, weight, mean, rstd, **again))


def test_declared_bytes():
    """ViT-H, 128 images of 110 tokens: four tables of 14,080 x 1280 in bf16."""
    table = 14080 * 1280 * 2
    for backward in (False, True):
        cost = add_layer_norm_cost(14080, 1280, torch.bfloat16, backward=backward)
        assert 4 * table < cost.bytes < 4.01 * table


def test_declared_bytes_under_autocast():
    """2 + 4 read and 4 + 2 written an element; back 4 + 2 + 4 read and 2 + 4 written, 2 more for y, 2 more for s."""
    entries = 14080 * 1280
    dtypes = {"residual_dtype": torch.float32, "out_dtype": torch.bfloat16, "weight_dtype": torch.float32}
    for backward, again, each in ((False, "", 12), (True, "", 16), (True, "y", 18), (True, "y, s", 20)):
        cost = add_layer_norm_cost(14080, 1280, torch.bfloat16, backward=backward, **dtypes, again=again)
        assert each * entries < cost.bytes < 1.01 * each * entries


def test_refuses_what_it_cannot_do():
    x, residual, weight, bias = inputs(4, 16, torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 16\], \[15\]"):
        add_layer_norm(x, None, weight[:15], bias, EPS)
    with pytest.raises(ValueError, match=r"residual must be \[4, 16\]"):
        add_layer_norm(x, residual[:3], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"residual .*float64"):
        add_layer_norm(x, residual.double(), weight, bias, EPS)
    with pytest.raises(ValueError, match=r"out_dtype .*int32"):
        add_layer_norm(x, residual, weight, bias, EPS, torch.int32)
    with pytest.raises(ValueError, match=r"float16 and torch\.float32"):
        add_layer_norm(x, residual, weight.half(), bias, EPS)
    with pytest.raises(ValueError, match="float64"):
        add_layer_norm(x.double(), None, weight, bias, EPS)
    wide = torch.zeros(1, MAX_WIDTH + 1)
    with pytest.raises(ValueError, match=f"D in 1..{MAX_WIDTH}"):
        add_layer_norm(wide, None, wide[0], wide[0], EPS)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code(arch: int):
    cases = assert_compiles_well("layer_norm", arch, r"layer_norm_\w+ d(384|1280|1408) bf16 weight bf16", expected=9)
    for case in cases:
        if case["kernel"] == "layer_norm_bwd":  # every program of the backward has a place on the chip
            threads = int(re.search(r" p(\d+)", case["config"])[1]) // MULTIPROCESSORS[arch] * 32 * case["num_warps"]
            assert -(-case["registers"] // 8) * 8 * threads <= 65536, case


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code_under_autocast(arch: int):
    assert_compiles_well("layer_norm", arch, r"d(384|1280) (bf16 residual|fp32 alone out bf16)", expected=20)


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280, 1408, 8192])
def test_on_a_chip(width: int, dtype: torch.dtype):
    check(inputs(MANY, width, dtype))
    tables = inputs(MANY, width, dtype)
    upstream = [randn(MANY, width, dtype=dtype)] * 2
    first, second = (value_and_gradients(lambda *t: add_layer_norm(*t, EPS), tables, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
