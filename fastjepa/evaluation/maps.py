"""What an encoder makes of each patch of a picture: how alike patches are, and what its heads attend to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.evaluation.features import judging, layer_tokens, normalise
from fastjepa.nn.block import Block
from fastjepa.nn.vision_transformer import VisionTransformer


@torch.no_grad()
def similarity_map(encoder: VisionTransformer, image: Tensor, patch: tuple[int, int]) -> Tensor:
    """The cosine of every patch's feature with that of `patch`, (row, column).

    Features are taken less their mean over the picture, which all patches share. Shapes: image [3, H, W], uint8 or
    normalised -> float32 [rows, columns] in -1..1.

    Raises:
        ValueError: a patch outside the picture's grid.
    """
    rows, columns = grid_of(encoder, image)
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f"patch {patch[0]},{patch[1]} is not in the grid of {rows} rows and {columns} columns")
    with judging(encoder):
        tokens = layer_tokens(encoder, image[None])[0][0].float()
    tokens = F.normalize(tokens - tokens.mean(dim=0), dim=1)
    return (tokens @ tokens[patch[0] * columns + patch[1]]).view(rows, columns).cpu()


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, image: Tensor, patch: tuple[int, int] | None = None) -> Tensor:
    """What each head of the last block attends to: from `patch`, (row, column), or on average over all patches.

    Shapes: image [3, H, W], uint8 or normalised -> float32 [heads, rows, columns], each map's sum 1.

    Raises:
        ValueError: a patch outside the picture's grid, or an encoder without blocks.
    """
    rows, columns = grid_of(encoder, image)
    if patch is not None and not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f"patch {patch[0]},{patch[1]} is not in the grid of {rows} rows and {columns} columns")
    if not len(encoder.blocks):
        raise ValueError("an encoder without blocks attends to nothing")
    block, seen = encoder.blocks[-1], []
    assert isinstance(block, Block)
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with judging(encoder):
            layer_tokens(encoder, image[None])
    finally:
        hook.remove()
    norm, attention = block.norm1, block.attn
    assert isinstance(norm, nn.LayerNorm)
    x = F.layer_norm(seen[0].float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)[: rows * columns]
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias).view(rows * columns, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(1, 2, 0, 3)  # [H, N, d] each
    if patch is not None:
        place = patch[0] * columns + patch[1]
        query = query[:, place : place + 1]
    weights = (attention.scale * query @ key.transpose(1, 2)).softmax(dim=-1).mean(dim=1)
    return weights.view(-1, rows, columns).cpu()


def grid_of(encoder: VisionTransformer, image: Tensor) -> tuple[int, int]:
    """Rows and columns of patches in an image [3, H, W].

    Raises:
        ValueError: an image that the encoder does not take.
    """
    return encoder.grid_of(normalise(image)[None] if image.dtype == torch.uint8 else image[None])
