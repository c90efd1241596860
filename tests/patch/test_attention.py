"""Attention of timm, MAE, data2vec and stable-pretraining, by their signatures."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastjepa
from fastjepa import ops
from fastjepa.ops import library
from fastjepa.patch import FallbackWarning
from fastjepa.patch.compare import run
from tests.helpers import distance
from tests.patch.others_like import AltBlock, Attention, Block, MaskedAutoencoder, StableAttention


@pytest.mark.parametrize("on_kernels", [False, True], ids=["torch", "interpreted kernels"])
@pytest.mark.parametrize("fused_attn", [False, True])
def test_timm_blocks(monkeypatch: pytest.MonkeyPatch, fused_attn: bool, on_kernels: bool):
    monkeypatch.setattr(library, "takes_kernels", lambda x: on_kernels and x.dtype == torch.float32)
    block = Block(24, 3, fused_attn=fused_attn)
    report = fastjepa.patch(block, probe=(torch.randn(2, 7, 24),))
    assert [f.operation for f in report.patched] == ["layer_norm", "attention", "layer_norm", "gelu"]


@pytest.mark.parametrize("fused_attn", [False, True])
def test_a_mask_or_an_order_asked_for_is_stock_s(fused_attn: bool):
    block, x, mask = Block(24, 3, fused_attn=fused_attn), torch.randn(2, 5, 24), torch.randn(5, 5)
    expected = block(x, attn_mask=mask)
    fastjepa.patch(block, verify=False)
    with pytest.warns(FallbackWarning, match="it was given attn_mask"):
        assert torch.equal(block(x, attn_mask=mask), expected)
    with pytest.warns(FallbackWarning, match="it was given is_causal"):
        block.attn(x, is_causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block.attn(x, None, False)


def test_query_norms_are_refused():
    with pytest.raises(ValueError, match="has q_norm, k_norm besides qkv and proj"):
        fastjepa.patch(Attention(24, 3, qk_norm=True))


def test_other_attention_is_named():
    class TwoLinearAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    model = nn.Sequential(nn.LayerNorm(8), TwoLinearAttention(), nn.MultiheadAttention(8, 2))
    report = fastjepa.patch(model, strict=False, verify=False)
    assert [f.what for f in report.skipped] == ["TwoLinearAttention", "MultiheadAttention"]
    assert report.skipped[0].reason == "has q, kv, and known are qkv, proj and num_heads"


def test_masked_autoencoder_trains_the_same():
    """Random masks of each image, drawn within the model."""
    images, losses = torch.randn(4, 3, 16, 16), {}
    for patched in (False, True):
        torch.manual_seed(2)
        model = MaskedAutoencoder()
        if patched:
            report = fastjepa.patch(model)
            assert not report.skipped
            assert report.verification is not None
            assert report.verification.outputs < 1e-6
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[patched] = []
        torch.manual_seed(3)
        for _ in range(20):
            loss, _, _ = model(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[patched].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]


def test_data2vec_student_and_teacher_train_the_same():
    """Random masks, a teacher that is an average of the student, and a padding mask where there is one."""
    losses = {}
    for patched in (False, True):
        torch.manual_seed(2)
        student = nn.ModuleList([AltBlock(24, 3), AltBlock(24, 3)])
        teacher = copy.deepcopy(student).requires_grad_(False)
        if patched:
            for model in (student, teacher):
                assert not fastjepa.patch(model, verify=False).skipped
        optimizer, losses[patched] = torch.optim.AdamW(student.parameters(), lr=1e-3), []
        torch.manual_seed(3)
        x = torch.randn(2, 8, 24)
        for _ in range(20):
            mask = torch.rand(2, 8) < 0.6
            wanted = sum(_targets(teacher, x))
            loss = (_targets(student, x * ~mask[..., None])[-1] - wanted)[mask].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ops.ema_update_(teacher.parameters(), student.parameters(), 0.99)
            losses[patched].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    block, padded = AltBlock(24, 3), torch.arange(8).expand(2, 8) > 5
    expected = block(x, padded)[0]
    fastjepa.patch(block, verify=False)
    with pytest.warns(FallbackWarning, match="it was given padding_mask"):
        assert torch.equal(block(x, padded)[0], expected)


def _targets(blocks, x):
    found = []
    for block in blocks:
        x, target = block(x)
        found.append(target)
    return found


def test_stable_pretraining_s_attention():
    module, x = StableAttention(24, 3, attn_drop=0.5).eval(), torch.randn(2, 4, 24)
    expected = module(x)
    fastjepa.patch(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(module(x, grid_size=(2, 2)), expected) < 1e-6  # there is nothing that it would turn
    assert not torch.equal(module.train()(x), module(x))
    with pytest.warns(FallbackWarning, match="it was given attn_mask"):
        module(x, torch.zeros(4, 4).bool())


def test_empty_and_single_tokens():
    module = Attention(24, 3)
    stock = copy.deepcopy(module)
    fastjepa.patch(module)
    for shape in ((2, 1, 24), (1, 1, 24), (0, 5, 24)):
        x = torch.randn(shape)
        ours, theirs = run(module, (x,)), run(stock, (x,))
        assert ours.outputs[0].shape == shape
        assert torch.allclose(ours.outputs[0], theirs.outputs[0], atol=1e-6)
