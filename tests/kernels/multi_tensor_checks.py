"""What the tests of the multi-tensor kernels share: tensors anywhere in memory, and rounding as on a chip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.row_checks import DEVICE, relative_error

GUARD = 5  # elements before a tensor that starts at an odd place, and after every tensor


def round_as_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 to bf16, and to 8 bits it drops carries; make it round to nearest even, as chips do."""
    convert = interpreter._convert_float

    def converted(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(np.array(x, dtype=np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


class Placed:
    """A tensor amid memory of its own, aligned to 16 bytes or off by one element.

    Around what is written lie numbers and around what is only read lie NaNs, so that a step too far changes something.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype, aligned: bool = True, written: bool = True):
        before = 0 if aligned else 1
        around = 77.0 if written else float("nan")
        self.memory = torch.full((before + values.numel() + GUARD,), around, dtype=dtype, device=DEVICE)
        self.inside = slice(before, before + values.numel())
        self.tensor = self.memory[self.inside].view(values.shape)
        self.tensor.copy_(values)

    def assert_surroundings_untouched(self) -> None:
        """Nothing was written before the tensor or after it."""
        outside = torch.cat([self.memory[: self.inside.start], self.memory[self.inside.stop :]])
        assert (outside == 77.0).all()


def error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The relative error of many tensors as one."""
    return relative_error(*(torch.cat([t.detach().double().flatten() for t in ts]) for ts in (got, exact)))
