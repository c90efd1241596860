"""I-JEPA: a context encoder and a predictor trained to give what an EMA target encoder sees in the masked blocks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.predictor import VisionTransformerPredictor
from fastjepa.nn.vision_transformer import VisionTransformer
from fastjepa.ops import library
from fastjepa.pairing import TargetRows
from fastjepa.ragged import Ragged

if TYPE_CHECKING:
    from fastjepa.kernels.ema import MultiTensorEMA


class IJEPA(nn.Module):
    """Owns `.encoder`, `.predictor` and `.target_encoder`, which starts as a copy of the encoder and takes no gradient.

    Source: Assran et al. 2023 (arXiv 2301.08243).

    >>> from fastjepa import MaskCollator, vit_predictor, vit_tiny
    >>> encoder = vit_tiny(img_size=[64], patch_size=8, depth=1)
    >>> predictor = vit_predictor(num_patches=64, embed_dim=192, predictor_embed_dim=96, depth=1, num_heads=3)
    >>> model = IJEPA(encoder, predictor)
    >>> collate = MaskCollator((64, 64), 8, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), npred=4, ragged=True)
    >>> images, masks_enc, masks_pred = collate([torch.rand(3, 64, 64) for _ in range(2)])
    >>> model.loss(images, masks_enc, masks_pred).backward()
    >>> model.update_target(0.996)
    """

    def __init__(self, encoder: VisionTransformer, predictor: VisionTransformerPredictor):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self._ema: MultiTensorEMA | None = None

    @torch.no_grad()
    def target_features(self, images: Tensor, targets: TargetRows | None = None) -> Tensor:
        """What the target encoder sees in whole images, before the layer norm: [B, C, H, W] -> [B, N, D].

        With `targets` those rows alone, [U, D]: nothing else is computed of the last block's MLP.
        """
        features = self.target_encoder(images) if targets is None else self.target_encoder(images, keep=targets.kept)
        assert isinstance(features, Tensor)
        return features

    def predict(
        self, images: Tensor, masks_enc: list[Tensor] | Ragged, masks_pred: list[Tensor] | Ragged
    ) -> Tensor | Ragged:
        """The predictor's output for the encoder's contexts; forms as in `VisionTransformerPredictor`."""
        return self.predictor(self.encoder(images, masks_enc), masks_enc, masks_pred)

    def loss(
        self,
        images: Tensor,
        masks_enc: list[Tensor] | Ragged,
        masks_pred: list[Tensor] | Ragged,
        targets: TargetRows | None = None,
    ) -> Tensor:
        """The objective of a batch, a scalar to call `backward` on.

        Shapes: images [B, C, H, W]; masks as `VisionTransformer` and `VisionTransformerPredictor` take them; targets
        `TargetRows.build(masks_pred, B, N)`, which is best made while the masks lie on the CPU, and else made here.

        Raises:
            ValueError: images, masks or targets that do not fit.
        """
        if targets is None and isinstance(self.target_encoder, VisionTransformer):
            rows, columns = self.target_encoder.grid_of(images)
            targets = TargetRows.build(masks_pred, len(images), rows * columns)
        return self.forward(images, masks_enc, masks_pred, targets)[0]

    def forward(
        self,
        images: Tensor,
        masks_enc: list[Tensor] | Ragged,
        masks_pred: list[Tensor] | Ragged,
        targets: TargetRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, target features): of whole images [B, N, D], for whoever watches them for collapse.

        With `targets` the features are those rows alone, [U, D]; the loss is the same, for less work.
        """
        features = self.target_features(images, targets)
        prediction = self.predict(images, masks_enc, masks_pred)
        return ops.jepa_loss(prediction, features, masks_pred, targets), features

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move every parameter of the target encoder to momentum * itself + (1 - momentum) * the encoder's.

        Raises:
            ValueError: a momentum outside 0..1.
        """
        targets, sources = self.target_encoder.parameters(), self.encoder.parameters()
        if not library.takes_kernels(next(self.encoder.parameters())):
            ops.ema_update_(targets, sources, momentum)
            return
        if self._ema is None:
            from fastjepa.kernels.ema import MultiTensorEMA

            self._ema = MultiTensorEMA(targets, sources)  # its tables are made once
        self._ema.update(momentum)

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which hold this instance's addresses: copies make their own."""
        return super().__getstate__() | {"_ema": None}
