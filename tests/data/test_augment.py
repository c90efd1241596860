"""The training crop and the colour options."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastjepa.data import Augment, random_resized_crop


def picture(width=60, height=40):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_crop_lies_inside(width, height, low, seed):
    left, top, w, h = random_resized_crop(width, height, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w >= 1
    assert h >= 1


def test_crop_areas_and_ratios():
    rng = np.random.default_rng(0)
    crops = np.array([random_resized_crop(400, 400, (0.3, 0.8), rng) for _ in range(2000)])
    area, ratio = crops[:, 2] * crops[:, 3] / 400**2, crops[:, 2] / crops[:, 3]
    assert 0.29 < area.min() < 0.32
    assert 0.72 < area.max() < 0.81
    assert 0.74 < ratio.min() < 0.77
    assert 1.29 < ratio.max() < 1.35
    assert abs(area.mean() - 0.55) < 0.02
    assert abs(np.log(ratio).mean()) < 0.02


def test_crop_is_pillows_bilinear():
    image = picture()
    out = Augment(32)(encoded(image), np.random.default_rng(5)).pixels
    left, top, w, h = random_resized_crop(60, 40, (0.3, 1.0), np.random.default_rng(5))
    expected = image.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(out, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert out.dtype == torch.uint8


@pytest.mark.parametrize(
    "options",
    [
        {"horizontal_flip": True},
        {"color_distortion": True, "color_jitter": 1.0},
        {"gaussian_blur": True},
        {"horizontal_flip": True, "color_distortion": True, "color_jitter": 0.5, "gaussian_blur": True},
    ],
)
def test_options_change_pictures_and_repeat_by_seed(options):
    image = encoded(picture())
    plain, changed = Augment(16), Augment(16, **options)
    outs = [changed(image, np.random.default_rng(s)).pixels for s in range(12)]
    assert all(torch.equal(out, changed(image, np.random.default_rng(s)).pixels) for s, out in enumerate(outs))
    differ = [not torch.equal(out, plain(image, np.random.default_rng(s)).pixels) for s, out in enumerate(outs)]
    assert any(differ)


def test_hue_goes_round():
    from fastjepa.data.augment import _shift_hue

    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert np.array(_shift_hue(red, 1 / 3))[0, 0].argmax() == 1
    assert np.array(_shift_hue(red, -1 / 3))[0, 0].argmax() == 2
