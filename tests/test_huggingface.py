"""Folders of transformers' `IJepaModel`: the real package reads ours and we read its, weights to the bit."""

from __future__ import annotations

import json
import os

import pytest
import torch

import fastjepa
from fastjepa import load_encoder, read_checkpoint
from fastjepa.huggingface import read_encoder, write_encoder
from fastjepa.layouts import EncoderSizes
from tests.helpers import distance

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture
def encoder():
    encoder = fastjepa.vit_tiny(img_size=[32], patch_size=8, depth=2, embed_dim=24, num_heads=3).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.fixture
def folder(encoder, tmp_path):
    write_encoder(encoder.state_dict(), EncoderSizes.of_state(encoder.state_dict(), 3), tmp_path / "model")
    return tmp_path / "model"


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_there_and_back(encoder, folder):
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]
    state, sizes = read_encoder(folder)
    assert_same(state, encoder.state_dict())
    assert (sizes.num_heads, sizes.patch_size, sizes.layer_norm_eps) == (3, 8, 1e-6)
    checkpoint = read_checkpoint(folder)
    assert_same(checkpoint["target_encoder"], encoder.state_dict())
    assert_same(checkpoint["encoder"], encoder.state_dict())
    assert checkpoint["predictor"] == {}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_encoder(folder)(images), encoder(images))


def test_the_real_model_reads_ours(encoder, folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs, found = transformers.IJepaModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(theirs.eval()(images).last_hidden_state, encoder(images)) < 1e-5
    for ours in (encoder.blocks[1].mlp.fc2.weight, encoder.pos_embed, encoder.patch_embed.proj.bias):
        assert any(torch.equal(ours, p) for p in theirs.parameters())


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False}, {"layer_norm_eps": 1e-3, "image_size": 64}])
@pytest.mark.parametrize("shards", ["100GB", "20KB"])
def test_we_read_what_the_real_model_writes(tmp_path, settings, shards):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
    config = transformers.IJepaConfig(**{**sizes, "image_size": 32, "patch_size": 8, **settings})
    theirs = transformers.IJepaModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() is (shards == "20KB")
    images = torch.randn(2, 3, config.image_size, config.image_size)
    ours = load_encoder(tmp_path / "theirs")
    with torch.no_grad():
        assert distance(ours(images), theirs(images).last_hidden_state) < 1e-5
        masks = [torch.tensor([[0, 3, 5], [1, 2, 7]])]
        assert ours(images, masks).shape == (2, 3, 24)


def test_we_read_a_classifier_of_the_real_package(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    theirs = transformers.IJepaForImageClassification(
        transformers.IJepaConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(load_encoder(tmp_path / "theirs")(images), theirs.ijepa(images).last_hidden_state) < 1e-5


def test_several_files(encoder, folder):
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for part, chosen in parts.items():
        safetensors.save_file({name: tensors[name] for name in chosen}, folder / part)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: part for part, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read_encoder(folder)[0], encoder.state_dict())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is not there"):
        read_encoder(folder)
    index["weight_map"]["layernorm.bias"] = "../model/a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not there"):
        read_encoder(folder)


def test_folders_that_will_not_do(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no folder of a transformers model: it has no config\.json"):
        read_checkpoint(tmp_path / "empty")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"model: model_type is 'vit', not 'ijepa'"):
        read_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model: no encoder\.layer\.2\.layernorm_before\.weight among its tensors"):
        read_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(ValueError, match=r"of another model: pos_embed is \[1, 16, 24\] there and \[1, 16, 48\] here"):
        load_encoder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_damaged_weights(folder, kept):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"model: model\.safetensors is damaged or no safetensors file"):
        read_checkpoint(folder)


def test_nothing_is_written_over(encoder, folder):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(ValueError, match="is there already"):
        write_encoder(encoder.state_dict(), EncoderSizes.of_state(encoder.state_dict(), 3), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    (folder.parent / "empty").mkdir()
    write_encoder(encoder.state_dict(), EncoderSizes.of_state(encoder.state_dict(), 3), folder.parent / "empty")
    assert_same(read_encoder(folder.parent / "empty")[0], encoder.state_dict())


def test_without_safetensors_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install 'fastjepa\[hub\]'"):
        read_checkpoint(folder)
