"""Names and sizes of an encoder in its layouts: there and back, published sizes, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastjepa
from fastjepa.layouts import HEADS_OF_MODEL, HEADS_OF_WIDTH, EncoderSizes, from_transformers, heads_of, to_transformers

# The published checkpoints: factory, patch size, image size, parameters of the encoder.
PUBLISHED = {
    "IN1K-vit.h.14-300e": ("vit_huge", 14, 224),
    "IN22K-vit.h.14-900e": ("vit_huge", 14, 224),
    "IN1K-vit.h.16-448px-300e": ("vit_huge", 16, 448),
    "IN22K-vit.g.16-600e": ("vit_giant", 16, 224),
}


def encoder_of(name: str, patch_size: int, image_size: int) -> fastjepa.VisionTransformer:
    """On the meta device: shapes alone."""
    with torch.device("meta"):
        return getattr(fastjepa, name)(patch_size=patch_size, img_size=[image_size])


def newer(name: str) -> str:
    """A name of transformers' files as version 5's modules have it."""
    changes = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_checkpoints(published):
    name, patch_size, image_size = PUBLISHED[published]
    encoder = encoder_of(name, patch_size, image_size)
    state = encoder.state_dict()
    sizes = EncoderSizes.of_state(state, heads_of({}, encoder.embed_dim))
    assert (sizes.num_heads, sizes.depth, sizes.img_size) == (16, len(encoder.blocks), (image_size, image_size))
    assert EncoderSizes.of_transformers(sizes.to_transformers()) == sizes
    given = to_transformers(state)
    assert given["embeddings.position_embeddings"].shape == (1, (image_size // patch_size) ** 2, encoder.embed_dim)
    assert given["encoder.layer.31.attention.attention.key.weight"].shape == (encoder.embed_dim,) * 2
    assert sum(t.numel() for t in given.values()) == sum(t.numel() for t in state.values())
    back = from_transformers(given, sizes)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_shapes_are_those_of_the_real_model(published):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    encoder = encoder_of(*PUBLISHED[published])
    sizes = EncoderSizes.of_state(encoder.state_dict(), 16)
    with torch.device("meta"):
        theirs = transformers.IJepaModel(transformers.IJepaConfig(**sizes.to_transformers()), add_pooling_layer=False)
    expected = {newer(name): tensor.shape for name, tensor in theirs.state_dict().items()}
    ours = {newer(name): tensor.shape for name, tensor in to_transformers(encoder.state_dict()).items()}
    assert ours == expected


def test_heads_are_those_of_the_factories():
    for name, heads in HEADS_OF_MODEL.items():
        encoder = encoder_of(name, 16, 32)
        assert encoder.num_heads == heads == HEADS_OF_WIDTH[encoder.embed_dim]
    assert heads_of({}, 48) is None
    run = {"config": {"meta": {"num_heads": None, "model_name": "vit_small"}}}
    assert heads_of({"fastjepa": run}, 48) == 6
    run["config"]["meta"]["num_heads"] = 4
    assert heads_of({"fastjepa": run}, 384) == 4


@given(
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    per_head=st.sampled_from([4, 8]),
    hidden=st.integers(1, 70),
    grid=st.integers(1, 4),
    bias=st.booleans(),
    version_5=st.booleans(),
    classifier=st.booleans(),
)
def test_there_and_back_bit_for_bit(depth, heads, per_head, hidden, grid, bias, version_5, classifier):
    width = 4 * heads * per_head
    size = (4 * grid, 4 * grid)
    sizes = EncoderSizes(size, 4, 3, width, depth, heads, hidden, bias)
    with torch.device("meta"):
        state = fastjepa.pretrained.build_encoder(sizes).state_dict()
    state = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    assert EncoderSizes.of_state(state, heads) == sizes
    assert EncoderSizes.from_dict(sizes.to_dict()) == sizes
    given = to_transformers(state)
    if version_5:
        given = {newer(name): tensor for name, tensor in given.items()}
    if classifier:
        given = {f"ijepa.{name}": tensor for name, tensor in given.items()} | {"classifier.weight": torch.ones(2)}
    back = from_transformers(given, sizes)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.fixture
def state():
    return fastjepa.vit_tiny(img_size=[32], depth=1, embed_dim=24).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, "no pos_embed among its tensors"),
        ({"blocks.0.mlp.fc1.weight": None}, r"no blocks\.0\.mlp\.fc1\.weight"),
        ({"pos_embed": torch.zeros(1, 5, 24)}, "5 patches, which make no square"),
        ({"patch_embed.proj.weight": torch.zeros(24, 48)}, r"patch_embed\.proj\.weight is \[24, 48\]"),
    ],
)
def test_states_of_something_else(state, change, message):
    for name, tensor in change.items():
        state.pop(name) if tensor is None else state.update({name: tensor})
    with pytest.raises(ValueError, match=message):
        EncoderSizes.of_state(state, 3)


def test_heads_that_do_not_divide(state):
    with pytest.raises(ValueError, match="5 heads do not divide its width 24"):
        EncoderSizes.of_state(state, 5)


def test_tensors_of_something_else(state):
    sizes = EncoderSizes.of_state(state, 3)
    given = to_transformers(state)
    with pytest.raises(ValueError, match=r"head\.weight is no tensor of an I-JEPA encoder"):
        to_transformers(state | {"head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no layernorm\.bias among its tensors"):
        from_transformers({k: v for k, v in given.items() if k != "layernorm.bias"}, sizes)
    with pytest.raises(ValueError, match=r"embeddings\.cls_token is no tensor of an IJepaModel with 1 layers"):
        from_transformers(given | {"embeddings.cls_token": torch.ones(1)}, sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "model_type is 'vit', not 'ijepa'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"patch_size": [8, 16]}, r"patch_size is \[8, 16\], not square"),
    ],
)
def test_configurations_of_something_else(state, change, message):
    config = EncoderSizes.of_state(state, 3).to_transformers()
    with pytest.raises(ValueError, match=message):
        EncoderSizes.of_transformers(config | change)
