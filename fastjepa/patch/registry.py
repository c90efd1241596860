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

from fastjepa.patch.attention import attend_apart
from fastjepa.patch.report import Change, Finding
from fastjepa.patch.swapping import ALREADY, fall_back, like, numbers, stock_forward

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
IMPLEMENTATION = "fastjepa"
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
    change = Change(module, "config", config, own)
    calls = ((like(module, 2, 5, width),),)
    return Finding("attention", where, what, (change,), "", numbers(*module.parameters()), module, calls)


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
    if reason:
        fall_back(module, reason)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return attend_apart(query, key, value, scaling, dropout), None


def _wants_map(module: Any) -> bool:
    """Whether a hook on the module is there for its map.

    Those of transformers itself stay for good once `output_attentions` was asked for; they collect while it is.
    """
    hooks = [*module._forward_hooks.values()]
    theirs = [h for h in hooks if getattr(h, "__module__", "") == _CAPTURING]
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    if len(theirs) < len(hooks) or (theirs and collector is None):
        return True
    return bool(theirs) and "attentions" in (collector.get() or ())


def stock_attention(module: Any) -> tuple[str, Callable[..., Any]]:
    """Name and function of the attention that the module's own config asks for, now."""
    space = inspect.unwrap(stock_forward(module)).__globals__
    name = getattr(module.config, _STOCK)._attn_implementation or "eager"
    return name, space[_EAGER] if name == "eager" else space[REGISTRY][name]
