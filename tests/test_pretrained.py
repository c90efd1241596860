"""An encoder out of a checkpoint: the official golden one, ours, and what cannot be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastjepa import load_encoder, read_checkpoint, vit_tiny
from fastjepa.checkpoint import MODELS, write_checkpoint
from fastjepa.pretrained import load_ijepa
from fastjepa.training import train
from tests.conftest import GOLDENS
from tests.helpers import distance, make_pictures, tiny_config

OFFICIAL = GOLDENS / "ijepa_tiny-latest.pth.tar"


@pytest.mark.parametrize("model", ["target_encoder", "encoder"])
def test_official_checkpoint_gives_the_recorded_features(model):
    with np.load(GOLDENS / "ijepa_tiny-latest_expected.npz") as expected:
        encoder = load_encoder(OFFICIAL, model, num_heads=3)
        assert not encoder.training
        with torch.no_grad():
            features = encoder(torch.tensor(expected["images"]).float())
        assert distance(features, expected[f"{model}_all"]) < 1e-5


def test_our_run_says_its_heads(tmp_path):
    result = train(tiny_config(make_pictures(tmp_path / "p"), tmp_path / "run", runtime={"stop_after": 1}))
    encoder = load_encoder(result.checkpoint)
    assert encoder.num_heads == 3
    for name, tensor in result.model.target_encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


def test_all_three_models_of_official_checkpoint_and_run(tmp_path):
    model, state = load_ijepa(OFFICIAL, num_heads=3), read_checkpoint(OFFICIAL)
    for name in MODELS:
        for key, tensor in getattr(model, name).state_dict().items():
            assert torch.equal(tensor, state[name][key]), key
    assert not model.training
    assert model.predictor.predictor_blocks[0].attn.num_heads == 3
    write_checkpoint(state | {"predictor": {}}, tmp_path / "x.pth.tar")
    with pytest.raises(ValueError, match="has no predictor"):
        load_ijepa(tmp_path / "x.pth.tar", num_heads=3)


def test_the_number_of_heads_is_asked_for():
    with pytest.raises(ValueError, match=r"target_encoder is 48 wide, none of the published widths.*--num-heads"):
        load_encoder(OFFICIAL)
    with pytest.raises(ValueError, match="5 heads do not divide its width 48"):
        load_encoder(OFFICIAL, num_heads=5)
    with pytest.raises(ValueError, match="model must be target_encoder or encoder, got 'predictor'"):
        load_encoder(OFFICIAL, "predictor")


def test_checkpoints_of_something_else(tmp_path):
    path = tmp_path / "run.pth.tar"
    state = vit_tiny(img_size=[32], depth=1).state_dict()
    write_checkpoint({**{name: {"weight": torch.ones(2)} for name in MODELS}, "epoch": 0}, path)
    with pytest.raises(ValueError, match=r"run\.pth\.tar: target_encoder is no I-JEPA encoder: no patch_embed"):
        load_encoder(path, num_heads=3)
    write_checkpoint({**{name: state | {"cls_token": torch.ones(2)} for name in MODELS}, "epoch": 0}, path)
    with pytest.raises(ValueError, match="has cls_token"):
        load_encoder(path)
