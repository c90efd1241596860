"""Weight initialisation of the official models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from fastjepa.nn.block import Block
from fastjepa.nn.norm import LayerNorm

LAYER_NORM = partial(LayerNorm, eps=1e-6)


def init_weights(model: nn.Module, std: float = 0.02) -> None:
    """Normal weights of deviation `std`, cut at +-2, in linear maps and convolutions; zero biases; unit LayerNorms."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
            nn.init.ones_(module.weight)


@torch.no_grad()
def rescale_residuals(blocks: Iterable[nn.Module]) -> None:
    """Divide what block l (from 1) adds to the residual stream by sqrt(2 l), so that its variance does not grow."""
    for depth, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        block.attn.proj.weight.div_(math.sqrt(2.0 * depth))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * depth))
