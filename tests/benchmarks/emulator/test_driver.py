"""Shipped kernels on an emulated chip, whole and with something taken out of what was compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.emulator import Fault, driver, emulated
from benchmarks.emulator.driver import Moved
from fastjepa.kernels.attention import _attention_fwd_kernel, attention_fwd
from fastjepa.kernels.gelu import bias_gelu_cost, gelu_fwd
from fastjepa.kernels.reference import ragged_attention_ref
from tests.kernels.row_checks import relative_error

pytestmark = pytest.mark.compiled
BF16 = torch.bfloat16


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`edited(pattern, instead)`: the attention kernel's PTX is changed so before it is run."""
    parse = driver.ptx.parse

    def edit(pattern: str, instead: str) -> None:
        def changed(text: str):
            text, count = re.subn(pattern, instead, text)
            assert count
            return parse(text)

        monkeypatch.setattr(driver.ptx, "parse", changed)
        _attention_fwd_kernel.device_caches.clear()

    yield edit
    _attention_fwd_kernel.device_caches.clear()


def attend() -> float:
    """How far bf16 attention is from fp64."""
    qkv, offsets = torch.randn(150, 3, 2, 80, dtype=BF16), torch.tensor([0, 40, 150], dtype=torch.int32)
    out, _ = attention_fwd(qkv, offsets, 110, 0.1)
    return relative_error(out, ragged_attention_ref(qkv.double(), offsets, 110, 0.1))


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_a_kernel_as_it_is(sm: int):
    with emulated(sm):
        assert attend() < 4e-3


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_without_barriers(sm: int, edited: Callable[[str, str], None]):
    edited(r"bar\.sync\s+0;", "")
    with emulated(sm), pytest.raises(Fault, match=r"_attention_fwd_kernel, attention\w*\.py:\d+, .*last barrier"):
        attend()


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_without_waiting_for_copies(sm: int, edited: Callable[[str, str], None]):
    edited(r"cp\.async\.wait_group\s+\d+;", "")
    with emulated(sm):
        assert attend() == float("inf")


def test_in_another_order_of_a_products_operands(edited: Callable[[str, str], None]):
    """Where the tensor cores take each number from is looked at, not only that they do something."""
    edited(r"(mma\.sync\S* \{[^}]*\}), \{ (%r\d+), (%r\d+), ", r"\1, { \3, \2, ")
    with emulated(80):
        assert attend() > 0.1


def test_what_is_moved_is_what_is_declared():
    x, bias, moved = torch.randn(64, 1024, dtype=BF16), torch.randn(1024, dtype=BF16), Moved()
    with emulated(80, moved):
        y = gelu_fwd(x, bias)
    (counted,) = moved.values()
    declared = bias_gelu_cost(64, 1024, BF16).bytes
    assert counted["store bytes"] == y.nbytes
    assert x.nbytes <= counted["load bytes"] <= 1.2 * x.nbytes  # every program reads its part of the bias
    assert declared == x.nbytes + y.nbytes + bias.nbytes
    assert counted["load sectors"] * 32 == counted["load bytes"]
    assert counted["shared store passes"] == counted["shared store passes at best"]


def test_an_access_that_goes_astray(edited: Callable[[str, str], None]):
    edited(r"st\.global\.v4\.b32 \[ (%rd\d+) \+ 0 \]", r"st.global.v4.b32 [ \1 + 1099511627776 ]")
    with emulated(80), pytest.raises(Fault, match="outside every tensor"):
        attend()
