"""Linear layers that, under autocast, take 16-bit copies of their weights which the optimizer keeps, or 8-bit ones."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from fastjepa import ops
from fastjepa.copies import is_current, set_current
from fastjepa.ops.fp8 import CAPABILITY
from fastjepa.ops.rows import linear_dtype

Kind = TypeVar("Kind", bound=nn.Module)


class Linear(nn.Linear):
    """`torch.nn.Linear` which need not cast its weight and bias at every use: see `keep_copies`.

    With copies, and where autocast asks for their dtype, weight and bias are taken from them as long as they are
    current. With `fp8` set (`set_fp8`), products that need no gradient are taken in 8 bits where autocast asks for
    bf16. Otherwise, and under `torch.compile`, this is `nn.Linear`.

    Shapes: [..., D] -> [..., D'].
    """

    copies: tuple[Tensor, Tensor | None] | None = None
    fp8 = False
    quantised: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight^T + bias."""
        return self._apply_to(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x @ weight^T, for whoever adds the bias."""
        return self._apply_to(x, None)

    def parameters_in(self, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in `dtype`, without gradients: the copies where they hold."""
        copies = self.copies if self.copies is not None and self.copies[0].dtype == dtype else (None, None)
        return _cast(weight, copies[0], dtype), None if bias is None else _cast(bias, copies[1], dtype)

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = linear_dtype(x.device, x.dtype)
        if self.fp8 and dtype == torch.bfloat16 and not self.trains(x) and not torch.compiler.is_compiling():
            return self._in_fp8(x, bias)
        if self.copies is None or self.copies[0].dtype != dtype or torch.compiler.is_compiling():
            return F.linear(x, self.weight, bias)
        weight16, bias16 = self.parameters_in(dtype, self.weight, bias)
        x = x.to(dtype)
        if self.trains(x):
            return _CopiedLinear.apply(x, self.weight, bias, weight16, bias16)
        return F.linear(x, weight16, bias16)

    def trains(self, x: Tensor) -> bool:
        """Whether a product with x is one that gradients may be asked of."""
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    def _in_fp8(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with both factors in 8 bits; the weight's are made anew where the weight has changed."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.quantised is None or not is_current(self.quantised[0], self.weight):
                self.quantised = ops.quantise_rows(self.weight)
                set_current(self.quantised[0], self.weight)
            rows = x.to(torch.bfloat16).flatten(0, -2)
            y = ops.quantised_linear(
                *ops.quantise_rows(rows), *self.quantised, None if bias is None else bias.to(torch.bfloat16)
            )
            return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies, which the optimizer of this instance keeps, and without what is made of the weight."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("copies", "quantised")}


def set_fp8(model: nn.Module, on: bool = True) -> int:
    """Have every `Linear` of one live model take in 8 bits those products that need no gradient; gives their number.

    That is for the target encoder, half of a step's work: `set_fp8(model.target_encoder)`. Rows of tokens and of
    weights are scaled each by its largest entry, and sums are fp32. It takes effect under bf16 autocast, and on CUDA
    for widths that are multiples of 16; elsewhere the layers are as before. A processor computes the same numbers, at
    no gain.

    Raises:
        ValueError: the model lies on a GPU without 8-bit floating numbers.
    """
    found = [module for module in model.modules() if isinstance(module, Linear)]
    for module in found:
        device = module.weight.device
        if on and device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
            raise ValueError(
                f"{torch.cuda.get_device_name(device)} has no 8-bit floating numbers: compute capability "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} or newer has (L40S, 4090, H100, H200, B200)"
            )
    for module in found:
        odd = module.weight.is_cuda and any(size % 16 for size in module.weight.shape)
        module.fp8, module.quantised = on and not odd, None
    return len(found)


def keep_copies(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[Tensor, Tensor]:
    """Give every `Linear` of one live model copies of its weight and bias in `dtype`; returns {parameter: copy}.

    Hand that to `AdamWEMA(low_precision=...)`, which rewrites them in its own pass at each step. Where nobody does, and
    a parameter has changed, it is cast at each use as autocast casts it. Outputs are those of autocast; gradients of
    weights come in fp32 straight from the product's sums on CUDA, where autocast rounds them to 16 bits. Layers that
    `set_fp8` was called for get none.

    >>> layer = Linear(2, 1, bias=False)
    >>> [copy.dtype for copy in keep_copies(layer).values()]
    [torch.bfloat16]
    """
    found: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.dtype != dtype and not module.fp8:
            copies = [None if p is None else p.detach().to(dtype) for p in (module.weight, module.bias)]
            for parameter, copy in zip((module.weight, module.bias), copies, strict=True):
                if copy is not None:
                    found[parameter] = copy
                    set_current(copy, parameter)
            module.copies = copies[0], copies[1]  # type: ignore[assignment]
    return found


def _cast(parameter: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    return copy if copy is not None and is_current(copy, parameter) else parameter.detach().to(dtype)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether some hook wants to see what goes in or out of one of these modules."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of `kind` itself, without hooks or a forward of somebody else's, so that it need not be called."""
    if type(module) is not kind or "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or _has_any_global_hook())


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
        dx = dy @ weight16 if ctx.needs_input_grad[0] else None
        dw, db = parameter_gradients(dy, x, ctx.dtype, *ctx.needs_input_grad[1:3])
        return dx, dw, db, None, None


def parameter_gradients(
    dy: Tensor, x: Tensor | None, dtype: torch.dtype, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias that are asked for."""
    rows = dy.flatten(0, -2)
    dw = product(rows.t(), x.flatten(0, -2), dtype) if of_weight and x is not None else None
    return dw, rows.sum(0, dtype=dtype) if of_bias else None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on CUDA fp32 is what the tensor cores have summed up, never rounded to 16 bits.

    >>> product(torch.eye(2).bfloat16(), torch.eye(2).bfloat16(), torch.float32).dtype
    torch.float32
    """
    if a.dtype != dtype == torch.float32 and (a.is_cuda or a.is_meta):
        return torch.mm(a, b, out_dtype=dtype)  # which PyTorch has for no processor
    return (a @ b).to(dtype)
