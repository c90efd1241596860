"""What an encoder sees in whole pictures: average-pooled features of its last layers, as probes take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in training


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] as the floating images that the models take."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def whole_picture(image: Image.Image, size: int, part: float = 1.0) -> Tensor:
    """The largest centred square of a picture, or `part` of its side, scaled: uint8 [3, size, size].

    The published evaluations resize to 256 and crop 224: part=0.875.
    """
    side = round(part * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())


@torch.no_grad()
def extract_features(
    encoder: nn.Module, images: Tensor | Iterable[Tensor], batch_size: int = 256, layers: int = 1
) -> Tensor:
    """What the encoder sees in whole images, averaged over their patches.

    The encoder is put into evaluation mode for the while, and on CUDA runs in bf16, as in training. Batches are moved
    to its device, the features back.

    Shapes:
        images: [n, 3, H, W], or batches of such (a DataLoader, say); uint8 is normalised, floating is taken as it is.
        layers: of so many last blocks, each through the encoder's last norm, side by side; the last one's come last.

    Returns:
        float32 [n, layers * D] on the CPU.

    Raises:
        ValueError: no images, or more layers than the encoder has.

    >>> from fastjepa import vit_tiny
    >>> extract_features(vit_tiny(img_size=[32], depth=1), torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([3, 192])
    """
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    with judging(encoder):
        pooled = [
            torch.cat([tokens.float().mean(dim=1) for tokens in layer_tokens(encoder, batch, layers)], dim=1).cpu()
            for batch in batches
            if len(batch)
        ]
    if not pooled:
        raise ValueError("there are no images to extract features from")
    return torch.cat(pooled)


@torch.no_grad()
def layer_tokens(encoder: nn.Module, images: Tensor, layers: int = 1) -> list[Tensor]:
    """The tokens [B, N, D] of the last `layers` blocks, the last one's last; images as in `extract_features`.

    Raises:
        ValueError: more layers than the encoder has.
    """
    device = next(encoder.parameters()).device
    images = images.to(device, non_blocking=True)
    images = normalise(images) if images.dtype == torch.uint8 else images
    if layers == 1:
        return [encoder(images)]
    blocks: nn.ModuleList = encoder.blocks  # type: ignore[assignment]
    if not 1 <= layers <= len(blocks):
        raise ValueError(f"features of the last {layers} layers are asked for, of an encoder with {len(blocks)}")
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: found.append(call[-1])) for block in blocks[-layers:-1]]
    try:
        last = encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    count = last.shape[0] * last.shape[1]  # behind them there may be padding
    norm: nn.Module = encoder.norm  # type: ignore[assignment]
    return [*(norm(tokens[:count]).view(last.shape) for tokens in found), last]


@contextmanager
def judging(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, and on CUDA bf16, for the while."""
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            yield
    finally:
        encoder.train(training)
