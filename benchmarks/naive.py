"""The I-JEPA step as it is usually written in eager PyTorch: the baseline of the `step` suite.

An independent implementation of what the published training code does, with the same costs: every patch embedded and
then most dropped, attention weights materialised, indices repeated over the width for each gather, one multiply-add per
parameter for the EMA, one gradient norm per weight, AdamW as torch builds it by default. Parameter names are the
official ones, so it shares weights with `fastjepa.IJEPA`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.nn.position import sincos_positions
from fastjepa.training.models import parameter_groups


def take(x: Tensor, masks: list[Tensor]) -> Tensor:
    """[B, N, D] by masks [B, K] -> [len(masks) * B, K, D], the index repeated over D."""
    return torch.cat([x.gather(1, m.long().unsqueeze(-1).repeat(1, 1, x.shape[-1])) for m in masks])


class Attention(nn.Module):
    """softmax(q k^T) v with the weights written out."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x))
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

    def __init__(self, side: int, patch_size: int, dim: int, depth: int, heads: int):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(sincos_positions(dim, (side, side)), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, N, D] or [len(masks) * B, K, D]."""
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = take(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Narrow transformer over context and mask tokens."""

    def __init__(self, side: int, dim: int, width: int, depth: int, heads: int):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, (side, side)), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, context: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor]) -> Tensor:
        """[nenc * B, K, D] -> [npred * nenc * B, K', D]."""
        batch = context.shape[0] // len(masks_enc)
        positions = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = self.predictor_embed(context) + take(positions, masks_enc)
        wanted = take(positions, masks_pred).view(len(masks_pred), 1, batch, -1, x.shape[-1])
        wanted = wanted.repeat(1, len(masks_enc), 1, 1, 1).flatten(0, 2)
        kept = x.shape[1]
        x = torch.cat([x.repeat(len(masks_pred), 1, 1), self.mask_token + wanted], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])


class NaiveStep:
    """Models, optimizer and one training step."""

    def __init__(self, encoder: Encoder, predictor: Predictor, bf16: bool = False):
        self.encoder, self.predictor, self.bf16 = encoder, predictor, bf16
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(parameter_groups(encoder, predictor))
        self.device = next(encoder.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=bf16 and self.device.type == "cuda")

    def loss(self, images: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor]) -> Tensor:
        """The objective of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                features = self.target_encoder(images)
                features = take(F.layer_norm(features, features.shape[-1:]), masks_pred)
                features = features.view(len(masks_pred), 1, len(images), *features.shape[1:])
                features = features.repeat(1, len(masks_enc), 1, 1, 1).flatten(0, 2)
            prediction = self.predictor(self.encoder(images, masks_enc), masks_enc, masks_pred)
            return F.smooth_l1_loss(prediction, features)

    def step(self, images: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor], momentum: float) -> float:
        """Forward, backward, AdamW, gradient norms for the log, EMA."""
        loss = self.loss(images, masks_enc, masks_pred)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, parameter in self.encoder.named_parameters():
            if parameter.grad is not None and not (name.endswith(".bias") or parameter.dim() == 1):
                torch.norm(parameter.grad).item()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for theirs, ours in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                ours.mul_(momentum).add_((1.0 - momentum) * theirs)
        return loss.item()
