"""Patches nearest to what is predicted: those of a model that predicts perfectly, and of plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastjepa import IJEPA, MaskCollator, vit_predictor, vit_tiny
from fastjepa.evaluation.features import normalise
from fastjepa.evaluation.retrieval import _tiles, _whole, nearest_patches


@pytest.fixture
def model():
    encoder = vit_tiny(img_size=[32], patch_size=4, depth=1, embed_dim=24, num_heads=2)
    predictor = vit_predictor(num_patches=64, embed_dim=24, predictor_embed_dim=12, depth=1, num_heads=2)
    return IJEPA(encoder, predictor).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


def masks(batch, **more):
    scales = (0.85, 1.0), (0.15, 0.2), (0.75, 1.5)
    return MaskCollator((32, 32), 4, *scales, npred=2, min_keep=2, ragged=True, **more).sample(batch, [5])


def test_a_perfect_prediction_finds_its_patch_in_a_copy_of_the_picture(model, images, monkeypatch):
    images = torch.stack([images[0], images[1], images[0]])
    masks_enc, masks_pred = masks(3)
    whole = F.layer_norm(model.target_features(normalise(images)), (24,))
    rows = torch.arange(3).repeat_interleave(masks_pred.lengths.view(3, 2).sum(dim=1))
    perfect = masks_pred.with_values(whole[rows, masks_pred.values.long()])
    monkeypatch.setattr(model, "predict", lambda *arguments: perfect)
    whose, which = nearest_patches(model, images, masks_enc, masks_pred)
    copied = rows != 1
    assert (whose[copied] == 2 - rows[copied]).all()
    assert torch.equal(which[copied], masks_pred.values.long()[copied])
    assert (whose[rows == 1] != 1).all()


def test_it_is_the_largest_cosine_among_the_others(model, images):
    masks_enc, masks_pred = masks(3)
    with torch.no_grad():
        predicted = model.predict(normalise(images), masks_enc, masks_pred).values
        features = F.layer_norm(model.target_features(normalise(images)), (24,))
    mean = features.flatten(0, 1).mean(dim=0)
    whose, which = nearest_patches(model, images, masks_enc, masks_pred)
    rows = torch.arange(3).repeat_interleave(masks_pred.lengths.view(3, 2).sum(dim=1))
    for place in range(0, len(rows), 7):
        alike = F.cosine_similarity(predicted[place] - mean, features - mean, dim=-1)
        alike[rows[place]] = -2.0
        assert alike.argmax() == whose[place] * 64 + which[place]


def test_tiles_are_patches_row_by_row(images):
    picture = images[0].permute(1, 2, 0).numpy()
    tiles = _tiles(picture, 4)
    assert (tiles[9] == picture[4:8, 4:8]).all()
    assert (_whole(tiles, (8, 8)) == picture).all()


def test_what_cannot_be_asked(model, images):
    with pytest.raises(ValueError, match="need two pictures and one context each, got 1 and 1"):
        nearest_patches(model, images[:1], *masks(1))
    with pytest.raises(ValueError, match="got 3 and 2"):
        nearest_patches(model, images, *masks(3, nenc=2, allow_overlap=True))
