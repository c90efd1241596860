"""What a step has to work on: the models as numbers, and the tokens that masks leave of a batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from fastjepa.config import Config
from fastjepa.flops import StepFlops, Tokens
from fastjepa.masks import MaskCollator
from fastjepa.nn import Block
from fastjepa.objective import IJEPA
from fastjepa.ragged import Ragged, image_rows, masks_to_ragged
from fastjepa.training.models import build_models, step_flops

SEED = 0
SHOWN = 25_600  # images whose masks are drawn for an average
FEWEST, MOST = 20, 400  # batches


@dataclass(frozen=True)
class Models:
    """Encoder and predictor as numbers.

    Attributes:
        flops: their widths, depths and patches. heads: of the encoder and of the predictor.
        encoder_parameters, predictor_parameters: those that are trained; the target encoder has as many as the encoder.
    """

    flops: StepFlops
    heads: int
    predictor_heads: int
    encoder_parameters: int
    predictor_parameters: int

    @classmethod
    def of(cls, model: IJEPA) -> Models:
        """Those of a model, on any device."""
        encoder, predictor = model.encoder, model.predictor
        counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (encoder, predictor)]
        block = predictor.predictor_blocks[0]
        assert isinstance(block, Block)
        return cls(step_flops(model), encoder.num_heads, block.attn.num_heads, *counts)

    @classmethod
    def build(cls, config: Config) -> Models:
        """Those of a configuration; nothing is allocated.

        Raises:
            ValueError: an unknown model, or sizes that do not go together.
        """
        with torch.device("meta"):
            return cls.of(build_models(config))

    @property
    def parameters(self) -> int:
        """All that are trained."""
        return self.encoder_parameters + self.predictor_parameters


@dataclass(frozen=True)
class Batch:
    """Tokens of a batch, and `kept`: its images' patches that lie in some target."""

    tokens: Tokens
    kept: float

    def times(self, factor: float) -> Batch:
        """So many of it at once."""
        return Batch(Tokens(*(factor * getattr(self.tokens, f.name) for f in fields(Tokens))), factor * self.kept)

    def scaled(self, context: float, target: float) -> Batch:
        """With so many times the tokens in each context and each target."""
        t = self.tokens
        pairs = context * (t.pairs - t.predicted) + target * t.predicted
        tokens = replace(
            t,
            context=context * t.context,
            target=target * t.target,
            pairs=pairs,
            predicted=target * t.predicted,
            context_squares=context**2 * t.context_squares,
            pair_squares=(pairs / t.pairs) ** 2 * t.pair_squares,
        )
        return Batch(tokens, target * self.kept)


@dataclass(frozen=True)
class Batches:
    """Batches of one size, and their mean.

    Attributes:
        context: tokens of an image's contexts, on average. target: of one of its targets.
    """

    drawn: tuple[Batch, ...]
    mean: Batch
    context: float
    target: float

    @property
    def count(self) -> int:
        """Of batches drawn."""
        return len(self.drawn)


def draw(config: Config, batch_size: int, ragged: bool, count: int | None = None) -> Batches:
    """Masks of `count` batches, always the same ones (as many as show `SHOWN` images, unless given).

    Raises:
        ValueError: settings that admit no mask.
    """
    count = count or min(MOST, max(FEWEST, SHOWN // batch_size))
    mask = config.mask
    scales = tuple(mask.enc_mask_scale), tuple(mask.pred_mask_scale), tuple(mask.aspect_ratio)
    limits = mask.num_enc_masks, mask.num_pred_masks, mask.min_keep, mask.allow_overlap, ragged
    batches = _drawn(config.data.crop_size, mask.patch_size, scales, limits, batch_size, count)
    mean = Batch(
        Tokens(*(sum(getattr(b.tokens, f.name) for b in batches) / count for f in fields(Tokens))),
        sum(b.kept for b in batches) / count,
    )
    targets = batch_size * config.mask.num_pred_masks
    return Batches(batches, mean, mean.tokens.context / batch_size, mean.tokens.target / targets)


@cache  # a plan asks for the masks of every measured step, many of them alike
def _drawn(
    pixels: int, patch_size: int, scales: tuple[Any, ...], limits: tuple[Any, ...], batch_size: int, count: int
) -> tuple[Batch, ...]:
    collator = MaskCollator((pixels, pixels), patch_size, *scales, *limits)
    patches = collator.height * collator.width
    batches = []
    for number in range(count):
        masks = collator.sample(batch_size, [SEED, number])
        targets = masks[1] if isinstance(masks[1], Ragged) else masks_to_ragged(masks[1])
        named = torch.zeros(batch_size * patches, dtype=torch.bool)
        named[image_rows(targets, batch_size, patches)] = True
        batches.append(Batch(Tokens.of(batch_size, *masks), float(named.sum())))
    return tuple(batches)
