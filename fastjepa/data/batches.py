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
from fastjepa.data.drawing import Placed, draw_crops, finish_crops
from fastjepa.data.order import EpochOrder
from fastjepa.data.pictures import Pictures, UnreadableImage
from fastjepa.masks import MaskCollator
from fastjepa.pairing import TargetRows
from fastjepa.ragged import Ragged

Masks = list[Tensor] | Ragged

PREFETCH = 2  # batches that each worker is ahead


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Shapes: images uint8 [B, 3, H, W], torch.channels_last in memory; masks as `MaskCollator` gives them; targets of
    masks_pred; samples int64 [B], index of each picture; unreadable: what could not be read while making it, a line
    each (another picture stands in); fallback: the first picture that the engine left to Pillow, and why.
    """

    images: Tensor
    masks_enc: Masks
    masks_pred: Masks
    targets: TargetRows
    samples: Tensor
    unreadable: tuple[str, ...] = ()
    fallback: str | None = None

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


class TrainingBatches(Dataset):
    """Batch number `step`: pictures of a permutation drawn for each epoch, crops and masks drawn for each step.

    Everything follows from (seed, step), so neither the number of workers nor an interruption changes a batch. Of
    `world` processes that train together, the one of `rank` takes its `batch_size` of the step's pictures. The pictures
    left over at the end of an epoch, fewer than a step needs, are dropped, as in the published code.

    Raises:
        ValueError: fewer pictures than a step needs, a rank that is not one of `world`, or an engine that cannot do
            what `augment` asks of it.
    """

    def __init__(
        self,
        folder: Pictures,
        augment: Augment,
        masks: MaskCollator,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank must be one of 0 to world - 1, got rank={rank} and world={world}")
        if len(folder) < batch_size * world:
            processes = f" for each of {world} processes" if world > 1 else ""
            raise ValueError(
                f"data.batch_size={batch_size}{processes} is more than the {len(folder)} pictures in {folder.root}; "
                "lower it"
            )
        self.folder, self.augment, self.masks = folder, augment, masks
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.steps_per_epoch = len(folder) // (batch_size * world)
        if augment.engine.late and (augment.color_distortion or augment.gaussian_blur):
            raise ValueError(
                f"data.engine={augment.engine.name} decodes on the device, without colour distortion or blur; "
                "turbo and pillow do them in the workers"
            )
        self.order = EpochOrder(len(folder), seed, folder.blocks)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`."""
        return self._finish(self._make(step))

    def loader(self, start: int, end: int, workers: int, pin: bool) -> Iterator[Batch]:
        """Batches start, start + 1, ... end - 1, made ahead by `workers` processes (0: made here, when asked for)."""
        ring = None
        if workers and not self.augment.engine.late:
            size = self.augment.crop_size
            shape = (PREFETCH * workers + 1, self.batch_size, size, size, 3)
            ring = torch.empty(shape, dtype=torch.uint8).share_memory_()
        loader = DataLoader(
            _Made(self, start, ring),
            batch_size=None,
            sampler=range(start, end),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=pin,
            collate_fn=_whole,
            generator=torch.Generator(),  # or it would draw from the global one each time a run is taken up again
        )
        # Pinning copies the images; otherwise they are copied here, before their place in the ring is written again.
        return self._stream(iter(loader), copies=ring is not None and not pin)

    def _make(self, step: int, out: Tensor | None = None) -> tuple[Batch, list[Placed]]:
        """What a worker does for a step, the images in `out`; pictures decoded late come encoded beside the batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        number = step * self.world + self.rank  # each process draws from streams of its own
        first = (place * self.world + self.rank) * self.batch_size
        chosen = self.order(epoch)[first : first + self.batch_size].tolist()
        streams = np.random.default_rng([self.seed, 1, number]).spawn(len(chosen))
        drawn = draw_crops(self.folder, self.augment, chosen, streams)
        masks_enc, masks_pred = self.masks.sample(self.batch_size, [self.seed, 2, number])
        targets = TargetRows.build(masks_pred, self.batch_size, self.masks.height * self.masks.width)
        images = torch.empty(0, dtype=torch.uint8)
        if drawn.crops:
            images = torch.stack([crop.permute(1, 2, 0) for crop in drawn.crops], out=out).permute(0, 3, 1, 2)
        samples = torch.tensor(drawn.samples)
        unreadable = tuple(drawn.unreadable)
        return Batch(images, masks_enc, masks_pred, targets, samples, unreadable, drawn.fallback), drawn.placed

    def _stream(self, made: Iterator[tuple[Batch, list[Placed]]], copies: bool) -> Iterator[Batch]:
        for batch in map(self._finish, made):
            yield replace(batch, images=batch.images.clone()) if copies else batch

    def _finish(self, made: tuple[Batch, list[Placed]]) -> Batch:
        """The batch, with what its worker left to the process that trains."""
        batch, placed = made
        if not placed:
            return batch
        try:
            images, fallback = finish_crops(self.augment, placed)
        except UnreadableImage as error:
            name = self.augment.engine.name
            raise ValueError(f"{error}; data.engine={name} replaces no such picture, turbo and pillow do") from error
        return replace(batch, images=images, fallback=fallback)


class _Made(Dataset):
    """What workers do, by step.

    Images are written round and round into `ring`, shared memory [slots, B, H, W, 3]: new memory for each batch costs
    its pages. The loader has at most PREFETCH batches a worker under way beyond the one that it gave last, so with one
    slot more than those none is written before the next batch is asked for.
    """

    def __init__(self, batches: TrainingBatches, start: int, ring: Tensor | None):
        self.batches, self.start, self.ring = batches, start, ring

    def __getitem__(self, step: int) -> tuple[Batch, list[Placed]]:
        out = None if self.ring is None else self.ring[(step - self.start) % len(self.ring)]
        return self.batches._make(step, out)


class Unreadable:
    """Counts the pictures of a run that could not be read, and says when they are too many.

    A hundredth (`fraction`) of the pictures may be unreadable, and in a small folder up to ten, or a quarter if that is
    fewer.
    """

    def __init__(self, folder: Pictures, fraction: float):
        self.limit = int(max(fraction * len(folder), min(10, len(folder) // 4)))
        self.total = len(folder)
        self.files: dict[str, None] = {}
        self.fallback: str | None = None

    def add(self, batch: Batch) -> list[str]:
        """What is new of `batch` and worth a line: pictures not yet known to be unreadable, the first left to Pillow.

        Raises:
            ValueError: too many pictures cannot be read; names the newest.
        """
        said = []
        for line in dict.fromkeys(batch.unreadable):
            if line not in self.files:
                self.files[line] = None
                said.append(f"skipped a picture that cannot be read ({len(self.files)} so far): {line}")
        if len(self.files) > self.limit:
            raise ValueError(
                f"{len(self.files)} of the {self.total} pictures cannot be read, more than data.max_corrupt allows "
                f"({self.limit}); the last: {next(reversed(self.files))}"
            )
        if batch.fallback and not self.fallback:
            self.fallback = batch.fallback
            said.append(f"read by Pillow, as will be others like it: {self.fallback}")
        return said


def _whole(batch: Any) -> Any:
    return batch


def _each(masks: Masks, change) -> Masks:
    return change(masks) if isinstance(masks, Ragged) else [change(m) for m in masks]
