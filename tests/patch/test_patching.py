"""`patch` on one live model: what changes, what stays, and the way back. The model is one of ijepa's signatures."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastjepa
from fastjepa.ops import library
from fastjepa.patch import FallbackWarning, attention, patching
from fastjepa.patch.compare import run
from tests.helpers import distance
from tests.patch.ijepa_like import MLP, Attention, Block, VisionTransformer, VisionTransformerPredictor
from tests.patch.others_like import Block as TimmBlock

MASKS = [torch.tensor([[0, 3, 5, 6], [1, 2, 7, 15]]), torch.tensor([[4, 8, 9, 14], [0, 1, 2, 3]])]


def images() -> torch.Tensor:
    """A batch of two."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def classes(model: nn.Module) -> list[type]:
    """Of every module, in order."""
    return [type(m) for m in model.modules()]


def test_everything_of_a_model_is_patched_and_nothing_of_it_moves():
    model, other = VisionTransformer(), VisionTransformer()
    stock, code = classes(model), {c: dict(vars(c)) for c in classes(model)}
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    grads, modes = [p.grad for p in model.parameters()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = fastjepa.patch(model)
    assert torch.equal(state, torch.get_rng_state())
    assert grads == [p.grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert not report.skipped
    assert {f.operation for f in report.patched} == {"attention", "layer_norm", "gelu", "gather"}
    assert len(report.patched) == 2 + 5 + 2 + 1
    assert list(model.state_dict()) == keys
    assert all(parameters[n] is p for n, p in model.named_parameters())
    outside = sum(p.numel() for n, p in model.named_parameters() if "embed" in n)
    assert report.covered == report.total - outside
    assert classes(other) == stock
    assert {c: dict(vars(c)) for c in stock} == code
    report.undo()
    assert classes(model) == stock
    report.undo()  # nothing left to restore


@pytest.mark.parametrize("on_kernels", [False, True], ids=["torch", "interpreted kernels"])
def test_outputs_and_gradients_stay(monkeypatch: pytest.MonkeyPatch, on_kernels: bool):
    """Each is at most twice as far from fp64 as torch is, over several draws: in one, how near torch comes is luck."""
    monkeypatch.setattr(library, "takes_kernels", lambda x: on_kernels and x.dtype == torch.float32)
    offs: dict[tuple, list[tuple[float, float]]] = {}
    for draw in range(4):
        torch.manual_seed(draw)
        for model, arguments in (
            (VisionTransformer(depth=1), (torch.randn(2, 3, 16, 16), MASKS)),
            (VisionTransformerPredictor(), (torch.randn(2, 4, 24), MASKS[:1], MASKS)),
        ):
            stock, exact = run(model, arguments), run(copy.deepcopy(model).double(), _double(arguments))
            report = fastjepa.patch(model, probe=arguments)
            ours = run(model, arguments)
            assert report.verification is not None
            assert report.verification.gradients is not None
            for kind, (a, b, c) in enumerate(zip(ours, stock, exact, strict=True)):
                for place, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
                    if z.norm() >= 1e-6:
                        offs.setdefault((type(model), kind, place), []).append((distance(x, z), distance(y, z)))
    assert len(offs) > 20
    for tensor, found in offs.items():
        ours_off, torchs_off = (math.hypot(*of_all) / math.sqrt(len(found)) for of_all in zip(*found, strict=True))
        assert ours_off <= 2 * max(torchs_off, torch.finfo(torch.float32).eps), tensor


def test_a_step_of_training_is_the_same():
    losses = {}
    for patched in (False, True):
        torch.manual_seed(1)
        encoder, predictor = VisionTransformer(drop_path=0.2), VisionTransformerPredictor()
        reports = [fastjepa.patch(m) for m in (encoder, predictor) if patched]
        target = copy.deepcopy(encoder).requires_grad_(False)
        assert classes(target) == classes(encoder)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1e-2)
        found = []
        for _ in range(5):
            wanted = torch.cat([target(images()).gather(1, m[..., None].expand(-1, -1, 24)) for m in MASKS])
            loss = nn.functional.smooth_l1_loss(predictor(encoder(images(), MASKS[:1]), MASKS[:1], MASKS), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fastjepa.ops.ema_update_(target.parameters(), encoder.parameters(), 0.99)
            found.append(loss.item())
        losses[patched] = torch.tensor(found)
        for report in reports:
            report.undo()
    assert torch.allclose(losses[True], losses[False], rtol=1e-4)
    assert losses[True][0] > losses[True][-1]


def test_a_linear_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"^Linear: nothing to patch: .* a Linear alone is one matrix product"
    ) as caught:
        fastjepa.patch(nn.Linear(4, 4))
    assert "\n" not in str(caught.value)
    report = fastjepa.patch(nn.Linear(4, 4), strict=False)
    assert not report.found
    assert not report.active


def test_only_a_part_is_an_error_that_names_it_and_leaves_the_model():
    model = VisionTransformer()
    model.norm = nn.LayerNorm(24, elementwise_affine=False)
    stock = classes(model)
    with pytest.raises(ValueError, match=r"only 9 of 10 places .* layer_norm: norm \(LayerNorm\): has no weight"):
        fastjepa.patch(model)
    assert classes(model) == stock
    report = fastjepa.patch(model, strict=False)
    assert [f.where for f in report.skipped] == ["norm"]
    assert "skipped layer_norm: norm (LayerNorm)" in str(report)
    report.undo()
    assert not fastjepa.patch(model, ops=["attention", "gelu"]).skipped


@pytest.mark.parametrize("ops", [["attention", "matmul"], []])
def test_an_unknown_operation_is_an_error(ops: list[str]):
    with pytest.raises(ValueError, match="ops must be of gather, attention, layer_norm, gelu, got"):
        fastjepa.patch(VisionTransformer(), ops=ops)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"takes a torch.nn.Module, got function"):
        fastjepa.patch(lambda x: x)
    with torch.device("meta"):
        model = nn.LayerNorm(8)
    with pytest.raises(ValueError, match="meta device"):
        fastjepa.patch(model)
    model = VisionTransformer()
    with pytest.raises(ValueError, match=r"cannot be verified, try verify=False: .*\[2, 5\]"):
        fastjepa.patch(model, probe=(torch.randn(2, 5),))
    assert type(model.norm) is nn.LayerNorm


def test_fastjepa_s_own_modules_are_not_patched():
    with pytest.raises(ValueError, match="is fastjepa's own already"):
        fastjepa.patch(fastjepa.vit_tiny(img_size=[32], depth=1))


def test_twice_is_an_error():
    model = VisionTransformer()
    report = fastjepa.patch(model)
    with pytest.raises(ValueError, match="is patched already; take that back first"):
        fastjepa.patch(model)
    report.undo()
    fastjepa.patch(model).undo()


def test_undo_refuses_where_something_was_put_on_top():
    model = VisionTransformer()
    report = fastjepa.patch(model)
    ours = type(model.norm)
    model.norm.__class__ = type("Theirs", (ours,), {})
    with pytest.raises(ValueError, match="__class__ of a Theirs was replaced again after patch"):
        report.undo()
    assert type(model.blocks[0]).__name__ == "FastBlock"
    model.norm.__class__ = ours
    report.undo()
    assert type(model.blocks[0]) is Block


def test_context_manager_restores_after_an_error():
    model = VisionTransformer()
    with pytest.raises(ZeroDivisionError), fastjepa.patch(model):
        model.forward = model.norm.weight.numel() // 0
    assert type(model.blocks[0].attn) is Attention


class InterleavedAttention(Attention):
    """q, k and v of a head behind one another: the same parameters, read otherwise."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        attn = (self.scale * q @ k.mT).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).flatten(2)), attn


class PostNormBlock(Block):
    """The same parts, norms behind."""

    def forward(self, x, return_attention=False):
        y, attn = self.attn(x)
        x = self.norm1(x + self.drop_path(y))
        return attn if return_attention else self.norm2(x + self.drop_path(self.mlp(x)))


class TanhMLP(MLP):
    """Another GELU."""

    def __init__(self, dim, drop):
        super().__init__(dim, drop)
        self.act = nn.GELU(approximate="tanh")


class ScaledNorm(nn.LayerNorm):
    """A LayerNorm that is none."""

    def forward(self, x):
        return 1.001 * super().forward(x)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda block: setattr(block.attn, "__class__", InterleavedAttention), "its outputs are .* from fp64"),
        (lambda block: setattr(block, "__class__", PostNormBlock), "its outputs are .* from fp64"),
        (lambda block: setattr(block, "mlp", TanhMLP(24, 0.0)), "between them here is act GELU"),
        (lambda block: setattr(block.norm1, "__class__", ScaledNorm), "layer_norm: blocks.1.norm1 .* from fp64"),
        (lambda block: setattr(block.attn, "gate", nn.Linear(24, 24)), "has gate besides qkv and proj"),
        (lambda block: setattr(block.attn, "num_heads", 5), "does not take|by 5 heads"),
        (lambda block: delattr(block.attn, "scale"), "has no number `scale`"),
        (lambda block: setattr(block.mlp, "forward", block.mlp.forward), "has a forward set on it by other code"),
    ],
    ids=["interleaved", "post-norm", "tanh", "scaled norm", "gate", "heads", "no scale", "own forward"],
)
def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, part, reason: str):
    monkeypatch.setattr(library, "takes_kernels", lambda x: x.dtype == torch.float32)  # where LayerNorm is ours
    model = VisionTransformer()
    part(model.blocks[1])
    stock = classes(model)
    with pytest.raises(ValueError, match=reason):
        fastjepa.patch(model)
    assert classes(model) == stock


def test_verify_takes_back_what_changes_the_numbers_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    right = attention.attend
    monkeypatch.setattr(patching, "_fault", lambda finding: "")
    monkeypatch.setattr(attention, "attend", lambda *a: 1.001 * right(*a))
    model = VisionTransformer()
    stock = classes(model)
    with pytest.raises(ValueError, match=r"VisionTransformer was left as it is: patched, on \[2, 3, 16, 16\] float32"):
        fastjepa.patch(model)
    assert classes(model) == stock


def test_what_cannot_be_verified_as_a_whole_says_so():
    model = nn.ModuleDict({"encoder": VisionTransformer()})
    with pytest.warns(UserWarning, match="not compared as a whole: nothing of the model tells its input shape"):
        report = fastjepa.patch(model)
    assert report.verification is None
    assert "not compared as a whole" in str(report)
    report.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastjepa.patch(model, verify=False).active


def test_an_output_without_tensors_is_not_taken_for_the_same():
    class Opaque(nn.Sequential):
        def forward(self, x):
            return {1: object()} if super().forward(x).numel() else None

    with pytest.raises(ValueError, match="its output holds no floating tensor"):
        fastjepa.patch(Opaque(nn.LayerNorm(8)), probe=(torch.randn(2, 8),))


def test_a_frozen_teacher_is_compared_by_its_outputs():
    report = fastjepa.patch(VisionTransformer().requires_grad_(False))
    assert report.verification is not None
    assert report.verification.outputs < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("first", ["patch", "cast"])
def test_other_dtypes(dtype: torch.dtype, first: str):
    model = VisionTransformer()
    expected = copy.deepcopy(model).to(dtype)(images().to(dtype), MASKS)
    if first == "cast":
        model.to(dtype)
    fastjepa.patch(model)
    ours = model.to(dtype)(images().to(dtype), MASKS)
    assert ours.dtype == dtype
    assert distance(ours, expected) < 20 * torch.finfo(dtype).eps


def test_deep_copies_are_patched_and_apart():
    model = VisionTransformer()
    report = fastjepa.patch(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert twin.blocks[0].attn.qkv.weight is not model.blocks[0].attn.qkv.weight
    before = twin(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report.undo()
    assert type(twin.blocks[0]).__name__ == "FastBlock"
    assert torch.equal(twin(images()), before)


def test_our_average_follows_a_patched_model():
    model = VisionTransformer()
    fastjepa.patch(model)
    ema = fastjepa.EMA(model, decay=0.5)
    first = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    assert classes(ema.module) == classes(model)
    assert all(torch.allclose(p, first[n] + 0.5) for n, p in ema.module.named_parameters())


def test_a_copy_is_taken_back_without_a_report():
    model = VisionTransformer()
    stock = classes(model)
    fastjepa.patch(model)
    twin = copy.deepcopy(model)
    assert fastjepa.unpatch(twin) == 12  # 5 norms, 2 attentions, their 2 blocks, 2 MLPs, the encoder
    assert classes(twin) == stock
    assert fastjepa.unpatch(twin) == 0
    assert type(model.blocks[0]).__name__ == "FastBlock"
    model.norm.__class__ = type("Theirs", (type(model.norm),), {})
    with pytest.raises(ValueError, match="__class__ of a Theirs was replaced again"):
        fastjepa.unpatch(model)


def test_autocast_gives_the_same_dtypes(monkeypatch: pytest.MonkeyPatch):
    """The kernels of rows; the interpreter has no bf16 products."""
    monkeypatch.setattr(library, "takes_kernels", lambda x: x.dtype in (torch.float32, torch.bfloat16))
    model, x = VisionTransformer(depth=1), torch.randn(2, 6, 24)
    exact, found = copy.deepcopy(model).double(), {}
    parts = (lambda m: m.norm(x), lambda m: m.blocks[0].mlp(x), lambda m: m.blocks[0].mlp(m.norm(x)))
    expected = [part(exact.double()) for part in (lambda m: m.norm(x.double()), lambda m: m.blocks[0].mlp(x.double()))]
    for patched in (False, True):
        if patched:
            fastjepa.patch(model, ops=("layer_norm", "gelu"), verify=False)
        with torch.autocast("cpu", torch.bfloat16):
            found[patched] = [part(model) for part in parts]
    assert [y.dtype for y in found[True]] == [y.dtype for y in found[False]]
    for ours, theirs, right in zip(found[True], found[False], expected, strict=False):
        assert distance(ours, right) <= 2 * max(distance(theirs, right), torch.finfo(torch.float32).eps)


def test_one_token_without_a_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "takes_kernels", lambda x: True)
    model, x = VisionTransformer(depth=1), torch.randn(24)
    expected = model.norm(x), model.blocks[0].mlp(x)
    fastjepa.patch(model, ops=("layer_norm", "gelu"), verify=False)
    assert all(torch.equal(a, b) for a, b in zip((model.norm(x), model.blocks[0].mlp(x)), expected, strict=True))


def test_state_dicts_and_pickles_are_those_of_the_stock_model():
    model, other = VisionTransformer(), VisionTransformer()
    before = model(images())
    fastjepa.patch(model)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other(images()), before)
    loaded = pickle.loads(pickle.dumps(model))
    assert classes(loaded) == classes(other)
    assert torch.equal(loaded(images()), before)
    model.load_state_dict(VisionTransformer().state_dict())
    assert not torch.allclose(model(images()), before)


@pytest.mark.parametrize("first", ["patch", "compile"])
@pytest.mark.parametrize("make", [VisionTransformer, lambda: nn.Sequential(TimmBlock(24, 3), TimmBlock(24, 3))])
def test_torch_compile(make, first: str):
    torch.compiler.reset()
    model = make()
    arguments = (images(), MASKS) if isinstance(model, VisionTransformer) else (torch.randn(2, 6, 24),)
    expected = model(*arguments)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if first == "compile" else model
    if first == "compile":
        compiled(*arguments)
    report = fastjepa.patch(compiled, probe=arguments)
    if first == "patch":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = compiled(*arguments)
    assert distance(ours, expected) < 1e-6
    ours.sum().backward()
    report.undo()
    assert not any("Fast" in c.__name__ for c in classes(model))
    assert distance(compiled(*arguments), expected) < 1e-6


@pytest.mark.parametrize("first", ["patch", "wrap"])
def test_distributed_data_parallel(tmp_path: Path, first: str):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = VisionTransformer()
        expected = run(model, (images(), MASKS))
        wrapped = model if first == "patch" else DistributedDataParallel(model)
        report = fastjepa.patch(wrapped)
        if first == "patch":
            wrapped = DistributedDataParallel(model)
        assert list(wrapped.state_dict()) == [f"module.{k}" for k in model.state_dict()]
        assert distance(wrapped(images(), MASKS), expected.outputs[0]) < 1e-6
        wrapped(images(), MASKS).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        report.undo()
        assert type(model.norm) is nn.LayerNorm
        del wrapped
        gc.collect()  # it holds the group, which is to end here and not whenever garbage is collected
    finally:
        torch.distributed.destroy_process_group()


def test_attention_maps_that_are_asked_for_are_stock_and_said_aloud():
    model = VisionTransformer()
    block, x = model.blocks[0], torch.randn(2, 5, 24)
    expected, alone = block(x, return_attention=True), block.attn(x)[1]
    fastjepa.patch(model)
    with pytest.warns(
        FallbackWarning, match="Attention runs its own code for this call: its attention map is asked for"
    ):
        assert torch.equal(block(x, return_attention=True), expected)
    with pytest.warns(FallbackWarning):
        assert torch.equal(block.attn(x)[1], alone)
    seen = []
    handle = block.attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    with pytest.warns(FallbackWarning):
        block(x)
    assert seen[0].shape == (2, 3, 5, 5)
    handle.remove()
    handle = block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.warns(FallbackWarning, match="a hook on attn_drop"):
        block(x)
    assert len(seen) == 2
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)


def test_hooks_see_what_they_saw(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "takes_kernels", lambda x: x.dtype == torch.float32)
    names = ["blocks.0", "blocks.0.norm2", "blocks.0.mlp", "blocks.0.mlp.fc1", "blocks.0.mlp.act", "blocks.0.attn.qkv"]
    seen: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    model = VisionTransformer(depth=1)
    modules = dict(model.named_modules())
    for patched in (False, True):
        if patched:
            fastjepa.patch(model)
        handles = [
            modules[n].register_forward_hook(lambda m, i, o, n=n, kept=seen[patched]: kept.update({n: o}))
            for n in names
        ]
        model(images(), MASKS)
        for handle in handles:
            handle.remove()
    assert set(seen[True]) == set(names)
    assert all(distance(seen[True][n], seen[False][n]) < 1e-5 for n in names)


def test_dropout_and_stochastic_depth_in_training():
    x = torch.randn(4, 6, 24)
    always = VisionTransformer(drop=0.999999, attn_drop=1.0).blocks[0]  # SDPA wants a probability, Dropout takes 1 too
    never = VisionTransformer().blocks[0]
    for block in (always, never):
        fastjepa.patch(block)
    assert torch.allclose(always(x), x)
    assert not torch.allclose(always.eval()(x), x)
    assert torch.equal(never(x), never.eval()(x))
    some = VisionTransformer(attn_drop=0.5).blocks[0]
    kept = some.eval()(x)
    fastjepa.patch(some)
    assert distance(some(x), kept) < 1e-6
    attend = some.train().attn  # linear in the dropped weights, so that its mean is the value without dropout
    with torch.no_grad():
        draws = torch.stack([attend(x, need_map=False)[0] for _ in range(2000)])
        expected, _ = attend.eval()(x, need_map=False)
    error = (draws.mean(dim=0) - expected).abs() / (draws.std(dim=0) / 2000**0.5)
    assert 0.5 < float(error.mean()) < 1.1  # of a normal distribution 0.8


def test_report_reads_well():
    text = str(fastjepa.patch(VisionTransformer()))
    assert text.splitlines()[0].startswith("VisionTransformer: 10 of 10 places patched, ")
    assert "  attention: 2 x Attention" in text
    assert "on [2, 3, 16, 16] float32, [[2, 8] int64, [2, 8] int64]: outputs differ by" in text
    assert "forward+backward" in text


def _double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
