"""Inputs for a model that is only known by what it is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = 2


def probe_of(model: Any) -> tuple[Any, ...] | None:
    """Inputs of a small batch, made from the model's own input shape; None where nothing tells it.

    Known are models with a `patch_embed.proj` convolution (with masks where they take some), predictors with
    `predictor_embed`, and those of transformers by their config.
    """
    for make in (_by_config, _encoder, _predictor):
        if (arguments := make(model)) is not None:
            return arguments
    return None


def described(arguments: Sequence[Any]) -> str:
    """Inputs in words: their shapes."""
    return ", ".join(_described(a) for a in arguments)


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{list(argument.shape)} {str(argument.dtype).removeprefix('torch.')}"
    if isinstance(argument, list | tuple):
        return f"[{described(argument)}]"
    return str(argument)


def _by_config(model: Any) -> tuple[Any, ...] | None:
    """transformers: `main_input_name` says what is wanted, the config how large."""
    config: Any = getattr(model, "config", None)
    wanted = getattr(model, "main_input_name", None)
    if wanted == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return (_random(model, IMAGES, getattr(config, "num_channels", 3), *size),)
    if wanted == "pixel_values_videos" and hasattr(config, "crop_size"):
        frames, channels = config.frames_per_clip, getattr(config, "in_chans", 3)
        return (_random(model, IMAGES, frames, channels, config.crop_size, config.crop_size),)
    return None


def _encoder(model: Any) -> tuple[Any, ...] | None:
    """Images, or videos, and two masks of half of the patches each where the model takes masks."""
    proj = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(proj, nn.Conv2d | nn.Conv3d):
        return None
    *tubelet, height, width = proj.kernel_size
    size = _image_size(model, height)
    if size is None:
        return None
    frames = [model.num_frames] if tubelet and hasattr(model, "num_frames") else tubelet
    images = _random(model, IMAGES, proj.in_channels, *frames, *size)
    time = frames[0] // tubelet[0] if tubelet else 1
    takes = list(inspect.signature(model.forward).parameters)
    if "masks" not in takes:
        return (images,)
    masks = _masks(time * (size[0] // height) * (size[1] // width), images.device)
    return (images, *[None] * (takes.index("masks") - 1), masks)


def _predictor(model: Any) -> tuple[Any, ...] | None:
    """Context tokens, their masks, and two masks of targets."""
    embed, takes = getattr(model, "predictor_embed", None), list(inspect.signature(model.forward).parameters)
    if not isinstance(embed, nn.Linear) or takes[:2] != ["x", "masks_x"] or len(takes) < 3:
        return None
    positions = getattr(model, "predictor_pos_embed", None)
    patches = getattr(model, "num_patches", None) if positions is None else positions.shape[1]
    if patches is None:
        return None
    masks = _masks(patches, embed.weight.device)
    contexts, targets = masks[:1], masks[1:] if takes[2] == "masks_y" else masks  # V-JEPA 2 has a target for a context
    return (_random(model, IMAGES, contexts[0].shape[1], embed.in_features), contexts, targets)


def _image_size(model: Any, patch: int) -> tuple[int, int] | None:
    """Pixels of an image, from whatever of the model tells them."""
    if hasattr(model, "img_height") and hasattr(model, "img_width"):
        return model.img_height, model.img_width
    for owner in (model.patch_embed, model):
        size = getattr(owner, "img_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and size:
            return int(size[0]), int(size[-1])
    patches = getattr(model.patch_embed, "num_patches", None)
    side = math.isqrt(patches) if patches else 0
    return (side * patch, side * patch) if side else None


def _masks(patches: int, device: torch.device) -> list[Tensor]:
    """Two masks int64 [IMAGES, half of the patches], sorted, the halves of one shuffle."""
    generator = torch.Generator().manual_seed(2)
    half = max(1, patches // 2)
    shuffled = torch.stack([torch.randperm(patches, generator=generator) for _ in range(IMAGES)])
    return [shuffled[:, start : start + half].sort(dim=1).values.to(device) for start in (0, patches - half)]


def _random(model: nn.Module, *shape: int) -> Tensor:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator).to(parameter.device, parameter.dtype)
