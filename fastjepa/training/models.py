"""Models and optimizer of a configuration."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from fastjepa import nn as models
from fastjepa.config import Config
from fastjepa.flops import StepFlops, Tower
from fastjepa.nn.init import init_weights
from fastjepa.objective import IJEPA
from fastjepa.optim import AdamWEMA
from fastjepa.sharding import is_sharded

ENCODERS = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant")


def build_models(config: Config) -> IJEPA:
    """Encoder, predictor and target encoder of a run, initialised as the published training code does.

    That code draws every linear weight anew after the models are made, so the residual branches keep deviation 0.02.

    Raises:
        ValueError: an unknown model, or sizes that do not go together; names the key.
    """
    meta, data, mask = config.meta, config.data, config.mask
    if meta.model_name not in ENCODERS:
        near = difflib.get_close_matches(meta.model_name, ENCODERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ENCODERS)}"
        raise ValueError(f"meta.model_name: unknown model {meta.model_name!r}; {hint}")
    sizes = {key: getattr(meta, key) for key in ("embed_dim", "depth", "num_heads") if getattr(meta, key) is not None}
    try:
        encoder = getattr(models, meta.model_name)(patch_size=mask.patch_size, img_size=[data.crop_size], **sizes)
        predictor = models.vit_predictor(
            num_patches=encoder.patch_embed.num_patches,
            embed_dim=encoder.embed_dim,
            predictor_embed_dim=meta.pred_emb_dim,
            depth=meta.pred_depth,
            num_heads=encoder.num_heads,
        )
    except ValueError as error:
        raise ValueError(f"section meta: {error}") from None
    for model in (encoder, predictor):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                init_weights(module)
    with torch.no_grad():
        encoder.patch_embed.proj.weight.mul_(meta.patch_embed_scale)
    return IJEPA(encoder, predictor)


def parameter_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict[str, Any]]:
    """The four official groups: weights of encoder and predictor, then their biases and 1-d parameters, not decayed.

    Positions and other parameters that take no gradient are in their places too, so that optimizer states are
    interchangeable with the official checkpoints'.
    """

    def bare(name: str, parameter: nn.Parameter) -> bool:
        return "bias" in name or parameter.dim() == 1

    named = [list(model.named_parameters()) for model in (encoder, predictor)]
    decayed = [{"params": [p for n, p in pairs if not bare(n, p)]} for pairs in named]
    plain = [{"params": [p for n, p in pairs if bare(n, p)], "WD_exclude": True, "weight_decay": 0} for pairs in named]
    return decayed + plain


def build_optimizer(model: IJEPA, bf16: bool = False) -> AdamWEMA:
    """AdamW over the official groups and the target's EMA in one pass; set `.momentum` before each step.

    A step whose gradients are not finite changes nothing. `bf16`: the model's linear layers are given bf16 copies of
    their weights, which the optimizer keeps; not where the model is sharded, since its weights are gathered in bf16.
    """
    pairs = zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True)
    groups = parameter_groups(model.encoder, model.predictor)
    sharded = any(map(is_sharded, model.encoder.parameters()))
    copies = models.keep_copies(model) if bf16 and not sharded else None
    optimizer = AdamWEMA(groups, target_params=dict(pairs), low_precision=copies, skip_nonfinite=True)
    if model.encoder.pos_embed.device.type == "cpu":
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's one-pass AdamW, where there is no kernel of ours
    return optimizer


def step_flops(model: IJEPA) -> StepFlops:
    """The FLOP count of this model's training step."""
    encoder, predictor = model.encoder, model.predictor

    def tower(blocks: nn.ModuleList, width: int) -> Tower:
        ratios = [block.mlp.fc1.out_features / width for block in blocks if isinstance(block, models.Block)]
        return Tower(width, len(blocks), ratios[0] if ratios else 4.0)

    return StepFlops(
        tower(encoder.blocks, encoder.embed_dim),
        tower(predictor.predictor_blocks, predictor.predictor_embed.out_features),
        encoder.patch_embed.proj.weight.shape[1:].numel(),
        encoder.patch_embed.num_patches,
    )
