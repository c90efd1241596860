"""FLOPs launched by a step over FLOPs that it needs: counted, on the meta device, at the sizes that are trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa
from fastjepa import IJEPA, MaskCollator, Ragged
from fastjepa.kernels.attention_tiles import attention_config, head_parts, regime_of
from fastjepa.pairing import TargetRows
from fastjepa.training.models import step_flops

BATCH = 128


def models(name, patch, depth):
    with torch.device("meta"):
        encoder = getattr(fastjepa, name)(patch_size=patch)
        sizes = {"num_patches": encoder.patch_embed.num_patches, "embed_dim": encoder.embed_dim}
        predictor = fastjepa.vit_predictor(**sizes, depth=depth, num_heads=encoder.num_heads)
        return IJEPA(encoder, predictor)


def masks(patch, ragged, step=0):
    settings = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5)}
    return MaskCollator((224, 224), patch, **settings, npred=4, min_keep=10, ragged=ragged).sample(BATCH, [0, step])


def lengths(masks_enc, masks_pred) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each context, of each target, and of each sequence of the predictor."""
    if isinstance(masks_enc, Ragged):
        context, target = masks_enc.lengths, masks_pred.lengths
    else:
        context, target = (torch.full((BATCH * len(m),), m[0].shape[1]) for m in (masks_enc, masks_pred))
    return context, target, (context.view(BATCH, 1) + target.view(BATCH, 4)).flatten()


def on_meta(masks):
    return masks.to("meta") if isinstance(masks, Ragged) else [m.to("meta") for m in masks]


def products(model, masks_enc, masks_pred, targets) -> float:
    """FLOPs of the linear layers in a step, forward and backward: all products of two matrices."""
    images = torch.empty(BATCH, 3, 224, 224, device="meta")
    targets = None if targets is None else targets.to("meta")
    with FlopCounterMode(display=False) as counter:
        model(images, on_meta(masks_enc), on_meta(masks_pred), targets)[0].backward()
    model.zero_grad()
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    assert set(counts) == {"aten.mm", "aten.addmm", "aten.bmm"}, "an operation that is counted neither here nor below"
    return counts["aten.mm"] + counts["aten.addmm"]  # bmm: padded attention of the reference, not what a GPU runs


def attention(model, context, pairs, arch: int | None) -> float:
    """FLOPs of attention: that our kernels launch on a chip, tiles rounded up, or (None) that the formulas need.

    The formulas have 2 products forward and 4 backward; our backward has 7, made of whole tiles in both passes.
    """

    def tower(blocks, lengths, trained):
        heads, width = blocks[0].attn.num_heads, blocks[0].attn.proj.in_features // blocks[0].attn.num_heads
        lengths = lengths.long()
        if arch is None:
            return len(blocks) * heads * (12 if trained else 4) * width * float((lengths**2).sum())
        config = attention_config(width, torch.bfloat16, arch, regime_of(int(lengths.max())))
        total = 0.0
        for tiles, count in ((config.fwd, 2), (config.bwd, 7 if trained else 0)):
            rows, stream = (-(-lengths // size) * size for size in (tiles.rows, tiles.stream))
            total += count * 2 * sum(head_parts(width)) * float((rows * stream).sum())
        return len(blocks) * heads * total

    whole = torch.full((BATCH,), model.encoder.patch_embed.num_patches)
    encoder, predictor = model.encoder.blocks, model.predictor.predictor_blocks
    return tower(encoder, whole, False) + tower(encoder, context, True) + tower(predictor, pairs, True)


def unneeded(model, context, target, pairs, targets) -> float:
    """FLOPs in `StepFlops` that no implementation needs.

    Projection and MLP of the last blocks for tokens that nothing reads, and the gradient of the pixels.
    """
    encoder, predictor = model.encoder, model.predictor
    width, narrow = encoder.embed_dim, predictor.predictor_embed.out_features
    tokens = BATCH * encoder.patch_embed.num_patches - len(targets.kept)
    last = 18.0 * width**2 * tokens + 3 * 18.0 * narrow**2 * float(pairs.sum() - target.sum())
    return last + 2.0 * encoder.patch_embed.proj.weight.numel() * float(context.sum())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "patch", "depth"), [("vit_huge", 14, 12), ("vit_base", 16, 6)])
def test_flops_launched_over_needed(name, patch, depth, ragged):
    model = models(name, patch, depth)
    masks_enc, masks_pred = masks(patch, ragged)
    context, target, pairs = lengths(masks_enc, masks_pred)
    targets = TargetRows.build(masks_pred, BATCH, model.encoder.patch_embed.num_patches)
    plain = step_flops(model)(BATCH, masks_enc, masks_pred)
    needed = plain - unneeded(model, context, target, pairs, targets)
    linear = products(model, masks_enc, masks_pred, targets)
    assert linear == pytest.approx(needed - attention(model, context, pairs, None), rel=1e-9)  # not one too many
    for arch in (80, 90):
        launched = linear + attention(model, context, pairs, arch)
        assert launched <= 1.02 * plain, f"{launched / plain:.4f} on sm {arch}"
        assert launched <= 1.04 * needed, f"{launched / needed:.4f} on sm {arch}"  # more than 1: attention's, all of it


@pytest.mark.parametrize("ragged", [False, True])
def test_what_target_tokens_alone_save(ragged):
    model = models("vit_base", 16, 6)
    masks_enc, masks_pred = masks(16, ragged)
    targets = TargetRows.build(masks_pred, BATCH, 196)
    union, whole = (products(model, masks_enc, masks_pred, rows) for rows in (targets, None))
    assert whole - union == 18 * 768**2 * (BATCH * 196 - len(targets.kept))
    repeats = products(model, masks_enc, masks_pred, TargetRows.build(on_meta(masks_pred), BATCH, 196))
    assert union < repeats < whole


def test_padding_to_a_multiple_costs_little():
    model = models("vit_base", 16, 6)
    masks_enc, masks_pred = masks(16, ragged=True)
    targets = TargetRows.build(masks_pred, BATCH, 196)
    exact = products(model, masks_enc, masks_pred, targets)
    padded = products(model, masks_enc.padded(64), masks_pred.padded(1), targets)
    assert exact < padded < 1.005 * exact
