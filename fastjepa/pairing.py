"""Which context and which target make up each sequence of the predictor, and where each token comes from.

Also which rows of the target encoder's output the targets name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.ragged import Ragged, can_look, image_rows, masks_to_ragged


@dataclass(frozen=True)
class Pairing:
    """Each of the S' predictor sequences is one context of an image followed by one of its targets.

    Shapes:
        context_of, target_of: int64 [S'], the sequence of masks_enc and of masks_pred in each predictor sequence.
        per_image: predictor sequences an image has (1 where the order is mask-major).
        repeats: predictor sequences that each target sequence is in (nenc).
    """

    context_of: Tensor
    target_of: Tensor
    per_image: int
    repeats: int

    @classmethod
    def image_major(cls, masks_enc: Ragged, masks_pred: Ragged) -> Pairing:
        """In the order image, target, context: sequence (b * npred + t) * nenc + k.

        Raises:
            ValueError: contexts and targets of different numbers of images.
        """
        nenc, npred = masks_enc.per_image, masks_pred.per_image
        if masks_enc.num_sequences * npred != masks_pred.num_sequences * nenc:
            raise ValueError(
                f"masks_enc holds {masks_enc.num_sequences // nenc} images and masks_pred "
                f"{masks_pred.num_sequences // npred}"
            )
        s = torch.arange(masks_pred.num_sequences * nenc, device=masks_enc.device)
        return cls(s // (npred * nenc) * nenc + s % nenc, s // nenc, npred * nenc, nenc)

    @classmethod
    def mask_major(cls, nenc: int, npred: int, batch: int, device: torch.device) -> Pairing:
        """In the official order target, context, image: sequence (t * nenc + k) * batch + b."""
        s = torch.arange(npred * nenc * batch, device=device)
        return cls(s % (nenc * batch), s // (nenc * batch) * batch + s % batch, 1, nenc)


@dataclass(frozen=True)
class PredictorLayout:
    """Where every token of the predictor's packed input comes from, and where its targets lie.

    Shapes:
        source: int64 [T], the context token at each place, -1 for a mask token.
        patches: int64 [T], the patch at each place.
        offsets: int32 [S' + 1]; max_length: a host bound on the longest sequence.
        picked: int64 [T'], the places that hold mask tokens, in order.
        targets: `Ragged` of the patches at those places, the frame of the predictor's output.
    """

    source: Tensor
    patches: Tensor
    offsets: Tensor
    max_length: int
    picked: Tensor
    targets: Ragged

    @classmethod
    def build(cls, masks_enc: Ragged, masks_pred: Ragged, pairing: Pairing) -> PredictorLayout:
        """Worked out from offsets alone; the sizes are known on the host, so nothing is read back."""
        context_lengths = masks_enc.lengths.index_select(0, pairing.context_of)
        targets = select_sequences(masks_pred, pairing.target_of, len(masks_pred.values) * pairing.repeats)
        patches_to = masks_pred.values.index_select(0, targets.values)
        total = len(masks_enc.values) * (len(pairing.context_of) // masks_enc.num_sequences) + len(targets.values)
        offsets = _offsets(context_lengths + targets.lengths)
        sequence, place = _places(offsets, total)
        in_context = place < context_lengths.index_select(0, sequence)
        start = masks_enc.offsets[:-1].index_select(0, pairing.context_of)
        source = torch.where(in_context, start.index_select(0, sequence) + place, -1)
        # Places of the targets: each sequence's targets follow its context.
        target_sequence, target_place = _places(targets.offsets, len(targets.values))
        picked = (offsets[:-1] + context_lengths).index_select(0, target_sequence) + target_place
        patches = torch.empty(total, dtype=torch.int64, device=source.device)
        patches.index_copy_(0, picked, patches_to.long())
        if len(masks_enc.values):
            known = masks_enc.values.long().index_select(0, source.clamp(min=0))
            patches = torch.where(in_context, known, patches)
        frame = targets.with_values(patches_to, pairing.per_image)
        frame.spare = masks_pred.spare
        longest = masks_enc.max_length + masks_pred.max_length
        if can_look(offsets) and len(offsets) > 1:
            longest = int(offsets.diff().max())
        return cls(source, patches, offsets, longest, picked, frame)


@dataclass(frozen=True)
class TargetRows:
    """The rows of the target encoder's output that some target names, so that its last layer can make them alone.

    Shapes:
        kept: int64 [U], rows of `features.view(B * N, D)`.
        place: int64 [T], where in `kept` the row of each token of masks_pred lies.
    """

    kept: Tensor
    place: Tensor

    @classmethod
    def build(cls, masks_pred: Sequence[Tensor] | Ragged, num_images: int, num_patches: int) -> TargetRows:
        """Each row once where the masks lie on the CPU; elsewhere their number would have to be read back.

        There, and in graphs, a row comes as often as targets name it, or every row if those are no fewer.

        >>> rows = TargetRows.build([torch.tensor([[2, 3]]), torch.tensor([[1, 2]])], num_images=1, num_patches=4)
        >>> rows.kept.tolist(), rows.place.tolist()
        ([1, 2, 3], [1, 2, 0, 1])

        Raises:
            ValueError: masks that do not fit the images.
        """
        index = masks_pred if isinstance(masks_pred, Ragged) else masks_to_ragged(masks_pred, num_images)
        rows, everything = image_rows(index, num_images, num_patches), num_images * num_patches
        if can_look(rows):
            return cls(*rows.unique(return_inverse=True))
        if len(rows) < everything:
            return cls(rows, torch.arange(len(rows), device=rows.device))
        return cls(torch.arange(everything, device=rows.device), rows)

    def padded(self, multiple: int) -> TargetRows:
        """With row 0, which no token is told to read there, so often that `multiple` divides the number of rows.

        Raises:
            ValueError: a multiple below 1.
        """
        if multiple < 1:
            raise ValueError(f"rows can be padded to multiples of 1 or more, got {multiple}")
        return TargetRows(F.pad(self.kept, (0, -len(self.kept) % multiple)), self.place)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TargetRows:
        """This on `device`."""
        return TargetRows(*(t.to(device, non_blocking=non_blocking) for t in (self.kept, self.place)))

    def pin_memory(self) -> TargetRows:
        """This in page-locked memory."""
        return TargetRows(self.kept.pin_memory(), self.place.pin_memory())


def select_sequences(index: Ragged, which: Tensor, total: int) -> Ragged:
    """Sequences `which` (int64 [S']) of `index` one after another, holding the place of each of their tokens.

    `total` is their number of tokens, which the caller knows without asking the device.
    """
    offsets = _offsets(index.lengths.index_select(0, which))
    sequence, place = _places(offsets, total)
    places = index.offsets[:-1].index_select(0, which).index_select(0, sequence) + place
    return Ragged(places, offsets, max_length=index.max_length)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def _places(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """int64 [total] twice: the sequence of each token, and its place within it."""
    count = offsets.shape[0] - 1
    sequence = torch.arange(count, device=offsets.device).repeat_interleave(offsets.diff(), output_size=total)
    return sequence, torch.arange(total, device=offsets.device) - offsets.index_select(0, sequence)
