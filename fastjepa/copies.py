"""Low-precision copies of parameters: whether one holds what its parameter has now."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


def set_current(copy: Tensor, parameter: Tensor) -> None:
    """Note that `copy` holds what `parameter` has now."""
    copy.copied = weakref.ref(parameter), *_state(parameter)  # type: ignore[attr-defined]


def is_current(copy: Tensor, parameter: Tensor) -> bool:
    """Whether `copy` was written since `parameter` last changed, and lies where it lies.

    What goes past autograd's version counter is not seen: writing into `parameter.data`.
    """
    found: tuple[Any, ...] | None = getattr(copy, "copied", None)
    return found is not None and found[0]() is parameter and found[1:] == _state(parameter)


def _state(parameter: Tensor) -> tuple[int, int, int]:
    return parameter._version, parameter.data_ptr(), parameter.get_device()
