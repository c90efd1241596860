"""The crops of one batch: drawn, decoded, and others drawn in place of what cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.augment import Augment
from fastjepa.data.engines import Box, Crop
from fastjepa.data.pictures import Pictures, UnreadableImage

REPLACEMENTS = 20  # other pictures tried in place of an unreadable one


class Placed(NamedTuple):
    """An encoded picture and the place of a crop; where it is decoded late also its name, and whether to mirror it."""

    data: bytes
    box: Box
    name: str = ""
    flip: bool = False


@dataclass
class Drawn:
    """A batch's crops, or for an engine that decodes late what to make them of.

    `samples` are the numbers of the pictures they are of; `unreadable` has a line for each that could not be read, and
    `fallback` names the first that was left to Pillow, and says why.
    """

    samples: list[int]
    crops: list[Tensor] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    fallback: str | None = None


def draw_crops(
    pictures: Pictures, augment: Augment, chosen: Sequence[int], streams: Sequence[np.random.Generator]
) -> Drawn:
    """A crop of each of the `chosen` pictures, each from a random stream of its own.

    Another picture stands in for one that cannot be read; a blank one with the number -1 where `REPLACEMENTS` of them
    cannot, since `Unreadable` then ends the run.
    """
    drawn = Drawn(list(chosen))
    made: dict[int, Crop | Placed] = {}
    waiting = list(range(len(drawn.samples)))
    for _ in range(REPLACEMENTS):
        tried = _try(pictures, augment, [(drawn.samples[i], streams[i]) for i in waiting])
        for i, result in zip(waiting, tried, strict=True):
            if isinstance(result, UnreadableImage):
                drawn.unreadable.append(str(result))
                drawn.samples[i] = int(streams[i].integers(len(pictures)))
            else:
                made[i] = result
        waiting = [i for i in waiting if i not in made]
    for i in waiting:
        drawn.samples[i] = -1
    for i in range(len(drawn.samples)):
        result = made.get(i)
        if isinstance(result, Placed):
            drawn.placed.append(result)
        elif result is None:
            drawn.crops.append(torch.zeros(3, augment.crop_size, augment.crop_size, dtype=torch.uint8))
        else:
            drawn.crops.append(result.pixels)
            if result.aside and drawn.fallback is None:
                drawn.fallback = f"{pictures.name(drawn.samples[i])} ({result.aside})"
    return drawn


def finish_crops(augment: Augment, placed: Sequence[Placed]) -> tuple[Tensor, str | None]:
    """The crops of an engine that decodes late, [B, 3, H, W] on its device; the first picture left to Pillow.

    Raises:
        UnreadableImage: one cannot be decoded, although its header can be read; names it.
    """
    crops = augment.engine.crops([p.data for p in placed], [p.box for p in placed], augment.crop_size)
    pixels, fallback = [], None
    for crop, picture in zip(crops, placed, strict=True):
        if isinstance(crop, UnreadableImage):
            raise UnreadableImage(f"{picture.name} ({crop})")
        if crop.aside and fallback is None:
            fallback = f"{picture.name} ({crop.aside})"
        pixels.append(crop.pixels.flip(-1) if picture.flip else crop.pixels)
    device = next((p.device for p in pixels if p.device.type != "cpu"), None)
    return torch.stack([p.to(device) for p in pixels] if device else pixels), fallback


def _try(
    pictures: Pictures, augment: Augment, wanted: Sequence[tuple[int, np.random.Generator]]
) -> list[Crop | Placed | UnreadableImage]:
    """For each number and stream a crop, or what to make it of, or why there is none."""
    results: list[Crop | Placed | UnreadableImage] = []
    for index, stream in wanted:
        try:
            data = pictures.read(index)
        except UnreadableImage as error:
            results.append(error)
            continue
        try:
            box = augment.box(data, stream)
        except UnreadableImage as error:
            results.append(UnreadableImage(f"{pictures.name(index)} ({error})"))
            continue
        if augment.engine.late:
            results.append(Placed(data, box, pictures.name(index), augment.flips(stream)))
        else:
            results.append(Placed(data, box))
    if augment.engine.late:
        return results
    where = [i for i, result in enumerate(results) if isinstance(result, Placed)]
    placed = [result for result in results if isinstance(result, Placed)]
    crops = augment.engine.crops([p.data for p in placed], [p.box for p in placed], augment.crop_size)
    for i, crop in zip(where, crops, strict=True):
        if isinstance(crop, UnreadableImage):
            results[i] = UnreadableImage(f"{pictures.name(wanted[i][0])} ({crop})")
        else:
            results[i] = crop._replace(pixels=augment.distort(crop.pixels, wanted[i][1]))
    return results
