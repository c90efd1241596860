"""Pictures with something drawn on them: similarity, attention, masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastjepa.evaluation.maps import attention_maps, grid_of, similarity_map
from fastjepa.evaluation.pictures import STYLE, _matplotlib, shown
from fastjepa.masks import MaskCollator
from fastjepa.nn.vision_transformer import VisionTransformer

MOST_HEADS = 16
TARGETS = ("#d9480f", "#f59f00", "#2f9e44", "#ae3ec9", "#e64980", "#1098ad")


def plot_similarity(
    encoder: VisionTransformer, images: Tensor, out: Path, patches: Sequence[tuple[int, int]] | None = None
) -> Path:
    """Draw, beside each image, how alike the feature of every patch is to that of some patches, marked by a cross.

    Shapes: images [k, 3, H, W], uint8 or normalised. `patches`: (row, column) each; None: a middle one, one of the
    upper left and one of the lower right.

    Raises:
        ValueError: no images, a patch outside the grid, or matplotlib is not installed.
    """
    rows, columns = grid_of(encoder, _first(images))
    chosen = list(patches or _spread(rows, columns))
    cells = []
    for image in images:
        maps = [similarity_map(encoder, image, patch).numpy() for patch in chosen]
        cells.append([(f"to patch {r},{c}", m, (r, c)) for (r, c), m in zip(chosen, maps, strict=True)])
    return _grid(images, cells, out, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, "cosine of the features")


def plot_attention(encoder: VisionTransformer, images: Tensor, out: Path, patch: tuple[int, int] | None = None) -> Path:
    """Draw, beside each image, what the heads of the last block attend to, each map against its own largest weight.

    Shapes: images [k, 3, H, W]. `patch`: (row, column) that attends; None: all patches on average. Of more than 16
    heads the first 16 are drawn.

    Raises:
        ValueError: no images, a patch outside the grid, or matplotlib is not installed.
    """
    _first(images)
    cells = []
    for image in images:
        maps = attention_maps(encoder, image, patch).numpy()[:MOST_HEADS]
        cells.append([(f"head {head}", m / m.max(), patch) for head, m in enumerate(maps)])
    return _grid(images, cells, out, {"cmap": "magma", "vmin": 0, "vmax": 1}, "attention, 1: each map's largest")


def plot_masks(collator: MaskCollator, images: Tensor, out: Path, seed: int = 0, draws: int = 3) -> Path:
    """Draw the masks that a sampler draws: on each image its context, and its targets framed, several draws of each.

    Shapes: images [k, 3, H, W], uint8 or normalised, of the collator's size.

    Raises:
        ValueError: no images, or matplotlib is not installed.
    """
    _first(images)
    rows, columns = collator.height, collator.width
    pictures = shown(images)
    figure_of, context = _matplotlib()
    with context(STYLE | {"axes.grid": False}):
        aspect = images.shape[2] / images.shape[3]
        figure = figure_of((7.2, 7.2 / draws * aspect * len(images) + 0.9), dpi=150, layout="constrained")
        axes = figure.subplots(len(images), draws, squeeze=False)
        for draw in range(draws):
            masks_enc, masks_pred = collator.sample(len(images), [seed, draw])
            for place, picture in enumerate(pictures):
                kept = _of_image(masks_enc, place, len(images))
                targets = _of_image(masks_pred, place, len(images))
                _draw_masks(axes[place, draw], picture, kept, targets, (rows, columns))
        figure.suptitle("Lit: what the context encoder sees. Framed: the targets.", fontsize=14)
        figure.savefig(out)
    return out


def _draw_masks(
    axis: Any, picture: np.ndarray, kept: list[np.ndarray], targets: list[np.ndarray], grid: tuple[int, int]
) -> None:
    rows, columns = grid
    high, wide = picture.shape[0] / rows, picture.shape[1] / columns
    seen = np.zeros(rows * columns, dtype=bool)
    seen[np.concatenate(kept)] = True
    light = np.kron(seen.reshape(grid), np.ones((round(high), round(wide))))[..., None]
    floating = picture.astype(np.float64) / (255 if picture.dtype == np.uint8 else 1)
    axis.imshow(floating * (0.25 + 0.75 * light) + 0.15 * (1 - light))
    for number, target in enumerate(targets):
        colour, width = TARGETS[number % len(TARGETS)], max(1.2, 5.5 - 1.3 * number)  # none hides the one below
        inside = np.zeros(rows * columns, dtype=bool)
        inside[target] = True
        for (row, column), here in np.ndenumerate(inside.reshape(grid)):
            if here:
                _frame(axis, inside.reshape(grid), row, column, (high, wide), {"color": colour, "linewidth": width})
    axis.set_axis_off()


def _frame(
    axis: Any, inside: np.ndarray, row: int, column: int, size: tuple[float, float], style: dict[str, Any]
) -> None:
    """The sides of one patch that lie on the border of its target."""
    high, wide = size
    top, left = row * high - 0.5, column * wide - 0.5
    sides = {
        (-1, 0): ([left, left + wide], [top, top]),
        (1, 0): ([left, left + wide], [top + high, top + high]),
        (0, -1): ([left, left], [top, top + high]),
        (0, 1): ([left + wide, left + wide], [top, top + high]),
    }
    for (down, right), (x, y) in sides.items():
        r, c = row + down, column + right
        if not (0 <= r < inside.shape[0] and 0 <= c < inside.shape[1] and inside[r, c]):
            axis.plot(x, y, **style, solid_capstyle="projecting", clip_on=False)


def _of_image(masks: Any, image: int, batch: int) -> list[np.ndarray]:
    """The patches of each of an image's masks, of lists [B, K] or of a `Ragged` of B * n sequences."""
    if isinstance(masks, list):
        return [mask[image].numpy() for mask in masks]
    sequences = masks.unbind()
    return [s.numpy() for s in sequences[image * masks.per_image : (image + 1) * masks.per_image]]


def _grid(
    images: Tensor, cells: Sequence[Sequence[tuple[str, np.ndarray, Any]]], out: Path, style: dict[str, Any], bar: str
) -> Path:
    """Each image and its maps, five to a line."""
    pictures = shown(images)
    maps = len(cells[0])
    width = min(5, maps + 1)
    lines = -(-(maps + 1) // width)
    aspect = images.shape[2] / images.shape[3]
    figure_of, context = _matplotlib()
    with context(STYLE | {"axes.grid": False}):
        side = 7.2 / width
        height = (side * aspect + 0.25) * lines * len(images) + 0.6
        figure = figure_of((7.2, height), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.08)
        axes = figure.subplots(lines * len(images), width, squeeze=False)
        drawn = None
        for place, (picture, found) in enumerate(zip(pictures, cells, strict=True)):
            flat = axes[place * lines : (place + 1) * lines].reshape(-1)
            for axis in flat:
                axis.set_axis_off()
            flat[0].imshow(picture, extent=(0, 1, 0, aspect))
            flat[0].set_title("picture", loc="center", fontsize=11)
            for axis, (title, values, patch) in zip(flat[1:], found, strict=False):
                drawn = axis.imshow(values, interpolation="nearest", extent=(0, 1, 0, aspect), **style)
                axis.set_title(title, loc="center", fontsize=11)
                if patch is not None:
                    rows, columns = values.shape
                    x, y = (patch[1] + 0.5) / columns, aspect * (1 - (patch[0] + 0.5) / rows)
                    for where in (axis, flat[0]):
                        where.plot(x, y, marker="+", color="black", markersize=9, markeredgewidth=3)
                        where.plot(x, y, marker="+", color="white", markersize=8, markeredgewidth=1.4)
        figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.6, aspect=40, label=bar)
        figure.savefig(out)
    return out


def _spread(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(rows // 2, columns // 2), (rows // 4, columns // 4), (3 * rows // 4, 3 * columns // 4)]


def _first(images: Tensor) -> Tensor:
    if not len(images):
        raise ValueError("there are no images to draw on")
    return images[0]
