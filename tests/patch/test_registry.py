"""transformers: models of random weights, where it is installed."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch

import fastjepa
from fastjepa.patch import FallbackWarning, patching, registry
from tests.helpers import distance

transformers = pytest.importorskip("transformers", "4.53", reason="the swap extra: pip install 'transformers>=4.53'")


def image_model(attention: str = "sdpa", kind: str = "IJepa", **settings):
    """An encoder of 16 patches, and its configuration."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    make, config = getattr(transformers, f"{kind}Model"), getattr(transformers, f"{kind}Config")
    config = config(**sizes, image_size=16, patch_size=4, attn_implementation=attention, **settings)
    return make(config), config


def first_attention(model):
    """Its projections have other names from version to version."""
    return next(m for m in model.modules() if hasattr(m, "q_proj") or hasattr(m, "query"))


def video_model(**settings):
    """V-JEPA 2 with its predictor: 32 tubelets."""
    config = transformers.VJEPA2Config(
        patch_size=4, crop_size=16, frames_per_clip=4, hidden_size=24, num_attention_heads=2, num_hidden_layers=2,
        pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, **settings,
    )  # fmt: skip
    return transformers.VJEPA2Model(config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["IJepa", "ViTMAE", "Dinov2"])
def test_image_models(kind: str, attention: str):
    settings = {"mlp_ratio": 2} if kind == "Dinov2" else {}
    model, _ = image_model(attention, kind, **settings)
    probe = (torch.randn(2, 3, 16, 16),)
    if kind == "ViTMAE":
        probe = (*probe, torch.rand(2, 16))  # the noise that its random masks follow from
    report = fastjepa.patch(model, probe=probe)
    counts = {op: sum(f.operation == op for f in report.patched) for op in ("attention", "gelu")}
    assert counts == {"attention": 2, "gelu": 2}
    assert report.verification is not None
    assert report.verification.outputs < 1e-6


def test_another_instance_of_the_same_configuration_is_untouched():
    model, config = image_model()
    other = transformers.IJepaModel(config)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x).last_hidden_state
    modules = [m for m in model.modules() if getattr(m, "config", None) is config]
    report = fastjepa.patch(model)
    assert config._attn_implementation == model.config._attn_implementation == "sdpa"
    owners = [m for m in model.modules() if getattr(m, "config", None) is not None]
    assert len([m for m in owners if m.config is not config]) == 2
    assert not any(type(m).__name__.startswith("Fast") for m in other.modules())
    assert len([m for m in other.modules() if getattr(m, "config", None) is config]) == len(modules)
    assert distance(model(x).last_hidden_state, expected) < 1e-6
    report.undo()
    assert [m for m in model.modules() if getattr(m, "config", None) is config] == modules
    assert torch.equal(model(x).last_hidden_state, expected)


def test_training_is_the_same_and_restores():
    x, losses = torch.randn(4, 3, 16, 16), {}
    for patched in (False, True):
        torch.manual_seed(0)
        model, _ = image_model("eager")
        model.train()
        wanted = torch.randn(4, 16, 24)
        report = fastjepa.patch(model) if patched else None
        optimizer, losses[patched] = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(20):
            loss = (model(x).last_hidden_state - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[patched].append(loss.item())
        if report:
            report.undo()
            assert not any(type(m).__name__.startswith("Fast") for m in model.modules())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]


def test_attention_maps_masks_and_other_implementations():
    model, _ = image_model("eager")
    x, block = torch.randn(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    block[..., 8:] = float("-inf")
    attention = first_attention(model)
    tokens = torch.randn(2, 16, 24)
    maps = model(x, output_attentions=True).attentions
    takes_mask = "attention_mask" in inspect.signature(attention.forward).parameters
    masked = attention(tokens, block)[0] if takes_mask else None
    fastjepa.patch(model)
    with pytest.warns(FallbackWarning, match="its attention map is asked for"):
        ours = model(x, output_attentions=True).attentions
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model(x)
    handle = attention.register_forward_hook(lambda module, inputs, output: None)
    with pytest.warns(FallbackWarning, match="a hook might want it"):
        model(x)
    handle.remove()
    assert len(ours) == 2
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, maps, strict=True))
    if takes_mask:
        with pytest.warns(FallbackWarning, match="it was given a mask"):
            assert torch.equal(attention(tokens, block)[0], masked)
    name, _ = registry.stock_attention(attention)
    assert name == "eager"
    model.config._attn_implementation = "sdpa"
    assert registry.stock_attention(attention)[0] == "sdpa"


def test_copies_and_compiled_models():
    torch.compiler.reset()
    model, _ = image_model()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x).last_hidden_state
    fastjepa.patch(model)
    twin = copy.deepcopy(model)
    assert distance(twin(x).last_hidden_state, expected) < 1e-6
    compiled = torch.compile(model, backend="aot_eager")
    assert distance(compiled(x).last_hidden_state, expected) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_video_models(attention: str):
    model = video_model(attn_implementation=attention)
    report = fastjepa.patch(model)
    assert sum(f.operation == "attention" for f in report.patched) == 3
    assert {f.what for f in report.patched if f.operation == "gather"} >= {"VJEPA2PredictorEmbeddings"}
    assert report.verification is not None
    assert report.verification.outputs < 1e-6
    clip, masks = torch.randn(2, 4, 3, 16, 16), [torch.arange(0, 32, 3).repeat(2, 1)]
    ours = model(clip, context_mask=masks, target_mask=[m + 1 for m in masks if int(m.max()) < 31])
    report.undo()
    theirs = model(clip, context_mask=masks, target_mask=[m + 1 for m in masks if int(m.max()) < 31])
    assert distance(ours.predictor_output.last_hidden_state, theirs.predictor_output.last_hidden_state) < 1e-6


def test_maps_of_video_models():
    model, clip = video_model(attn_implementation="eager"), torch.randn(1, 4, 3, 16, 16)
    expected = model(clip, output_attentions=True).attentions
    fastjepa.patch(model)
    with pytest.warns(FallbackWarning, match="its attention map is asked for"):
        ours = model(clip, output_attentions=True).attentions
    assert len(ours) == len(expected) == 2
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model(clip)


def test_causal_and_unknown_versions_are_refused(monkeypatch: pytest.MonkeyPatch):
    model, _ = image_model()
    attention = first_attention(model)
    space = inspect.unwrap(type(attention).forward).__globals__
    with monkeypatch.context() as patched:
        patched.delitem(space, "eager_attention_forward")
        with pytest.raises(ValueError, match="eager_attention_forward: a version of transformers that is not known"):
            fastjepa.patch(model)
    with monkeypatch.context() as patched:
        patched.setitem(space, registry.REGISTRY, {"sdpa": None})
        with pytest.raises(ValueError, match="register and eager_attention_forward: a version of transformers"):
            fastjepa.patch(model)
    attention.is_causal = True
    with pytest.raises(ValueError, match="is causal, and the kernel has no mask"):
        fastjepa.patch(model)
    assert not any(type(m).__name__.startswith("Fast") for m in model.modules())


def test_a_language_model_is_refused_as_a_whole():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaModel(config)
    with pytest.raises(ValueError, match=r"LlamaAttention\): is causal"):
        fastjepa.patch(model)


def test_twice_is_an_error_and_warnings_are_none():
    model, _ = image_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fastjepa.patch(model)
        model.train()(torch.randn(2, 3, 16, 16)).last_hidden_state.sum().backward()
    with pytest.raises(ValueError, match=patching.ALREADY):
        fastjepa.patch(model)
