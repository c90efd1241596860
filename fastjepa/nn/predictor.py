"""The predictor: a narrow Vision Transformer from context tokens to the features of masked patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.block import Block
from fastjepa.nn.init import LAYER_NORM, init_weights, rescale_residuals
from fastjepa.nn.linear import Linear
from fastjepa.nn.position import sincos_positions
from fastjepa.nn.stack import Stack
from fastjepa.pairing import Pairing, PredictorLayout
from fastjepa.ragged import Ragged, check_patches, masks_to_ragged


class VisionTransformerPredictor(Stack):
    """Predictor with the parameter names, shapes and keywords of the official `VisionTransformerPredictor`.

    Each pair of an image's context and one of its targets is a sequence of its own: the context's tokens, then one mask
    token for each target patch.

    Shapes:
        context: with lists [nenc * B, K, D]; with `Ragged` masks a `Ragged` [T, D] of masks_enc's offsets.
        masks_enc, masks_pred: lists of nenc [B, K] and npred [B, K'], or two `Ragged` of patch indices.

    Returns:
        With lists [npred * nenc * B, K', D], in order target, context, image. With `Ragged` a `Ragged` [T', D] whose
        sequences run image, target, context.

    Raises:
        ValueError: masks of two kinds, or a context that does not fit them; a num_patches that is no square (give
            `grid_size` then).

    Source: Assran et al. 2023 (arXiv 2301.08243), section 3.
    """

    def __init__(
        self,
        num_patches: int,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        init_std: float = 0.02,
        grid_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"the predictor needs at least one layer, got depth={depth}")
        side = math.isqrt(num_patches)
        grid = grid_size or (side, side)
        if grid[0] * grid[1] != num_patches:
            raise ValueError(f"num_patches={num_patches} is not the {grid[0]}x{grid[1]} grid; give grid_size")
        width = predictor_embed_dim
        self.predictor_embed = Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=False)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # later layers drop more
        self.predictor_blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, norm_layer)
            for rate in rates
        )
        self.predictor_norm = norm_layer(width)
        self.predictor_proj = Linear(width, embed_dim)
        nn.init.trunc_normal_(self.mask_token, std=init_std)
        init_weights(self, init_std)
        rescale_residuals(self.predictor_blocks)

    def forward(
        self,
        context: Tensor | Ragged,
        masks_enc: Tensor | Sequence[Tensor] | Ragged,
        masks_pred: Tensor | Sequence[Tensor] | Ragged,
    ) -> Tensor | Ragged:
        """Predict the features of every target patch from each context of its image."""
        if isinstance(context, Ragged) and isinstance(masks_enc, Ragged) and isinstance(masks_pred, Ragged):
            return self._predict(context.values, masks_enc, masks_pred, Pairing.image_major(masks_enc, masks_pred))
        if isinstance(context, Ragged) or isinstance(masks_enc, Ragged) or isinstance(masks_pred, Ragged):
            raise ValueError("context, masks_enc and masks_pred must be all `Ragged`, or a tensor and two lists")
        contexts, targets = masks_to_ragged(masks_enc), masks_to_ragged(masks_pred)
        nenc = 1 if isinstance(masks_enc, Tensor) else len(masks_enc)
        npred = 1 if isinstance(masks_pred, Tensor) else len(masks_pred)
        batch = contexts.num_sequences // nenc
        if targets.num_sequences != npred * batch:
            raise ValueError(f"masks_enc holds {batch} images and masks_pred {targets.num_sequences // npred}")
        pairing = Pairing.mask_major(nenc, npred, batch, contexts.device)
        predicted = self._predict(context.flatten(0, 1), contexts, targets, pairing)
        return predicted.values.view(predicted.num_sequences, -1, predicted.values.shape[-1])

    def _predict(self, context: Tensor, masks_enc: Ragged, masks_pred: Ragged, pairing: Pairing) -> Ragged:
        for masks in (masks_enc, masks_pred):
            check_patches(masks, self.predictor_pos_embed.shape[1])
        if len(context) != len(masks_enc.values):
            raise ValueError(f"context has {len(context)} tokens, but masks_enc names {len(masks_enc.values)} patches")
        layout = PredictorLayout.build(masks_enc, masks_pred, pairing)
        positions = self.predictor_pos_embed[0]
        context = self.predictor_embed(context)
        # Under autocast the linear gives bf16, but the residual stream stays as wide as the positions unless told.
        context = self.as_stream(context, torch.promote_types(context.dtype, positions.dtype))
        # The first block's norm1 and QKV of a context are the same for each of its targets. Shared, they would take
        # 0.1 % off a step's FLOPs and put 3.4 MB an image on gathers and sums of rows 3 D wide (ViT-H/14 ragged, by
        # count): at most 0.04 % of the step won on an A100, nothing on an H100.
        x = ops.assemble_predictor(context, self.mask_token.view(-1), positions, layout.source, layout.patches)
        # Nothing reads the context's output, so the last block makes that of the mask tokens alone.
        x = self.run(
            self.predictor_blocks,
            self.predictor_norm,
            x,
            layout.offsets,
            layout.max_length,
            keep=layout.picked,
            for_linear=True,
        )
        return layout.targets.with_values(self.predictor_proj(x))


def vit_predictor(**kwargs) -> VisionTransformerPredictor:
    """`VisionTransformerPredictor` with the official factory's settings; keywords are passed on."""
    return VisionTransformerPredictor(**kwargs)
