"""The public operations against plain loops, their gradients, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastjepa import Ragged, ops
from tests.helpers import distance

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@given(LENGTHS, st.integers(0, 3))
def test_attention_is_each_sequence_alone(lengths, slack):
    total = sum(lengths)
    qkv = torch.randn(total, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = ops.ragged_attention(qkv, offsets_of(lengths), max(lengths) + slack, 0.7)
    parts = []
    for piece in qkv.split(lengths):
        q, k, v = piece.permute(1, 2, 0, 3)
        parts.append(((q @ k.transpose(1, 2) * 0.7).softmax(-1) @ v).transpose(0, 1))
    expected = torch.cat(parts)
    assert out.shape == (total, 2, 4)
    assert distance(out, expected) < 1e-12
    if total:
        up = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad(y, qkv, up, retain_graph=True)[0] for y in (out, expected))
        assert distance(ours, theirs) < 1e-12


def test_attention_gradcheck():
    qkv = torch.randn(5, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.ragged_attention(x, offsets_of([3, 0, 2]), 3), qkv)


def test_attention_poisoned(poison):
    out = ops.ragged_attention(torch.randn(5, 3, 2, 8), offsets_of([3, 0, 2]), 3)
    assert out.isfinite().all()


@given(st.data())
def test_gather_and_scatter(data):
    per_image, batch, patches = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    sequences = [
        torch.tensor(data.draw(st.lists(st.integers(0, patches - 1), max_size=4)), dtype=torch.int32)
        for _ in range(batch * per_image)
    ]
    index = Ragged.from_list(sequences, per_image)
    x = torch.randn(batch, patches, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(patches, 3, dtype=torch.float64)
    packed = ops.gather_tokens(x, index, positions)
    expected = torch.cat([x[s // per_image, q.long()] + positions[q.long()] for s, q in enumerate(sequences)])
    assert torch.equal(packed.values, expected)
    back = ops.scatter_tokens(packed, index, patches)
    assert back.shape == (batch * per_image, patches, 3)
    by_hand = torch.zeros_like(back)
    for s, (sequence, tokens) in enumerate(zip(sequences, packed.unbind(), strict=True)):
        for patch, token in zip(sequence.tolist(), tokens, strict=True):
            by_hand[s, patch] += token
    assert torch.allclose(back, by_hand, rtol=0, atol=1e-12)
    if len(index.values):
        assert torch.autograd.gradcheck(lambda t: ops.gather_tokens(t, index, positions).values, x)


@pytest.mark.parametrize("contexts", [1, 2])
def test_loss_of_both_forms(contexts):
    features = torch.randn(3, 8, 6, dtype=torch.float64)
    masks = [torch.stack([torch.randperm(8)[:4] for _ in range(3)]) for _ in range(2)]
    prediction = torch.randn(2, contexts, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    normalised = F.layer_norm(features, (6,))
    target = torch.stack([torch.stack([normalised[b, m[b]] for b in range(3)]) for m in masks])  # [2, 3, 4, 6]
    expected = F.smooth_l1_loss(prediction, target.unsqueeze(1).expand_as(prediction))
    lists = ops.jepa_loss(prediction.flatten(0, 2), features, masks)
    assert lists.item() == pytest.approx(expected.item(), rel=1e-12)
    index = Ragged.from_list([masks[t][b] for b in range(3) for t in range(2)], 2)
    image_major = prediction.permute(2, 0, 1, 3, 4).flatten(0, 3)
    offsets = torch.arange(3 * 2 * contexts + 1, dtype=torch.int32) * 4
    ragged = ops.jepa_loss(Ragged(image_major, offsets, 2 * contexts), features, index)
    assert ragged.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(y, prediction, retain_graph=True)[0] for y in (lists, expected))
    assert distance(ours, theirs) < 1e-12


def test_loss_takes_bf16_targets_in_fp32():
    features, prediction = torch.randn(1, 4, 8), torch.randn(4, 8).bfloat16()
    loss = ops.jepa_loss(prediction.view(1, 4, 8), features, [torch.arange(4).view(1, 4)])
    expected = F.smooth_l1_loss(prediction.float(), F.layer_norm(features[0], (8,)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@given(st.floats(0, 1))
def test_ema(momentum):
    targets = [torch.randn(3), torch.randn(2, 2, dtype=torch.float64), torch.randn(0), torch.randn(1).bfloat16()]
    sources = [torch.randn(t.shape) for t in targets]
    expected = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources, strict=True)]
    ops.ema_update_(iter(targets), iter(sources), momentum)
    for ours, theirs in zip(targets, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=0, atol=2e-2 if ours.dtype == torch.bfloat16 else 1e-6)


def test_rows():
    x, residual, weight, bias = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6), torch.randn(6)
    y, total = ops.add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, F.layer_norm(x + residual, (6,), weight, bias, 1e-6))
    assert torch.equal(ops.bias_gelu(x, bias), F.gelu(x + bias))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.ragged_attention(torch.zeros(4, 2, 1, 8), offsets_of([4]), 4), r"\[T, 3, H, d\], got .*\[4, 2"),
        (lambda: ops.ragged_attention(torch.zeros(4, 3, 1, 8), offsets_of([4]).long(), 4), "int32"),
        (lambda: ops.ragged_attention(torch.zeros(4, 3, 1, 8), offsets_of([4]), 3), "cannot hold 4"),
        (lambda: ops.ragged_attention(torch.zeros(4, 3, 1, 8), offsets_of([4]).to("meta"), 4), "on meta"),
        (lambda: ops.gather_tokens(torch.zeros(2, 3), Ragged.from_list([torch.tensor([0])])), r"\[B, N, D\]"),
        (lambda: ops.gather_tokens(torch.zeros(1, 3, 2), Ragged.from_list([torch.zeros(1)])), "int32 or int64"),
        (
            lambda: ops.gather_tokens(torch.zeros(1, 3, 2), Ragged.from_list([torch.tensor([3])])),
            r"0..2, got values in 3..3",
        ),
        (
            lambda: ops.gather_tokens(torch.zeros(1, 3, 2), Ragged.from_list([torch.tensor([0])]), torch.zeros(2, 2)),
            "pos_embed",
        ),
        (
            lambda: ops.scatter_tokens(Ragged.from_list([torch.zeros(2, 2)]), Ragged.from_list([torch.tensor([0])]), 3),
            "T = 1",
        ),
        (lambda: ops.jepa_loss(torch.zeros(1, 2, 4), torch.zeros(2, 4), [torch.tensor([[0, 1]])]), r"\[B, N, D\]"),
        (lambda: ops.jepa_loss(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), [torch.tensor([[0, 1]])]), "does not fit"),
        (lambda: ops.ema_update_([torch.zeros(2)], [torch.zeros(3)], 0.5), "pair 0 has shapes"),
        (lambda: ops.ema_update_([torch.zeros(2)], [], 0.5), "as many targets as sources"),
        (lambda: ops.ema_update_([], [], 1.5), "momentum must be in 0..1"),
        (lambda: ops.take_rows(torch.zeros(2, 2), torch.zeros(1, 1, dtype=torch.int64)), "rows"),
        (lambda: ops.add_layer_norm(torch.zeros(2, 3), None, torch.zeros(2), torch.zeros(2)), "weight"),
        (lambda: ops.add_layer_norm(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), torch.zeros(3)), "residual"),
        (lambda: ops.bias_gelu(torch.zeros(2, 3), torch.zeros(2)), "bias"),
        (
            lambda: ops.assemble_predictor(
                torch.zeros(1, 4), torch.zeros(3), torch.zeros(2, 4), torch.tensor([0]), torch.tensor([0])
            ),
            "mask_token",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
