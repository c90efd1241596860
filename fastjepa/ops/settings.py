"""What can be chosen about the operations: the backend of attention, and whether values of indices are checked."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

ATTENTION_BACKENDS = ("auto", "triton", "flash-attn", "xformers", "sdpa", "reference")
_MODULES = {"triton": "triton", "flash-attn": "flash_attn", "xformers": "xformers"}


@dataclass
class Settings:
    """The choices in force; see `configure`."""

    attention: str = "auto"
    check_values: bool = False


current = Settings()


class configure:  # noqa: N801 - called as a function, like torch.no_grad
    """Choose how the operations run, from here on or within a `with` block.

    Arguments:
        attention: the backend of `ragged_attention`. "auto": our kernel for CUDA tensors, "reference" for others.
            "triton": our kernel. "flash-attn", "xformers": those packages, where installed. "sdpa": what PyTorch has,
            `torch.nn.attention.varlen` for 16-bit CUDA tensors and scaled_dot_product_attention elsewhere.
            "reference": scaled_dot_product_attention over sequences padded to the longest. One that is asked for by
            name either runs or raises; only "auto" chooses. `backends()` and `fastjepa doctor` say what runs.
        check_values: look into indices and offsets and raise a ValueError that quotes what is out of range. On CUDA
            this waits for the device at every operation, so it is off unless asked for, and then costs nothing;
            tensors on the CPU are always looked into.

    Raises:
        ValueError: an unknown backend, or one whose package is not installed.

    >>> with configure(attention="sdpa"):
    ...     current.attention
    'sdpa'
    >>> current.attention
    'auto'
    """

    def __init__(self, *, attention: str | None = None, check_values: bool | None = None):
        self._before = (current.attention, current.check_values)
        if attention is not None:
            if attention not in ATTENTION_BACKENDS:
                raise ValueError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {attention!r}")
            module = _MODULES.get(attention)
            if module and importlib.util.find_spec(module) is None:
                raise ValueError(f"attention={attention!r} needs that package: pip install {attention}")
            current.attention = attention
        if check_values is not None:
            current.check_values = check_values

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        current.attention, current.check_values = self._before


def looks_into(values: Tensor) -> bool:
    """Whether an operation may read `values`: on the CPU, or where asked for; never in a graph."""
    return (current.check_values or values.device.type == "cpu") and not torch.compiler.is_compiling()


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """ValueError unless all of `values` are in low..high; where `looks_into` says so."""
    if looks_into(values) and values.numel():
        least, most = (int(x) for x in torch.aminmax(values))
        if least < low or most > high:
            raise ValueError(f"{name} must be in {low}..{high}, got values in {least}..{most}")


def check_offsets(offsets: Tensor, total: int, max_length: int) -> None:
    """ValueError unless offsets run from 0 to `total` without falling, by at most max_length; as `check_range`."""
    if looks_into(offsets):
        steps = offsets.diff()
        first, last = int(offsets[0]), int(offsets[-1])
        least, most = (int(x) for x in torch.aminmax(steps)) if steps.numel() else (0, 0)
        if first != 0 or last != total or least < 0 or most > max_length:
            raise ValueError(
                f"offsets must run from 0 to the {total} tokens without falling, by at most max_length={max_length}; "
                f"they run from {first} to {last} in steps of {least}..{most}"
            )
