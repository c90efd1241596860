import copy
import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from benchmarks.counter import as_on_a_gpu
from fastjepa.nn import Linear, keep_copies, set_fp8
from fastjepa.nn import fused_block as fused
from fastjepa.nn.block import Block
from fastjepa.nn.norm import LayerNorm

CASES = {  # dtypes of stream, branch, norms, linears; of autocast; whether with copies
    "fp32": ("fp32", "fp32", "fp32", "fp32", None, False),
    "fp16 throughout": ("fp16", "fp16", "fp16", "fp16", None, False),
    "autocast": ("fp32", "fp16", "fp32", "fp32", "fp16", False),
    "autocast, copies": ("fp32", "fp16", "fp32", "fp32", "fp16", True),
    "narrow stream, copies": ("fp16", "fp16", "fp32", "fp32", "fp16", True),
    "autocast, sharded": ("fp32", "fp16", "fp16", "fp16", "fp16", False),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTH = 32
LENGTHS = (0, 4, 1, 8)
SOME = torch.tensor([1, 2, 7, 12])


def made(case: str = "fp32", width: int = WIDTH, **more) -> Block:
    _, _, norms, linears, autocast, copies = CASES[case]
    torch.manual_seed(0)
    block = Block(width, 2, **more)
    for module in block.modules():
        if isinstance(module, LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3), nn.init.normal_(module.bias)
            module.to(DTYPES[norms])
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, 0.0, 0.3), None if module.bias is None else nn.init.normal_(module.bias)
            module.to(DTYPES[linears])
    if copies:
        keep_copies(block, DTYPES[autocast])
    return block


def inputs_of(case: str, lengths=LENGTHS, branch: bool = True, width: int = WIDTH) -> list[Tensor]:
    stream, added, *_ = CASES[case]
    torch.manual_seed(1)
    tokens = sum(lengths)
    return [torch.randn(tokens, width).to(DTYPES[stream]), torch.randn(tokens, width).to(DTYPES[added])][: 1 + branch]


def by_parts():
    """Blocks as if nothing fused."""
    return patch.object(fused, "fused_block", lambda *_, **__: None)


def step(
    block: Block,
    inputs: list[Tensor],
    lengths=LENGTHS,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    kernels: bool = True,
    saved: list[Tensor] | None = None,
) -> tuple[list[Any], list[Any]]:
    """([s, branch, gradients of the inputs], gradients of the parameters)."""
    device = inputs[0].device
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    inputs = [x.clone().requires_grad_() for x in inputs]
    held = [] if saved is None else saved
    block.zero_grad()

    def pack(tensor):
        held.append(tensor)
        return tensor

    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
    branch = inputs[1] if len(inputs) == 2 else None
    with as_on_a_gpu() if kernels else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            s, out = block(inputs[0], offsets, max(lengths, default=1), keep, branch, True, recompute)
        (s.float().square().sum() + out.float().square().sum()).backward()
    return [s.detach(), out.detach(), *(x.grad for x in inputs)], [p.grad for p in block.parameters()]


def spied():
    """Counts the calls that fuse."""
    real, results = fused.fused_block, []

    def spy(*args, **more):
        results.append(real(*args, **more))
        return results[-1]

    return patch.object(fused, "fused_block", spy), results


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("keep", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gives_what_its_parts_give(case: str, branch: bool, keep: Tensor | None, recompute: bool):
    """To the last bit, but for sums that are taken in other pieces, and gradients that autocast rounds to 16 bits."""
    block, inputs, dtype = made(case), inputs_of(case, branch=branch), DTYPES.get(CASES[case][4] or "")
    with by_parts():
        wanted, of_weights = step(block, inputs, keep=keep, dtype=dtype)
    spy, results = spied()
    with spy:
        found, ours = step(block, inputs, keep=keep, dtype=dtype, recompute=recompute)
    assert [result is not None for result in results] == [True]
    if not branch:  # ours adds the two gradients of x in fp32, before it rounds; autograd after
        torch.testing.assert_close(found.pop(), wanted.pop(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    rounded = "autocast" in case and "copies" not in case
    torch.testing.assert_close(ours, of_weights, **({"rtol": 5e-3, "atol": 1e-1} if rounded else {}))


@pytest.mark.parametrize("keep", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("case", CASES)
def test_is_as_near_to_fp64_as_its_parts(case: str, keep: Tensor | None):
    block, inputs, dtype = made(case), inputs_of(case), DTYPES.get(CASES[case][4] or "")
    exact = step(copy.deepcopy(block).double(), [x.double() for x in inputs], keep=keep, kernels=False)
    with by_parts():
        wanted, of_weights = step(block, inputs, keep=keep, dtype=dtype)
    found, ours = step(block, inputs, keep=keep, dtype=dtype)
    for a, b, c in zip(found + ours, wanted + of_weights, exact[0] + exact[1], strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.05 * (b - c).norm() + 1e-6 * c.norm()


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 0), (33,), (16, 17)])
def test_of_few_tokens_and_of_tiles(lengths: tuple[int, ...]):
    block, inputs = made(), inputs_of("fp32", lengths)
    with by_parts():
        wanted = step(block, inputs, lengths)
    torch.testing.assert_close(step(block, inputs, lengths), wanted)
    with torch.no_grad(), as_on_a_gpu():
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        s, out = block(inputs[0], offsets, max(lengths, default=1), None, inputs[1], True)
    torch.testing.assert_close([s, out], wanted[0][:2], rtol=0, atol=0)


def test_no_tokens_are_kept():
    block, inputs = made(), inputs_of("fp32")
    (s, out, dx, dbranch), ours = step(block, inputs, keep=torch.tensor([], dtype=torch.int64))
    assert s.shape == out.shape == (0, WIDTH)
    assert not any(gradient.any() for gradient in (dx, dbranch, *ours))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_without_a_bias(qkv_bias: bool):
    block = made(qkv_bias=qkv_bias)
    block.attn.proj.bias = block.mlp.fc2.bias = None
    with by_parts():
        wanted = step(block, inputs_of("fp32"))
    torch.testing.assert_close(step(block, inputs_of("fp32")), wanted)


@pytest.mark.parametrize("case", ["sum alone", "branch alone", "expanded", "checkpoint", "x without gradient", "twice"])
def test_odd_circumstances(case: str):
    offsets = torch.tensor([0, 5, 13], dtype=torch.int32)

    def run() -> tuple[list[Tensor | None], list[Tensor | None]]:
        block = made()
        x, branch = inputs_of("fp32")
        x.requires_grad_(case != "x without gradient"), branch.requires_grad_()
        with as_on_a_gpu():
            if case == "checkpoint":
                s, out = checkpoint(block, x, offsets, 8, None, branch, True, use_reentrant=False)
            else:
                s, out = block(x, offsets, 8, None, branch, True)
            losses = {
                "sum alone": s.square().sum(),
                "branch alone": out.square().sum(),
                "expanded": s.sum() + out.sum(),
            }
            loss = losses.get(case, s.square().sum() + out.square().sum())
            loss.backward(retain_graph=case == "twice")
            if case == "twice":
                loss.backward()
        return [x.grad, branch.grad], [p.grad for p in block.parameters()]

    with by_parts():
        wanted, of_weights = run()
    found, ours = run()
    torch.testing.assert_close(found, wanted)
    missing = [torch.zeros_like(a) if b is None else b for a, b in zip(ours, of_weights, strict=True)]
    torch.testing.assert_close(ours, missing)


@pytest.mark.parametrize(
    "frozen", ["norm1", "norm2.bias", "attn.qkv", "attn.proj.weight", "mlp.fc1", "mlp.fc2.bias", ""]
)
def test_of_what_is_frozen(frozen: str):
    block, inputs = made(), inputs_of("fp32")
    for name, parameter in block.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    with by_parts():
        wanted, of_weights = step(block, inputs)
    found, ours = step(block, inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, of_weights)
    assert [gradient is None for gradient in ours] == [not p.requires_grad for p in block.parameters()]


def test_keeps_each_number_once_and_neither_norms_nor_gelus():
    """The stream, q, k and v, attention, the branch behind it, the MLP's hidden numbers; or the inputs alone."""
    block, tokens = made("autocast, copies"), sum(LENGTHS)
    for recompute, kept in ((False, 4 + 6 + 2 + 2 + 8), (True, 4 + 2)):
        saved: list[Tensor] = []
        step(block, inputs_of("autocast, copies"), dtype=torch.float16, recompute=recompute, saved=saved)
        weights = {p.data_ptr() for p in block.parameters()} | {copy.data_ptr() for copy in keep_of(block)}
        held = [t for t in saved if t.dim() > 1 and len(t) == tokens and t.data_ptr() not in weights]
        assert len({t.data_ptr() for t in held}) == len(held)
        assert sum(t.element_size() * t[0].numel() for t in held) == WIDTH * kept
    saved = []  # without copies weights are cast again, too
    step(made("autocast"), inputs_of("autocast"), dtype=torch.float16, recompute=True, saved=saved)
    assert {t.dtype for t in saved if t.dim() == 2 and len(t) >= WIDTH} == {torch.float32}
    saved = []
    step(made(), inputs_of("fp32"), saved=saved)
    assert sum(t.shape == (tokens, WIDTH) for t in saved) == 2, "in one dtype the sum is no wider than the branch"


def keep_of(block: Block) -> list[Tensor]:
    return [t for m in block.modules() if isinstance(m, Linear) and m.copies for t in m.copies if t is not None]


PARTS = ["norm1", "norm2", "attn", "attn.qkv", "attn.proj", "attn.proj_drop", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"]


@pytest.mark.parametrize("keep", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("part", [*PARTS, "mlp.drop", "drop_path"])
@pytest.mark.parametrize("how", ["hook", "instance", "subclass"])
def test_calls_parts_that_are_not_ours(how: str, part: str, keep: Tensor | None):
    block, calls = made(), []
    module = block.get_submodule(part)
    if how == "hook":
        module.register_forward_hook(lambda module, inputs, output: calls.append(output))
    elif how == "instance":
        forward = module.forward
        module.forward = lambda *args, **more: (calls.append(args), forward(*args, **more))[1]
    else:
        old = type(module)

        def forward(self, *args, **more):
            calls.append(args)
            return old.forward(self, *args, **more)

        module.__class__ = type("Theirs", (old,), {"forward": forward})
    found = step(block, inputs_of("fp32"), keep=keep)
    assert len(calls) == (2 if part in ("mlp.drop", "drop_path") else 1)
    torch.testing.assert_close(found, step(block, inputs_of("fp32"), keep=keep, kernels=False), rtol=1e-4, atol=1e-2)


def unregistered(linear: Linear) -> None:
    """As `FullyShardedDataParallel` and replicas of `DataParallel` leave it."""
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


CHANGES = {
    "norm of another": lambda block: setattr(block, "norm1", nn.LayerNorm(WIDTH)),
    "norm without weight": lambda block: setattr(block, "norm2", LayerNorm(WIDTH, elementwise_affine=False)),
    "norm without bias": lambda block: setattr(block, "norm2", LayerNorm(WIDTH, bias=False)),
    "norm in fp64": lambda block: block.norm1.double(),
    "linear of another": lambda block: setattr(block.attn, "proj", nn.Linear(WIDTH, WIDTH)),
    "linear in fp16": lambda block: block.mlp.fc2.half(),
    "linear in fp64": lambda block: block.mlp.fc2.double(),
    "linear in 8 bits": lambda block: set_fp8(block),
    "no bias before the GELU": lambda block: setattr(block.mlp.fc1, "bias", None),
    "parametrized": lambda block: parametrize.register_parametrization(block.attn.qkv, "weight", nn.Identity()),
    "compiled": lambda block: block.mlp.fc1.compile(backend="eager"),
    "another GELU": lambda block: setattr(block.mlp, "act", nn.GELU("tanh")),
    "attention in parts": lambda block: setattr(block.attn, "backend", "reference"),
    "odd heads": lambda block: setattr(block.attn, "num_heads", 8),
    "scale of attention that is none": lambda block: setattr(block.attn, "scale", float("nan")),
    "weight that is no parameter": lambda block: unregistered(block.mlp.fc2),
    "bias of another dtype": lambda block: setattr(block.attn.proj, "bias", nn.Parameter(torch.zeros(WIDTH).half())),
    "scale of attention": lambda block: setattr(block.attn, "scale", -1.0),
    "attention drops": lambda block: setattr(block.attn, "attn_drop", 0.1),
    "projection drops": lambda block: setattr(block.attn, "proj_drop", nn.Dropout(0.1)),
    "MLP drops": lambda block: setattr(block.mlp.drop, "p", 0.1),
    "no dropout": lambda block: setattr(block.mlp, "drop", nn.Identity()),
    "path drops": lambda block: setattr(block.drop_path, "probability", 0.1),
}


def test_without_gradients_nothing_is_kept_beside_the_hidden_numbers():
    block, inputs, held = made(), inputs_of("fp32"), []
    real, attended = fused._from_hidden, []
    run = fused.attention_fwd

    def attention(*arguments):
        results = run(*arguments)
        attended.append(weakref.ref(results[0]))
        return results

    def last(given, hidden):
        held.append(attended[-1]())
        return real(given, hidden)

    spies = patch.object(fused, "attention_fwd", attention), patch.object(fused, "_from_hidden", last)
    with spies[0], spies[1], as_on_a_gpu(), torch.no_grad():
        block(inputs[0], torch.tensor([0, 5, 13], dtype=torch.int32), 8, None, inputs[1], True)
    assert held == [None]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_lies_apart_is_read_where_it_lies(recompute: bool):
    block, (x, branch) = made(), inputs_of("fp32")
    offsets = torch.tensor([0, 5, 13], dtype=torch.int32)

    def run(apart: bool) -> list[Any]:
        def spread(t: Tensor) -> Tensor:
            return torch.stack([t, torch.full_like(t, 3)], -1)[..., 0] if apart else t

        copied = copy.deepcopy(block)
        for linear in (copied.attn.qkv, copied.mlp.fc1, copied.mlp.fc2):
            linear.bias = nn.Parameter(spread(linear.bias.detach()))
        copied.norm2.weight = nn.Parameter(spread(copied.norm2.weight.detach()))
        inputs = [spread(t).detach().requires_grad_() for t in (x, branch)]
        with as_on_a_gpu():
            s, out = copied(inputs[0], spread(offsets), 8, spread(SOME), inputs[1], True, recompute)
            (s.square().sum() + out.square().sum()).backward()
        return [s, out, *(t.grad for t in inputs), *(p.grad for p in copied.parameters())]

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_is_in_the_forward_pass_s_dtypes(recompute: bool):
    """Whatever autocast is on as it runs."""
    block, inputs = made(), inputs_of("fp32")
    wanted = step(block, inputs, recompute=recompute)
    real = Tensor.backward

    def backward(self, *arguments):
        with torch.autocast("cpu", torch.float16):
            real(self, *arguments)

    with patch.object(Tensor, "backward", backward):
        found = step(block, inputs, recompute=recompute)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["offsets", "keep", "weight"])
def test_a_change_before_the_backward_pass_is_seen(changed: str):
    block, (x, branch) = made(), inputs_of("fp32")
    x.requires_grad_()
    given = {
        "offsets": torch.tensor([0, 5, 13], dtype=torch.int32),
        "keep": SOME.clone(),
        "weight": block.mlp.fc2.weight,
    }
    with as_on_a_gpu():
        s, out = block(x, given["offsets"], 8, given["keep"], branch, True)
        with torch.no_grad():
            given[changed] += 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (s.sum() + out.sum()).backward()


def fuses(block: Block, x: Tensor, branch: Tensor | None) -> bool:
    with as_on_a_gpu():
        return fused.fused_block(block, x, branch, torch.tensor([0, 5, 13], dtype=torch.int32), 8) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_does_not_fuse_what_it_must_not(change: str):
    block, inputs = made(), inputs_of("fp32")
    assert fuses(block, *inputs)
    CHANGES[change](block)
    on = torch.autocast("cpu", torch.bfloat16) if change == "linear in 8 bits" else nullcontext()
    with on:
        assert not fuses(block, *inputs)
    if "drops" in change:
        assert fuses(block.eval(), *inputs)


def test_does_not_fuse_in_fp64_nor_under_hooks_of_all_modules_nor_without_kernels():
    block, (x, branch) = made(), inputs_of("fp32")
    assert fuses(block, x, None)
    assert fuses(block, x, branch.half())
    assert not fuses(block, x.double(), None)
    assert not fuses(block, x, branch.double())
    handle = register_module_forward_hook(lambda *_: None)
    assert not fuses(block, x, branch)
    handle.remove()
    spy, results = spied()
    with spy:
        step(block, [x, branch], kernels=False)
        assert not results
        step(block, [x, branch])
    assert len(results) == 1


def test_a_wide_norm_is_not_fused():
    block = Block(9000, 100)
    assert not fuses(block, torch.randn(13, 9000), None)


@pytest.mark.parametrize("norms, linears, stream", ["www", "wnw", "wdw", "wwn", "dww", "wwd"])
def test_dtypes_that_parts_refuse_are_refused(norms: str, linears: str, stream: str):
    """Without autocast a weight is not cast in silence."""
    dtypes = {"n": torch.float16, "w": torch.float32, "d": torch.float64}
    block, x = made(), inputs_of("fp32")[0].to(dtypes[stream])
    for module in block.modules():
        if isinstance(module, LayerNorm | Linear):
            module.to(dtypes[norms if isinstance(module, LayerNorm) else linears])
    joined = fuses(block, x, None)
    try:
        with as_on_a_gpu(), by_parts():
            block(x, torch.tensor([0, 5, 13], dtype=torch.int32), 8)
        refused = False
    except (RuntimeError, ValueError):
        refused = True
    assert joined != refused
    with torch.autocast("cpu", torch.float16):
        assert fuses(block, x, None) == ("d" not in norms + linears + stream)


def test_refuses_what_does_not_fit():
    block, (x, branch) = made(), inputs_of("fp32")
    offsets = torch.tensor([0, 5, 13], dtype=torch.int32)
    short = made()
    short.norm2 = LayerNorm(16)
    biased = made()
    biased.mlp.fc1.bias = nn.Parameter(torch.zeros(7))
    for owner, inputs, said in (
        (block, (x[None], offsets, 8), r"expected x \[T, D\].*\[1, 13, 32\], \[32\] and \[32\]"),
        (block, (x[:, :16], offsets, 8), r"\[13, 16\], \[32\]"),
        (block, (x, offsets, 8, None, branch[:3]), r"residual must be \[3, 32\] as x is, got \[13, 32\]"),
        (block, (x, offsets.long(), 8), r"offsets must be int32 \[S \+ 1\], got torch.int64 \[3\]"),
        (block, (x, offsets, 3), r"2 sequences of at most max_length=3 tokens cannot hold 13"),
        (
            block,
            (x, offsets, 8, SOME[None]),
            r"expected x \[R, D\] and rows \[T\], got \[13, 32\] and \[1, 4\]",
        ),
        (block, (x, offsets, 8, SOME.float()), r"rows must be int32 or int64, got torch.float32"),
        (block, (x, offsets, 8.5), r"max_length must be a whole number, got 8.5"),
        (short, (x, offsets, 8), r"\[13, 32\], \[16\] and \[16\]"),
        (biased, (x, offsets, 8), r"\[13, 128\] and \[7\]"),
    ):
        with as_on_a_gpu(), pytest.raises(ValueError, match=said):
            owner(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("keep", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("width", [96, 192, 384, 1280])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype | None, width: int, keep: bool, recompute: bool):
    lengths = (256, 1, 0, 77, 130)
    block, inputs = made(width=width).cuda(), [x.cuda() for x in inputs_of("fp32", lengths, width=width)]
    inputs[1] = inputs[1].to(dtype or torch.float32)
    if dtype:
        keep_copies(block, dtype)
    some = torch.arange(0, sum(lengths), 3, device="cuda") if keep else None
    with by_parts():
        wanted, of_weights = step(block, inputs, lengths, some, dtype, kernels=False)
    found, ours = step(block, inputs, lengths, some, dtype, recompute, kernels=False)
    for a, b in zip(found + ours, wanted + of_weights, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 2e-3 * b.float().norm()
