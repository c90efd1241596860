"""Looking into indices and offsets, which costs nothing on the CPU and a wait for the device on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def check_range(name: str, values: Tensor, low: int, high: int, asked: bool) -> None:
    """ValueError unless all of `values` are in low..high. Looked into on the CPU or where `asked`, never in a graph."""
    if _looks_into(values, asked) and values.numel():
        least, most = (int(x) for x in torch.aminmax(values))
        if least < low or most > high:
            raise ValueError(f"{name} must be in {low}..{high}, got values in {least}..{most}")


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
