"""The tensors and hyperparameters of `adamw_ema`, as rows of its tables. For the columns, see there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .multi_tensor import DTYPE_CODES, VECTOR_BYTES, addresses, is_aligned, lie_alike

# Dtype codes of p, of its gradient, of t and of the copies: the official recipe, bf16 gradients, and bf16 throughout.
PATHS: tl.constexpr = tl.constexpr(((0, 0, 0, 2), (0, 2, 0, 2), (2, 2, 2, 2)))
N_PATHS: tl.constexpr = tl.constexpr(len(PATHS.value))
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

    def addresses(self) -> list[tuple[int, torch.dtype | None]]:
        """Where all of them lie."""
        return addresses([tensor for row in self.rows() for tensor in row])

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

    def gradient_table(self, grads: Sequence[Tensor | None]) -> list[list[int]]:
        """The rows of the gradient table.

        Raises:
            ValueError: a gradient of a parameter that has no moments.
        """
        rows = []
        for i, (row, grad) in enumerate(zip(self.rows(), grads, strict=True)):
            if grad is None:
                rows.append([0, 0, 0, _path(row, None)])
                continue
            if row[1] is None or row[2] is None:
                raise ValueError(f"parameter {i} has a gradient and no moments")
            place = grad.data_ptr() or VECTOR_BYTES  # an empty gradient lies nowhere, and its step counts
            rows.append([place, DTYPE_CODES[grad.dtype], is_aligned(grad), _path(row, grad)])
        return rows


def laid_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient, copied if it lies unlike its parameter.

    Raises:
        ValueError: a gradient that is sparse, or not of the parameter's shape, or not fp32, fp16 or bf16.
    """
    if grad.layout != torch.strided or grad.dtype not in DTYPE_CODES or grad.shape != param.shape:
        raise ValueError(f"gradient {list(grad.shape)} {grad.dtype} {grad.layout} for a parameter {list(param.shape)}")
    return grad if lie_alike(param, grad) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _code(tensor: Tensor | None) -> int | None:
    return None if tensor is None else DTYPE_CODES[tensor.dtype]


def _path(row: Sequence[Tensor | None], grad: Tensor | None) -> int:
    """The first of `PATHS` that fits: every tensor aligned, and of the dtype wanted or not there."""
    param, _, _, target, param_copy, target_copy = row
    found = [_code(t) for t in (param, grad, target, param_copy, target_copy)]
    if is_aligned(*row, grad):
        for i, (p, g, t, c) in enumerate(PATHS.value):
            if all(code in (None, wanted) for code, wanted in zip(found, (p, g, t, c, c), strict=True)):
                return i
    return N_PATHS.value
