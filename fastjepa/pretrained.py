"""Trained models out of any checkpoint, ready to use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastjepa.checkpoint import MODELS, load_weights, read_checkpoint
from fastjepa.layouts import EncoderSizes, heads_of
from fastjepa.nn.norm import LayerNorm
from fastjepa.nn.predictor import VisionTransformerPredictor
from fastjepa.nn.vision_transformer import VisionTransformer
from fastjepa.objective import IJEPA

ENCODERS = ("target_encoder", "encoder")


def load_encoder(
    path: str | os.PathLike[str], model: str = "target_encoder", num_heads: int | None = None
) -> VisionTransformer:
    """The encoder in a checkpoint of ours, an official `.pth.tar` or a transformers folder, in evaluation mode.

    Arguments:
        model: target_encoder, the one that the published evaluations use, or encoder.
        num_heads: attention heads, which do not show in weights: asked for only where the file does not say and the
            width is none of the published models'.

    Raises:
        ValueError: a file that cannot be read, or holds no such encoder; names the file and what is wrong.
    """
    checkpoint = read_checkpoint(path)
    sizes = encoder_sizes(checkpoint, path, model, num_heads)
    with torch.device("meta"):  # no weights are drawn only to be written over
        encoder = build_encoder(sizes)
    encoder = encoder.to_empty(device="cpu")
    load_weights(encoder, checkpoint[model], f"checkpoint {path}: {model}")
    return encoder.eval()


def load_ijepa(path: str | os.PathLike[str], num_heads: int | None = None) -> IJEPA:
    """All three models in a checkpoint, in evaluation mode; the predictor has as many heads as the encoders.

    Raises:
        ValueError: as `load_encoder`; or there is no predictor, as in transformers folders.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint["predictor"]
    if "mask_token" not in state:
        raise ValueError(f"checkpoint {path} has no predictor")
    sizes = encoder_sizes(checkpoint, path, num_heads=num_heads)
    width = state["mask_token"].shape[-1]
    with torch.device("meta"):
        encoder = build_encoder(sizes)
        predictor = VisionTransformerPredictor(
            encoder.patch_embed.num_patches,
            sizes.embed_dim,
            width,
            depth=len({name.split(".")[1] for name in state if name.startswith("predictor_blocks.")}),
            num_heads=sizes.num_heads,
            mlp_ratio=(state["predictor_blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / width,
            qkv_bias="predictor_blocks.0.attn.qkv.bias" in state,
        )
        model = IJEPA(encoder, predictor)
    model = model.to_empty(device="cpu")
    for name in MODELS:
        load_weights(getattr(model, name), checkpoint[name], f"checkpoint {path}: {name}")
    return model.eval()


def encoder_sizes(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    model: str = "target_encoder",
    num_heads: int | None = None,
) -> EncoderSizes:
    """The sizes of an encoder in what `read_checkpoint(path)` gave; arguments and errors as `load_encoder`."""
    if model not in ENCODERS:
        raise ValueError(f"model must be {' or '.join(ENCODERS)}, got {model!r}")
    known = checkpoint.get("encoder_config")
    if known:
        return EncoderSizes.from_dict(known)
    state: Mapping[str, Tensor] = checkpoint[model]
    width = state["norm.weight"].shape[0] if "norm.weight" in state else 0
    heads = num_heads or heads_of(checkpoint, width)
    if heads is None:
        raise ValueError(
            f"checkpoint {path}: {model} is {width} wide, none of the published widths, so its number of heads has to "
            "be given: num_heads (--num-heads)"
        )
    try:
        return EncoderSizes.of_state(state, heads)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {model} is no I-JEPA encoder: {error}") from None


def build_encoder(sizes: EncoderSizes) -> VisionTransformer:
    """An encoder of these sizes, with weights to be loaded."""
    return VisionTransformer(
        img_size=sizes.img_size,
        patch_size=sizes.patch_size,
        in_chans=sizes.in_chans,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=(sizes.hidden + 0.5) / sizes.embed_dim,  # which is cut to a whole number of features
        qkv_bias=sizes.qkv_bias,
        norm_layer=partial(LayerNorm, eps=sizes.layer_norm_eps),
    )
