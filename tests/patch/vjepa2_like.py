"""Modules with the names and signatures of facebookresearch/vjepa2, written for these tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patch.ijepa_like import MLP


def apply_masks(x: Tensor, masks: list[Tensor], concat: bool = True) -> Any:
    """The tokens that each mask names."""
    found = [x.gather(1, m[..., None].repeat(1, 1, x.shape[-1])) for m in masks]
    return torch.cat(found) if concat else found


def rotate_queries_or_keys(x: Tensor, pos: Tensor) -> Tensor:
    """Pairs of neighbours turned by angles, whose frequencies run twice over the width."""
    half = x.shape[-1] // 2
    angles = pos.unsqueeze(-1) * 10000.0 ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
    sin, cos = (f(angles).repeat(1, 1, 1, 2) for f in (torch.sin, torch.cos))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """Without positions; takes those of the masked patches all the same, and ignores them."""

    def __init__(self, dim: int, num_heads: int, use_sdpa: bool = True, is_causal: bool = False, drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.proj_drop_prob = nn.Dropout(drop), nn.Dropout(drop), drop
        self.use_sdpa, self.is_causal = use_sdpa, is_causal

    def split(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        if attn_mask is not None or self.use_sdpa:
            p = self.proj_drop_prob
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, p, is_causal=self.is_causal)
        else:
            y = self.attn_drop((q @ k.mT * self.scale).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        return self.attend(*self.split(x), attn_mask)


class RoPEAttention(Attention):
    """Frame, row and column turn a third of each head's width each."""

    def __init__(self, dim: int, num_heads: int, grid_size: int = 4, **options: Any):
        super().__init__(dim, num_heads, **options)
        self.grid_size = grid_size
        self.d_dim = self.h_dim = self.w_dim = 2 * (self.head_dim // 3 // 2)

    def separate_positions(self, ids: Tensor, H_patches: int | None = None, W_patches: int | None = None):  # noqa: N803
        rows, columns = H_patches or self.grid_size, W_patches or self.grid_size
        return ids // (rows * columns), ids % (rows * columns) // columns, ids % columns

    def rotate(self, x: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        *axes, rest = x.split((*[self.d_dim] * 3, self.head_dim - 3 * self.d_dim), dim=-1)
        turned = [rotate_queries_or_keys(a, pos=p) for a, p in zip(axes, positions, strict=True)]
        return torch.cat([*turned, rest], dim=-1)

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):  # noqa: N803
        q, k, v = self.split(x)
        ids = torch.arange(x.shape[1]) if mask is None else mask.unsqueeze(1).repeat(1, self.num_heads, 1)
        positions = self.separate_positions(ids, H_patches, W_patches)
        return self.attend(self.rotate(q, positions), self.rotate(k, positions), v, attn_mask)


class ACRoPEAttention(RoPEAttention):
    """With action tokens before each frame's patches, which only time turns."""

    def forward(self, x, mask=None, attn_mask=None, T: Any = None, H: Any = None, W: Any = None, action_tokens=0):  # noqa: N803
        area = H * W
        ids = torch.arange(T * area) if mask is None else mask.unsqueeze(1).repeat(1, self.num_heads, 1)
        frame, row, column = (1.0 * p for p in self.separate_positions(ids, H, W))
        positions = frame, row * (self.grid_size / H), column * (self.grid_size / W)
        q, k, v = self.split(x)
        if not action_tokens:
            return self.attend(self.rotate(q, positions), self.rotate(k, positions), v, attn_mask)
        q, k = (self.with_actions(t, positions, T, area, action_tokens) for t in (q, k))
        return self.attend(q, k, v, attn_mask)

    def with_actions(self, x: Tensor, positions: tuple[Tensor, ...], frames: int, area: int, actions: int) -> Tensor:
        parts = x.unflatten(2, (frames, actions + area))
        acts, patches = parts[:, :, :, :actions], self.rotate(parts[:, :, :, actions:].flatten(2, 3), positions)
        time = torch.arange(frames)
        turned = [
            torch.cat([rotate_queries_or_keys(a[..., : self.d_dim], pos=time), a[..., self.d_dim :]], dim=-1)
            for a in acts.unbind(3)
        ]
        return torch.cat([torch.stack(turned, dim=3), patches.unflatten(2, (frames, area))], dim=3).flatten(2, 3)


class Block(nn.Module):
    """Pre-norm; hands positions on."""

    def __init__(self, dim: int, attn: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attn, MLP(dim, 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed3D(nn.Module):
    """Tubelets."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (2, 4, 4), (2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class VisionTransformer(nn.Module):
    """Encoder of clips; with rotary positions, or none."""

    def __init__(self, dim: int = 24, num_heads: int = 2, depth: int = 2, use_rope: bool = True, **options: Any):
        super().__init__()
        self.img_height = self.img_width = 16
        self.num_frames = 4
        self.patch_embed = PatchEmbed3D(dim)
        kind = RoPEAttention if use_rope else Attention
        self.blocks = nn.ModuleList(Block(dim, kind(dim, num_heads, **options)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(x)
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x, mask=None if masks is None else torch.cat(masks))
        return self.norm(x)
