"""Models with the classes, signatures and parameter names of facebookresearch/ijepa, written for these tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastjepa.nn.position import sincos_positions


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The tokens that each mask names, with an index as wide as the tokens."""
    return torch.cat([x.gather(1, m[..., None].repeat(1, 1, x.shape[-1])) for m in masks])


class DropPath(nn.Module):
    """Stochastic depth for whole images."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class MLP(nn.Module):
    """fc1, GELU, fc2, one dropout used twice."""

    def __init__(self, dim: int, drop: float):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Gives its output and its map."""

    def __init__(self, dim: int, num_heads: int, qk_scale: float | None = None, attn_drop: float = 0, drop: float = 0):
        super().__init__()
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((self.scale * q @ k.mT).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2))), attn


class Block(nn.Module):
    """Pre-norm, its attention's map on demand."""

    def __init__(self, dim: int, num_heads: int, drop: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in "12")
        self.attn, self.mlp = Attention(dim, num_heads, attn_drop=attn_drop, drop=drop), MLP(dim, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        y, attn = self.attn(self.norm1(x))
        if return_attention:
            return attn
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A strided convolution."""

    def __init__(self, img_size: int, patch_size: int, dim: int):
        super().__init__()
        self.img_size, self.num_patches = img_size, (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class VisionTransformer(nn.Module):
    """Encoder of whole images or of masked ones."""

    def __init__(
        self, img_size: int = 16, patch_size: int = 4, dim: int = 24, depth: int = 2, num_heads: int = 3, **drops
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, dim)
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(sincos_positions(dim, (side, side)), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads, **drops) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionTransformerPredictor(nn.Module):
    """Context and mask tokens to features of the targets."""

    def __init__(self, num_patches: int = 16, embed_dim: int = 24, dim: int = 16, depth: int = 1, num_heads: int = 2):
        super().__init__()
        side = int(num_patches**0.5)
        self.predictor_embed, self.predictor_proj = nn.Linear(embed_dim, dim), nn.Linear(dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(dim, (side, side)), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, masks_x: list[Tensor], masks: list[Tensor]) -> Tensor:
        positions = self.predictor_pos_embed.repeat(len(x) // len(masks_x), 1, 1)
        x = self.predictor_embed(x) + apply_masks(positions, masks_x)
        wanted = self.mask_token + apply_masks(positions, masks)
        kept, x = x.shape[1], torch.cat([x.repeat(len(masks), 1, 1), wanted], dim=1)  # one context an image
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])
