"""Pictures: written, of the right size, and showing what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastjepa import vit_tiny
from fastjepa.evaluation import plot_curves, plot_features
from fastjepa.evaluation.pictures import feature_colours

pytest.importorskip("matplotlib")

ROWS = [{"step": step, "loss": 0.3 - 0.001 * step} for step in range(60)]
MARKS = [
    {"step": step, "linear": 25.0 + step, "knn": 20.0 + step, "low_shot": 19.0, "rankme": 12.0} for step in (0, 5, 10)
]


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("count", [1, 60])
def test_curves(tmp_path, probed, count):
    marks = MARKS if probed else [{**m, "linear": None, "knn": None, "low_shot": None} for m in MARKS]
    with Image.open(plot_curves(ROWS[:count], marks, tmp_path / "curves.png")) as drawn:
        assert drawn.size == (1080, 1500 if probed else 1050)
        assert np.asarray(drawn.convert("L")).std() > 5


def test_curves_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one step"):
        plot_curves([], MARKS, tmp_path / "curves.png")


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
@pytest.mark.parametrize("baseline", [True, False])
def test_features(tmp_path, size, baseline):
    encoder = vit_tiny(img_size=[32], patch_size=8, depth=1).train()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    other = vit_tiny(img_size=[32], patch_size=8, depth=1) if baseline else None
    with Image.open(plot_features(encoder, images, tmp_path / "features.png", other)) as drawn:
        assert drawn.width == 1080
        assert drawn.height > 300
    assert encoder.training


class Means(nn.Module):
    """Features that are the mean colour of each 4x4 patch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return nn.functional.avg_pool2d(images * self.weight, 4).flatten(2).transpose(1, 2)


def test_equal_patches_get_equal_colours_in_their_place():
    images = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    images[:, :, :, 8:] = 255
    images[:, 0, 4:, :8] = 128
    colours = feature_colours(Means(), images)
    assert colours.shape == (1, 2, 4, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    np.testing.assert_allclose(colours[0, :, 2:], np.broadcast_to(colours[0, 0, 2], (2, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(colours[0, 0, 0], colours[0, 0, 1], atol=1e-3)
    assert np.abs(colours[0, 0, 0] - colours[0, 0, 2]).max() > 0.5
    assert np.abs(colours[0, 0, 0] - colours[0, 1, 0]).max() > 0.1


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        plot_features(Means(), torch.zeros(0, 3, 8, 8), tmp_path / "features.png")
