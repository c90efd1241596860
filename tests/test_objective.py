"""The objective: the same numbers whether the target encoder makes every token or those that targets name."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastjepa import IJEPA, MaskCollator, Ragged, ops, vit_predictor, vit_tiny
from fastjepa.pairing import TargetRows
from fastjepa.ragged import image_rows, masks_to_ragged
from tests.helpers import GOLDEN_MODELS, distance, golden_lists, golden_model, golden_ragged


def masks(ragged, nenc=1, batch=3):
    settings = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5)}
    return MaskCollator((64, 64), 8, **settings, nenc=nenc, npred=4, ragged=ragged).sample(batch, [3])


def small(depth=2, **more):
    encoder = vit_tiny(img_size=[64], patch_size=8, depth=depth, embed_dim=48, **more)
    predictor = vit_predictor(num_patches=64, embed_dim=48, predictor_embed_dim=24, depth=2, num_heads=3)
    model = IJEPA(encoder, predictor).double()
    nn.init.normal_(model.target_encoder.norm.bias)  # not a copy of the encoder any longer
    return model


def gradients(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    model.zero_grad()
    return found


def repeated(masks_pred, batch=3, patches=64):
    """As for masks on a device: rows as often as targets name them."""
    index = masks_pred if isinstance(masks_pred, Ragged) else masks_to_ragged(masks_pred)
    rows = image_rows(index, batch, patches)
    return TargetRows(rows, torch.arange(len(rows)))


@pytest.mark.parametrize("nenc", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_target_tokens_alone_change_no_number(ragged, nenc, depth):
    model, images = small(depth), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    masks_enc, masks_pred = masks(ragged, nenc)
    plain, features = model(images, masks_enc, masks_pred)
    assert features.shape == (3, 64, 48)
    plain.backward()
    expected = gradients(model)
    for targets in (TargetRows.build(masks_pred, 3, 64), repeated(masks_pred)):
        loss, kept = model(images, masks_enc, masks_pred, targets)
        assert distance(kept, features.flatten(0, 1)[targets.kept]) < 1e-12
        assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
        loss.backward()
        assert all(distance(ours, theirs) < 1e-10 for ours, theirs in zip(gradients(model), expected, strict=True))
    assert model.loss(images, masks_enc, masks_pred).item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_target_tokens_alone_in_fp32(golden, name):
    arrays = golden(name)
    model, images = golden_model(arrays), torch.tensor(arrays["images"])
    for masks_enc, masks_pred in (golden_lists(arrays), golden_ragged(arrays)):
        plain = model(images, masks_enc, masks_pred)[0]
        assert distance(model.loss(images, masks_enc, masks_pred), plain) < 1e-6
        targets = repeated(masks_pred, len(images), model.encoder.patch_embed.num_patches)
        assert distance(model.loss(images, masks_enc, masks_pred, targets), plain) < 1e-6


def test_loss_takes_target_tokens_alone():
    """Unless they are given or the target encoder is not ours, they are worked out."""
    model, images = small(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    masks_enc, masks_pred = masks(True)
    seen = []
    handle = model.target_encoder.register_forward_hook(lambda module, inputs, output: seen.append(list(output.shape)))
    union = len(TargetRows.build(masks_pred, 3, 64).kept)
    loss = model.loss(images, masks_enc, masks_pred)
    model.loss(images, masks_enc, masks_pred, repeated(masks_pred))
    model(images, masks_enc, masks_pred)
    assert seen == [[union, 48], [len(masks_pred.values), 48], [3, 64, 48]]
    assert union < len(masks_pred.values) < 3 * 64
    handle.remove()

    class Foreign(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images)

    model.target_encoder = Foreign(model.target_encoder)
    assert model.loss(images, masks_enc, masks_pred).item() == pytest.approx(loss.item(), rel=1e-12)


def test_stochastic_depth_drops_the_same_sequences():
    model, images = small(drop_path_rate=0.5).train(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    masks_enc, masks_pred = masks(True)
    torch.manual_seed(1)
    plain = model(images, masks_enc, masks_pred)[0]
    torch.manual_seed(1)
    assert model.loss(images, masks_enc, masks_pred).item() == pytest.approx(plain.item(), rel=1e-12)


SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=6, max_size=6)


@given(SEQUENCES, st.integers(1, 2))
def test_target_rows_by_hand(sequences, npred):
    index = Ragged.from_list([torch.tensor(s, dtype=torch.int32) for s in sequences], npred)
    images = 6 // npred
    rows = [s // npred * 6 + patch for s, sequence in enumerate(sequences) for patch in sequence]
    targets = TargetRows.build(index, images, 6)
    assert targets.kept.tolist() == sorted(set(rows))
    assert targets.kept[targets.place].tolist() == rows


def test_target_rows_on_a_device():
    """Where their number cannot be known, rows are as many as the targets, or all where those are no fewer."""
    few = TargetRows.build([torch.zeros(2, 3, dtype=torch.int64, device="meta")], 2, 9)
    assert (few.kept.shape, few.place.shape) == ((6,), (6,))
    many = TargetRows.build([torch.zeros(2, 3, dtype=torch.int64, device="meta")] * 3, 2, 9)
    assert (many.kept.shape, many.place.shape) == ((18,), (18,))
    moved = pickle.loads(pickle.dumps(TargetRows.build([torch.tensor([[1, 0]])], 1, 2))).to("meta")
    assert all(getattr(moved, field.name).is_meta for field in dataclasses.fields(moved))


def test_bad_input():
    model, images = small(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    masks_enc, masks_pred = masks(True)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        model.loss(images[:, :2], masks_enc, masks_pred)
    with pytest.raises(ValueError, match="do not fit 2 images"):
        model.loss(images[:2], masks_enc, masks_pred)
    other = TargetRows.build([torch.tensor([[0, 1]])], 1, 64)
    with pytest.raises(ValueError, match="targets keep 2 rows for 2 tokens, but there are 2 rows"):
        model.loss(images, masks_enc, masks_pred, other)
    with pytest.raises(ValueError, match=r"\[U, D\], the rows of `targets`, got \[1, 2, 4\]"):
        ops.jepa_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), [torch.tensor([[0, 1]])], other)
    with pytest.raises(ValueError, match="rows must be in 0..191, got values in 192..192"):
        model.target_features(images, TargetRows(torch.tensor([192]), torch.tensor([0])))
    wrong = TargetRows(torch.tensor([0, 1]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="targets.place must be in 0..1, got values in 0..2"):
        ops.jepa_loss(torch.zeros(1, 2, 4), torch.zeros(2, 4), [torch.tensor([[0, 1]])], wrong)
