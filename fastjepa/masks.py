"""The multi-block masks of I-JEPA, drawn for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from fastjepa.ragged import Ragged

SIZES = 1 << 16  # block sizes are drawn from a table of this many equally likely scales
TRIES = 20  # places tried for a context block before one target less is kept out of it


class MaskCollator:
    """Collates samples and draws the context and target masks of each image.

    A batch has one target block size and one context block size; each image has its own block positions. A context
    block loses the patches of the image's targets (unless `allow_overlap`); if 20 places in a row leave it `min_keep`
    patches or fewer, one target less is kept out of it, and so on.

    Arguments:
        input_size: pixels of an image, (height, width) or one number; patch_size in pixels must divide both.
        enc_mask_scale, pred_mask_scale: smallest and largest fraction of the patches in a block.
        aspect_ratio: smallest and largest height over width of a target block; context blocks are square.
        nenc, npred: context and target blocks an image has.
        min_keep: every mask has more patches than this.
        ragged: False gives the official lists of int64 [B, K], cut to the batch's shortest; True two `Ragged` of int32
            patch indices with nothing cut.
        seed: masks follow from (seed, step) alone, `step` counting calls; in a DataLoader worker also from that
            worker's own seed. `state_dict` and `load_state_dict` carry them over.

    Called on a list of samples -> (collated samples, masks_enc, masks_pred).

    Raises:
        ValueError: settings that admit no mask, saying which and why.

    Source: section 3 and appendix A of Assran et al. 2023 (arXiv 2301.08243); sizes and positions are distributed as
    in the published training code.

    >>> collate = MaskCollator((224, 224), 14, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), npred=4, min_keep=10)
    >>> labels, masks_enc, masks_pred = collate([0, 1, 2])
    >>> labels.tolist(), len(masks_enc), len(masks_pred), masks_pred[0].shape[0]
    ([0, 1, 2], 1, 4, 3)
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = (224, 224),
        patch_size: int = 16,
        enc_mask_scale: Sequence[float] = (0.2, 0.8),
        pred_mask_scale: Sequence[float] = (0.2, 0.8),
        aspect_ratio: Sequence[float] = (0.3, 3.0),
        nenc: int = 1,
        npred: int = 2,
        min_keep: int = 4,
        allow_overlap: bool = False,
        ragged: bool = False,
        seed: int = 0,
    ):
        pixels = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(pixels) != 2 or patch_size < 1 or any(n < patch_size or n % patch_size for n in pixels):
            raise ValueError(f"patch_size={patch_size} does not divide input_size={tuple(pixels)}")
        if nenc < 1 or npred < 1 or min_keep < 0:
            raise ValueError(f"nenc and npred must be at least 1 and min_keep 0, got {nenc}, {npred} and {min_keep}")
        self.height, self.width = pixels[0] // patch_size, pixels[1] // patch_size
        self.nenc, self.npred, self.min_keep = nenc, npred, min_keep
        self.allow_overlap, self.ragged = allow_overlap, ragged
        self.seed, self.step = seed, 0
        self._enc_sizes = self._sizes("enc_mask_scale", enc_mask_scale, (1.0, 1.0))
        self._pred_sizes = self._sizes("pred_mask_scale", pred_mask_scale, aspect_ratio)

    def __call__(self, batch: Sequence[Any]) -> tuple[Any, list[Tensor] | Ragged, list[Tensor] | Ragged]:
        """Collate samples with torch's `default_collate` and draw their masks."""
        worker = get_worker_info()
        key = [self.seed, self.step] if worker is None else [self.seed, self.step, worker.seed]
        masks_enc, masks_pred = self.sample(len(batch), key)
        self.step += 1
        return default_collate(list(batch)), masks_enc, masks_pred

    def state_dict(self) -> dict[str, int]:
        """What the next masks follow from."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken."""
        self.seed, self.step = int(state["seed"]), int(state["step"])

    def sample(self, batch_size: int, key: Sequence[int]) -> tuple[list[Tensor] | Ragged, list[Tensor] | Ragged]:
        """(masks_enc, masks_pred) of a batch, following from `key` (non-negative ints) alone; changes nothing."""
        return self.draw(batch_size, key).masks()

    def draw(self, batch_size: int, key: Sequence[int]) -> Drawn:
        """The masks of `sample`, from which those of some images can be taken."""
        if batch_size < 1:
            raise ValueError("cannot draw masks for an empty batch")
        rng = np.random.default_rng(list(key))
        pred_size = self._pred_sizes[rng.integers(SIZES)]
        enc_size = self._enc_sizes[rng.integers(SIZES)]

        top, left = self._corners(rng, pred_size, (batch_size, self.npred))
        height, width = int(pred_size[0]), int(pred_size[1])
        block = (np.arange(height, dtype=np.int32)[:, None] * self.width + np.arange(width, dtype=np.int32)).ravel()
        targets = (top * self.width + left)[..., None] + block  # [B, npred, h * w]
        kept = self._contexts(rng, enc_size, top, left, pred_size)
        return Drawn(kept.reshape(batch_size, self.nenc, -1), targets, self.ragged)

    def _contexts(
        self, rng: np.random.Generator, size: np.ndarray, top: np.ndarray, left: np.ndarray, pred_size: np.ndarray
    ) -> np.ndarray:
        """bool [B * nenc, N]: the patches of each context block that no target has."""
        targets = self._blocks(pred_size, top, left)  # [B, npred, H, words]
        taken = np.bitwise_or.reduce(targets, axis=1)
        if self.allow_overlap:
            taken[:] = 0
        image = np.arange(len(top) * self.nenc) // self.nenc
        kept = self._blocks(size, *self._corners(rng, size, len(image))) & ~taken[image]
        todo = np.flatnonzero(_sizes_of(kept) <= self.min_keep)
        attempt = 1
        while len(todo):
            block = self._blocks(size, *self._corners(rng, size, len(todo)))
            # Every TRIES attempts one target less is kept out, from the last; without any, every block is large enough.
            out = 0 if self.allow_overlap else max(self.npred - attempt // TRIES, 0)
            block &= ~np.bitwise_or.reduce(targets[image[todo], :out], axis=1)
            kept[todo] = block
            todo = todo[_sizes_of(block) <= self.min_keep]
            attempt += 1
        bits = np.unpackbits(kept.view(np.uint8), axis=-1, bitorder="little")  # [B * nenc, H, words * 64]
        return bits[:, :, : self.width].reshape(len(image), -1).view(bool)

    def _blocks(self, size: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
        """uint64 [..., H, words]: the patches of each block, a bit each, as many words to a row as it needs."""
        words = -(-self.width // 64)
        columns = np.arange(self.width)
        inside = (columns >= columns[:, None]) & (columns < columns[:, None] + size[1])  # [left, column]
        padded = np.zeros((self.width, 64 * words), dtype=bool)
        padded[:, : self.width] = inside
        row_bits = np.packbits(padded, axis=1, bitorder="little").view("<u8").astype(np.uint64)  # [left, words]
        row = np.arange(self.height) - top[..., None]
        in_rows = (row >= 0) & (row < size[0])
        return row_bits[left][..., None, :] * in_rows[..., None]

    def _corners(
        self, rng: np.random.Generator, size: np.ndarray, shape: int | tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Top and left of blocks; as in the published code the last row and column of places is never taken."""
        top = rng.integers(self.height - size[0], size=shape, dtype=np.int32)
        return top, rng.integers(self.width - size[1], size=shape, dtype=np.int32)

    def _sizes(self, name: str, scale: Sequence[float], aspect_ratio: Sequence[float]) -> np.ndarray:
        """int16 [SIZES, 2]: (height, width) of a block for each draw, scale and aspect ratio moving together."""
        for key, pair in ((name, scale), ("aspect_ratio", aspect_ratio)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] < float("inf"):
                raise ValueError(f"{key} must be two numbers, 0 < smallest <= largest, got {list(pair)}")
        if scale[1] > 1:
            raise ValueError(f"{name} is a fraction of the patches, at most 1, got {list(scale)}")
        draw = (np.arange(SIZES) + 0.5) / SIZES
        patches = np.floor(self.height * self.width * (scale[0] + draw * (scale[1] - scale[0])))
        ratio = aspect_ratio[0] + draw * (aspect_ratio[1] - aspect_ratio[0])
        height = np.minimum(np.rint(np.sqrt(patches * ratio)), self.height - 1)
        width = np.minimum(np.rint(np.sqrt(patches / ratio)), self.width - 1)
        worst = int((height * width).argmin())
        if height[worst] * width[worst] <= self.min_keep:
            raise ValueError(
                f"no mask is possible: {name}={list(scale)} with aspect ratio {list(aspect_ratio)} gives blocks of "
                f"{int(height[worst])}x{int(width[worst])} patches on a {self.height}x{self.width} grid, but a mask "
                f"must have more than min_keep={self.min_keep} patches; raise the scale or lower min_keep"
            )
        return np.stack([height, width], axis=1).astype(np.int16)


@dataclass(frozen=True)
class Drawn:
    """The masks of a batch.

    Shapes: contexts bool [B, nenc, N], the patches of each context; targets int32 [B, npred, K'], those of each target.
    """

    contexts: np.ndarray
    targets: np.ndarray
    ragged: bool

    @property
    def tokens(self) -> np.ndarray:
        """int64 [B], the context patches of each image."""
        return np.count_nonzero(self.contexts, axis=(1, 2))

    def masks(self, images: np.ndarray | None = None) -> tuple[list[Tensor] | Ragged, list[Tensor] | Ragged]:
        """(masks_enc, masks_pred) of all images, or of those that `images` (int [B']) names, in that order.

        As lists they are cut to the shortest context among them.
        """
        contexts, targets = (
            (self.contexts, self.targets) if images is None else (self.contexts[images], self.targets[images])
        )
        count, nenc, patches = contexts.shape
        npred, size = targets.shape[1:]
        lengths = np.count_nonzero(contexts, axis=2).reshape(-1)
        named = (np.flatnonzero(contexts) % patches).astype(np.int32)
        if self.ragged:
            offsets = np.arange(count * npred + 1, dtype=np.int32) * size
            return (
                _ragged(named, np.concatenate(([0], lengths.cumsum())).astype(np.int32), nenc),
                _ragged(targets.reshape(-1), offsets, npred),
            )
        starts = lengths.cumsum() - lengths
        cut = named[starts[:, None] + np.arange(lengths.min())].reshape(count, nenc, -1)
        return _lists(cut), _lists(targets)


def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor]) -> Tensor:
    """The tokens that each mask names, mask after mask.

    Shapes: x [B, N, D]; masks a list of integer [B, K] -> [len(masks) * B, K, D].

    Raises:
        ValueError: x or masks of other shapes, dtypes or devices, or (looked for on the CPU) an index out of range.
    """
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    if x.dim() != 3 or not masks or any(m.dim() != 2 or m.shape[0] != x.shape[0] for m in masks):
        raise ValueError(
            f"x must be [B, N, D] and masks [B, K], got {list(x.shape)} and {[list(m.shape) for m in masks]}"
        )
    if any(m.dtype not in (torch.int32, torch.int64) or m.device != x.device for m in masks):
        kinds = [f"{m.dtype} on {m.device}" for m in masks]
        raise ValueError(f"masks must be int32 or int64 on {x.device} as x is, got {kinds}")
    if len({m.shape[1] for m in masks}) > 1:
        raise ValueError(f"masks must be of one length, got {[list(m.shape) for m in masks]}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        for mask in masks:
            if mask.numel() and not (int(mask.min()) >= 0 and int(mask.max()) < x.shape[1]):
                raise ValueError(f"masks must be in 0..{x.shape[1] - 1}, got {int(mask.min())}..{int(mask.max())}")
    start = (torch.arange(x.shape[0], device=x.device) * x.shape[1]).view(-1, 1)
    rows = torch.cat([start + m for m in masks])  # [len(masks) * B, K]
    return x.flatten(0, 1).index_select(0, rows.view(-1)).view(*rows.shape, x.shape[2])


def _sizes_of(blocks: np.ndarray) -> np.ndarray:
    """int [n]: patches in each of uint64 [n, H, words]."""
    return np.bitwise_count(blocks).sum(axis=(1, 2), dtype=np.int64)


def _ragged(values: np.ndarray, offsets: np.ndarray, per_image: int) -> Ragged:
    return Ragged(torch.from_numpy(values), torch.from_numpy(offsets), per_image)


def _lists(masks: np.ndarray) -> list[Tensor]:
    """[B, n, K] as n int64 tensors [B, K]."""
    return list(torch.from_numpy(masks.astype(np.int64).swapaxes(0, 1).copy()).unbind(0))
