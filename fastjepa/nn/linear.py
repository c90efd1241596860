"""Linear layers that, under autocast, take 16-bit copies of their weights which the optimizer keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastjepa.copies import is_current, set_current
from fastjepa.ops.rows import linear_dtype


class Linear(nn.Linear):
    """`torch.nn.Linear` which need not cast its weight and bias at every use: see `keep_copies`.

    With copies, and where autocast asks for their dtype, weight and bias are taken from them as long as they are
    current. Otherwise, and under `torch.compile`, this is `nn.Linear`.

    Shapes: [..., D] -> [..., D'].
    """

    copies: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight^T + bias."""
        return self._apply_to(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x @ weight^T, for whoever adds the bias."""
        return self._apply_to(x, None)

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = linear_dtype(x.device, x.dtype)
        if self.copies is None or self.copies[0].dtype != dtype or torch.compiler.is_compiling():
            return F.linear(x, self.weight, bias)
        weight16 = _current(self.copies[0], self.weight)
        bias16 = None if bias is None or self.copies[1] is None else _current(self.copies[1], bias)
        x = x.to(dtype)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _CopiedLinear.apply(x, self.weight, bias, weight16, bias16)
        return F.linear(x, weight16, bias16)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies, which the optimizer of this instance keeps."""
        return {key: value for key, value in super().__getstate__().items() if key != "copies"}


def keep_copies(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[Tensor, Tensor]:
    """Give every `Linear` of one live model copies of its weight and bias in `dtype`; returns {parameter: copy}.

    Hand that to `AdamWEMA(low_precision=...)`, which rewrites them in its own pass at each step. Where nobody does, and
    a parameter has changed, it is cast at each use as autocast casts it. Outputs are those of autocast; gradients of
    weights come in fp32 straight from the product's sums on CUDA, where autocast rounds them to 16 bits.

    >>> layer = Linear(2, 1, bias=False)
    >>> [copy.dtype for copy in keep_copies(layer).values()]
    [torch.bfloat16]
    """
    found: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.dtype != dtype:
            copies = [None if p is None else p.detach().to(dtype) for p in (module.weight, module.bias)]
            for parameter, copy in zip((module.weight, module.bias), copies, strict=True):
                if copy is not None:
                    found[parameter] = copy
                    set_current(copy, parameter)
            module.copies = copies[0], copies[1]  # type: ignore[assignment]
    return found


def _current(copy: Tensor, parameter: Tensor) -> Tensor:
    return copy if is_current(copy, parameter) else parameter.detach().to(copy.dtype)


class _CopiedLinear(torch.autograd.Function):
    """F.linear(x, weight16, bias16), whose gradients are those of weight and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight16, bias16):
        ctx.save_for_backward(x, weight16)
        ctx.dtype = weight.dtype
        return F.linear(x, weight16, bias16)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight16 = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight16
        rows = dy.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            dw = product(rows.t(), x.flatten(0, -2), ctx.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=ctx.dtype)
        return dx, dw, db, None, None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on CUDA fp32 is what the tensor cores have summed up, never rounded to 16 bits.

    >>> product(torch.eye(2).bfloat16(), torch.eye(2).bfloat16(), torch.float32).dtype
    torch.float32
    """
    if (a.is_cuda or a.is_meta) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)  # which PyTorch has for no processor
    return (a @ b).to(dtype)
