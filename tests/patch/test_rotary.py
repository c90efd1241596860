"""V-JEPA 2: attention with and without rotary positions, whole clips and masked ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import fastjepa
from fastjepa.ops import library
from fastjepa.patch import FallbackWarning
from fastjepa.patch.compare import distances, in_double, run
from tests.helpers import distance
from tests.patch import vjepa2_like
from tests.patch.vjepa2_like import ACRoPEAttention, Attention, RoPEAttention, VisionTransformer, rotate_queries_or_keys

MASKS = [torch.tensor([[0, 3, 5, 17, 30], [1, 2, 7, 15, 31]]), torch.tensor([[4, 8, 9, 14, 20], [0, 1, 2, 3, 16]])]


def same(model, arguments) -> None:
    """Patched, the outputs and gradients are at most twice as far from fp64 as before."""
    stock, exact = run(model, arguments), run(copy.deepcopy(model).double(), in_double(arguments))
    with fastjepa.patch(model, verify=False) as report:
        assert not report.skipped
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Of Triton 3.6's interpreter, under numpy before 2.4.
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
            ours = run(model, arguments)
    assert not any(d.fault(name, torch.float32) for name, d in distances(ours, stock, exact).items())


@pytest.mark.parametrize("on_kernels", [False, True], ids=["torch", "interpreted kernels"])
@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("use_sdpa", [False, True])
def test_clips(monkeypatch: pytest.MonkeyPatch, use_rope: bool, use_sdpa: bool, on_kernels: bool):
    monkeypatch.setattr(library, "takes_kernels", lambda x: on_kernels and x.dtype == torch.float32)
    model = VisionTransformer(dim=32, depth=1, use_rope=use_rope, use_sdpa=use_sdpa)
    clip = torch.randn(2, 3, 4, 16, 16)
    for arguments in ((clip,), (clip, MASKS)):
        same(model, arguments)


def test_report_of_a_clip_model():
    report = fastjepa.patch(VisionTransformer())
    assert report.verification is not None
    assert report.verification.probe == "[2, 3, 4, 16, 16] float32, [[2, 16] int64, [2, 16] int64]"
    assert report.verification.outputs < 1e-6
    assert "attention: 2 x RoPEAttention" in str(report)
    assert "gather: 1 x VisionTransformer" in str(report)


@pytest.mark.parametrize("actions", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_action_tokens(actions: int, masked: bool):
    module = ACRoPEAttention(36, 2, grid_size=4)
    x = torch.randn(2, 2 * (actions + 6), 36)
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool() if masked else None
    same(module, (x, None, mask, 2, 2, 3, actions))


def test_positions_of_another_grid_and_of_masks():
    same(RoPEAttention(36, 2, grid_size=4), (torch.randn(2, 12, 36), None, None, 2, 2, 3))
    same(ACRoPEAttention(36, 2, grid_size=4), (torch.randn(2, 5, 36), MASKS[0], None, 2, 4, 4))


def test_4096_tokens():
    module = RoPEAttention(24, 1, grid_size=16)
    x = torch.randn(1, 4096, 24)
    expected = module(x)
    fastjepa.patch(module, verify=False)
    assert distance(module(x), expected) < 1e-5


def test_an_attention_mask_is_followed_and_positions_are_ignored_where_stock_ignores_them():
    module, x, mask = Attention(24, 2), torch.randn(2, 5, 24), torch.ones(5, 5).tril().bool()
    expected, plain = module(x, MASKS[0], mask), module(x)
    fastjepa.patch(module)
    with pytest.warns(FallbackWarning, match="it was given attn_mask"):
        assert torch.equal(module(x, MASKS[0], mask), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(module(x, mask=MASKS[0]), plain) < 1e-6
        assert distance(module(x=x), plain) < 1e-6


def test_the_stock_code_s_dropout_in_eval_is_kept():
    """With use_sdpa it drops attention weights by the projection's rate, in eval mode too."""
    for module in (Attention(24, 2, drop=0.5), RoPEAttention(24, 2, drop=0.5)):
        x = torch.randn(2, 6, 24)
        torch.manual_seed(3)
        expected = module.eval()(x)
        with fastjepa.patch(module, verify=False):
            torch.manual_seed(3)
            assert distance(module(x), expected) < 1e-6
            assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("kind", [Attention, RoPEAttention])
def test_causal_attention_is_refused(kind):
    with pytest.raises(ValueError, match="is causal, and the kernel has no mask"):
        fastjepa.patch(kind(24, 2, is_causal=True))


class OlderRoPEAttention(RoPEAttention):
    """Without sizes of the grid, and a rotation beside it."""

    def forward(self, x, mask=None):
        assert rotate_queries_or_keys
        return super().forward(x, mask)


def test_other_versions_are_refused_by_what_they_lack(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="takes x, mask: a version of V-JEPA 2's attention that is not known"):
        fastjepa.patch(OlderRoPEAttention(24, 2))
    module = RoPEAttention(24, 2)
    del module.proj_drop_prob
    with pytest.raises(ValueError, match="lacks proj_drop_prob: a version"):
        fastjepa.patch(module)
    module = Attention(24, 2)
    del module.proj_drop_prob
    with pytest.raises(ValueError, match="has use_sdpa and no proj_drop_prob: a version"):
        fastjepa.patch(module)
    monkeypatch.delattr(vjepa2_like, "rotate_queries_or_keys")
    with pytest.raises(ValueError, match="lacks function rotate_queries_or_keys: a version"):
        fastjepa.patch(RoPEAttention(24, 2))
