import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from benchmarks.counter import as_on_a_gpu
from fastjepa.nn import Linear, keep_copies
from fastjepa.nn.block import Block
from fastjepa.nn.norm import LayerNorm, add_norm
from fastjepa.nn.norm_linear import joins, norm_linear

CASES = {  # dtypes of stream, branch, norm, linear; of autocast; whether with copies
    "fp32": ("fp32", "fp32", "fp32", "fp32", None, False),
    "fp16 throughout": ("fp16", "fp16", "fp16", "fp16", None, False),
    "autocast": ("fp32", "fp16", "fp32", "fp32", "fp16", False),
    "autocast, copies": ("fp32", "fp16", "fp32", "fp32", "fp16", True),
    "narrow stream, copies": ("fp16", "fp16", "fp32", "fp32", "fp16", True),
    "autocast, sharded": ("fp32", "fp16", "fp16", "fp16", "fp16", False),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Head(nn.Module):
    """(linear(norm(x + branch)), x + branch), joined or one after the other."""

    def __init__(self, joined: bool, with_bias: bool = True, x_is_kept: bool = False, width: int = 48):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = LayerNorm(width), Linear(width, 32)
        self.joined, self.options = joined, (with_bias, x_is_kept)
        with torch.no_grad():
            self.norm.weight.normal_(1.0, 0.3), self.norm.bias.normal_()

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.joined:
            assert joins(self.norm, self.linear, x, branch)
            return norm_linear(self.norm, self.linear, x, branch, *self.options)
        y, x = add_norm(self.norm, x, branch, for_linear=True)
        return (self.linear(y) if self.options[0] else self.linear.product(y)), x


def step(head: nn.Module, inputs: list[Tensor], dtype: torch.dtype | None = None, saved: list[Tensor] | None = None):
    inputs = [x.clone().requires_grad_() for x in inputs]
    held = [] if saved is None else saved

    def pack(tensor):
        held.append(tensor)
        return tensor

    autocast = torch.autocast(inputs[0].device.type, dtype) if dtype else nullcontext()
    with as_on_a_gpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        z, s = head(*inputs)
    with as_on_a_gpu():
        (z.float().square().sum() + s.float().square().sum()).backward()
    return [z, s, *(x.grad for x in inputs)], [p.grad for p in head.parameters()]


def made(case: str, rows: int, branch: bool = True, **options):
    stream, added, norm, linear, autocast, copies = CASES[case]
    heads = [Head(joined, **options) for joined in (False, True)]
    for head in heads:
        head.norm.to(DTYPES[norm]), head.linear.to(DTYPES[linear])
        if copies:
            keep_copies(head, DTYPES[autocast])
    torch.manual_seed(1)
    inputs = [torch.randn(rows, 48).to(DTYPES[stream]), torch.randn(rows, 48).to(DTYPES[added])]
    return heads, inputs[: 1 + branch], DTYPES.get(autocast)


@pytest.mark.parametrize("x_is_kept", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_two_give(case: str, rows: int, branch: bool, x_is_kept: bool):
    heads, inputs, dtype = made(case, rows, branch, with_bias=not x_is_kept, x_is_kept=x_is_kept)
    (wanted, of_weights), (found, ours) = (step(head, inputs, dtype) for head in heads)
    if not branch:  # ours adds the two gradients of x in fp32, before it rounds; autograd after
        exact, a, b = step(copy.deepcopy(heads[0]).double(), [inputs[0].double()])[0][2], found.pop(), wanted.pop()
        assert (a - exact).norm() <= 1.01 * (b - exact).norm()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    if "autocast" not in case or "copies" in case:
        torch.testing.assert_close(ours, of_weights, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["autocast", "autocast, sharded"])
def test_is_as_near_to_fp64_as_autocast(case: str):
    """Which rounds gradients of weights to 16 bits; ours come from the product's sums."""
    heads, inputs, dtype = made(case, 37, x_is_kept=True)
    exact = step(copy.deepcopy(heads[0]).double(), [x.double() for x in inputs])
    (wanted, of_weights), (found, ours) = (step(head, inputs, dtype) for head in heads)
    for a, b, c in zip(found + ours, wanted + of_weights, exact[0] + exact[1], strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.01 * (b - c).norm()


def shapes(saved: list[Tensor]) -> list[tuple[str, list[int]]]:
    return sorted((str(t.dtype), list(t.shape)) for t in saved if t.shape == (37, 48))


def test_keeps_the_sum_alone_or_the_branch_alone():
    for x_is_kept, kept in ((False, ["torch.float32"]), (True, ["torch.float16", "torch.float32"])):
        heads, inputs, dtype = made("autocast, copies", 37, x_is_kept=x_is_kept)
        saved: list[Tensor] = []
        step(heads[1], inputs, dtype, saved)
        assert shapes(saved) == [(dtype, [37, 48]) for dtype in kept]
    saved = []
    heads, inputs, _ = made("fp32", 37, x_is_kept=True)
    step(heads[1], inputs, None, saved)
    assert shapes(saved) == [("torch.float32", [37, 48])], "of one dtype, the sum is no wider than the branch"


class Unmoved(torch.autograd.Function):
    """A sum that gives no gradient."""

    @staticmethod
    def forward(ctx, z, s):
        return z.sum() + s.sum()

    @staticmethod
    def backward(ctx, dy):
        return None, None


@pytest.mark.parametrize("case", ["sum unused", "sum alone", "neither", "expanded", "checkpoint", "x without gradient"])
def test_odd_circumstances(case: str):
    def run(joined: bool):
        head = Head(joined, x_is_kept=True)
        torch.manual_seed(1)
        x, branch = torch.randn(5, 48, requires_grad=case != "x without gradient"), torch.randn(5, 48)
        branch = (branch if case == "expanded" else branch.half()).requires_grad_()
        with as_on_a_gpu(), nullcontext() if case == "expanded" else torch.autocast("cpu", torch.float16):
            out = checkpoint(head, x, branch, use_reentrant=False) if case == "checkpoint" else head(x, branch)
        z, s = out[0].float(), out[1]
        losses = {"sum unused": z.square().sum(), "sum alone": s.square().sum(), "expanded": z.sum() + s.sum()}
        losses["neither"] = x.sum() + Unmoved.apply(z, s)
        with as_on_a_gpu():
            losses.get(case, z.square().sum() + s.square().sum()).backward()
        return [x.grad, branch.grad], [p.grad for p in head.parameters()]

    (wanted, of_weights), (found, ours) = run(False), run(True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(ours, of_weights, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("frozen", ["norm", "norm.bias", "linear.weight", "linear.bias", "linear", ""])
def test_of_what_is_frozen(frozen: str):
    heads, inputs, _ = made("fp32", 5)
    for head in heads:
        for name, parameter in head.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
    (wanted, of_weights), (found, ours) = (step(head, inputs) for head in heads)
    torch.testing.assert_close((found, ours), (wanted, of_weights))
    assert sum(gradient is None for gradient in ours) == sum(gradient is None for gradient in of_weights)


def test_does_not_join_what_it_must_not():
    norm, linear, x = LayerNorm(48), Linear(48, 32), torch.randn(5, 48)
    assert not joins(norm, linear, x, None), "no kernels there"
    with as_on_a_gpu():
        assert joins(norm, linear, x, None)
        assert joins(norm, linear, x, x.half())
        assert not joins(norm, linear, x.double(), None)
        assert not joins(norm, linear, x, x.double())
        assert not joins(nn.LayerNorm(48), linear, x, None)
        assert not joins(norm, nn.Linear(48, 32), x, None)
        assert not joins(LayerNorm(48, elementwise_affine=False), linear, x, None)
        assert not joins(LayerNorm(48, bias=False), linear, x, None)
        assert not joins(LayerNorm(9000), Linear(9000, 2), torch.randn(1, 9000), None)
        with torch.no_grad():
            assert not joins(norm, linear, x, None)
        for module in (norm, linear):
            handle = module.register_forward_hook(lambda *_: None)
            assert not joins(norm, linear, x, None)
            handle.remove()
        assert joins(norm, linear, x, None)
        handle = register_module_forward_hook(lambda *_: None)
        assert not joins(norm, linear, x, None), "a hook of all modules"
        handle.remove()
        linear.compile(backend="eager")
        assert not joins(norm, linear, x, None)
        linear._compiled_call_impl = None
        assert joins(norm, linear, x, None)
        norm.forward = lambda *_, **__: x
        assert not joins(norm, linear, x, None)


@pytest.mark.parametrize("norm, linear, stream", ["www", "wnw", "wdw", "wwn", "dww", "wwd"])
def test_dtypes_that_the_two_refuse_are_refused(norm: str, linear: str, stream: str):
    """Without autocast a weight is not cast in silence."""
    dtypes = {"n": torch.float16, "w": torch.float32, "d": torch.float64}
    layers, x = (
        (LayerNorm(48).to(dtypes[norm]), Linear(48, 32).to(dtypes[linear])),
        torch.randn(5, 48).to(dtypes[stream]),
    )
    with as_on_a_gpu():
        joined = joins(*layers, x, None)
        try:
            layers[1](add_norm(layers[0], x, None, for_linear=True)[0])
            refused = False
        except (RuntimeError, ValueError):
            refused = True
    assert joined != refused
    with as_on_a_gpu(), torch.autocast("cpu", torch.float16):
        assert joins(*layers, x, None) == ("d" not in norm + linear + stream)


def test_refuses_what_does_not_fit():
    norm, linear, x = LayerNorm(48), Linear(48, 32), torch.randn(5, 48)
    for inputs, said in (
        ((x[None], None), r"expected x \[T, D\].*\[1, 5, 48\], \[48\] and \[48\]"),
        ((x[:, :32], None), r"\[5, 32\], \[48\]"),
        ((x[:3], x), r"residual must be \[5, 48\] as x is, got \[3, 48\]"),
    ):
        with as_on_a_gpu(), pytest.raises(ValueError, match=said):
            norm_linear(norm, linear, *inputs)


# Within a block, whose parts may be other people's.


def block_step(block: Block, kernels: bool, keep: Tensor | None = None, autocast: torch.dtype | None = None):
    torch.manual_seed(1)
    x, offsets = torch.randn(9, 32, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    block.zero_grad()
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    cast = torch.autocast("cpu", autocast) if autocast else nullcontext()
    with as_on_a_gpu() if kernels else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
            out = block(x, offsets, 5, keep)
        out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in block.parameters())], saved


def test_a_block_keeps_no_norm_s_output():
    block = Block(32, 2)
    keep_copies(block, torch.float16)
    _, saved = block_step(block, True, autocast=torch.float16)
    rows = {t.data_ptr(): t for t in saved if t.dim() > 1 and len(t) == 9}  # nothing is saved twice
    # The stream, q, k and v, attention, the branch behind it, the MLP's hidden numbers.
    assert sum(t.element_size() * t[0].numel() for t in rows.values()) == 32 * (4 + 6 + 2 + 2 + 8)


@pytest.mark.parametrize("keep", [None, torch.tensor([1, 2, 7])], ids=["all", "some"])
@pytest.mark.parametrize("part", ["norm1", "norm2", "attn", "attn.qkv", "mlp", "mlp.fc1", None])
@pytest.mark.parametrize("how", ["hook", "instance", "subclass"])
def test_a_block_calls_parts_that_are_not_ours(how: str, part: str | None, keep: Tensor | None):
    block, calls = Block(32, 2), []
    if part is not None:
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
    found, _ = block_step(block, True, keep)
    assert len(calls) == (part is not None)
    torch.testing.assert_close(found, block_step(block, False, keep)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [100, 192, 1280, 1408])
@pytest.mark.parametrize("x_is_kept", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype | None, x_is_kept: bool, width: int):
    heads = [Head(joined, x_is_kept=x_is_kept, width=width).cuda() for joined in (False, True)]
    inputs = [torch.randn(5001, width, device="cuda"), torch.randn(5001, width, device="cuda")]
    inputs[1] = inputs[1].to(dtype or torch.float32)
    for head in heads:
        if dtype:
            keep_copies(head, dtype)
    (wanted, of_weights), (found, ours) = (step(head, inputs, dtype) for head in heads)
    for a, b in zip(found + ours, wanted + of_weights, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()
    assert all(gradient.dtype == torch.float32 for gradient in ours)
