"""V-JEPA 2's attention with rotary positions: both rotated at once, before our kernel.

The published code rotates queries and keys apart, and works out the same angles for every head. Here queries and keys
are one tensor, and all heads share their angles. The rotation itself is the module's own function, so that its numbers
are those of the version at hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.patch.attention import arguments, attend_apart, curious, dropout_of, scale_of
from fastjepa.patch.report import Change, Finding
from fastjepa.patch.swapping import fall_back, like, numbers, stock_forward, swapped

VIDEO = ["x", "mask", "attn_mask", "T", "H_patches", "W_patches"]
ACTIONS = ["x", "mask", "attn_mask", "T", "H", "W", "action_tokens"]


def find_rotary_attention(where: str, module: Any, parent: nn.Module | None) -> Finding | None:
    """`RoPEAttention` and `ACRoPEAttention`, by their qkv, proj and `separate_positions`."""
    if not hasattr(module, "qkv") or not hasattr(module, "separate_positions"):
        return None
    what, takes = type(module).__name__, arguments(module)
    lacks = [n for n in _NEEDED if not hasattr(module, n)]
    if _ROTATE not in stock_forward(module).__globals__:
        lacks.append(f"function {_ROTATE}")
    if lacks or takes not in (VIDEO, ACTIONS):
        has = f"lacks {', '.join(lacks)}" if lacks else f"takes {', '.join(takes)}"
        return Finding("attention", where, what, reason=f"{has}: a version of V-JEPA 2's attention that is not known")
    if module.is_causal:
        return Finding("attention", where, what, reason="is causal, and the kernel has no mask")
    forward, calls = (_video, _video_calls) if takes == VIDEO else (_actions, _action_calls)
    change = Change(module, "__class__", type(module), swapped(type(module), {"forward": forward}))
    covers = numbers(*module.qkv.parameters(), *module.proj.parameters())
    return Finding("attention", where, what, (change,), "", covers, module, calls(module))


_ROTATE = "rotate_queries_or_keys"
_NEEDED = (
    "num_heads", "head_dim", "scale", "proj", "attn_drop", "proj_drop", "proj_drop_prob", "use_sdpa", "is_causal",
    "grid_size", "d_dim", "h_dim", "w_dim",
)  # fmt: skip


def _video(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    T: int | None = None,  # noqa: N803
    H_patches: int | None = None,  # noqa: N803
    W_patches: int | None = None,  # noqa: N803
) -> Tensor:
    if reason := curious(self):
        fall_back(self, reason)
        return stock_forward(self)(self, x, mask, attn_mask, T, H_patches, W_patches)
    ids = torch.arange(x.shape[1], device=x.device) if mask is None else mask.unsqueeze(1)
    return _attend(self, x, self.separate_positions(ids, H_patches, W_patches), attn_mask)


def _actions(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    T: int | None = None,  # noqa: N803
    H: int | None = None,  # noqa: N803
    W: int | None = None,  # noqa: N803
    action_tokens: int = 0,
) -> Tensor:
    if reason := curious(self):
        fall_back(self, reason)
        return stock_forward(self)(self, x, mask, attn_mask, T, H, W, action_tokens)
    assert isinstance(T, int)  # the published module needs these too
    assert isinstance(H, int)
    assert isinstance(W, int)
    ids = torch.arange(T * H * W, device=x.device) if mask is None else mask.unsqueeze(1)
    frame, row, column = self.separate_positions(ids, H, W)
    row, column = row * (self.grid_size / H), column * (self.grid_size / W)
    if (
        action_tokens
    ):  # they stand before the patches of their frame, in its time and at the origin, where nothing turns
        row, column = (F.pad(p.view(T, H * W), (action_tokens, 0)).flatten() for p in (row, column))
        frame = torch.arange(T, device=x.device, dtype=row.dtype).repeat_interleave(action_tokens + H * W)
    return _attend(self, x, (frame, row, column), attn_mask)


def _attend(module: Any, x: Tensor, positions: tuple[Tensor, ...], attn_mask: Tensor | None) -> Tensor:
    """Shapes: x [B, N, D]; positions of frame, row and column [N] or [B, 1, N] -> [B, N, D]."""
    rotate = stock_forward(module).__globals__[_ROTATE]
    heads = module.num_heads
    qk, v = module.qkv(x).split((2 * x.shape[-1], x.shape[-1]), dim=-1)
    qk, v = (t.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for t in (qk, v))  # [B, 2H, N, d], [B, H, N, d]
    widths = (module.d_dim, module.h_dim, module.w_dim)
    *axes, rest = qk.split((*widths, module.head_dim - sum(widths)), dim=-1)
    turned = [rotate(part, pos=position) for part, position in zip(axes, positions, strict=True)]
    q, k = torch.cat([*turned, rest], dim=-1).split(heads, dim=1)
    scale, dropout = scale_of(module), dropout_of(module)
    if attn_mask is not None:  # the published code takes PyTorch's attention then, as with use_sdpa
        scale, dropout = None, module.proj_drop_prob
    y = attend_apart(q, k, v, scale, dropout, attn_mask)
    return module.proj_drop(module.proj(y.flatten(2)))


def _video_calls(module: Any) -> tuple[tuple[Any, ...], ...]:
    """Whole frames, and some patches of two."""
    area = module.grid_size**2
    some = torch.arange(0, 2 * area, max(1, 2 * area // 6), device=module.qkv.weight.device).repeat(2, 1)
    whole = ((like(module, 2, area, module.qkv.in_features),),) if area <= 1024 else ()
    return ((like(module, 2, some.shape[1], module.qkv.in_features), some), *whole)


def _action_calls(module: Any) -> tuple[tuple[Any, ...], ...]:
    """Two frames of 2 x 3 patches without and with two action tokens, and some patches of them."""
    some, width = torch.tensor([[0, 2, 5, 9], [1, 3, 4, 10]], device=module.qkv.weight.device), module.qkv.in_features
    return (
        (like(module, 2, 12, width), None, None, 2, 2, 3, 0),
        (like(module, 2, 16, width), None, None, 2, 2, 3, 2),
        (like(module, 2, 4, width), some, None, 2, 2, 3, 0),
    )
