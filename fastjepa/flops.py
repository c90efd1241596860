"""Floating-point operations of a training step, counted as the field does: two for a multiply-add, matmuls only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.ragged import Ragged


@dataclass(frozen=True)
class Flops:
    """`matmuls`: products with weights. `attention`: its two products of tokens with tokens."""

    matmuls: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmuls + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmuls + other.matmuls, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matmuls * times, self.attention * times)


@dataclass(frozen=True)
class Tokens:
    """How many tokens a batch's masks leave to compute on, and how long their sequences are.

    Attributes:
        images: B. context, target: tokens of all contexts and of all targets.
        pairs: of the predictor's sequences, each a context and a target of one image. predicted: of these the targets'.
        context_squares, pair_squares: sums of squared lengths, which attention costs by.
    """

    images: float
    context: float
    target: float
    pairs: float
    predicted: float
    context_squares: float
    pair_squares: float

    @classmethod
    def of(cls, batch_size: int, masks_enc: list[Tensor] | Ragged, masks_pred: list[Tensor] | Ragged) -> Tokens:
        """Those of masks of `batch_size` images (on the CPU).

        >>> Tokens.of(1, [torch.tensor([[0, 1]])], [torch.tensor([[2, 3, 4]]), torch.tensor([[3, 4, 5]])]).pairs
        10.0
        """
        context, nenc = _lengths(masks_enc)
        target, npred = _lengths(masks_pred)
        pairs = (context.view(batch_size, 1, nenc) + target.view(batch_size, npred, 1)).flatten()
        return cls(
            images=float(batch_size),
            context=float(context.sum()),
            target=float(target.sum()),
            pairs=float(pairs.sum()),
            predicted=float(nenc * target.sum()),
            context_squares=_squares(context),
            pair_squares=_squares(pairs),
        )


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers: `width`, number of `layers`, and the MLP's hidden width over the width."""

    width: int
    layers: int
    mlp_ratio: float = 4.0

    def forward(self, tokens: float, squares: float) -> Flops:
        """One forward pass over sequences of so many tokens together, whose lengths' squares add up to `squares`.

        A token and layer cost 8 D^2 for attention's four projections, 4 r D^2 for the MLP and 4 n D for attention.
        """
        matmuls = (8.0 + 4.0 * self.mlp_ratio) * self.width**2 * tokens
        return Flops(matmuls, 4.0 * self.width * squares) * self.layers

    @property
    def tail(self) -> float:
        """FLOPs a token, forward, of a layer's output projection and MLP: what is left of it behind attention."""
        return (2.0 + 4.0 * self.mlp_ratio) * self.width**2


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an I-JEPA training step: what the masks need, whatever an implementation computes.

    The backward pass counts twice the forward, and the target encoder has none.
    """

    encoder: Tower
    predictor: Tower
    patch_values: int  # numbers in a patch, channels * patch_size^2
    num_patches: int

    def __call__(self, batch_size: int, masks_enc: list[Tensor] | Ragged, masks_pred: list[Tensor] | Ragged) -> float:
        """FLOPs of a step on `batch_size` images with these masks (on the CPU)."""
        return sum(flops.total for flops in self.parts(Tokens.of(batch_size, masks_enc, masks_pred)).values())

    def parts(self, tokens: Tokens) -> dict[str, Flops]:
        """Of the `target` encoder, and of `context` encoder and `predictor` with their backward passes."""
        whole = tokens.images * self.num_patches
        target = self.encoder.forward(whole, whole * self.num_patches) + self.embed(whole)
        context = self.encoder.forward(tokens.context, tokens.context_squares) + self.embed(tokens.context)
        into_out = 2.0 * self.encoder.width * self.predictor.width
        predictor = self.predictor.forward(tokens.pairs, tokens.pair_squares)
        predictor += Flops(into_out * (tokens.context + tokens.predicted))
        return {"target": target, "context": context * 3.0, "predictor": predictor * 3.0}

    def embed(self, patches: float) -> Flops:
        """Of embedding so many patches, forward."""
        return Flops(2.0 * self.patch_values * self.encoder.width * patches)


def _lengths(masks: list[Tensor] | Ragged) -> tuple[Tensor, int]:
    """(int64 [B * n] lengths image by image, n masks an image)."""
    if isinstance(masks, Ragged):
        return masks.lengths.long(), masks.per_image
    batch, length = masks[0].shape
    return torch.full((batch * len(masks),), length), len(masks)


def _squares(lengths: Tensor) -> float:
    return float((lengths.double() ** 2).sum())
