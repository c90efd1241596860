"""`apply_masks`: what it gives, and where it is put."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastjepa
from fastjepa.ops import library
from fastjepa.patch.gather import apply_masks
from tests.patch import ijepa_like, vjepa2_like


@given(st.integers(0, 3), st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.booleans())
def test_gives_what_the_published_functions_give(batch: int, tokens: int, kept: list[int], concat: bool):
    x = torch.randn(batch, tokens, 3)
    kept = [kept[0]] * len(kept) if concat else kept
    masks = [torch.randint(tokens, (batch, k)) for k in kept]
    ours, theirs = apply_masks(x, masks, concat), vjepa2_like.apply_masks(x, masks, concat)
    assert torch.equal(ours, theirs) if concat else all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("concat", [True, False])
def test_on_kernels(monkeypatch: pytest.MonkeyPatch, concat: bool):
    monkeypatch.setattr(library, "takes_kernels", lambda x: True)
    x, masks = (
        torch.randn(2, 5, 8, requires_grad=True),
        [torch.tensor([[0, 4], [1, 1]]), torch.tensor([[2, 3], [3, 0]])],
    )
    gradients = []
    for function in (apply_masks, vjepa2_like.apply_masks):
        y = function(x, masks, concat=concat)
        y = y if concat else torch.cat(y)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(apply_masks(x, masks[0]), vjepa2_like.apply_masks(x, masks[:1]))  # lightly takes one alone


def packed(x: Tensor, *masks: Tensor) -> Tensor:
    """stable-pretraining's signature."""
    return vjepa2_like.apply_masks(x, list(masks))


def shifted(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The right signature, other numbers."""
    return vjepa2_like.apply_masks(x, [m.roll(1, 1) for m in masks])


def fussy(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The right signature, other masks."""
    raise TypeError("masks must be boolean")


REFUSED = {packed: r"takes x, \*masks, and known", shifted: "gives something else", fussy: "failed .* must be boolean"}


@pytest.mark.parametrize("function", REFUSED)
def test_another_function_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch, function):
    monkeypatch.setattr(ijepa_like, "apply_masks", function)
    with pytest.raises(ValueError, match=f"gather: .* its apply_masks {REFUSED[function]}"):
        fastjepa.patch(ijepa_like.VisionTransformer())


@pytest.fixture
def package() -> Iterator[list[types.ModuleType]]:
    """A package `jepa_src` of a module that has `apply_masks`, two that took it from there, and one that did not."""
    modules = [types.ModuleType(f"jepa_src{name}") for name in ("", ".masks", ".models", ".train", ".data")]
    for module in modules[1:4]:
        module.apply_masks = ijepa_like.apply_masks
    sys.modules.update({m.__name__: m for m in modules})
    sys.modules["jepa_src_other"] = other = types.ModuleType("jepa_src_other")
    other.apply_masks = ijepa_like.apply_masks
    yield [*modules, other]
    for module in (*modules, other):
        del sys.modules[module.__name__]


def test_every_namespace_of_a_package(package: list[types.ModuleType]):
    with fastjepa.patch_gathers("jepa_src") as report:
        assert [f.where for f in report.patched] == [f"jepa_src.{n}.apply_masks" for n in ("masks", "models", "train")]
        assert [getattr(m, "apply_masks", None) for m in package[1:4]] == [apply_masks] * 3
        assert package[5].apply_masks is ijepa_like.apply_masks
        with pytest.raises(ValueError, match="none of the 5 imported modules of 'jepa_src' has a function apply_masks"):
            fastjepa.patch_gathers("jepa_src")
    assert all(m.apply_masks is ijepa_like.apply_masks for m in package[1:4])


def test_one_wrong_function_leaves_every_namespace(package: list[types.ModuleType]):
    package[3].apply_masks = shifted
    with pytest.raises(ValueError, match=r"gather: jepa_src.train.apply_masks .*gives something else"):
        fastjepa.patch_gathers("jepa_src")
    assert package[1].apply_masks is ijepa_like.apply_masks


def test_a_package_that_is_not_imported():
    with pytest.raises(ValueError, match="none of the 0 imported modules of 'no_such_package'"):
        fastjepa.patch_gathers("no_such_package")


def test_one_model_gets_a_forward_of_its_own():
    model, other, x = ijepa_like.VisionTransformer(), ijepa_like.VisionTransformer(), torch.randn(1, 3, 16, 16)
    masks = [torch.tensor([[1, 2, 3]])]
    expected = model(x, masks)
    with fastjepa.patch(model, ops="gather"):
        assert type(model).forward.__globals__["apply_masks"] is apply_masks
        assert ijepa_like.apply_masks is not apply_masks
        assert type(other).forward.__globals__["apply_masks"] is ijepa_like.apply_masks
        assert torch.equal(model(x, masks), expected)
        assert type(model.norm) is nn.LayerNorm
