"""The I-JEPA models as they are usually written in PyTorch: the baselines of the `step` suite.

An independent implementation of what the published models do, with the same costs: every patch embedded and then most
dropped, attention weights materialised and returned, indices repeated over the width for each gather. Parameter names
are the official ones, so it shares weights with `fastjepa.IJEPA`. With `plain=False` the same models without those
costs, as far as stock PyTorch goes: `scaled_dot_product_attention`, and gathers with an expanded index.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.nn.position import sincos_positions


def take(x: Tensor, masks: list[Tensor], plain: bool = True) -> Tensor:
    """[B, N, D] by masks int64 [B, K] -> [len(masks) * B, K, D]; the index is repeated over D, or expanded."""
    width = x.shape[-1]
    spread = (m.unsqueeze(-1).repeat(1, 1, width) if plain else m.unsqueeze(-1).expand(-1, -1, width) for m in masks)
    return torch.cat([x.gather(1, index) for index in spread])


class Attention(nn.Module):
    """softmax(q k^T) v with the weights written out, and returned with the output; or torch's fused attention."""

    def __init__(self, dim: int, heads: int, plain: bool):
        super().__init__()
        self.heads, self.scale, self.plain = heads, (dim // heads) ** -0.5, plain
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, N, D] -> [B, N, D], and the weights [B, H, N, N]."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.plain:
            weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
            y = weights @ v
        else:
            weights, y = None, F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, count, width)), weights


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int, plain: bool):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, plain)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        y, _ = self.attn(self.norm1(x))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A strided convolution."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Vision Transformer on all patches, or on those that masks keep."""

    def __init__(self, side: int, patch_size: int, dim: int, hidden: int, depth: int, heads: int, plain: bool = True):
        super().__init__()
        self.plain = plain
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(sincos_positions(dim, (side, side)), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, plain) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, N, D] or [len(masks) * B, K, D]."""
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = take(x, masks, self.plain)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Narrow transformer over context and mask tokens."""

    def __init__(self, side: int, dim: int, width: int, hidden: int, depth: int, heads: int, plain: bool = True):
        super().__init__()
        self.plain = plain
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, (side, side)), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads, hidden, plain) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, context: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor]) -> Tensor:
        """[nenc * B, K, D] -> [npred * nenc * B, K', D]."""
        batch = context.shape[0] // len(masks_enc)
        positions = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = self.predictor_embed(context) + take(positions, masks_enc, self.plain)
        wanted = take(positions, masks_pred, self.plain).view(len(masks_pred), 1, batch, -1, x.shape[-1])
        wanted = wanted.repeat(1, len(masks_enc), 1, 1, 1).flatten(0, 2)
        kept = x.shape[1]
        x = torch.cat([x.repeat(len(masks_pred), 1, 1), self.mask_token + wanted], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])
