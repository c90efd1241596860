"""Training batches by step number: any worker can make any of them, and a resumed run makes the same ones."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
LOST_WORKER = ("DataLoader worker (pid", "DataLoader timed out")  # how PyTorch's errors begin

PREFETCH = 2  # batches that each worker is ahead
HELD = 3  # batches that whoever trains may hold at a time without new memory being taken
GLANCE = 1.0  # seconds between looks at whether the workers live, while a batch is waited for


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Shapes: images uint8 [B, 3, H, W], torch.channels_last in memory; masks as `MaskCollator` gives them; targets of
    masks_pred; samples int64 [B], index of each picture; num_patches: N, of a whole picture; unreadable: what could not
    be read while making it, a line each (another picture stands in); fallback: the first picture that the engine left
    to Pillow, and why.
    """

    images: Tensor
    masks_enc: Masks
    masks_pred: Masks
    targets: TargetRows
    samples: Tensor
    num_patches: int
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
    def row_multiple(self) -> int:
        """`padded` rounds the target encoder's rows up to multiples of it: as many as four images have."""
        return 4 * self.num_patches

    @property
    def token_multiple(self) -> int:
        """`padded` rounds the contexts' tokens up to multiples of it: half an image, about as a context has."""
        return -(-self.num_patches // 2)

    def padded(self) -> Batch:
        """In shapes that come again from step to step, for the same loss: see `Ragged.padded`, `TargetRows.padded`.

        Lists of masks stay as they are.
        """
        masks_enc, masks_pred = self.masks_enc, self.masks_pred
        if isinstance(masks_enc, Ragged) and isinstance(masks_pred, Ragged):
            masks_enc, masks_pred = masks_enc.padded(self.token_multiple), masks_pred.padded(1)
        return replace(self, masks_enc=masks_enc, masks_pred=masks_pred, targets=self.targets.padded(self.row_multiple))

    def tensors(self) -> list[Tensor]:
        """What a step reads: images, masks, then the targets' rows."""
        masks = [m for masks in (self.masks_enc, self.masks_pred) for m in _listed(masks)]
        return [self.images, *masks, self.targets.kept, self.targets.place]

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
        return replace(
            self, images=images, masks_enc=masks_enc, masks_pred=masks_pred, targets=targets, samples=samples
        )


class TrainingBatches(Dataset):
    """Batch number `step`: pictures of a permutation drawn for each epoch, crops and masks drawn for each step.

    Everything follows from (seed, step), so neither the number of workers nor an interruption changes a batch. Of
    `world` processes that train together, the one of `rank` takes its `batch_size` of the step's pictures; with
    `Ragged` masks they are dealt out so that each has about as many tokens, and the step is the same whatever `world`
    is. As lists, masks are cut to the shortest context of a process, as in the published code. The pictures
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

    def loader(
        self, start: int, end: int, workers: int, pin: bool, say: Callable[[str], None] = print, patience: float = 600.0
    ) -> Iterator[Batch]:
        """Batches start, start + 1, ... end - 1, made ahead by `workers` processes (0: made here, when asked for).

        A worker that dies, or gives nothing for `patience` seconds, is told to `say`, and all are started anew, once.

        Raises:
            OSError: it happened again.
        """
        lost, step = 0, start
        while step < end:
            try:
                for batch in self._stream(step, end, workers, pin, patience):
                    yield batch
                    step += 1
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if not workers or not is_lost(error):
                    raise
                lost += 1
                if lost > 1:
                    raise OSError(
                        f"data workers were lost twice, now at step {step} ({error}); data.num_workers=0 reads "
                        "pictures in the training process and shows what is wrong"
                    ) from error
                say(f"warning: a data worker was lost at step {step} ({error}); all are started anew")

    def _stream(self, start: int, end: int, workers: int, pin: bool, patience: float) -> Iterator[Batch]:
        ring = None
        if workers and not self.augment.engine.late:
            size = self.augment.crop_size
            ring = _Ring(PREFETCH * workers + HELD, (self.batch_size, size, size, 3))
        loader = DataLoader(
            _Made(self, ring),
            batch_size=None,
            sampler=_asked(range(start, end), ring),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=pin,
            collate_fn=_whole,
            timeout=min(patience, GLANCE) if workers else 0,
            generator=torch.Generator(),  # or it would draw from the global one each time a run is taken up again
        )
        with _quiet_children():
            made = iter(loader)
        for batch, placed, slot in _patient(made, patience):
            if ring is None or slot is None:
                yield self._finish((batch, placed))
            elif batch.images.is_pinned():  # a copy; where `pin` was asked for and cannot be, it is none
                ring.free.append(slot)
                yield batch
            else:
                yield replace(batch, images=ring.lend(slot))

    def pictures(self, step: int) -> np.ndarray:
        """Number of each picture drawn for `step`, of all processes together: integers [B * world]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.world
        return self.order(epoch)[place * size : (place + 1) * size]

    def _make(self, step: int, out: Tensor | None = None) -> tuple[Batch, list[Placed]]:
        """What a worker does for a step, the images in `out`; pictures decoded late come encoded beside the batch."""
        size = self.batch_size * self.world
        masks = self.masks.draw(size, [self.seed, 2, step])
        mine = dealt(masks.tokens if self.masks.ragged else np.zeros(size), self.rank, self.world)
        chosen = self.pictures(step)[mine].tolist()
        streams = [np.random.default_rng([self.seed, 1, step, int(image)]) for image in mine]
        drawn = draw_crops(self.folder, self.augment, chosen, streams)
        masks_enc, masks_pred = masks.masks(mine)
        patches = self.masks.height * self.masks.width
        targets = TargetRows.build(masks_pred, self.batch_size, patches)
        images = torch.empty(0, dtype=torch.uint8)
        if drawn.crops:
            images = torch.stack([crop.permute(1, 2, 0) for crop in drawn.crops], out=out).permute(0, 3, 1, 2)
        samples = torch.tensor(drawn.samples)
        unreadable = tuple(drawn.unreadable)
        return Batch(images, masks_enc, masks_pred, targets, samples, patches, unreadable, drawn.fallback), drawn.placed

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


def _patient(made: Iterator[Any], patience: float) -> Iterator[Any]:
    """What `made` gives, waiting `patience` seconds for each; the loader itself gives up after `GLANCE`."""
    end = time.monotonic() + patience
    while True:
        try:
            item = next(made)
        except StopIteration:
            return
        except RuntimeError as error:  # of workers that are dead it says something else
            if not str(error).startswith(LOST_WORKER[1]) or time.monotonic() >= end:
                raise
            continue
        yield item
        end = time.monotonic() + patience


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Within, PyTorch may set its handler for workers that die, which is taken back afterwards.

    It would raise wherever the training process happens to be, in the middle of a step too. Without it a lost worker is
    noticed when the next batch is asked for.
    """
    own = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if own else None
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def is_lost(error: Exception) -> bool:
    """Whether PyTorch says by `error` that a worker is gone, not that something failed in one."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(LOST_WORKER)
    return "DataLoader worker process" not in str(error)  # what it had made went with it, half handed over


def dealt(tokens: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The images of a step that are `rank`'s: as many for each of `world` processes, and about as many tokens.

    From the longest on they are dealt out in turns, back and forth. Shapes: tokens [B * world] -> int64 [B].

    >>> [dealt(np.array([9, 1, 8, 2]), rank, 2).tolist() for rank in range(2)]
    [[0, 1], [2, 3]]
    """
    turns = np.argsort(-tokens, kind="stable").reshape(-1, world)
    turns[1::2] = turns[1::2, ::-1]
    return np.sort(turns[:, rank])


class _Ring:
    """Shared memory that workers write images into: new memory for each batch would cost its pages.

    Attributes:
        free: the slots that no batch has, neither in the making nor with whoever asked for it.
    """

    def __init__(self, slots: int, shape: tuple[int, ...]):
        self.images = torch.empty((slots, *shape), dtype=torch.uint8).share_memory_()
        self.free = list(range(slots))

    def lend(self, slot: int) -> Tensor:
        """Images [B, 3, H, W] of a slot, which is free again when nothing has this memory any more."""
        lent = self.images.numpy()[slot]  # which a tensor made of it holds, and whatever shares its memory
        weakref.finalize(lent, self.free.append, slot).atexit = False
        return torch.from_numpy(lent).permute(0, 3, 1, 2)


def _asked(steps: range, ring: _Ring | None) -> Iterator[tuple[int, int | None]]:
    """Steps, each with a slot of the ring if one is free at the time when the loader hands it to a worker."""
    for step in steps:
        yield step, ring.free.pop() if ring and ring.free else None


class _Made(Dataset):
    """What workers do, by step and slot of the ring."""

    def __init__(self, batches: TrainingBatches, ring: _Ring | None):
        self.batches, self.images = batches, None if ring is None else ring.images

    def __getitem__(self, asked: tuple[int, int | None]) -> tuple[Batch, list[Placed], int | None]:
        step, slot = asked
        out = None if self.images is None or slot is None else self.images[slot]
        return *self.batches._make(step, out), slot


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


def _listed(masks: Masks) -> list[Tensor]:
    return [masks.values, masks.offsets] if isinstance(masks, Ragged) else masks
