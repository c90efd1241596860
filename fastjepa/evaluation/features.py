"""Average-pooled features of whole pictures, as probes take them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in training


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] as the floating images that the models take."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def whole_picture(image: Image.Image, size: int) -> Tensor:
    """The largest centred square of a picture, scaled: uint8 [3, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())


@torch.no_grad()
def extract_features(encoder: nn.Module, images: Tensor | Iterable[Tensor], batch_size: int = 256) -> Tensor:
    """What the encoder sees in whole images, averaged over their patches.

    The encoder is put into evaluation mode for the while. Batches are moved to its device, the features back.

    Shapes:
        images: [n, 3, H, W], or batches of such (a DataLoader, say); uint8 is normalised, floating is taken as it is.

    Returns:
        float32 [n, D] on the CPU.

    Raises:
        ValueError: no images.

    >>> from fastjepa import vit_tiny
    >>> extract_features(vit_tiny(img_size=[32], depth=1), torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([3, 192])
    """
    device = next(encoder.parameters()).device
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    training = encoder.training
    encoder.eval()
    try:
        pooled = [encoder(_floating(batch.to(device))).float().mean(dim=1).cpu() for batch in batches if len(batch)]
    finally:
        encoder.train(training)
    if not pooled:
        raise ValueError("there are no images to extract features from")
    return torch.cat(pooled)


def _floating(images: Tensor) -> Tensor:
    return normalise(images) if images.dtype == torch.uint8 else images
