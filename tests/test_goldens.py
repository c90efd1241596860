"""The golden data: what the official code computes, from the same weights, images and masks."""

from __future__ import annotations

import pytest
import torch

from fastjepa import VisionTransformer, read_checkpoint
from fastjepa.config import OptimizationConfig
from fastjepa.optim import AdamWEMA
from fastjepa.schedules import Schedules
from fastjepa.training.models import build_optimizer, parameter_groups
from tests.conftest import GOLDENS
from tests.helpers import GOLDEN_MODELS, distance, golden_lists, golden_model, golden_ragged, part

OUTPUT, GRADIENT, LOSSES = 1e-5, 2e-4, 5e-4


def assert_gradients(model, expected, names=("encoder", "predictor")):
    checked = 0
    for name in names:
        for key, parameter in getattr(model, name).named_parameters():
            if parameter.requires_grad:
                assert distance(parameter.grad, expected[f"{name}/{key}"]) < GRADIENT, key
                checked += 1
    assert checked == len(expected)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_rectangular(golden, name):
    arrays = golden(name)
    model, images = golden_model(arrays), torch.tensor(arrays["images"])
    masks_enc, masks_pred = golden_lists(arrays)
    assert distance(model.encoder(images), arrays["out/encoder_all"]) < OUTPUT
    assert distance(model.encoder(images, masks_enc), arrays["out/encoder_masked"]) < OUTPUT
    assert distance(model.predict(images, masks_enc, masks_pred), arrays["out/prediction"]) < OUTPUT
    loss = model.loss(images, masks_enc, masks_pred)
    assert distance(loss, arrays["out/loss"]) < OUTPUT
    loss.backward()
    assert_gradients(model, part(arrays, "grad"))


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_ragged(golden, name):
    arrays = golden(name)
    model, images = golden_model(arrays), torch.tensor(arrays["images"])
    masks_enc, masks_pred = golden_ragged(arrays)
    context = model.encoder(images, masks_enc)
    assert distance(context.values, arrays["ragged/context"]) < OUTPUT
    assert torch.equal(context.offsets, masks_enc.offsets)
    prediction = model.predict(images, masks_enc, masks_pred)
    assert distance(prediction.values, arrays["ragged/prediction"]) < OUTPUT
    assert prediction.per_image == masks_enc.per_image * masks_pred.per_image
    loss = model.loss(images, masks_enc, masks_pred)
    assert distance(loss, arrays["ragged/loss"]) < OUTPUT
    loss.backward()
    assert_gradients(model, part(arrays, "ragged_grad"))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_training(golden, name, one_pass):
    arrays = golden(name)
    model, images = golden_model(arrays), torch.tensor(arrays["images"])
    optimizer = (
        build_optimizer(model) if one_pass else torch.optim.AdamW(parameter_groups(model.encoder, model.predictor))
    )
    for step, expected in enumerate(arrays["train/losses"]):
        for group in optimizer.param_groups:
            group["lr"] = arrays["train/lr"][step].item()
            if not group.get("WD_exclude"):
                group["weight_decay"] = arrays["train/weight_decay"][step].item()
        loss = model.loss(images, *golden_lists(arrays, f"/{step}"))
        loss.backward()
        momentum = arrays["train/momentum"][step].item()
        if isinstance(optimizer, AdamWEMA):
            optimizer.momentum = momentum
        optimizer.step()
        optimizer.zero_grad()
        if not one_pass:
            model.update_target(momentum)
        assert abs(loss.item() / expected - 1) < LOSSES
    final = part(arrays, "train/final")
    for key, value in final.items():
        module, _, parameter = key.partition("/")
        assert distance(getattr(model, module).state_dict()[parameter], value) < GRADIENT, key
    assert final


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_schedules(golden, name):
    arrays = golden(name)
    hyper = {k: v.item() for k, v in part(arrays, "hyper").items()}
    momentum = arrays["train/momentum"]
    settings = OptimizationConfig(
        epochs=hyper["num_epochs"],
        lr=hyper["ref_lr"],
        start_lr=hyper["start_lr"],
        final_lr=hyper["final_lr"],
        warmup=hyper["warmup"],
        weight_decay=hyper["wd"],
        final_weight_decay=hyper["final_wd"],
        ipe_scale=hyper["ipe_scale"],
        ema=(momentum[0].item(), 1.0),
    )
    schedules = Schedules(settings, hyper["iterations_per_epoch"])
    for step in range(len(momentum)):
        assert schedules.lr(step) == pytest.approx(arrays["train/lr"][step], rel=1e-12)
        assert schedules.weight_decay(step) == pytest.approx(arrays["train/weight_decay"][step], rel=1e-12)
        assert schedules.momentum(step) == pytest.approx(momentum[step], rel=1e-12)


def test_official_checkpoint(golden):
    state = read_checkpoint(GOLDENS / "ijepa_tiny-latest.pth.tar")
    expected, c = golden("ijepa_tiny-latest_expected"), part(golden("ijepa_tiny"), "config")
    images = torch.tensor(expected["images"])
    for name in ("encoder", "target_encoder"):
        encoder = VisionTransformer([48], 4, embed_dim=48, depth=2, num_heads=int(c["num_heads"]))
        encoder.load_state_dict(state[name])
        assert distance(encoder(images), expected[f"{name}_all"]) < OUTPUT
    assert state["epoch"] == 1


def test_official_optimizer_state_loads():
    state = read_checkpoint(GOLDENS / "ijepa_tiny-latest.pth.tar")
    encoder = VisionTransformer([48], 4, embed_dim=48, depth=2, num_heads=3)
    from fastjepa import vit_predictor

    predictor = vit_predictor(num_patches=144, embed_dim=48, predictor_embed_dim=24, depth=2, num_heads=3)
    optimizer = torch.optim.AdamW(parameter_groups(encoder, predictor))
    optimizer.load_state_dict(state["opt"])
    named = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    assert len(named) == len(state["opt"]["state"])
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in named)
