"""Similarity and attention maps against plain formulas, and the pictures and the page that show them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastjepa import MaskCollator, vit_tiny
from fastjepa.checkpoint import write_checkpoint
from fastjepa.cli import main
from fastjepa.evaluation.features import extract_features, layer_tokens, normalise
from fastjepa.evaluation.gallery import show_checkpoint
from fastjepa.evaluation.maps import attention_maps, similarity_map
from fastjepa.evaluation.overlays import plot_attention, plot_masks, plot_similarity
from fastjepa.training import train
from tests.helpers import make_pictures, tiny_config


@pytest.fixture
def encoder():
    return vit_tiny(img_size=[32], patch_size=8, depth=3, embed_dim=24, num_heads=2, drop_rate=0.3)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)


def plain_blocks(encoder, image):
    """The tokens after every block, and the last block's attention, one image, by plain formulas."""
    x = F.conv2d(normalise(image)[None], encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=8)
    x = x.flatten(2).transpose(1, 2)[0] + encoder.pos_embed[0]
    after = []
    for block in encoder.blocks:
        qkv = block.attn.qkv(F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias, 1e-6)).view(-1, 3, 2, 12)
        q, k, v = qkv.permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / 12**0.5).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(0, 1).reshape(-1, 24))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(x, (24,), block.norm2.weight, block.norm2.bias, 1e-6))))
        after.append(x)
    return after, weights


def test_layers_are_those_of_plain_formulas(encoder, image):
    with torch.no_grad():
        after, _ = plain_blocks(encoder, image)
        expected = [F.layer_norm(x, (24,), encoder.norm.weight, encoder.norm.bias, 1e-6) for x in after]
    encoder.eval()
    for layers in (1, 2, 3):
        found = layer_tokens(encoder, image[None], layers)
        assert len(found) == layers
        for ours, theirs in zip(found, expected[-layers:], strict=True):
            torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-5)
    features = extract_features(encoder, image[None], layers=2)
    torch.testing.assert_close(features[0], torch.cat([t.mean(dim=0) for t in expected[1:]]), rtol=1e-4, atol=1e-5)
    assert not any(block._forward_hooks for block in encoder.blocks)
    with pytest.raises(ValueError, match="the last 4 layers are asked for, of an encoder with 3"):
        extract_features(encoder, image[None], layers=4)


def test_attention_is_that_of_plain_formulas(encoder, image):
    with torch.no_grad():
        _, weights = plain_blocks(encoder, image)
    torch.testing.assert_close(attention_maps(encoder, image), weights.mean(dim=1).view(2, 4, 4), rtol=1e-4, atol=1e-6)
    found = attention_maps(encoder, image, (2, 1))
    torch.testing.assert_close(found, weights[:, 9].view(2, 4, 4), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(2))
    assert not encoder.blocks[-1]._forward_pre_hooks
    assert encoder.training


def test_similarity_is_a_cosine(encoder, image):
    tokens = layer_tokens(encoder.eval(), image[None])[0][0]
    tokens = tokens - tokens.mean(dim=0)
    found = similarity_map(encoder, image, (1, 2))
    expected = F.cosine_similarity(tokens, tokens[6:7], dim=1).view(4, 4)
    torch.testing.assert_close(found, expected)
    assert found[1, 2] == pytest.approx(1.0)
    large = similarity_map(encoder, torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8), (7, 5))
    assert large.shape == (8, 6)


@pytest.mark.parametrize("patch", [(4, 0), (0, -1)])
def test_patches_outside(encoder, image, patch):
    for of in (similarity_map, attention_maps):
        with pytest.raises(ValueError, match="not in the grid of 4 rows and 4 columns"):
            of(encoder, image, patch)


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


def test_pictures_are_drawn(encoder, tmp_path):
    pytest.importorskip("matplotlib")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, draw in (
        ("s", lambda out: plot_similarity(encoder, images, out)),
        ("a", lambda out: plot_attention(encoder, images, out, (0, 3))),
        ("n", lambda out: plot_attention(encoder, normalise(images), out)),
    ):
        assert size_of(draw(tmp_path / f"{name}.png"))[0] == 1080
    for draw in (plot_similarity, plot_attention):
        with pytest.raises(ValueError, match="no images"):
            draw(encoder, images[:0], tmp_path / "x.png")


@pytest.mark.parametrize("ragged", [False, True])
def test_masks_are_drawn_where_they_are(tmp_path, ragged, monkeypatch):
    pytest.importorskip("matplotlib")
    from fastjepa.evaluation import overlays

    collator = MaskCollator((32, 32), 4, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), npred=3, min_keep=2, ragged=ragged)
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    drawn, draw = [], overlays._draw_masks
    monkeypatch.setattr(overlays, "_draw_masks", lambda *all: (drawn.append(all[2:4]), draw(*all)))
    plot_masks(collator, images, tmp_path / "m.png", seed=4, draws=1)
    plain = MaskCollator((32, 32), 4, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), npred=3, min_keep=2, ragged=True)
    masks_enc, masks_pred = plain.sample(2, [4, 0])
    for image, (kept, targets) in enumerate(drawn):
        whole = masks_enc.unbind()[image].numpy()
        assert np.isin(kept[0], whole).all()
        assert not ragged or len(kept[0]) == len(whole)
        assert len(targets) == 3
        for target, expected in zip(targets, masks_pred.unbind()[3 * image : 3 * image + 3], strict=True):
            assert np.array_equal(target, expected.numpy())
        assert not set(kept[0]) & set(np.concatenate(targets))
    with Image.open(tmp_path / "m.png") as picture:
        shades = np.asarray(picture.convert("L"))
    assert (np.abs(shades.astype(int) - 200) < 4).mean() > 0.1  # what is lit keeps its brightness


def test_gallery_of_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pictures = make_pictures(tmp_path / "p", count=6)
    result = train(tiny_config(pictures, tmp_path / "run", runtime={"stop_after": 1}))
    arguments = ["show", str(result.checkpoint), "--data", str(pictures), "--count", "2", "--json", "-"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--scale", "2", "--patch", "3", "4"]) == 0
    files = json.loads(capsys.readouterr().out)
    assert set(files) == {"features", "similarity", "attention", "predictions", "masks", "page"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    one = sorted(pictures.rglob("*.png"))[0]
    assert main(["show", str(result.checkpoint), "--data", str(one), "--out", str(tmp_path / "one")]) == 0
    page = (tmp_path / "one" / "index.html").read_text()
    assert one.name in page
    assert "predictions" not in page  # there is no other picture to show them by


def test_what_cannot_be_shown(tmp_path, encoder):
    path = tmp_path / "run.pth.tar"
    state = encoder.state_dict()
    write_checkpoint({"encoder": state, "predictor": {}, "target_encoder": state, "epoch": 1}, path)
    with pytest.raises(ValueError, match="no such folder of pictures"):
        show_checkpoint(path, tmp_path / "nothing", tmp_path / "out", num_heads=2)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no picture of .* can be read; the last that cannot be read: .*a\.png"):
        show_checkpoint(path, tmp_path / "x", tmp_path / "out", num_heads=2)
    with pytest.raises(ValueError, match="count must be at least 1"):
        show_checkpoint(path, tmp_path / "x", tmp_path / "out", num_heads=2, count=0)
    assert not (tmp_path / "out").exists()
