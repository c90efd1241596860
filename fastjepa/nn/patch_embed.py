"""Images to patch embeddings: all of them, or only those that a mask keeps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one linear map for each patch_size x patch_size patch.

    Shapes: images [B, C, H, W] -> [B, N, D], patches row by row.

    Raises:
        ValueError: an image size that the patch size does not divide.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768
    ):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = patch_size
        self.grid_size = self.grid(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of this many pixels."""
        p = self.patch_size
        if p < 1 or height < p or width < p or height % p or width % p:
            raise ValueError(f"patch_size={p} does not divide an image of {height}x{width} pixels")
        return height // p, width // p

    def patches(self, images: Tensor) -> Tensor:
        """The pixels of each patch: [B, C, H, W] -> [B, N, C * p * p], a copy."""
        rows, columns = self.grid(*images.shape[-2:])
        batch, channels, p = images.shape[0], images.shape[1], self.patch_size
        tiles = images.view(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(batch, rows * columns, channels * p * p)

    def embed(self, patches: Tensor) -> Tensor:
        """Embed patches that are already cut out: [..., C * p * p] -> [..., D]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Embed every patch."""
        return self.embed(self.patches(images))
