"""The tensors and hyperparameters of `adamw_ema`, as rows of its tables. For the columns, see there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .multi_tensor import DTYPE_CODES, VECTOR_BYTES, is_aligned, lie_alike

# Dtype codes of p, of its gradient, of t and of the copies: the official recipe, bf16 gradients, and bf16 throughout.
_PATHS = ((0, 0, 0, 2), (0, 2, 0, 2), (2, 2, 2, 2))
PATHS: tl.constexpr = tl.constexpr(tuple(code for path in _PATHS for code in path))
N_PATHS: tl.constexpr = tl.constexpr(len(_PATHS))
TENSOR_ROW: tl.constexpr = tl.constexpr(12)


class Hyperparameters(NamedTuple):
    """One parameter group's; `lr` may be a tensor of one element on the parameters' device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def row(self) -> list[float]:
        """The group's row; a learning rate on the device is copied into its place there."""
        logs = [math.log(beta) if beta else -math.inf for beta in (self.beta1, self.beta2)]
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        return [lr, self.weight_decay, self.beta1, self.beta2, self.eps, *logs, 0.0]


@dataclass(frozen=True)
class AdamWEMATensors:
    """n parameters, the group of each by its number, and what goes with each, None where a parameter has none."""

    params: list[Tensor]
    groups: list[int]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    targets: list[Tensor | None]
    param_copies: list[Tensor | None]
    target_copies: list[Tensor | None]

    def rows(self) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]]:
        """(p, m, v, t, copy of p, copy of t) of each parameter."""
        lists = self.exp_avgs, self.exp_avg_sqs, self.targets, self.param_copies, self.target_copies
        return list(zip(self.params, *lists, strict=True))

    def obstacle(self) -> str | None:
        """Why the kernel cannot take these tensors, if it cannot."""
        device, seen = self.params[0].device, set()
        for i, row in enumerate(self.rows()):
            there = [t for t in row if t is not None]
            kinds = {type(t).__name__ for t in there if type(t) not in (Tensor, torch.nn.Parameter)}
            if kinds:
                return f"parameter {i} comes with {sorted(kinds)}, not plain tensors"
            if any(t.device != device for t in there):
                return f"parameter {i} comes with tensors on {sorted({str(t.device) for t in there})}, not {device}"
            if any(t.dtype not in DTYPE_CODES for t in there):
                return f"parameter {i} comes with dtypes {sorted({str(t.dtype) for t in there})}"
            if any(t.shape != row[0].shape or not lie_alike(row[0], t) for t in there):
                return f"parameter {i} and what goes with it have gaps in memory or different shapes or strides"
            if any(t is not None and t.dtype != row[0].dtype for t in row[1:3]):
                return f"parameter {i} is {row[0].dtype} and its moments are not"
            places = [t.data_ptr() for t in there if t.numel()]
            if len(set(places)) < len(places) or not seen.isdisjoint(places):
                return f"parameter {i} or what goes with it shares memory with another tensor"
            seen.update(places)
        return None

    def table(self) -> list[list[int]]:
        """The rows of the tensor table."""
        rows = []
        for group, row in zip(self.groups, self.rows(), strict=True):
            places = [0 if t is None else t.data_ptr() for t in row]
            codes = [_code(t) or 0 for t in (row[0], *row[3:])]
            rows.append([row[0].numel(), group, *places, *codes])
        return rows

    def paths(self) -> list[dict[torch.dtype | None, int]]:
        """For each parameter, the path for an aligned gradient of each dtype, or for none."""
        return [
            {dtype: _path(row, code) for dtype, code in ((None, None), *DTYPE_CODES.items())} for row in self.rows()
        ]

    def gradient_table(
        self, grads: Sequence[Tensor | None], paths: Sequence[dict[torch.dtype | None, int]]
    ) -> list[list[int]]:
        """The rows of the gradient table, with `paths()` from before.

        Raises:
            ValueError: a gradient of a parameter that has no moments, or one that is not fp32, fp16 or bf16.
        """
        rows = []
        for i, (param, m, grad, path) in enumerate(zip(self.params, self.exp_avgs, grads, paths, strict=True)):
            if grad is None:
                rows.append([0, 0, 0, path[None]])
                continue
            dtype, place = grad.dtype, grad.data_ptr()
            if m is None:
                raise ValueError(f"parameter {i} has a gradient and no moments")
            if dtype not in DTYPE_CODES or grad.shape != param.shape:
                raise ValueError(f"gradient {list(grad.shape)} {dtype} for parameter {i} {list(param.shape)}")
            aligned = place % VECTOR_BYTES == 0
            # An empty gradient lies nowhere, and its step counts.
            rows.append([place or VECTOR_BYTES, DTYPE_CODES[dtype], aligned, path[dtype] if aligned else N_PATHS.value])
        return rows


def laid_as(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, those copied that lie unlike their parameters.

    Raises:
        ValueError: a gradient that is sparse.
    """
    laid: list[Tensor | None] = []
    for param, grad in zip(params, grads, strict=True):
        if grad is None or (grad.layout is torch.strided and lie_alike(param, grad)):
            laid.append(grad)
        elif grad.layout is torch.strided:
            laid.append(torch.empty_like(param, dtype=grad.dtype).copy_(grad))
        else:
            raise ValueError(f"AdamWEMA does not take {grad.layout} gradients; one of shape {list(grad.shape)} is")
    return laid


def _code(tensor: Tensor | None) -> int | None:
    return None if tensor is None else DTYPE_CODES[tensor.dtype]


def _path(row: Sequence[Tensor | None], grad_code: int | None) -> int:
    """The first of `PATHS` that fits: every tensor aligned, and of the dtype wanted or not there."""
    param, _, _, target, param_copy, target_copy = row
    p, t, c, d = (_code(tensor) for tensor in (param, target, param_copy, target_copy))
    if is_aligned(*row):
        for i, (p_code, g_code, t_code, copy_code) in enumerate(_PATHS):
            pairs = ((p, p_code), (grad_code, g_code), (t, t_code), (c, copy_code), (d, copy_code))
            if all(code in (None, wanted) for code, wanted in pairs):
                return i
    return N_PATHS.value
