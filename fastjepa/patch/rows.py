"""LayerNorm and the GELU-MLP of other codebases, on the row kernels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.linear import is_hooked
from fastjepa.ops import library
from fastjepa.patch.report import Change, Finding
from fastjepa.patch.swapping import identities, like, stock_forward, swapped


def find_layer_norm(where: str, module: nn.Module, parent: nn.Module | None) -> Finding | None:
    """An `nn.LayerNorm`, or a class derived from it, over the last dimension."""
    if not isinstance(module, nn.LayerNorm):
        return None
    what = type(module).__name__
    if len(module.normalized_shape) != 1:
        return Finding("layer_norm", where, what, reason=f"normalises over {len(module.normalized_shape)} dimensions")
    if module.weight is None or module.bias is None:
        return Finding("layer_norm", where, what, reason="has no weight or no bias, and the kernel applies both")
    if getattr(module, "_fast_norm", False):
        return Finding("layer_norm", where, what, reason="has timm's fast norm on, which gives other dtypes")
    stock = type(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not library.takes_kernels(x) or x.dim() < 2:
            return stock.forward(self, x)
        # Where autocast is on, torch's LayerNorm gives fp32 on CUDA.
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.float32 if autocast else x.dtype
        y, _ = ops.add_layer_norm(x.flatten(0, -2), None, self.weight, self.bias, self.eps, dtype)
        return y.view(x.shape)

    change = Change(module, "__class__", stock, swapped(stock, {"forward": forward}))
    covers = identities(module.weight, module.bias)
    return Finding(
        "layer_norm", where, what, (change,), "", covers, module, ((like(module, 2, 5, module.normalized_shape[0]),),)
    )


def find_mlp(where: str, module: nn.Module, parent: nn.Module | None) -> Finding | None:
    """fc1, an activation, fc2, and dropout between or behind them; or the first half alone, as `dense` and a GELU."""
    what, stock = type(module).__name__, type(module)
    fc1, fc2 = getattr(module, "fc1", getattr(module, "dense", None)), getattr(module, "fc2", None)
    if not isinstance(fc1, nn.Linear) or (hasattr(module, "fc1") and not isinstance(fc2, nn.Linear)):
        return None
    others = {n: m for n, m in module.named_children() if m is not fc1 and m is not fc2}
    activations = {n: m for n, m in others.items() if not isinstance(m, nn.Dropout | nn.Identity)}
    known = len(activations) == 1 and _is_gelu(next(iter(activations.values())))
    if fc2 is None and (not known or len(others) > 1):
        return None
    dropouts = [n for n, m in others.items() if isinstance(m, nn.Dropout) and n not in ("drop", "drop1", "drop2")]
    reason = ""
    if not known:
        reason = f"fastjepa knows fc1, exact GELU, fc2, but between them here is {_listed(activations)}"
    elif fc1.bias is None:
        reason = "its first linear has no bias, and the kernel adds one"
    elif dropouts:
        reason = f"has a dropout {dropouts[0]!r} of which nothing says where it belongs"
    elif len(_required(module)) != 1:
        reason = f"its forward takes {', '.join(_required(module)) or 'nothing'}, and not one tensor"
    if reason:
        return Finding("gelu", where, what, reason=reason)
    change = Change(module, "__class__", stock, swapped(stock, {"forward": _mlp(stock, *activations)}))
    covers = identities(*fc1.parameters(), *(fc2.parameters() if fc2 is not None else ()))
    return Finding("gelu", where, what, (change,), "", covers, module, ((like(module, 2, 5, fc1.in_features),),))


def _mlp(stock: Any, act: str) -> Any:
    """A forward that adds the first bias and applies GELU in one pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        fc1 = self.fc1 if hasattr(self, "fc1") else self.dense
        if not library.takes_kernels(x) or x.dim() < 2 or is_hooked(fc1, getattr(self, act)):
            return stock.forward(self, x)
        hidden = F.linear(x, fc1.weight)
        hidden = ops.bias_gelu(hidden.flatten(0, -2), fc1.bias).view(hidden.shape)
        if not hasattr(self, "fc2"):
            return hidden
        inner, outer = (getattr(self, n, getattr(self, "drop", None)) for n in ("drop1", "drop2"))
        y = self.fc2(hidden if inner is None else inner(hidden))
        return y if outer is None else outer(y)

    return forward


def _is_gelu(activation: nn.Module) -> bool:
    """Whether it is the exact GELU, by what it gives: the tanh form is 5e-4 away."""
    if next(activation.parameters(), None) is not None:
        return False
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    try:
        return torch.allclose(activation(x), F.gelu(x), rtol=0, atol=1e-9)
    except (RuntimeError, TypeError, ValueError):
        return False


def _listed(modules: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name} {type(m).__name__}" for name, m in modules.items()) or "no module"


def _required(module: nn.Module) -> list[str]:
    parameters = list(inspect.signature(stock_forward(module)).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
