"""transformers: our attention in its registry, taken by the attention modules of one model.

Modules that dispatch through `ALL_ATTENTION_FUNCTIONS` ask their `config` for a name. A patched module has a config of
its own that names ours: a config can be shared by several models, so it is never written to. Rotary embeddings and
projections are the module's own code.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastjepa.patch.attention import arguments, attend_apart
from fastjepa.patch.report import Change, Finding
from fastjepa.patch.swapping import ALREADY, fall_back, like, numbers, stock_forward, swapped

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
IMPLEMENTATION = "fastjepa"
_ASKED = "_fastjepa_asked"  # attribute of a module while it runs for a map
_CAPTURING = "transformers.utils.output_capturing"
_EAGER = "eager_attention_forward"  # a function beside each module, which no registry holds
_STOCK = "_fastjepa_stock"  # attribute of a patched module's config: the config that it replaces


def find_registry_attention(where: str, module: Any, parent: nn.Module | None) -> Finding | None:
    """A module of transformers whose forward looks its attention up by `config._attn_implementation`."""
    forward = inspect.unwrap(stock_forward(module))
    if REGISTRY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    what, registry = type(module).__name__, forward.__globals__[REGISTRY]
    config: Any = getattr(module, "config", None)
    lacks = [n for n in ("_attn_implementation", "_attn_implementation_internal") if not hasattr(config, n)]
    if not hasattr(type(registry), "register") or lacks or _EAGER not in forward.__globals__:
        wanted = f"config with {', '.join(lacks)}" if lacks else f"{REGISTRY}.register and {_EAGER}"
        return Finding("attention", where, what, reason=f"no {wanted}: a version of transformers that is not known")
    if hasattr(config, _STOCK):
        return Finding("attention", where, what, reason=ALREADY)
    if getattr(module, "is_causal", False):
        return Finding("attention", where, what, reason="is causal, and the kernel has no mask")
    type(registry).register(IMPLEMENTATION, attention)
    own = copy.copy(config)
    own._attn_implementation_internal = IMPLEMENTATION
    setattr(own, _STOCK, config)
    width = next(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
    changes = [Change(module, "config", config, own)]
    if "output_attentions" in arguments(module):
        ours = swapped(type(module), {"forward": _telling(module)})
        changes.append(Change(module, "__class__", type(module), ours))
    calls = ((like(module, 2, 5, width),),)
    return Finding("attention", where, what, tuple(changes), "", numbers(*module.parameters()), module, calls)


def _telling(module: nn.Module) -> Callable[..., Any]:
    """A forward that passes on to `attention` whether a map is asked for, which versions before 5 keep from it."""
    stock, place = type(module), arguments(module).index("output_attentions")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("output_attentions", args[place] if len(args) > place else False):
            return stock.forward(self, *args, **kwargs)
        setattr(self, _ASKED, True)
        try:
            return stock.forward(self, *args, **kwargs)
        finally:
            delattr(self, _ASKED)

    return forward


def config_change(module: Any) -> Change | None:
    """What was done to the config of a module, None where nothing was."""
    own = vars(module).get("config")
    return Change(module, "config", getattr(own, _STOCK), own) if hasattr(own, _STOCK) else None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: [B, H, N, d] each -> ([B, N, H, d], no map).

    With a mask, causal order, keys of other tokens, or where a map is asked for, what the model takes without us.
    """
    name, stock = stock_attention(module)
    reason = ""
    if attention_mask is not None:
        reason = "it was given a mask"
    elif kwargs.get("is_causal") or query.shape != key.shape:
        reason = "it is causal" if kwargs.get("is_causal") else "its keys are not those of the same tokens"
    elif name == "eager" and (kwargs.get("output_attentions") or _wants_map(module)):
        reason = "its attention map is asked for, or a hook might want it"
    elif hasattr(module, _ASKED):
        reason = "its attention map is asked for"
        stock = space_of(module)[_EAGER] if name == "sdpa" else stock  # as such versions do
    if reason:
        fall_back(module, reason)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return attend_apart(query, key, value, scaling, dropout), None


def _wants_map(module: Any) -> bool:
    """Whether a hook on the module is there for its map.

    Those of transformers itself stay for good once `output_attentions` was asked for; they collect while it is. Before
    version 5 a forward is put on the module instead, for the time of the call.
    """
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return True
    hooks = [*module._forward_hooks.values()]
    theirs = [h for h in hooks if getattr(h, "__module__", "") == _CAPTURING]
    collector: Any = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    if len(theirs) < len(hooks) or (theirs and collector is None):
        return True
    return bool(theirs) and "attentions" in (collector.get() or ())


def space_of(module: Any) -> dict[str, Any]:
    """The namespace that the module's own forward was written in."""
    return inspect.unwrap(stock_forward(module)).__globals__


def stock_attention(module: Any) -> tuple[str, Callable[..., Any]]:
    """Name and function of the attention that the module's own config asks for, now."""
    space = space_of(module)
    name = getattr(module.config, _STOCK)._attn_implementation or "eager"
    return name, space[_EAGER] if name == "eager" else space[REGISTRY][name]
