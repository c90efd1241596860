"""Models as timm, MAE, data2vec, lightly and stable-pretraining have them, written for these tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """timm's: two dropouts, an optional norm between."""

    def __init__(self, dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(4 * dim, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Attention(nn.Module):
    """timm's: its output alone, a mask on demand, PyTorch's attention or written out."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, fused_attn: bool = True, drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, fused_attn
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in "qk")
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.attn_drop.p * self.training, is_causal)
        else:
            scores = self.scale * q @ k.mT
            y = self.attn_drop((scores if attn_mask is None else scores + attn_mask).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """timm's: layer scales are left out."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads, **options)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """timm's: `img_size` is a pair."""

    def __init__(self, dim: int):
        super().__init__()
        self.img_size, self.num_patches = (16, 16), 16
        self.proj = nn.Conv2d(3, dim, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class MaskedAutoencoder(nn.Module):
    """MAE: a random part of each image's patches is encoded, all of them are decoded."""

    def __init__(self, dim: int = 24, num_heads: int = 3, depth: int = 2):
        super().__init__()
        self.patch_embed, self.cls_token = PatchEmbed(dim), nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm, self.decoder_embed = nn.LayerNorm(dim), nn.Linear(dim, 16)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, 16))
        self.decoder_blocks = nn.ModuleList([Block(16, 2)])
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(16), nn.Linear(16, 48)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        order = torch.rand(x.shape[:2]).argsort(dim=1)
        restore, kept = order.argsort(dim=1), int(x.shape[1] * (1 - mask_ratio))
        x = x.gather(1, order[:, :kept, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        filled = torch.cat([x[:, 1:], self.mask_token.expand(len(x), 16 - kept, -1)], dim=1)
        x = filled.gather(1, restore[..., None].expand(-1, -1, 16))
        for block in self.decoder_blocks:
            x = block(x)
        mask = (restore >= kept).to(x.dtype)
        pred = self.decoder_pred(self.decoder_norm(x))
        target = imgs.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        loss = ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()
        return loss, pred, mask


class AltAttention(nn.Module):
    """data2vec 2.0's: a padding mask and a bias on demand."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, alibi_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = q * self.scale @ k.mT
        if alibi_bias is not None:
            attn = attn + alibi_bias
        if padding_mask is not None:
            attn = attn.masked_fill(padding_mask[:, None, None], float("-inf"))
        return self.proj_drop(self.proj((self.attn_drop(attn.softmax(dim=-1)) @ v).transpose(1, 2).flatten(2)))


class AltBlock(nn.Module):
    """data2vec 2.0's: norms behind, and the features that the teacher gives come along."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attn, self.mlp = AltAttention(dim, num_heads), Mlp(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, alibi_bias: Tensor | None = None):
        x = self.norm1(x + self.attn(x, padding_mask, alibi_bias))
        target = self.mlp(x)
        return self.norm2(x + target), target


class StableAttention(nn.Module):
    """stable-pretraining's: dropout as a number, rotation only where it was asked for."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.use_rope, self.attn_drop, self.rope = self.head_dim**-0.5, False, attn_drop, None
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, grid_size: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.use_rope and grid_size is None:
            raise ValueError("a rotation needs grid_size")
        mask = None if attn_mask is None else ~attn_mask
        y = F.scaled_dot_product_attention(q, k, v, mask, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
