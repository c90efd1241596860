"""Pooled features: the plain mean over patches, whatever the form of the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import vit_tiny
from fastjepa.evaluation import extract_features, normalise, whole_picture


@pytest.fixture
def encoder():
    return vit_tiny(img_size=[32], depth=1, drop_rate=0.5)


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_features_are_the_mean_over_patches(encoder, images, batch_size):
    with torch.no_grad():
        expected = encoder.eval()(normalise(images)).mean(dim=1)
    torch.testing.assert_close(extract_features(encoder, images, batch_size), expected)


def test_batches_and_normalised_images_give_the_same(encoder, images):
    expected = extract_features(encoder, images)
    torch.testing.assert_close(extract_features(encoder, iter(images.split(2))), expected)
    torch.testing.assert_close(extract_features(encoder, normalise(images)), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_is_off(encoder, images, training):
    encoder.train(training)
    assert torch.equal(extract_features(encoder, images), extract_features(encoder, images))
    assert encoder.training is training


def test_no_images(encoder, images):
    with pytest.raises(ValueError, match="no images"):
        extract_features(encoder, images[:0])


def test_normalise_is_that_of_training(images):
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.permute(0, 2, 3, 1).numpy() / 255 - mean) / std
    np.testing.assert_allclose(normalise(images).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_whole_picture_is_the_centred_square():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert (whole_picture(Image.fromarray(wide), 4) == 200).all()
    assert whole_picture(Image.fromarray(wide).convert("L"), 6).shape == (3, 6, 6)
