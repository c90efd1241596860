"""Attention of other codebases: a `qkv` Linear, heads, a `proj` Linear and nothing else, on our kernel.

Two forms are known by what they give: the output alone, or (output, map) inside of a block that wants the map only when
it is asked. Attention that rotates queries and keys is in `rotary`, that of transformers in `registry`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.linear import is_hooked
from fastjepa.ops import library
from fastjepa.patch.report import Change, Finding
from fastjepa.patch.swapping import fall_back, identities, is_swapped, like, reads, stock_forward, swapped

_NORMS = ("q_norm", "k_norm")  # of queries and keys, within each head


def attend(qkv: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Attention of each image over its own tokens. Shapes: qkv [B, N, 3, H, d] -> [B, N, H * d]."""
    batch, count = qkv.shape[:2]
    if not library.takes_kernels(qkv):  # without looking into offsets that are right
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2).flatten(2)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * count
    return ops.ragged_attention(qkv.flatten(0, 1), offsets, count, scale, dropout).flatten(1).unflatten(0, (batch, -1))


def attend_apart(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, mask: Tensor | None = None
) -> Tensor:
    """The same of queries, keys and values apart, packed for the kernel; PyTorch's own where there is a mask.

    Shapes: q, k, v [B, H, N, d] -> [B, N, H, d].
    """
    if mask is None and library.takes_kernels(q) and q.shape == k.shape:
        qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2)  # [B, N, 3, H, d]
        return attend(qkv, scale, dropout).unflatten(-1, (q.shape[1], -1))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale).transpose(1, 2)


def find_qkv_attention(where: str, module: Any, parent: nn.Module | None) -> Finding | None:
    """Attention with `qkv`, `proj` and `num_heads`, and what else goes by that name and is not known."""
    what = type(module).__name__
    linears = [n for n, m in module.named_children() if isinstance(m, nn.Linear)]
    if not {"qkv", "proj"} <= set(linears) or not hasattr(module, "num_heads"):
        named = "attention" in what.lower() or what.lower().endswith("attn")
        if not named or not (linears or next(module.parameters(recurse=False), None) is not None):
            return None
        reason = f"has {_listed(linears)}, and known are qkv, proj and num_heads"
        return Finding("attention", where, what, reason=reason)
    if reason := _unknown(module):
        return Finding("attention", where, what, reason=reason)
    x = like(module, 2, 5, module.qkv.in_features)
    try:
        given = stock_forward(module)(module, x)
    except Exception as error:  # whatever its code raises for a call that is not meant
        return Finding("attention", where, what, reason=f"does not take {list(x.shape)} alone: {error}")
    covers = identities(*module.qkv.parameters(), *module.proj.parameters())
    if isinstance(given, Tensor):
        change = Change(module, "__class__", type(module), swapped(type(module), {"forward": _plain(module)}))
        return Finding("attention", where, what, (change,), "", covers, module, ((x,),))
    if reason := _unknown_block(module, parent):
        return Finding("attention", where, what, reason=reason)
    assert parent is not None
    changes = (
        Change(module, "__class__", type(module), swapped(type(module), {"forward": _mapped(type(module))})),
        Change(parent, "__class__", type(parent), swapped(type(parent), {"forward": _block(type(parent))})),
    )
    return Finding("attention", where, what, changes, "", covers, parent, ((x,),))


def _plain(module: nn.Module) -> Any:
    """A forward for attention that gives its output alone."""
    stock, (first, *names) = type(module), arguments(module)
    ignored = {n for n in names if not reads(stock.forward, n)} | {"grid_size"}  # that of a rotary embedding

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        others = dict(zip([first, *names], args, strict=False)) | kwargs
        x = others.pop(first)
        reason = _wish(others, ignored) or curious(self)
        if reason:
            fall_back(self, reason)
            return stock.forward(self, *args, **kwargs)
        return _output(self, x)

    return forward


def _mapped(stock: type[nn.Module]) -> Any:
    """A forward for attention that gives (output, map): its own, but for a block that says it wants no map."""

    def forward(self: Any, x: Tensor, need_map: bool = True) -> tuple[Tensor, Tensor | None]:
        reason = "its attention map is asked for" if need_map else curious(self)
        if reason:
            fall_back(self, reason)
            return stock.forward(self, x)
        return _output(self, x), None

    return forward


def _block(stock: type[nn.Module]) -> Any:
    """A forward for the block around it; residual and second norm are one pass where both are ours."""

    def forward(self: Any, x: Tensor, return_attention: bool = False) -> Tensor:
        if return_attention or is_hooked(self.attn):
            return stock.forward(self, x, return_attention)  # its attention makes a map, and says so
        attended = self.drop_path(self.attn(self.norm1(x), need_map=False)[0])
        y, x = _add_norm(self.norm2, attended, x)
        return x + self.drop_path(self.mlp(y))

    return forward


def _add_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual), for a linear map, and the sum."""
    if not (library.takes_kernels(x) and is_swapped(norm) and isinstance(norm, nn.LayerNorm)) or is_hooked(norm):
        total = residual + x
        return norm(total), total
    y, total = ops.add_layer_norm(x.flatten(0, -2), residual.flatten(0, -2), norm.weight, norm.bias, norm.eps)
    return y.view(x.shape), total.view(x.shape)


def _output(module: Any, x: Tensor) -> Tensor:
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))  # [B, N, 3, H, d]
    scale, dropout = scale_of(module), dropout_of(module)
    norms = [getattr(module, n, nn.Identity()) for n in _NORMS]
    if all(isinstance(norm, nn.Identity) for norm in norms):
        y = module.proj(attend(qkv, scale, dropout))
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (norm(t) for norm, t in zip(norms, (q, k), strict=True))
        y = module.proj(attend_apart(q, k, v, scale, dropout).flatten(2))
    return module.proj_drop(y) if hasattr(module, "proj_drop") else y


def scale_of(module: Any) -> float | None:
    """What queries are multiplied by. V-JEPA 2 leaves that to PyTorch where `use_sdpa`, whatever its `scale` is."""
    return None if getattr(module, "use_sdpa", False) else module.scale


def dropout_of(module: Any) -> float:
    """The probability of dropping a weight now. V-JEPA 2 drops by `proj_drop_prob` where `use_sdpa`, even in eval."""
    if getattr(module, "use_sdpa", False):
        return module.proj_drop_prob
    drop = getattr(module, "attn_drop", 0.0)
    if isinstance(drop, nn.Module):
        return drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0
    return drop if module.training else 0.0


def _wish(others: Mapping[str, Any], ignored: set[str]) -> str:
    """Which argument asks for more than attention over all tokens, "" where none does."""
    asked = [n for n, v in others.items() if n not in ignored and v is not None and not (isinstance(v, int) and not v)]
    return f"it was given {', '.join(asked)}" if asked else ""


def curious(module: Any) -> str:
    """What of a module's own forward someone wants to see, "" where nobody does."""
    drop = getattr(module, "attn_drop", None)
    return "a hook on attn_drop wants the map" if isinstance(drop, nn.Module) and is_hooked(drop) else ""


def _unknown(module: Any) -> str:
    """What keeps an attention with qkv and proj from being what the kernel computes, "" where nothing does."""
    heads, qkv, proj = module.num_heads, module.qkv, module.proj
    if not isinstance(heads, int) or heads < 1 or proj.in_features % heads or qkv.out_features != 3 * proj.in_features:
        return f"qkv gives {qkv.out_features} numbers, and not 3 for each of proj's {proj.in_features} by {heads} heads"
    if not isinstance(getattr(module, "scale", None), int | float):
        return "has no number `scale`"
    if getattr(module, "use_sdpa", False) and not hasattr(module, "proj_drop_prob"):
        return "has use_sdpa and no proj_drop_prob: a version of V-JEPA 2 that is not known"
    known = {"qkv": nn.Linear, "proj": nn.Linear, "attn_drop": nn.Dropout, "proj_drop": nn.Dropout}
    others = {n: m for n, m in module.named_children() if n not in _NORMS}
    foreign = [n for n, m in others.items() if not isinstance(m, known.get(n, nn.Identity) | nn.Identity)]
    foreign += [n for n, _ in module.named_parameters(recurse=False)]
    if foreign:
        return f"has {', '.join(foreign)} besides qkv and proj, of which the kernel knows nothing"
    if getattr(module, "is_causal", False):
        return "is causal, and the kernel has no mask"
    return "takes its rotary embedding as an argument" if "rope" in arguments(module) else ""


def _unknown_block(module: nn.Module, parent: Any) -> str:
    """What keeps the block around an attention that gives (output, map) from being known."""
    if arguments(module) != ["x"]:
        return f"gives an attention map, and takes {_listed(arguments(module))} where x is known"
    if parent is None:
        return "gives an attention map, and no block around it says that it is not wanted"
    name = type(parent).__name__
    parts = ("norm1", "attn", "drop_path", "norm2", "mlp")
    lacks = [n for n in parts if not isinstance(getattr(parent, n, None), nn.Module)]
    if lacks or parent.attn is not module:
        return f"gives an attention map, and its block {name} has no {_listed(lacks or ['attn'])}"
    if is_swapped(parent) or arguments(parent) != ["x", "return_attention"]:
        return f"gives an attention map, and {name}.forward takes {_listed(arguments(parent))}, not x, return_attention"
    return ""


def arguments(module: nn.Module) -> list[str]:
    """Names of what its own forward takes, but for self."""
    return list(inspect.signature(stock_forward(module)).parameters)[1:]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
