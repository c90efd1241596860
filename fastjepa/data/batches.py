"""Training batches by step number: any worker can make any of them, and a resumed run makes the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa.data.augment import Augment
from fastjepa.data.folder import ImageFolder, UnreadableImage
from fastjepa.masks import MaskCollator
from fastjepa.pairing import TargetRows
from fastjepa.ragged import Ragged

Masks = list[Tensor] | Ragged

REPLACEMENTS = 20  # other pictures tried in place of an unreadable one


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Shapes: images uint8 [B, 3, H, W]; masks as `MaskCollator` gives them; targets of masks_pred; samples int64 [B],
    index of each picture; num_patches: N, of a whole picture; unreadable: what could not be read while making it, a
    line each (another picture stands in).
    """

    images: Tensor
    masks_enc: Masks
    masks_pred: Masks
    targets: TargetRows
    samples: Tensor
    num_patches: int
    unreadable: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """In page-locked memory (the DataLoader calls it)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            masks_enc=_each(self.masks_enc, lambda m: m.pin_memory()),
            masks_pred=_each(self.masks_pred, lambda m: m.pin_memory()),
            targets=self.targets.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """On `device`, without waiting for the copies."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            masks_enc=_each(self.masks_enc, lambda m: m.to(device, non_blocking=True)),
            masks_pred=_each(self.masks_pred, lambda m: m.to(device, non_blocking=True)),
            targets=self.targets.to(device, non_blocking=True),
        )

    @property
    def context_tokens(self) -> int:
        """Context patches in the batch."""
        if isinstance(self.masks_enc, Ragged):
            return len(self.masks_enc.values)
        return sum(m.numel() for m in self.masks_enc)

    def parts(self, count: int) -> list[tuple[Batch, float]]:
        """The batch in `count` parts of equal numbers of images, and the share of the target tokens that each has.

        The losses of the parts, each times its share, add up to the batch's. For batches on the CPU.

        Raises:
            ValueError: a count that does not divide the images.
        """
        images = len(self.images)
        if count < 1 or images % count:
            raise ValueError(f"a batch of {images} images cannot be taken in {count} equal parts")
        if count == 1:
            return [(self, 1.0)]
        size = images // count
        found = [self._part(start, start + size) for start in range(0, images, size)]
        tokens = [len(part.targets.place) for part in found]
        return [(part, n / sum(tokens) if sum(tokens) else 0.0) for part, n in zip(found, tokens, strict=True)]

    def _part(self, start: int, end: int) -> Batch:
        masks_enc, masks_pred = (
            masks.of_images(start, end) if isinstance(masks, Ragged) else [m[start:end] for m in masks]
            for masks in (self.masks_enc, self.masks_pred)
        )
        targets = TargetRows.build(masks_pred, end - start, self.num_patches)
        images, samples = self.images[start:end], self.samples[start:end]
        return Batch(images, masks_enc, masks_pred, targets, samples, self.num_patches, self.unreadable)


class TrainingBatches(Dataset):
    """Batch number `step`: pictures of a permutation drawn for each epoch, crops and masks drawn for each step.

    Everything follows from (seed, step), so neither the number of workers nor an interruption changes a batch. The
    pictures left over at the end of an epoch, fewer than a batch, are dropped, as in the published code.

    Raises:
        ValueError: fewer pictures than a batch needs.
    """

    def __init__(self, folder: ImageFolder, augment: Augment, masks: MaskCollator, batch_size: int, seed: int = 0):
        if len(folder) < batch_size:
            raise ValueError(
                f"data.batch_size={batch_size} is more than the {len(folder)} pictures in {folder.root}; lower it"
            )
        self.folder, self.augment, self.masks = folder, augment, masks
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = len(folder) // batch_size

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.folder))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, 1, step])
        unreadable: list[str] = []
        images, samples = zip(*(self._crop(int(i), rng, unreadable) for i in chosen), strict=True)
        masks_enc, masks_pred = self.masks.sample(self.batch_size, [self.seed, 2, step])
        patches = self.masks.height * self.masks.width
        targets = TargetRows.build(masks_pred, self.batch_size, patches)
        pictures, numbers = torch.stack(images), torch.tensor(samples)
        return Batch(pictures, masks_enc, masks_pred, targets, numbers, patches, tuple(unreadable))

    def loader(self, start: int, end: int, workers: int, pin: bool) -> Iterator[Batch]:
        """Batches start, start + 1, ... end - 1, made ahead by `workers` processes (0: made here, when asked for)."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, end),
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_whole,
            generator=torch.Generator(),  # or it would draw from the global one each time a run is taken up again
        )
        return iter(loader)

    def _crop(self, index: int, rng: np.random.Generator, unreadable: list[str]) -> tuple[Tensor, int]:
        """A crop of picture `index`, or of another where it cannot be read, with a random stream of its own."""
        stream = rng.spawn(1)[0]
        for _ in range(REPLACEMENTS):
            try:
                return self.augment(self.folder.load(index), stream), index
            except UnreadableImage as error:
                unreadable.append(str(error))
                index = int(stream.integers(len(self.folder)))
        blank = torch.zeros(3, self.augment.crop_size, self.augment.crop_size, dtype=torch.uint8)
        return blank, -1  # the run ends on so many unreadable pictures; see `Unreadable`


class Unreadable:
    """Counts the pictures of a run that could not be read, and says when they are too many.

    A hundredth (`fraction`) of the pictures may be unreadable, and in a small folder up to ten, or a quarter if that is
    fewer.
    """

    def __init__(self, folder: ImageFolder, fraction: float):
        self.limit = int(max(fraction * len(folder), min(10, len(folder) // 4)))
        self.total = len(folder)
        self.files: dict[str, None] = {}

    def add(self, batch: Batch) -> list[str]:
        """Lines of `batch` about pictures not yet known to be unreadable.

        Raises:
            ValueError: too many pictures cannot be read; names the newest.
        """
        new = [line for line in dict.fromkeys(batch.unreadable) if line not in self.files]
        self.files.update(dict.fromkeys(new))
        if len(self.files) > self.limit:
            raise ValueError(
                f"{len(self.files)} of the {self.total} pictures cannot be read, more than data.max_corrupt allows "
                f"({self.limit}); the last: {next(reversed(self.files))}"
            )
        return new


def _whole(batch: Any) -> Any:
    return batch


def _each(masks: Masks, change) -> Masks:
    return change(masks) if isinstance(masks, Ragged) else [change(m) for m in masks]
