"""How one live module comes to run another forward: it gets a class of its own, derived from its own class.

Neither the stock class nor any other instance changes, and parameters, buffers, hooks and state-dict keys stay where
they are. (`torch.nn.utils.parametrize` and FSDP2 do the same.) A deep copy is patched as its original is; a pickle
holds the stock module, so that whoever loads it needs nothing of ours.
"""

from __future__ import annotations

import copy
import dis
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.patch.report import Change

ALREADY = "is patched already; take that back first"
STOCK = "_fastjepa_stock"  # attribute of a patched class: the class that it replaces


class FallbackWarning(UserWarning):
    """A patched module ran the stock code for a call that ours cannot serve."""


def swapped(stock: type[nn.Module], methods: dict[str, Any]) -> type[nn.Module]:
    """A class derived from `stock` with these methods instead of its own."""

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        make, arguments, state, *_ = _parts(stock, self)
        copied = make(*arguments)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def reduce_as_stock(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = _parts(stock, self)
        return (make, tuple(stock if a is type(self) else a for a in arguments), *rest)

    namespace = {"__module__": stock.__module__, STOCK: stock, "__reduce_ex__": reduce_as_stock, **methods}
    if not hasattr(stock, "__deepcopy__"):
        namespace["__deepcopy__"] = deepcopy
    return type(f"Fast{stock.__name__}", (stock,), namespace)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is patched already."""
    return hasattr(type(module), STOCK)


def class_change(module: nn.Module) -> Change | None:
    """What was done to the class of a module, None where nothing was."""
    if not is_swapped(module):
        return None
    ours = next(c for c in type(module).__mro__ if STOCK in vars(c))
    return Change(module, "__class__", getattr(ours, STOCK), ours)


def stock_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward function of the module's own class, as it is written there."""
    return getattr(type(module), STOCK, type(module)).forward


def fall_back(module: nn.Module, reason: str) -> None:
    """Say that this call runs the stock code; once for each sentence, as warnings go, and not in graphs."""
    if not torch.compiler.is_compiling():
        name = getattr(type(module), STOCK, type(module)).__name__
        warnings.warn(f"{name} runs its own code for this call: {reason}", FallbackWarning, stacklevel=3)


def reads(function: Callable[..., Any], name: str) -> bool:
    """Whether a function's code ever reads its argument `name`."""
    loads = (i for i in dis.get_instructions(function) if i.opname.startswith("LOAD"))
    return any(name in (i.argval if isinstance(i.argval, tuple) else (i.argval,)) for i in loads)


def with_globals(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """A copy of a function that sees other values for these global names.

    Without `__name__` among its globals torch.compile reads them where they are, and not in the module of that name.
    """
    space = {k: v for k, v in function.__globals__.items() if k != "__name__"} | names
    code, name, defaults, closure = function.__code__, function.__name__, function.__defaults__, function.__closure__
    copied = types.FunctionType(code, space, name, defaults, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def identities(*tensors: Tensor | None) -> frozenset[int]:
    """Identities of tensors."""
    return frozenset(id(t) for t in tensors if t is not None)


def like(module: nn.Module, *shape: int) -> Tensor:
    """A random input of this shape, of the device and dtype of the module's parameters, always the same."""
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(parameter.device, parameter.dtype)


def _parts(stock: type[nn.Module], module: nn.Module) -> tuple[Any, ...]:
    """What the stock class says of how to make a module again, in the form that may name another class."""
    parts = stock.__reduce_ex__(module, 1)
    assert isinstance(parts, tuple)
    return parts
