"""Floating-point operations of a training step, counted as the field does: two for a multiply-add, matmuls only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.ragged import Ragged


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers: `width`, number of `layers`, and the MLP's hidden width over the width."""

    width: int
    layers: int
    mlp_ratio: float = 4.0

    def forward(self, lengths: Tensor) -> float:
        """One forward pass over sequences of these lengths (int [S], on the CPU).

        A token and layer cost 8 D^2 for attention's four projections, 4 r D^2 for the MLP and 4 n D for attention.
        """
        tokens, squares = float(lengths.sum()), float((lengths.double() ** 2).sum())
        matmuls = (8.0 + 4.0 * self.mlp_ratio) * self.width**2 * tokens
        return self.layers * (matmuls + 4.0 * self.width * squares)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an I-JEPA training step: what the masks need, whatever an implementation computes.

    The backward pass counts twice the forward; the target encoder has none, nor has the patch embedding's input.
    """

    encoder: Tower
    predictor: Tower
    patch_values: int  # numbers in a patch, channels * patch_size^2
    num_patches: int

    def __call__(self, batch_size: int, masks_enc: list[Tensor] | Ragged, masks_pred: list[Tensor] | Ragged) -> float:
        """FLOPs of a step on `batch_size` images with these masks (on the CPU)."""
        context, nenc = _lengths(masks_enc)
        target, npred = _lengths(masks_pred)
        images = torch.full((batch_size,), self.num_patches)
        whole = self.encoder.forward(images) + self._embed(int(images.sum()))
        trained = self.encoder.forward(context) + self._embed(int(context.sum()))
        pairs = (context.view(batch_size, 1, nenc) + target.view(batch_size, npred, 1)).flatten()
        into_out = 2.0 * self.encoder.width * self.predictor.width
        trained += self.predictor.forward(pairs) + into_out * float(context.sum() + nenc * target.sum())
        return whole + 3.0 * trained

    def _embed(self, patches: int) -> float:
        return 2.0 * self.patch_values * self.encoder.width * patches


def _lengths(masks: list[Tensor] | Ragged) -> tuple[Tensor, int]:
    """(int64 [B * n] lengths image by image, n masks an image)."""
    if isinstance(masks, Ragged):
        return masks.lengths.long(), masks.per_image
    batch, length = masks[0].shape
    return torch.full((batch * len(masks),), length), len(masks)
