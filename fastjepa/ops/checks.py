"""What operations ask of their tensors.

Shapes, dtypes and devices are always looked at. Looking into indices and offsets costs nothing on the CPU and a wait
for the device on CUDA, so there it is done where `check=True` asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def check_tensors(floating: dict[str, Tensor | None], integers: dict[str, Tensor] | None = None) -> None:
    """ValueError unless all are on one device, of a floating dtype or of int32 or int64; the absent are left out."""
    first = None
    for tensors, whole in ((floating, False), (integers or {}, True)):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if not (tensor.dtype in INTEGERS if whole else tensor.is_floating_point()):
                wanted = "int32 or int64" if whole else "of a floating dtype"
                raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")
            if first is None:
                first = name, tensor.device
            if tensor.device != first[1]:
                raise ValueError(
                    f"all tensors must be on one device, got {first[0]} on {first[1]}, {name} on {tensor.device}"
                )


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as `expand` leaves them: such a tensor cannot be written in place."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_range(name: str, values: Tensor, low: int, high: int, asked: bool) -> None:
    """ValueError unless all of `values` are in low..high. Looked into on the CPU or where `asked`, never in a graph."""
    if _looks_into(values, asked) and values.numel():
        least, most = (int(x) for x in torch.aminmax(values))
        if least < low or most > high:
            raise ValueError(f"{name} must be in {low}..{high}, got values in {least}..{most}")


def check_same(name: str, ours: Tensor, theirs: Tensor, asked: bool) -> None:
    """ValueError unless two tensors of one shape are equal; as `check_range`."""
    if ours is not theirs and _looks_into(ours, asked) and not torch.equal(ours, theirs):
        raise ValueError(f"{name} differ")


def check_offsets(offsets: Tensor, total: int, max_length: int, asked: bool) -> None:
    """ValueError unless offsets run from 0 to `total` without falling, by at most max_length; as `check_range`."""
    if _looks_into(offsets, asked):
        steps = offsets.diff()
        first, last = int(offsets[0]), int(offsets[-1])
        least, most = (int(x) for x in torch.aminmax(steps)) if steps.numel() else (0, 0)
        if first != 0 or last != total or least < 0 or most > max_length:
            raise ValueError(
                f"offsets must run from 0 to the {total} tokens without falling, by at most max_length={max_length}; "
                f"they run from {first} to {last} in steps of {least}..{most}"
            )


def _looks_into(values: Tensor, asked: bool) -> bool:
    return (asked or values.device.type == "cpu") and not torch.compiler.is_compiling()
