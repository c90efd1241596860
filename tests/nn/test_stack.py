import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastjepa
from benchmarks.counter import as_on_a_gpu
from fastjepa import IJEPA, MaskCollator, vit_predictor
from fastjepa.nn import set_activation_checkpointing, set_narrow_stream
from fastjepa.nn.block import Block
from fastjepa.ops import library
from fastjepa.sharding import whole
from fastjepa.training.ranks import Ranks


def tiny(depth: int = 3, **more) -> IJEPA:
    encoder = fastjepa.VisionTransformer([64], 8, embed_dim=24, depth=depth, num_heads=2, **more)
    return IJEPA(encoder, vit_predictor(num_patches=64, embed_dim=24, predictor_embed_dim=16, depth=2, num_heads=2))


def batch(ragged: bool, images: int = 3):
    masks = MaskCollator((64, 64), 8, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), npred=2, ragged=ragged)
    return torch.randn(images, 3, 64, 64), *masks.sample(images, [0])


def plain(stack, blocks, norm, x, offsets, max_length, keep=None, for_linear=False):
    """What a stack stands for: every block gives its sum."""
    for depth, block in enumerate(blocks):
        x = block(x, offsets, max_length, keep if depth == len(blocks) - 1 else None)
    return norm(x)


def gradients(model: IJEPA, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("norm_layer", [fastjepa.nn.init.LAYER_NORM, nn.LayerNorm])
def test_deferred_sums_are_the_sums(monkeypatch, ragged: bool, norm_layer):
    model, inputs = tiny(norm_layer=norm_layer).double(), batch(ragged)
    inputs = (inputs[0].double(), *inputs[1:])
    loss = model.loss(*inputs)
    found = gradients(model, loss)
    monkeypatch.setattr(fastjepa.nn.stack.Stack, "run", plain)
    wanted = model.loss(*inputs)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, gradients(model, wanted))


def test_hooks_see_a_block_s_sum():
    model, (images, *_) = tiny(), batch(False)
    wanted = model.encoder(images)
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(model.encoder(images), wanted)
    assert [list(output.shape) for output in seen] == [[3 * 64, 24]] * 3
    torch.testing.assert_close(model.encoder.norm(seen[-1]).view(3, 64, 24), wanted)


def test_blocks_may_be_replaced():
    class Twice(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, offsets, max_length, keep=None):
            return self.block(x, offsets, max_length, keep) * 1.0

    model, (images, *_) = tiny(), batch(False)
    wanted = model.encoder(images)
    model.encoder.blocks[1] = Twice(model.encoder.blocks[1])
    torch.testing.assert_close(model.encoder(images), wanted)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_may_have_a_forward_of_somebody_elses(recompute: bool):
    """Of the first four inputs, whatever ours takes beside them."""

    class Doubled(Block):
        def forward(self, x, offsets, max_length, keep=None):
            return 2 * super().forward(x, offsets, max_length, keep)

    model, (images, *_) = tiny(), batch(False)
    set_activation_checkpointing(model, recompute)
    handle = model.encoder.blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    wanted = model.encoder(images)
    handle.remove()
    model.encoder.blocks[1].__class__ = Doubled
    torch.testing.assert_close(model.encoder(images), wanted)
    model.encoder.blocks[1].__class__ = Block
    forward = model.encoder.blocks[1].forward
    model.encoder.blocks[1].forward = lambda x, offsets, max_length, keep=None: (
        2 * forward(x, offsets, max_length, keep)
    )
    torch.testing.assert_close(model.encoder(images), wanted)


@pytest.mark.parametrize("drops", [{"drop_rate": 0.1, "drop_path_rate": 0.1}, {}])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_activation_checkpointing_changes_no_number(ragged: bool, kernels: bool, drops: dict[str, float]):
    model, inputs = tiny(depth=2, **drops), batch(ragged, images=2)
    other, part = copy.deepcopy(model), copy.deepcopy(model)
    assert set_activation_checkpointing(other) == 3
    assert set_activation_checkpointing(part, "predictor") == 1
    results = []
    with as_on_a_gpu() if kernels else nullcontext():
        for each in (model, other, part):
            torch.manual_seed(1)
            loss = each.loss(*inputs)
            results.append((loss.detach(), gradients(each, loss)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    assert set_activation_checkpointing(other, False) == 3


def test_activation_checkpointing_keeps_less():
    def kept(model: IJEPA) -> int:
        held: dict[int, int] = {}

        def pack(tensor):
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(*inputs)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(size for place, size in held.items() if place not in weights)

    model, inputs = tiny(), batch(True)
    whole = kept(model)
    set_activation_checkpointing(model)
    least = kept(model)
    assert least < whole / 3
    set_activation_checkpointing(model, "predictor")
    assert (model.encoder.recompute, model.target_encoder.recompute, model.predictor.recompute) == (False, False, True)
    assert least < kept(model) < 0.9 * whole


def test_activation_checkpointing_of_what_is_not_there():
    model = tiny()
    set_activation_checkpointing(model)
    for module, wish in ((model, "encoder"), (model, ""), (model.encoder, "predictor")):
        with pytest.raises(ValueError, match='give True, False, or "predictor"'):
            set_activation_checkpointing(module, wish)
    assert model.encoder.recompute
    assert model.predictor.recompute, "nothing is changed"


def test_a_narrow_stream_is_autocasts(monkeypatch):
    model, inputs = tiny(), batch(True)
    seen = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest: (seen.append(x.dtype), forward(self, x, *rest))[1])
    with torch.autocast("cpu", torch.bfloat16):
        wide = model.loss(*inputs)
        assert set(seen) == {torch.float32}
        set_narrow_stream(model)
        seen.clear()
        narrow = model.loss(*inputs)
        assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0)
    seen.clear()
    torch.testing.assert_close(model.loss(*inputs), wide, rtol=0.02, atol=0)
    assert set(seen) == {torch.float32}
    narrow.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.encoder.blocks.parameters())


def test_one_norm_pass_for_each_sum(monkeypatch):
    """With kernels, a residual sum is no operation of its own: LayerNorms take all of them."""
    monkeypatch.setattr(library, "takes_kernels", lambda x: x.dtype == torch.float32)
    model, (images, *_) = tiny(), batch(False)
    added = []
    real = torch.Tensor.__add__
    monkeypatch.setattr(torch.Tensor, "__add__", lambda a, b: (added.append(a.shape), real(a, b))[1])
    with torch.no_grad():
        model.encoder(images)
    assert added == [torch.Size([3, 64, 24])]  # positions


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_blocks_with_kernels(tmp_path, recompute: bool):
    """What backward keeps of weights is what `fully_shard` gathers again: between the passes they are freed."""
    model, inputs = tiny(depth=2), batch(True, images=2)
    set_activation_checkpointing(model, recompute)
    sharded = copy.deepcopy(model)

    def step(model: IJEPA) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with as_on_a_gpu():
            loss, _ = model(*inputs)
            loss.backward()
        return loss.detach(), [whole(p.grad) for p in model.parameters() if p.grad is not None]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        Ranks().shard(sharded, torch.device("cpu"))
        found = step(sharded)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, step(model), rtol=0, atol=0)
