"""Engines: ways from encoded pictures to crops of them, resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastjepa.config import ENGINES
from fastjepa.data.pictures import UnreadableImage, open_rgb, picture_size

Box = tuple[int, int, int, int]  # left, top, width, height


class Crop(NamedTuple):
    """uint8 [3, size, size], in memory mostly [size, size, 3]; and, where an engine left it to Pillow, why."""

    pixels: Tensor
    aside: str | None = None


class Engine:
    """Makes crops; travels to worker processes by pickle.

    Attributes:
        name: as in `data.engine`.
        late: pictures are decoded by the process that trains, on its device, and come to it encoded.
    """

    name: str
    late = False

    def size(self, data: bytes) -> tuple[int, int]:
        """(width, height) of an encoded picture, from its header.

        Raises:
            UnreadableImage: it has none.
        """
        return picture_size(data)

    def crop(self, data: bytes, box: Box, size: int) -> Crop:
        """`box` of an encoded picture, resized to `size` pixels a side.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        raise NotImplementedError

    def crops(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> list[Crop | UnreadableImage]:
        """`crop` of each of several; an exception stands in the place of what it is about."""
        return [tried(self.crop, data, box, size) for data, box in zip(datas, boxes, strict=True)]


class PillowEngine(Engine):
    """The reference: the whole picture decoded, cropped, and resized bilinearly, as in the published code."""

    name = "pillow"

    def crop(self, data: bytes, box: Box, size: int) -> Crop:
        left, top, width, height = box
        image = open_rgb(data).crop((left, top, left + width, top + height))
        return Crop(as_tensor(image.resize((size, size), Image.Resampling.BILINEAR)))


def tried(crop: Callable[..., Crop], *arguments) -> Crop | UnreadableImage:
    """A crop, or why there is none."""
    try:
        return crop(*arguments)
    except UnreadableImage as error:
        return error


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W], in memory still [H, W, 3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def choose_engine(name: str, device: torch.device | None = None) -> Engine:
    """The engine of `data.engine`; "auto" is turbo where it is installed, else pillow.

    `device` is the model's: torchvision and DALI decode there if it is a CUDA GPU, in the workers otherwise.

    Raises:
        ValueError: an engine that is not installed, or a name that is none; says what would do.
    """
    from fastjepa.data.devices import DALIEngine, TorchvisionEngine
    from fastjepa.data.turbo import TurboEngine

    if name == "auto":
        try:
            return TurboEngine()
        except ValueError:
            return PillowEngine()
    gpu = device if device is not None and device.type == "cuda" else None
    makers = {
        "turbo": TurboEngine,
        "pillow": PillowEngine,
        "dali": lambda: DALIEngine(gpu),
        "torchvision": lambda: TorchvisionEngine(gpu),
    }
    if name not in makers:
        raise ValueError(f"data.engine must be one of {', '.join(ENGINES)}, got {name!r}")
    try:
        return makers[name]()
    except ValueError as error:
        raise ValueError(f"data.engine={name}: {error}") from None
