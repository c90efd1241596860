"""What the predictor predicts, shown by patches of other pictures: the nearest in feature to each prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evaluation.features import judging, normalise
from fastjepa.evaluation.pictures import STYLE, _matplotlib, shown
from fastjepa.masks import MaskCollator
from fastjepa.objective import IJEPA
from fastjepa.ragged import Ragged

HIDDEN = 235  # grey of a patch that nobody sees


@torch.no_grad()
def nearest_patches(model: IJEPA, images: Tensor, masks_enc: Ragged, masks_pred: Ragged) -> tuple[Tensor, Tensor]:
    """For every target patch the patch of another picture whose feature is nearest to what is predicted there.

    Nearness is the cosine of the target encoder's normalised features, less their mean over all patches.

    Shapes: images [B, 3, H, W], uint8 or normalised, B > 1; masks with one context and npred targets an image, T target
    patches in all -> int64 [T] pictures, int64 [T] patches in them.

    Raises:
        ValueError: a single picture, or several contexts an image.
    """
    if len(images) < 2 or masks_enc.per_image != 1:
        raise ValueError(
            f"nearest patches need two pictures and one context each, got {len(images)} and {masks_enc.per_image}"
        )
    floating = normalise(images) if images.dtype == torch.uint8 else images
    with judging(model):
        features = model.target_features(floating).float()
        predicted = model.predict(floating, masks_enc, masks_pred)
    assert isinstance(predicted, Ragged)
    batch, count, width = features.shape
    gallery = F.layer_norm(features, (width,)).flatten(0, 1)
    mean = gallery.mean(dim=0)
    found = F.normalize(predicted.values.float() - mean, dim=1) @ F.normalize(gallery - mean, dim=1).T
    own = torch.arange(batch).repeat_interleave(masks_pred.lengths.view(batch, -1).sum(dim=1).long())
    found.view(-1, batch, count)[torch.arange(len(own)), own] = -torch.inf
    nearest = found.argmax(dim=1)
    return nearest // count, nearest % count


def plot_predictions(
    model: IJEPA, collator: MaskCollator, images: Tensor, out: Path, rows: int = 4, seed: int = 0
) -> Path:
    """Draw the first `rows` pictures: whole, as the context encoder sees them, and with predicted targets filled in.

    Each target patch is filled with the patch of another of the `images` that is nearest to what is predicted there.

    Shapes: images [B, 3, H, W], uint8 or normalised, of the models' size. The collator gives `Ragged` masks.

    Raises:
        ValueError: as `nearest_patches`, or matplotlib is not installed.
    """
    masks_enc, masks_pred = collator.sample(len(images), [seed])
    assert isinstance(masks_enc, Ragged)
    assert isinstance(masks_pred, Ragged)
    whose, which = (place.numpy() for place in nearest_patches(model, images, masks_enc, masks_pred))
    pictures = shown(images)
    size = model.encoder.patch_embed.patch_size
    tiles = np.stack([_tiles(picture, size) for picture in pictures])  # [B, N, p, p, 3]
    grid = collator.height, collator.width
    empty = np.full_like(tiles[0], HIDDEN if tiles.dtype == np.uint8 else HIDDEN / 255)
    ends = masks_pred.offsets[:: masks_pred.per_image].tolist()
    figure_of, context = _matplotlib()
    rows = min(rows, len(images))
    with context(STYLE | {"axes.grid": False}):
        figure = figure_of((7.2, 2.4 * rows * grid[0] / grid[1] + 0.6), dpi=150, layout="constrained")
        axes = figure.subplots(rows, 3, squeeze=False)
        for row in range(rows):
            seen = empty.copy()
            kept = masks_enc.unbind()[row].numpy()
            seen[kept] = tiles[row, kept]
            filled = seen.copy()
            part = slice(ends[row], ends[row + 1])
            filled[masks_pred.values.numpy()[part]] = tiles[whose[part], which[part]]
            for axis, drawn in zip(axes[row], (tiles[row], seen, filled), strict=True):
                axis.imshow(_whole(drawn, grid), interpolation="nearest")
                axis.set_axis_off()
        for axis, title in zip(axes[0], ("picture", "context", "predicted"), strict=True):
            axis.set_title(title, loc="center", fontsize=14)
        figure.savefig(out)
    return out


def _tiles(picture: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] -> [N, p, p, 3], patches row by row."""
    rows, columns = picture.shape[0] // size, picture.shape[1] // size
    cut = picture.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(rows * columns, size, size, 3)


def _whole(tiles: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[N, p, p, 3] -> [H, W, 3]."""
    rows, columns = grid
    size = tiles.shape[1]
    return tiles.reshape(rows, columns, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
