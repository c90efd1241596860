"""The encoder: keywords, keys, both mask forms, other image sizes, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastjepa
from fastjepa import Ragged, VisionTransformer, apply_masks, vit_tiny
from fastjepa.nn import position
from tests.helpers import distance

# name, patch size -> parameters of the official models, positions included.
SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
    "vit_giant": (1408, 40, 16),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_factories(name):
    width, depth, heads = SIZES[name]
    with torch.device("meta"):
        model = getattr(fastjepa, name)(patch_size=14 if name == "vit_huge" else 16, img_size=[224])
    assert (model.embed_dim, len(model.blocks), model.num_heads) == (width, depth, heads)
    hidden = 6144 if name == "vit_giant" else 4 * width
    assert model.blocks[0].mlp.fc1.out_features == hidden
    assert model.norm.eps == 1e-6
    assert model.pos_embed.shape == (1, 256 if name == "vit_huge" else 196, width)
    keys = {key.split(".", 2)[-1] for key in model.state_dict() if key.startswith("blocks.0.")}
    expected = {f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2") for kind in ("weight", "bias")}
    assert keys == expected | {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}


def test_masks_are_the_same_in_every_form():
    model = vit_tiny(img_size=[64], patch_size=16, depth=2).eval()
    images = torch.randn(3, 3, 64, 64)
    masks = [torch.stack([torch.randperm(16)[:5] for _ in range(3)]) for _ in range(2)]
    lists = model(images, masks)
    assert lists.shape == (6, 5, 192)
    per_image = [masks[k][b] for b in range(3) for k in range(2)]
    packed = model(images, Ragged.from_list(per_image, per_image=2))
    image_major = lists.view(2, 3, 5, 192).transpose(0, 1).reshape(-1, 192)
    assert distance(packed.values, image_major) < 1e-6
    assert distance(model(images, masks[0]), lists[:3]) < 1e-6
    # Without attention between patches, masking before the blocks and after them is the same.
    flat = VisionTransformer([64], 16, embed_dim=24, depth=0, num_heads=2)
    assert distance(flat(images, masks), apply_masks(flat(images), masks)) < 1e-6


def test_ragged_is_each_image_alone():
    model = vit_tiny(img_size=[64], patch_size=16, depth=2).eval()
    images = torch.randn(3, 3, 64, 64)
    sequences = [
        torch.tensor([1, 5, 9]),
        torch.arange(0),
        torch.tensor([0]),
        torch.arange(16),
        torch.tensor([3, 2]),
        torch.arange(7),
    ]
    packed = model(images, Ragged.from_list(sequences, per_image=2)).unbind()
    for place, sequence in enumerate(sequences):
        if len(sequence):
            alone = model(images[place // 2 : place // 2 + 1], [sequence.view(1, -1)])
            assert distance(packed[place], alone[0]) < 1e-5


def test_gradient_reaches_only_masked_patches():
    model = vit_tiny(img_size=[32], patch_size=16, depth=1)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(images, [torch.tensor([[0, 3]])]).square().sum().backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0)
    assert (seen[:16, :16] > 0).all()
    assert (seen[16:, 16:] > 0).all()
    assert (seen[:16, 16:] == 0).all()


@pytest.mark.parametrize("size", [(96, 96), (48, 80), (64, 32)])
def test_other_image_sizes(size):
    model = vit_tiny(img_size=[64], patch_size=16, depth=1).eval()
    grid = (size[0] // 16, size[1] // 16)
    table = position.interpolate_positions(model.pos_embed, (4, 4), grid)
    expected = nn.functional.interpolate(
        model.pos_embed.view(1, 4, 4, 192).permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False
    )
    assert torch.equal(table, expected.permute(0, 2, 3, 1).reshape(1, -1, 192))
    images = torch.randn(2, 3, *size)
    out = model(images)
    assert out.shape == (2, grid[0] * grid[1], 192)
    other = VisionTransformer(size, 16, embed_dim=192, depth=1, num_heads=3).eval()
    other.load_state_dict({**model.state_dict(), "pos_embed": table})
    assert distance(out, other(images)) < 1e-6


def test_positions():
    table = position.sincos_positions(8, (2, 3))[0]
    assert table.shape == (6, 8)
    angle = torch.tensor([2.0, 0.02])  # column 2 of row 1: frequencies 1 and 1/100
    expected = torch.cat([angle.sin(), angle.cos(), (angle / 2).sin(), (angle / 2).cos()])
    assert distance(table[5], expected) < 1e-6
    with pytest.raises(ValueError, match="width that 4 divides"):
        position.sincos_positions(6, (2, 2))


def test_initialisation():
    torch.manual_seed(1)
    model = vit_tiny(img_size=[64], depth=3)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for depth, block in enumerate(model.blocks, start=1):
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.05)
        assert block.mlp.fc1.bias.abs().max() == 0
    assert not model.pos_embed.requires_grad


def test_dropout_and_drop_path_only_in_training():
    torch.manual_seed(0)
    model = VisionTransformer(
        [32], 8, embed_dim=32, depth=2, num_heads=2, drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.5
    )
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_drop_path_drops_whole_sequences():
    from fastjepa.nn.block import DropPath

    offsets = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    out = DropPath(0.5).train()(torch.ones(9, 2), offsets)
    for start, end in ((0, 3), (3, 4), (4, 9)):
        assert out[start:end].unique().numel() == 1
    assert set(out.unique().tolist()) <= {0.0, 2.0}
    kept = torch.tensor([0, 3, 8])
    torch.manual_seed(3)
    whole = DropPath(0.5).train()(torch.ones(9, 2), offsets)
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.5).train()(torch.ones(3, 2), offsets, kept), whole[kept])


def test_bad_input():
    model = vit_tiny(img_size=[32], depth=1)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="does not divide an image of 30x32"):
        model(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="index must be in 0..3, got values in 0..4"):
        model(torch.zeros(1, 3, 32, 32), [torch.tensor([[0, 4]])])
    with pytest.raises(ValueError, match="do not fit 1 images"):
        model(
            torch.zeros(1, 3, 32, 32),
            Ragged.from_list([torch.tensor([0])] * 3, per_image=3).with_values(torch.tensor([0, 0, 0]), per_image=2),
        )
    with pytest.raises(ValueError, match="does not divide"):
        vit_tiny(img_size=[30])
    with pytest.raises(ValueError, match="does not divide the width"):
        VisionTransformer(embed_dim=64, num_heads=3)
    with pytest.raises(TypeError, match="nonsense"):
        vit_tiny(nonsense=3)
