"""Packed totals padded to a multiple: the same numbers, no place left unwritten, shapes that repeat."""

from __future__ import annotations

import pytest
import torch

import fastjepa.ops.library
from fastjepa import IJEPA, Ragged, vit_predictor, vit_tiny
from fastjepa.kernels.launch import is_interpreted
from fastjepa.nn import RaggedAttention, set_token_multiple
from fastjepa.pairing import Pairing, PredictorLayout
from fastjepa.ragged import pad_offsets
from tests.helpers import distance

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KERNELS = pytest.param(
    True, marks=pytest.mark.skipif(not (CUDA or is_interpreted()), reason="kernels need a GPU or Triton's interpreter")
)


def work(lengths=(5, 0, 3), targets=(2, 1, 3, 0, 4, 2)):
    """A small model, images, and ragged masks of these lengths."""
    torch.manual_seed(0)
    encoder = vit_tiny(img_size=[32], patch_size=8, embed_dim=48, depth=2)
    predictor = vit_predictor(num_patches=16, embed_dim=48, predictor_embed_dim=48, depth=2, num_heads=3)
    model = IJEPA(encoder, predictor).to(DEVICE)
    for parameter in model.parameters():  # biases too, so that padding is not zero beyond the first layer
        torch.nn.init.normal_(parameter, std=0.2)
    masks_enc = Ragged.from_list([torch.randperm(16)[:n] for n in lengths])
    masks_pred = Ragged.from_list([torch.randperm(16)[:n] for n in targets], 2)
    return model, torch.randn(3, 3, 32, 32, device=DEVICE), masks_enc.to(DEVICE), masks_pred.to(DEVICE)


def step(model, images, masks_enc, masks_pred):
    loss = model.loss(images, masks_enc, masks_pred)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [loss.detach(), model.encoder(images, masks_enc).values.detach(), *found]


@pytest.mark.parametrize("multiple", [2, 8, 64])
def test_numbers_are_the_same(multiple):
    model, images, *masks = work()
    model, images = model.double(), images.double()
    expected = step(model, images, *masks)
    assert set_token_multiple(model, multiple) == 3
    for ours, theirs in zip(step(model, images, *masks), expected, strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("on_kernels", [False, KERNELS])
def test_nothing_is_left_unwritten(monkeypatch, poison, on_kernels):
    monkeypatch.setattr(fastjepa.ops.library, "takes_kernels", lambda x: on_kernels)
    model, images, *masks = work()
    expected = step(model, images, *masks)
    set_token_multiple(model, 32)
    for ours, theirs in zip(step(model, images, *masks), expected, strict=True):
        assert ours.isfinite().all()
        assert distance(ours, theirs) < 1e-4


def test_lists_are_padded_too():
    model, images, *_ = work()
    masks = [torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])], [torch.tensor([[9], [10], [11]])] * 2
    expected = model.loss(images, *masks)
    set_token_multiple(model, 16)
    assert distance(model.loss(images, *masks), expected) < 1e-6


def test_attention_sees_repeating_shapes(monkeypatch):
    """Batches of other totals within a multiple have the same shapes, whatever their totals lack."""
    seen = []
    real = RaggedAttention.forward

    def spy(self, x, offsets, max_length, keep=None):
        seen.append((len(x), len(offsets)))
        return real(self, x, offsets, max_length, keep)

    monkeypatch.setattr(RaggedAttention, "forward", spy)
    shapes = []  # [target encoder, context encoder, predictor], two layers of each
    for lengths in ((5, 0, 3), (2, 6, 8), (1, 1, 1)):
        model, images, *masks = work(lengths)
        set_token_multiple(model, 16)
        seen.clear()
        model.loss(images, *masks)
        shapes.append(list(seen))
    target, context, predictor = (48, 5), (16, 5), (32, 8)
    assert shapes[0] == [target] * 2 + [context] * 2 + [predictor] * 2
    assert shapes[1] == [target] * 2 + [context] * 2 + [(48, 8)] * 2
    assert shapes[2] == shapes[0]


def test_layout():
    masks_enc, masks_pred = Ragged.from_list([torch.tensor([4, 2])]), Ragged.from_list([torch.tensor([7])])
    layout = PredictorLayout.build(masks_enc, masks_pred, Pairing.image_major(masks_enc, masks_pred))
    assert layout.padded(1) is layout
    padded = layout.padded(8)
    assert padded.source.tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert padded.patches.tolist() == [4, 2, 7, 0, 0, 0, 0, 0]
    assert padded.offsets.tolist() == [0, 3, 8]
    assert padded.max_length == 5
    assert padded.picked.tolist() == layout.picked.tolist()


def test_offsets():
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    assert pad_offsets(offsets, 4, 4, 1)[1] is offsets
    extra, padded, longest = pad_offsets(offsets, 4, 4, 4)
    assert (extra, padded.tolist(), padded.dtype, longest) == (0, [0, 4, 4], torch.int32, 4)
    with pytest.raises(ValueError, match="multiples of 1 or more, got 0"):
        set_token_multiple(vit_tiny(depth=1), 0)
