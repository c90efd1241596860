"""The training crop and the optional colour distortions, each drawn from a generator that is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.engines import Box, Crop, Engine, PillowEngine, as_tensor


@dataclass(frozen=True)
class Augment:
    """Random resized crop, then what is switched on of flip, colour distortion and blur.

    Called with an encoded picture and a numpy Generator -> `Crop`: uint8 [3, crop_size, crop_size]. Its place is drawn
    before the picture is decoded, so that `engine` can leave out what is not in it.

    Source: the published training code; crop and colour distortion as torchvision defines them for Pillow pictures.
    """

    crop_size: int
    crop_scale: tuple[float, float] = (0.3, 1.0)
    horizontal_flip: bool = False
    color_jitter: float = 0.0  # strength; 0 with color_distortion still draws greyscale
    color_distortion: bool = False
    gaussian_blur: bool = False
    engine: Engine = field(default_factory=PillowEngine)

    @classmethod
    def from_config(cls, data: DataConfig, engine: Engine) -> Augment:
        """As section `data` says."""
        return cls(
            data.crop_size,
            data.crop_scale,
            data.use_horizontal_flip,
            data.color_jitter_strength,
            data.use_color_distortion,
            data.use_gaussian_blur,
            engine,
        )

    def __call__(self, data: bytes, rng: np.random.Generator) -> Crop:
        """Draw one training crop of an encoded picture.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        crop = self.engine.crop(data, self.box(data, rng), self.crop_size)
        return crop._replace(pixels=self.distort(crop.pixels, rng))

    def box(self, data: bytes, rng: np.random.Generator) -> Box:
        """Draw the place of a crop in an encoded picture.

        Raises:
            UnreadableImage: it has no header.
        """
        return random_resized_crop(*self.engine.size(data), self.crop_scale, rng)

    def flips(self, rng: np.random.Generator) -> bool:
        """Draw whether a crop is mirrored."""
        return self.horizontal_flip and rng.random() < 0.5

    def distort(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Flip, colour distortion and blur of a crop, uint8 [3, H, W], whichever are switched on."""
        if self.flips(rng):
            pixels = pixels.flip(-1)
        if not (self.color_distortion or self.gaussian_blur):
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        if self.color_distortion:
            image = _distort(image, self.color_jitter, rng)
        if self.gaussian_blur and rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(radius=rng.uniform(0.1, 2.0)))
        return as_tensor(image)


def random_resized_crop(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """(left, top, width, height) of a crop with an area in `scale` of the picture's and an aspect ratio in 3/4..4/3.

    After ten draws that do not fit, the largest centred crop of an allowed aspect ratio.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = (width, max(1, round(width / ratio))) if width / height < ratio else (max(1, round(height * ratio)), height)
    return (width - w) // 2, (height - h) // 2, w, h


def _distort(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.8:
        spread = 0.8 * strength
        for kind in rng.permutation(4):
            if kind == 3:
                image = _shift_hue(image, rng.uniform(-0.2 * strength, 0.2 * strength))
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
                image = enhance(image).enhance(rng.uniform(max(0.0, 1 - spread), 1 + spread))
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue, dtype=np.int16) + round(turn * 255)
    hue = Image.fromarray((shifted % 256).astype(np.uint8), "L")
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
