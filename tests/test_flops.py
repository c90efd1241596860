"""FLOPs by part: of tokens counted by hand, and of the usual models as torch counts what they launch."""

from __future__ import annotations

import pytest
import torch

from fastjepa import MaskCollator, Ragged
from fastjepa.flops import Flops, StepFlops, Tokens, Tower

SETTINGS = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5), "npred": 4}


def test_tokens_by_hand():
    """Two images, one context and two targets each: sequences of 2 + 1, 2 + 3, 4 + 1 and 4 + 2 tokens."""
    contexts = Ragged.from_list([torch.arange(2), torch.arange(4)])
    targets = Ragged.from_list([torch.arange(n) for n in (1, 3, 1, 2)], per_image=2)
    tokens = Tokens.of(2, contexts, targets)
    assert tokens == Tokens(2, 6, 7, 19, 7, 4 + 16, 9 + 25 + 25 + 36)


def test_every_context_meets_every_target():
    contexts = Ragged.from_list([torch.arange(2), torch.arange(3)], per_image=2)
    targets = Ragged.from_list([torch.arange(4), torch.arange(1)], per_image=2)
    tokens = Tokens.of(1, contexts, targets)
    assert (tokens.pairs, tokens.predicted) == ((2 + 4) + (3 + 4) + (2 + 1) + (3 + 1), 2 * 5)


@pytest.mark.parametrize("ragged", [False, True])
def test_parts_are_the_step(ragged: bool):
    masks = MaskCollator((224, 224), 16, **SETTINGS, min_keep=10, ragged=ragged).sample(4, [0, 0])
    count = StepFlops(Tower(384, 12), Tower(192, 6), 768, 196)
    parts = count.parts(Tokens.of(4, *masks))
    assert set(parts) == {"target", "context", "predictor"}
    assert sum(flops.total for flops in parts.values()) == pytest.approx(count(4, *masks), rel=1e-12)


def test_a_layer_by_hand():
    """One sequence of 5 tokens, width 2, hidden width 6: qkv, proj, fc1, fc2, and 5 x 5 weights twice."""
    matmuls = 2 * 5 * (2 * 6 + 2 * 2 + 2 * 6 + 6 * 2)
    assert Tower(2, 1, 3.0).forward(5, 25) == Flops(matmuls, 2 * 2 * 25 * 2)
    assert Tower(2, 1, 3.0).tail == 2 * (2 * 2 + 2 * 6 + 6 * 2)
    assert Flops(1.0, 2.0) * 3 + Flops(1.0) == Flops(4.0, 6.0)
