"""Labelled pictures on disk, to fit probes on and to judge by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa.data import Pictures, UnreadableImage
from fastjepa.data.sources import open_pictures
from fastjepa.evaluation.features import extract_features, judging, layer_tokens, whole_picture
from fastjepa.nn.vision_transformer import VisionTransformer

PART = 0.875  # of the square's side is seen, as in the published evaluations (256 -> 224)
HELD_OUT = 5  # one in so many of a class is held out where the folder says nothing
TEST_FOLDERS = ("val", "test", "validation")
MAX_UNREADABLE = 0.01


@dataclass(frozen=True)
class LabelledPictures(Dataset):
    """Some pictures of a source, each with the number of its class; a picture as uint8 [3, size, size].

    Shapes: labels int64 [n]. Iterating `batches` leaves out pictures that cannot be read.
    """

    source: Pictures
    chosen: list[int]
    labels: Tensor
    size: int
    batch_size: int = 256
    workers: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[Tensor | None, int, str]:
        """(picture, place, ""), or (None, place, why it cannot be read)."""
        try:
            return whole_picture(self.source.load(self.chosen[place]), self.size, PART), place, ""
        except UnreadableImage as error:
            return None, place, str(error)

    def batches(self, order: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (uint8 images, places), in `order`.

        Raises:
            ValueError: more than 1 % of the pictures cannot be read.
        """
        sampler = range(len(self)) if order is None else order
        loader = DataLoader(
            self,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else each epoch would draw from torch's own
        )
        self.unreadable.clear()
        for images, places, reasons in loader:
            self.unreadable.extend(reasons)
            if len(self.unreadable) > max(1, MAX_UNREADABLE * len(self)):
                raise ValueError(f"too many pictures of {self.source.root} cannot be read; the last: {reasons[-1]}")
            if len(places):
                yield images, places

    def features(self, encoder: VisionTransformer, layers: int) -> tuple[Tensor, Tensor]:
        """Features [n, layers * D] as `extract_features` gives them, and labels int64 [n]."""
        read: list[Tensor] = []

        def images() -> Iterator[Tensor]:
            for batch, places in self.batches():
                read.append(places)
                yield batch

        found = extract_features(encoder, images(), layers=layers)
        return found, self.labels[torch.cat(read)]


class TokenBatches:
    """Tokens of a picture set, epoch after epoch in random order; kept in memory (as fp16) where they fit.

    Called with the number of an epoch it gives batches (tokens [B, N, D] on the encoder's device, labels int64 [B]).
    """

    def __init__(
        self, encoder: VisionTransformer, pictures: LabelledPictures, places: Tensor, memory: int, seed: int = 0
    ):
        self.encoder, self.pictures, self.places, self.seed = encoder, pictures, places, seed
        self.device = next(encoder.parameters()).device
        self.kept: Tensor | None = None
        shape = encoder.patch_embed.num_patches, encoder.embed_dim
        if len(places) * shape[0] * shape[1] * 2 <= memory:
            self._keep(shape)

    def _keep(self, shape: Any) -> None:
        read, kept = [], torch.zeros(len(self.pictures), *shape, dtype=torch.float16)
        for tokens, found in self._encoded(self.places.tolist()):
            kept[found] = tokens.half().cpu()
            read.append(found)
        self.kept, self.places = kept, torch.cat(read)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.places) // self.pictures.batch_size)

    def __call__(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches; None: in order."""
        order = self.places
        if epoch is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = order[torch.randperm(len(order), generator=generator)]
        for tokens, found in self._encoded(order.tolist()) if self.kept is None else self._from_memory(order):
            yield tokens, self.pictures.labels[found].to(self.device)

    def _from_memory(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.kept is not None
        for found in order.split(self.pictures.batch_size):
            yield self.kept[found].to(self.device).float(), found

    def _encoded(self, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, found in self.pictures.batches(order):
            with judging(self.encoder):
                (tokens,) = layer_tokens(self.encoder, images)
            yield tokens.float(), found


def labelled_pictures(
    data: str | os.PathLike[str],
    test: str | os.PathLike[str] | None,
    make: Callable[[Pictures, list[int], Tensor], LabelledPictures],
    seed: int = 0,
) -> tuple[LabelledPictures, LabelledPictures, list[str], str]:
    """Pictures to fit on and to judge by, the names of their classes, and a line that says which they are.

    Arguments:
        data: what `open_pictures` takes, a folder with a folder a class, say; or one with `train` and `val` (or `test`,
            `validation`) of that kind.
        test: the like, to judge by. None: data's own, else a fifth of each class, chosen by the seed.

    Raises:
        ValueError: no such pictures, fewer than two classes, or classes in one that the other lacks.
    """
    root = Path(data)
    held = Path(test) if test is not None else next((root / n for n in TEST_FOLDERS if (root / n).is_dir()), None)
    fitted = open_pictures(root / "train" if (root / "train").is_dir() else root)
    if len(fitted.classes) < 2:
        raise ValueError(f"{fitted.root} has fewer than two classes of pictures; in a folder, each class is a folder")
    numbers = {name: number for number, name in enumerate(fitted.classes)}
    everything = [i for i, label in enumerate(fitted.labels) if label >= 0]
    if held is None:
        ours, theirs = _split(fitted, everything, seed)
        line = f"{len(ours)} pictures of {root} to fit probes on, {len(theirs)} others, one in {HELD_OUT}, to judge by"
        sets = [(fitted, ours), (fitted, theirs)]
    else:
        judged = open_pictures(held)
        unknown = [name for name in judged.classes if name not in numbers]
        if unknown or not judged.classes:
            what = f"has the class {unknown[0]}, which {fitted.root} has not" if unknown else "has no classes"
            raise ValueError(f"{held} {what}")
        theirs = [i for i, label in enumerate(judged.labels) if label >= 0]
        line = f"{len(everything)} pictures of {fitted.root} to fit probes on, {len(theirs)} of {held} to judge by"
        sets = [(fitted, everything), (judged, theirs)]
    found = [
        make(source, chosen, torch.tensor([numbers[source.classes[source.labels[i]]] for i in chosen]))
        for source, chosen in sets
    ]
    return found[0], found[1], fitted.classes, line


def _split(source: Pictures, everything: list[int], seed: int) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    labels = np.asarray(source.labels)
    held: set[int] = set()
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < HELD_OUT:
            raise ValueError(
                f"{source.root} has {len(members)} pictures of {name}; at least {HELD_OUT} are needed to hold one out, "
                "or a folder to judge by (--test)"
            )
        held |= set(rng.permutation(members)[: len(members) // HELD_OUT].tolist())
    return [i for i in everything if i not in held], sorted(held)


def _collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    read = [(image, place) for image, place, _ in items if image is not None]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    return images, torch.tensor([place for _, place in read], dtype=torch.int64), [why for *_, why in items if why]
