"""Packed totals padded to a multiple: the same numbers, no place left unwritten, shapes that repeat."""

from __future__ import annotations

import pytest
import torch

import fastjepa.ops.library
from fastjepa import IJEPA, Ragged, TargetRows, vit_predictor, vit_tiny
from fastjepa.kernels.launch import is_interpreted
from fastjepa.nn import RaggedAttention
from fastjepa.ragged import image_rows
from tests.helpers import distance

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KERNELS = pytest.param(
    True, marks=pytest.mark.skipif(not (CUDA or is_interpreted()), reason="kernels need a GPU or Triton's interpreter")
)
SHAPES = [
    ((5, 0, 3), (2, 1, 3, 0, 4, 2), 1),
    ((5, 2, 0, 0, 3, 1), (2, 1, 3), 2),
]  # contexts, targets, contexts an image


def work(lengths=(5, 0, 3), targets=(2, 1, 3, 0, 4, 2), contexts=1):
    """A small model, three images, and ragged masks of these lengths."""
    torch.manual_seed(0)
    encoder = vit_tiny(img_size=[32], patch_size=8, embed_dim=48, depth=2)
    predictor = vit_predictor(num_patches=16, embed_dim=48, predictor_embed_dim=48, depth=2, num_heads=3)
    model = IJEPA(encoder, predictor).to(DEVICE)
    for parameter in model.parameters():  # biases too, so that padding is not zero beyond the first layer
        torch.nn.init.normal_(parameter, std=0.2)
    masks_enc = Ragged.from_list([torch.randperm(16)[:n] for n in lengths], contexts)
    masks_pred = Ragged.from_list([torch.randperm(16)[:n] for n in targets], len(targets) // 3)
    return model, torch.randn(3, 3, 32, 32, device=DEVICE), masks_enc.to(DEVICE), masks_pred.to(DEVICE)


def step(model, images, masks_enc, masks_pred, targets=None):
    loss = model(images, masks_enc, masks_pred, targets)[0]
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [loss.detach(), *found]


@pytest.mark.parametrize("multiple", [1, 2, 8, 64])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kept", [False, True])
def test_numbers_are_the_same(multiple, shapes, kept):
    model, images, masks_enc, masks_pred = work(*shapes)
    model, images = model.double(), images.double()
    targets = TargetRows.build(masks_pred, 3, 16) if kept else None
    expected = step(model, images, masks_enc, masks_pred, targets)
    targets = targets.padded(multiple) if targets else None
    found = step(model, images, masks_enc.padded(multiple), masks_pred.padded(1), targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("on_kernels", [False, KERNELS])
def test_nothing_is_left_unwritten(monkeypatch, poison, on_kernels):
    monkeypatch.setattr(fastjepa.ops.library, "takes_kernels", lambda x: on_kernels)
    model, images, masks_enc, masks_pred = work()
    expected = step(model, images, masks_enc, masks_pred)
    for ours, theirs in zip(step(model, images, masks_enc.padded(32), masks_pred.padded(1)), expected, strict=True):
        assert ours.isfinite().all()
        assert distance(ours, theirs) < 1e-4


def test_context_tokens_are_those_of_masks_without_padding():
    model, images, masks_enc, _ = work()
    padded = model.encoder(images, masks_enc.padded(8))
    assert isinstance(padded, Ragged)
    assert padded.spare == 1
    assert distance(padded.values[:8].detach(), model.encoder(images, masks_enc).values.detach()) < 1e-6


def test_attention_sees_repeating_shapes(monkeypatch):
    """Batches of other totals within a multiple have the same shapes, whatever their totals lack."""
    seen = []
    real = RaggedAttention.forward

    def spy(self, x, offsets, max_length, keep=None):
        seen.append((len(x), len(offsets), max_length))
        return real(self, x, offsets, max_length, keep)

    monkeypatch.setattr(RaggedAttention, "forward", spy)
    shapes = []  # [target encoder, context encoder, predictor], two layers of each
    for lengths in ((5, 0, 3), (2, 6, 8), (1, 1, 1)):
        model, images, masks_enc, masks_pred = work(lengths)
        seen.clear()
        model.loss(images, masks_enc.padded(16), masks_pred.padded(1))
        shapes.append([shape[:2] for shape in seen])
        assert seen[2][2] == 32, "the bound on the longest context repeats too"
    assert shapes[0] == [(48, 4)] * 2 + [(16, 5)] * 2 + [(44, 9)] * 2
    assert shapes[0] == shapes[1] == shapes[2]


def test_an_image_more():
    masks = Ragged.from_list([torch.tensor([4, 2]), torch.tensor([7])], 2)
    padded = masks.padded(8)
    assert (padded.values.tolist(), padded.offsets.tolist()) == ([4, 2, 7, 0, 0, 0, 0, 0], [0, 2, 3, 8, 8])
    assert (padded.per_image, padded.spare, padded.max_length) == (2, 1, 32)
    assert (padded.offsets.dtype, padded.values.dtype) == (torch.int32, torch.int64)
    assert padded.to("meta").spare == padded.with_values(padded.values.float()).spare == 1
    assert padded.padded(1).spare == 2
    assert padded.padded(1).offsets.tolist() == [0, 2, 3, 8, 8, 8, 8]
    assert padded.of_images(0, 1).spare == 0
    with pytest.raises(ValueError, match="multiples of 1 or more, got 0"):
        masks.padded(0)


def test_padding_is_of_no_image():
    masks = Ragged.from_list([torch.tensor([4, 2]), torch.tensor([7])])
    assert image_rows(masks.padded(4), 2, 9).tolist() == [4, 2, 16, 0]
    with pytest.raises(ValueError, match="masks of 2 sequences, 1 an image, do not fit 3 images"):
        image_rows(masks.padded(4), 3, 9)


@pytest.mark.parametrize("spare", [-1, 3, 1.0])
def test_padding_that_cannot_be(spare):
    with pytest.raises(ValueError, match=f"Ragged holds 4 sequences, of which spare={spare} cannot be"):
        Ragged(torch.arange(4), torch.arange(5, dtype=torch.int32), 2, spare=spare)


def test_predictions_say_their_padding():
    model, images, masks_enc, masks_pred = work()
    masks_enc, masks_pred = masks_enc.padded(8), masks_pred.padded(1)
    predicted = model.predict(images, masks_enc, masks_pred)
    assert isinstance(predicted, Ragged)
    assert (predicted.spare, len(predicted)) == (1, 8)


def test_target_rows():
    rows = TargetRows.build([torch.tensor([[2, 3]]), torch.tensor([[1, 2]])], num_images=1, num_patches=4)
    padded = rows.padded(8)
    assert padded.kept.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert padded.place is rows.place
    with pytest.raises(ValueError, match="multiples of 1 or more, got 0"):
        rows.padded(0)
