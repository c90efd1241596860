"""`Ragged`: sequences of different lengths, packed back to back with no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND = 32  # tokens: multiples of it bound the lengths of padded sequences


class Ragged:
    """S sequences packed back to back, `per_image` of them for each image.

    Shapes:
        values: [T, ...], any dtype; the tokens (or patch indices) of sequence 0, then 1, ...
        offsets: int32 [S + 1]; sequence s is `values[offsets[s]:offsets[s + 1]]` (the `cu_seqlens` of flash-attn).
        per_image: sequences an image has, so S = B * per_image and sequence s belongs to image `s // per_image`.
        max_length: length of the longest sequence in tokens, a host int. Worked out here where `offsets` lies on
            the CPU; pass it for offsets on another device, or reading it waits for that device once.
        spare: images at the end that are padding (see `padded`): S = (B + spare) * per_image.

    Raises:
        ValueError: values and offsets that do not fit together (offsets on the CPU are checked; offsets on another
            device are checked for shape and dtype only, since reading them would wait for the device).

    >>> r = Ragged(torch.tensor([3, 4, 9]), torch.tensor([0, 2, 3], dtype=torch.int32))
    >>> r.lengths.tolist(), r.max_length, [t.tolist() for t in r.unbind()]
    ([2, 1], 2, [[3, 4], [9]])
    """

    def __init__(
        self, values: Tensor, offsets: Tensor, per_image: int = 1, *, max_length: int | None = None, spare: int = 0
    ):
        self.values, self.offsets, self.per_image, self.spare = values, offsets, per_image, spare
        self._max_length = max_length
        self._check()

    def _check(self) -> None:
        values, offsets = self.values, self.offsets
        if not isinstance(values, Tensor) or not isinstance(offsets, Tensor):
            raise ValueError(f"Ragged takes tensors, got {type(values).__name__} and {type(offsets).__name__}")
        if values.dim() < 1:
            raise ValueError(f"Ragged values need a token dimension first: [T, ...], got shape {list(values.shape)}")
        if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int32:
            raise ValueError(f"Ragged offsets must be int32 [S + 1], got {offsets.dtype} {list(offsets.shape)}")
        if not isinstance(self.per_image, int) or self.per_image < 1 or self.num_sequences % self.per_image:
            raise ValueError(
                f"Ragged holds {self.num_sequences} sequences, which per_image={self.per_image} does not divide"
            )
        if not isinstance(self.spare, int) or not 0 <= self.spare * self.per_image <= self.num_sequences:
            raise ValueError(f"Ragged holds {self.num_sequences} sequences, of which spare={self.spare!r} cannot be")
        if offsets.device != values.device:
            raise ValueError(f"Ragged values are on {values.device} and its offsets on {offsets.device}")
        if not can_look(offsets):
            return
        lengths = offsets.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        if int(offsets[0]) != 0 or (len(lengths) and int(lengths.min()) < 0) or int(offsets[-1]) != len(values):
            raise ValueError(
                f"Ragged offsets must start at 0, never fall and end at the {len(values)} tokens of values, "
                f"got {_shortened(offsets)}"
            )
        if self._max_length is None:
            self._max_length = longest
        elif self._max_length < longest:
            raise ValueError(f"Ragged max_length={self._max_length}, but the longest sequence has {longest} tokens")

    @property
    def max_length(self) -> int:
        """Length of the longest sequence (or a bound given by whoever built this), a host int."""
        if self._max_length is None:
            self._max_length = int(self.lengths.max()) if self.num_sequences else 0
        return self._max_length

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int32 [S], the tokens in each sequence."""
        return self.offsets.diff()

    @property
    def device(self) -> torch.device:
        """Where values and offsets lie."""
        return self.values.device

    def __len__(self) -> int:
        return self.num_sequences

    def __repr__(self) -> str:
        return (
            f"Ragged(values={list(self.values.shape)} {self.values.dtype}, num_sequences={self.num_sequences}, "
            f"per_image={self.per_image}, max_length={self._max_length}, device={self.device})"
        )

    def with_values(self, values: Tensor, per_image: int | None = None) -> Ragged:
        """The same sequences holding `values` [T, ...], which may be of any dtype and trailing shape.

        Raises:
            ValueError: values of another number of tokens.
        """
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(f"these sequences have {len(self.values)} tokens, got values {list(values.shape)}")
        new = object.__new__(Ragged)
        new.values, new.offsets, new._max_length, new.spare = values, self.offsets, self._max_length, self.spare
        new.per_image = self.per_image if per_image is None else per_image
        return new

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        """This on `device`; `max_length` goes along, so nothing has to be read back from the device."""
        new = object.__new__(Ragged)
        new.values = self.values.to(device, non_blocking=non_blocking)
        new.offsets = self.offsets.to(device, non_blocking=non_blocking)
        new.per_image, new._max_length, new.spare = self.per_image, self.max_length, self.spare
        return new

    def padded(self, multiple: int) -> Ragged:
        """Patch indices with one image more, of padding: a multiple of `multiple` tokens, and shapes that come again.

        Its first sequence has as many tokens as lack, all of them patch 0, and its others none. `max_length` is rounded
        up too, unless the multiple is 1. Contexts padded so, with targets padded to a multiple of 1, give the same loss
        and gradients but for the rounding of sums in another order: nothing sees the padding's tokens, and no target
        reads them. Tokens that are added to targets would count in the loss as any others.

        >>> r = Ragged(torch.tensor([3, 4, 9]), torch.tensor([0, 2, 3], dtype=torch.int32)).padded(8)
        >>> r.values.tolist(), r.offsets.tolist(), r.max_length
        ([3, 4, 9, 0, 0, 0, 0, 0], [0, 2, 3, 8], 32)

        Raises:
            ValueError: a multiple below 1.
        """
        if multiple < 1:
            raise ValueError(f"tokens can be padded to multiples of 1 or more, got {multiple}")
        total = rounded(len(self.values), multiple)
        values = F.pad(self.values, (0, total - len(self.values)))
        offsets = F.pad(self.offsets, (0, self.per_image), value=total)
        longest = padded_length(self.max_length, multiple)
        return Ragged(values, offsets, self.per_image, max_length=longest, spare=self.spare + 1)

    def pin_memory(self) -> Ragged:
        """This in page-locked memory (`torch.utils.data.DataLoader(pin_memory=True)` calls it)."""
        new = self.with_values(self.values.pin_memory())
        new.offsets = self.offsets.pin_memory()
        return new

    def of_images(self, start: int, end: int) -> Ragged:
        """The sequences of images start, start + 1, ... end - 1; values are views. Waits for the device."""
        offsets = self.offsets[start * self.per_image : end * self.per_image + 1]
        first, last = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
        return Ragged(self.values[first:last], offsets - first, self.per_image)

    def unbind(self) -> list[Tensor]:
        """The sequences as a list of S tensors, views of `values`. Waits for the device."""
        return list(self.values.split(self.lengths.tolist()))

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor], per_image: int = 1) -> Ragged:
        """Pack tensors [L_s, ...] of equal trailing shape, of dtypes that are promoted as `torch.cat` does.

        Raises:
            ValueError: no tensors, or tensors of different trailing shapes or devices.
        """
        if not len(tensors):
            raise ValueError("Ragged.from_list needs at least one tensor")
        if any(t.dim() < 1 or t.shape[1:] != tensors[0].shape[1:] for t in tensors):
            raise ValueError(
                f"Ragged.from_list needs [L, ...] of one trailing shape, got {[list(t.shape) for t in tensors]}"
            )
        if len({t.device for t in tensors}) > 1:
            raise ValueError(f"Ragged.from_list needs tensors on one device, got {[str(t.device) for t in tensors]}")
        lengths = [len(t) for t in tensors]
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        values = torch.cat(list(tensors))
        return cls(values, offsets.to(values.device), per_image, max_length=max(lengths))

    @classmethod
    def from_nested(cls, nested: Tensor, per_image: int = 1) -> Ragged:
        """From a jagged nested tensor (`torch.nested`, `layout=torch.jagged`), sharing its values.

        Raises:
            ValueError: a tensor that is not nested with the jagged layout.
        """
        if not nested.is_nested or nested.layout != torch.jagged:
            raise ValueError("Ragged.from_nested needs torch.nested with layout=torch.jagged")
        jagged: Any = nested
        return cls(jagged.values(), jagged.offsets().to(torch.int32), per_image)

    def to_nested(self) -> Tensor:
        """As a jagged nested tensor [S, *, ...], sharing `values`."""
        return torch.nested.nested_tensor_from_jagged(self.values, self.offsets.long())


def masks_to_ragged(masks: Sequence[Tensor] | Tensor, num_images: int | None = None) -> Ragged:
    """Official masks, a list of integer [B, K], as one `Ragged` in their own mask-major order (sequence k * B + b).

    Raises:
        ValueError: no masks, or masks that are not int32 or int64 tensors alike and of one shape [B, K], or of another
            number of images than `num_images`.
    """
    listed = [masks] if isinstance(masks, Tensor) else list(masks)
    if not listed or any(m.dim() != 2 or m.shape != listed[0].shape for m in listed) or not _alike(listed):
        raise ValueError(
            "masks must be int32 or int64 tensors of one shape [B, K], dtype and device, got "
            f"{[(m.dtype, str(m.device), list(m.shape)) for m in listed]}"
        )
    batch, length = listed[0].shape
    if num_images is not None and batch != num_images:
        raise ValueError(f"masks are of {batch} images, but there are {num_images}")
    offsets = torch.arange(len(listed) * batch + 1, dtype=torch.int32, device=listed[0].device) * length
    return Ragged(torch.cat(listed).view(-1), offsets, max_length=length)


def sequence_ids(index: Ragged) -> Tensor:
    """int64 [T]: the sequence that each token belongs to."""
    ids = torch.arange(index.num_sequences, device=index.device)
    return ids.repeat_interleave(index.lengths, output_size=index.values.shape[0])


def rounded(count: int, multiple: int) -> int:
    """The next multiple from `count` on."""
    return count + -count % multiple


def padded_length(max_length: int, multiple: int) -> int:
    """The bound on the length of sequences that are padded to a multiple: few different ones, and none far too high.

    >>> padded_length(133, 128), padded_length(42, 1)
    (160, 42)
    """
    return max_length if multiple == 1 else rounded(max(max_length, multiple), BOUND)


def image_rows(index: Ragged, num_images: int, num_patches: int) -> Tensor:
    """int64 [T]: where each masked patch lies in `features.view(B * N, D)`.

    Sequence s belongs to image `(s // per_image) % num_images`; the remainder lets the mask-major order of the
    official lists (all images under mask 0, then all under mask 1) share this with the image-major order of `Ragged`.
    So spare images name patches of the first ones.

    Raises:
        ValueError: a number of sequences that is not a multiple of the images', or (checked on the CPU) a patch
            outside 0..N-1.
    """
    sequences = index.num_sequences - index.spare * index.per_image
    if sequences % (num_images * index.per_image) if num_images else sequences:
        raise ValueError(f"masks of {sequences} sequences, {index.per_image} an image, do not fit {num_images} images")
    check_patches(index, num_patches)
    patches = index.values
    image = torch.arange(index.num_sequences, device=index.device) // index.per_image % max(num_images, 1)
    return (image * num_patches).repeat_interleave(index.lengths, output_size=len(patches)) + patches


def check_patches(index: Ragged, num_patches: int) -> None:
    """Look at patch indices that lie on the CPU; those on a device are not read back.

    Raises:
        ValueError: a patch outside 0..num_patches-1.
    """
    if can_look(index.values) and len(index.values):
        low, high = (int(v) for v in index.values.aminmax())
        if low < 0 or high >= num_patches:
            raise ValueError(f"masks name patches {low}..{high}, but there are patches 0..{num_patches - 1}")


def _alike(masks: Sequence[Tensor]) -> bool:
    """Whether all are int32, or all int64, on one device."""
    return masks[0].dtype in (torch.int32, torch.int64) and len({(m.dtype, m.device) for m in masks}) == 1


def can_look(tensor: Tensor) -> bool:
    """Whether values can be looked at for nothing: on the CPU, outside of a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shortened(offsets: Tensor) -> str:
    listed = offsets[:8].tolist()
    return f"{listed}" if len(offsets) <= 8 else f"{listed[:-1]}... of {len(offsets)}, the last {int(offsets[-1])}"
