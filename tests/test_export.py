"""Checkpoints through every layout and back, to the bit; on the command line too."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import load_encoder, read_checkpoint
from fastjepa.checkpoint import MODELS
from fastjepa.cli import main
from fastjepa.evaluation.features import normalise
from fastjepa.export import LAYOUTS, export
from tests.conftest import GOLDENS

pytest.importorskip("safetensors", reason="safetensors is not installed")
OFFICIAL = GOLDENS / "ijepa_tiny-latest.pth.tar"


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("way", list(itertools.permutations(LAYOUTS)))
def test_any_way_round_keeps_every_bit(tmp_path, way):
    original = read_checkpoint(OFFICIAL)
    path = OFFICIAL
    for step, to in enumerate(way):
        out = tmp_path / f"{step}-{to}"
        heads = 3 if path == OFFICIAL or "official" in path.name else None
        result = export(path, to, out, num_heads=heads)
        assert result["encoder"]["num_heads"] == 3
        assert result["parameters"] == sum(t.numel() for t in original["target_encoder"].values())
        path = out
    assert_same(read_checkpoint(path)["target_encoder"], original["target_encoder"])


@pytest.mark.parametrize("to", ["official", "fastjepa"])
def test_files_keep_everything(tmp_path, to):
    export(OFFICIAL, to, tmp_path / "out", num_heads=3)
    ours, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(OFFICIAL)
    for name in MODELS:
        assert_same(ours[name], theirs[name])
    assert {k: ours[k] for k in ("epoch", "batch_size", "lr")} == {k: theirs[k] for k in ("epoch", "batch_size", "lr")}
    assert ours["opt"]["param_groups"] == theirs["opt"]["param_groups"]
    raw = torch.load(tmp_path / "out", weights_only=True)
    assert all(name.startswith("module.") is (to == "official") for name in raw["encoder"])
    assert ("encoder_config" in raw) is (to == "fastjepa")
    if to == "official":
        original = torch.load(OFFICIAL, weights_only=True)
        assert list(raw["predictor"]) == list(original["predictor"])
        assert set(raw) == set(original)


def test_the_encoder_that_is_asked_for(tmp_path):
    original = read_checkpoint(OFFICIAL)
    for model in ("encoder", "target_encoder"):
        export(OFFICIAL, "transformers", tmp_path / model, model, 3)
        assert_same(load_encoder(tmp_path / model).state_dict(), original[model])
    assert not torch.equal(original["encoder"]["norm.weight"], original["target_encoder"]["norm.weight"])


def test_what_a_layout_has_no_place_for_is_said(tmp_path):
    export(OFFICIAL, "transformers", tmp_path / "folder", num_heads=3)
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": 1e-12}))
    notes = export(tmp_path / "folder", "official", tmp_path / "out.pth.tar")["notes"]
    assert any("no predictor" in note for note in notes)
    assert "layer_norm_eps 1e-12 becomes 1e-06, which that code has" in notes
    assert export(tmp_path / "folder", "fastjepa", tmp_path / "ours.pth.tar")["notes"] == notes[:1]
    assert load_encoder(tmp_path / "ours.pth.tar").norm.eps == 1e-12


def test_transformers_prepares_pictures_as_training_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    export(OFFICIAL, "transformers", tmp_path / "folder", num_heads=3)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder", use_fast=False)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, normalise(torch.from_numpy(pixels).permute(2, 0, 1)), rtol=1e-5, atol=1e-5)


def test_command(tmp_path, capsys):
    arguments = ["export", str(OFFICIAL), "--num-heads", "3", "--to", "transformers", str(tmp_path / "out")]
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["encoder"]["embed_dim"] == 48
    assert main(["export", str(tmp_path / "out"), "--to", "official", str(tmp_path / "a" / "x.pth.tar")]) == 0
    printed = capsys.readouterr().out
    assert "x.pth.tar: 0.1 M parameters of the target_encoder" in printed
    assert "note: there is no predictor" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{official}", "--to", "timm", "{out}"], "can be exported to transformers, official, fastjepa, not to 'timm'"),
        (["{official}", "--to", "transformers", "{out}"], "its number of heads has to be given"),
        (["{official}", "--to", "official", "{official}", "--num-heads", "3"], "is there already"),
        (
            ["{official}", "--to", "official", "{out}", "--model", "predictor"],
            "model must be target_encoder or encoder",
        ),
        (["nothing.pth.tar", "--to", "official", "{out}"], "nothing.pth.tar: no such file"),
        (["{folder}", "--to", "official", "{out}"], "it has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    names = {"official": OFFICIAL, "out": tmp_path / "out", "folder": tmp_path}
    assert main(["export", *(a.format(**names) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
