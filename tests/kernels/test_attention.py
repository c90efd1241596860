"""Ragged attention against its reference: values, gradients, lengths, layouts, launches, compiled code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.kernels.attention import (
    attention_bwd,
    attention_config,
    attention_cost,
    attention_fwd,
    compile_cases,
    ragged_attention,
)
from fastjepa.kernels.attention_tiles import DTYPES, HEAD_DIMS, MEDIUM, REGIMES, SHORT, head_parts, regime_of
from fastjepa.kernels.reference import ragged_attention_ref
from tests.kernels.row_checks import (
    DEVICE,
    ON_A_CHIP,
    ROOT,
    assert_compiles_well,
    compare,
    launches,
    randn,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poison")
LENGTHS = [5, 0, 1, 37, 65, 0]  # an empty one, a token, a part of a tile, two tiles, empty at the end
BOUNDS = {"short": SHORT, "medium": MEDIUM, "long": MEDIUM + 1}  # any bound of the lengths chooses a regime


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def check(
    qkv: Tensor,
    lengths: list[int],
    max_length: int | None = None,
    scale: float | None = None,
    upstream: Tensor | None = None,
    few: bool = False,
) -> Tensor:
    offsets = offsets_of(lengths)
    longest = max(lengths)
    if upstream is None:
        upstream = randn(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype)
    out, _ = compare(
        lambda x: ragged_attention(x, offsets, longest if max_length is None else max_length, scale),
        lambda x: ragged_attention_ref(x.contiguous(), offsets, longest, scale),
        [qkv],
        [upstream],
        few,
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 88, 96, 128])
def test_values_and_gradients(head_dim: int, dtype: torch.dtype):
    lengths = LENGTHS if dtype == torch.float16 else LENGTHS[:4]
    check(randn(sum(lengths), 3, 2, head_dim, dtype=dtype), lengths)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("head_dim", [24, 80, 128])
def test_every_regime(head_dim: int, regime: str):
    """The bound decides the launch and not the answer: programs beyond the end of every sequence leave."""
    assert regime_of(BOUNDS[regime]) == regime
    check(randn(sum(LENGTHS), 3, 1, head_dim, dtype=torch.float16), LENGTHS, max_length=BOUNDS[regime])


def test_long_sequences():
    check(randn(390, 3, 1, 24, dtype=torch.float16), [MEDIUM + 44, 90])


def test_equal_lengths_are_a_batch():
    check(randn(4 * 33, 3, 2, 32, dtype=torch.float16), [33] * 4)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    head_dim=st.sampled_from([16, 24, 72]),
    heads=st.integers(1, 2),
    slack=st.sampled_from([0, 1, 200]),
)
def test_any_lengths(lengths: list[int], head_dim: int, heads: int, slack: int):
    check(
        randn(sum(lengths), 3, heads, head_dim, dtype=torch.float16), lengths, max_length=max(lengths) + slack, few=True
    )


def test_sequences_of_one_token():
    """Each is its own value; nothing depends on its query and key."""
    qkv, upstream = randn(5, 3, 2, 24, dtype=torch.float16), randn(5, 2, 24, dtype=torch.float16)
    offsets = offsets_of([1, 1, 0, 1, 1, 1])
    out, dqkv = value_and_gradients(lambda x: ragged_attention(x, offsets, 1), [qkv], [upstream])
    assert torch.equal(out, qkv[:, 2])
    assert torch.equal(dqkv[:, 2], upstream)
    assert dqkv[:, :2].abs().max() < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("sequences", [0, 3])
def test_no_tokens(sequences: int):
    qkv = randn(0, 3, 2, 80, dtype=torch.float16)
    out, dqkv = value_and_gradients(
        lambda x: ragged_attention(x, offsets_of([0] * sequences), 0), [qkv], [randn(0, 2, 80, dtype=torch.float16)]
    )
    assert out.shape == (0, 2, 80)
    assert dqkv.shape == qkv.shape


def test_sequences_do_not_see_one_another():
    qkv = randn(sum(LENGTHS), 3, 2, 80, dtype=torch.float16)
    together, _ = attention_fwd(qkv, offsets_of(LENGTHS), max(LENGTHS), 0.1)
    parts = qkv.split(LENGTHS)
    alone = [attention_fwd(part, offsets_of([len(part)]), max(LENGTHS), 0.1)[0] for part in parts]
    assert torch.equal(together, torch.cat(alone))


def test_saved_log_sum_exp():
    qkv, scale = randn(43, 3, 2, 24), 0.3
    _, lse = attention_fwd(qkv, offsets_of([40, 3]), 40, scale)
    for part, got in zip(qkv.double().split([40, 3]), lse.split([40, 3], dim=1), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", part[:, 0], part[:, 1])
        torch.testing.assert_close(got.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def layouts(qkv: Tensor) -> dict[str, Tensor]:
    """The same values: tokens apart, heads apart, off by one element, off by one element a token, width apart."""
    tokens, _, heads, width = qkv.shape
    return {
        "tokens apart": qkv.new_zeros(tokens, 5, heads, width)[:, 1:4].copy_(qkv),
        "heads apart": qkv.new_zeros(tokens, 3, heads, 2 * width)[..., width:].copy_(qkv),
        "part first": qkv.new_zeros(3, tokens, heads, width).transpose(0, 1).copy_(qkv),
        "misaligned": qkv.new_zeros(qkv.numel() + 1)[1:].view(qkv.shape).copy_(qkv),
        "odd stride": qkv.new_zeros(tokens, 3 * heads * width + 1)[:, 1:].unflatten(1, (3, heads, width)).copy_(qkv),
        "width apart": qkv.new_zeros(tokens, 3, width, heads).transpose(2, 3).copy_(qkv),
    }


@pytest.mark.parametrize(
    "layout", ["tokens apart", "heads apart", "part first", "misaligned", "odd stride", "width apart"]
)
def test_strange_layouts(layout: str):
    qkv = randn(43, 3, 2, 24, dtype=torch.float16)
    odd = layouts(qkv)[layout]
    assert odd.stride() != qkv.stride() or odd.data_ptr() % 16
    upstream = randn(24, 2, 43, dtype=torch.float16).permute(2, 1, 0)  # of a view whose last dimension is not dense
    assert torch.equal(check(odd, [40, 3], upstream=upstream), check(qkv, [40, 3], upstream=upstream))


def test_upstream_gradient_that_is_expanded():
    qkv = randn(43, 3, 2, 24).requires_grad_()
    offsets = offsets_of([40, 3])
    ours, theirs = (
        torch.autograd.grad(attend(qkv, offsets, 40).sum(), qkv)[0]
        for attend in (ragged_attention, ragged_attention_ref)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [None, 0.05, 1.0])
def test_scale(scale: float | None):
    check(randn(43, 3, 2, 24, dtype=torch.float16), [40, 3], scale=scale)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in rows beyond a sequence, which are dropped
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_scores_far_from_zero(sign: float):
    """Every score near -2000 or 2000, where a key that is not there would weigh most, or the exponential overflow."""
    qkv = randn(43, 3, 1, 24)
    qkv[:, 0] = 20 + 0.1 * qkv[:, 0]
    qkv[:, 1] = sign * (20 + 0.1 * qkv[:, 1])
    check(qkv, [40, 3])


def test_repeats_bitwise():
    qkv, upstream = randn(70, 3, 2, 80, dtype=torch.float16), randn(70, 2, 80, dtype=torch.float16)
    offsets = offsets_of([66, 4])
    first, second = (value_and_gradients(lambda x: ragged_attention(x, offsets, 66), [qkv], [upstream]) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("qkv", "offsets", "scale", "message"),
    [
        ((4, 2, 1, 24), torch.int32, None, r"\[T, 3, H, d\], got torch.float32 \[4, 2, 1, 24\]"),
        ((4, 3, 1, 20), torch.int32, None, "multiple of 8 in 8..128, got 20"),
        ((4, 3, 1, 136), torch.int32, None, "got 136"),
        ((4, 3, 1, 24), torch.int64, None, r"int32 \[S \+ 1\], got torch.int64"),
        ((4, 3, 1, 24), torch.int32, -1.0, "scale must be positive, got -1.0"),
    ],
)
def test_what_it_refuses(qkv: tuple[int, ...], offsets: torch.dtype, scale: float | None, message: str):
    with pytest.raises(ValueError, match=message):
        ragged_attention(torch.zeros(qkv), torch.tensor([0, 4], dtype=offsets), 4, scale)


def test_head_parts_waste_little():
    for head_dim in range(8, 129, 8):
        first, second = head_parts(head_dim)
        assert head_dim <= first + second <= max(16, head_dim + 24)
        assert all(part in (0, 16, 32, 64, 128) for part in (first, second))


@pytest.mark.parametrize("lengths", [[40, 3, 0], [MEDIUM + 1], [0]])
def test_declared_launches_are_those_made(monkeypatch: pytest.MonkeyPatch, lengths: list[int]):
    qkv, offsets, longest = randn(sum(lengths), 3, 1, 16, dtype=torch.float16), offsets_of(lengths), max(lengths)
    out, lse = attention_fwd(qkv, offsets, longest, 0.25)
    forward = launches(monkeypatch, lambda: attention_fwd(qkv, offsets, longest, 0.25))
    backward = launches(monkeypatch, lambda: attention_bwd(out, qkv, out, lse, offsets, longest, 0.25))
    assert forward == attention_cost(lengths, 1, 16, 2).launches
    assert backward == attention_cost(lengths, 1, 16, 2, backward=True).launches


def test_declared_cost():
    forward, backward = (attention_cost([100, 50], 16, 80, 2, backward) for backward in (False, True))
    assert forward.flops == 4 * (100**2 + 50**2) * 16 * 80
    assert backward.flops == 2.5 * forward.flops
    head = 150 * 16 * 80 * 2
    assert 4 * head < forward.bytes < 4.05 * head
    assert 8 * head < backward.bytes < 8.05 * head


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_every_choice_is_shipped(arch: int):
    """What can be launched for a shipped width is among the cases that are compiled and looked at."""
    shipped = {(case.name, case.config) for case in compile_cases(arch)}
    assert len(shipped) == len(compile_cases(arch))
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for regime in REGIMES:
                choice = attention_config(head_dim, dtype, arch, regime)
                label = (
                    f"d{head_dim} { ({torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32'}[dtype]) }"
                )
                assert ("attention_fwd", f"{label} {choice.fwd}") in shipped
                for part in ("both",) if choice.one_launch else ("queries", "keys"):
                    assert ("attention_bwd", f"{label} {part} {choice.bwd}") in shipped


def in_a_process(task: str, *arguments: str) -> list:
    """What a task below prints, run where kernels are compiled; here they are interpreted if there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", f"from {__name__} import {task}; {task}(*{arguments!r})"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arch", "mma", "pattern"),
    [
        (80, "HMMA", "attention_(fwd d80 bf16 64x32|bwd d80 bf16 both)"),
        (90, "HGMMA", "attention_(fwd d24 bf16|bwd d24 bf16 both)"),
    ],
)
def test_compiled_code(arch: int, mma: str, pattern: str):
    for case in assert_compiles_well("attention", arch, pattern, 2):
        assert case["mma_instructions"].get(mma), case


def print_signatures(batches: str) -> None:
    """The different keys by which Triton would compile, over random batches; nothing is compiled or launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastjepa.kernels.attention import _attention_bwd_kernel, _attention_fwd_kernel

    backend, keys, calls = make_backend(GPUTarget("cuda", 80, 32)), set(), 0
    for kernel in (_attention_fwd_kernel, _attention_bwd_kernel):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def record(*args, grid, warmup, kernel=kernel, bind=bind, **kwargs):
            nonlocal calls
            calls += 1
            _, specialization, options = bind(*args, **kwargs)
            keys.add(f"{kernel.fn.__name__} {specialization} {options}")

        kernel.run = record
    for lengths in random_batches(int(batches)):
        qkv, offsets = torch.zeros(sum(lengths), 3, 2, 24, dtype=torch.bfloat16), offsets_of(lengths)
        out, lse = attention_fwd(qkv, offsets, max(lengths), 0.2)
        attention_bwd(out, qkv, out, lse, offsets, max(lengths), 0.2)
    print(json.dumps([calls, len(keys)]))


def random_batches(count: int) -> list[list[int]]:
    """Lengths of a few sequences, in every regime; among them counts that divide by 16 and a single token."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 340, (1 + i % 5,), generator=generator).tolist() for i in range(count - 2)]
    return [[1], [16, 32], *(lengths if any(lengths) else [7] for lengths in drawn)]


def test_new_lengths_compile_nothing():
    """Over 50 batches: forward is one choice at this width and chip, backward is "both", "queries" and "keys"."""
    calls, keys = in_a_process("print_signatures", "50")
    assert calls > 100
    assert keys == 4


@pytest.mark.gpu
def test_new_lengths_compile_nothing_on_a_gpu():
    from fastjepa.kernels.attention import _attention_bwd_kernel, _attention_fwd_kernel

    def compiled() -> int:
        place = torch.cuda.current_device()
        return sum(len(kernel.device_caches[place][0]) for kernel in (_attention_fwd_kernel, _attention_bwd_kernel))

    def run(lengths: list[int]) -> None:
        qkv, offsets = randn(sum(lengths), 3, 2, 24, dtype=torch.bfloat16), offsets_of(lengths)
        out, lse = attention_fwd(qkv, offsets, max(lengths), 0.2)
        attention_bwd(out, qkv, out, lse, offsets, max(lengths), 0.2)

    for bound in BOUNDS.values():
        run([bound])
    before = compiled()
    for lengths in random_batches(50):
        run(lengths)
    assert compiled() == before


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("head_dim", [8, 48, *HEAD_DIMS])
def test_on_a_chip(head_dim: int, dtype: torch.dtype):
    many = ((110, 18, 24), (154, 18, 24), (256, 0, 8), (700, 500, 4))
    few = ((40, 9, 2), (130, 9, 1), (270, 0, 1))  # of each regime; an emulated chip is slow
    for mean, spread, count in many if DEVICE.type == "cuda" else few:
        drawn = (mean + spread * torch.randn(count)).clamp(0, 4096).int().tolist()
        lengths = [*drawn, 0, 1, mean]
        qkv = randn(sum(lengths), 3, 3, head_dim, dtype=dtype)
        check(qkv, lengths)
        if DEVICE.type != "cuda":
            continue  # an emulated chip has one order
        upstream = randn(sum(lengths), 3, head_dim, dtype=dtype)
        offsets = offsets_of(lengths)
        first, second = (
            value_and_gradients(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv], [upstream])  # noqa: B023
            for _ in "ab"
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize("regime", REGIMES)
def test_layouts_on_a_chip(regime: str):
    qkv = randn(sum(LENGTHS), 3, 2, 80, dtype=torch.bfloat16)
    upstream = randn(sum(LENGTHS), 2, 80, dtype=torch.bfloat16)
    for odd in layouts(qkv).values():
        check(odd, LENGTHS, max_length=BOUNDS[regime], upstream=upstream)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_a_gpu():
    """The last sequences of a packed batch of 4.6 GB are those that they are alone."""
    tokens, tail = 600_000, [300, 100]
    lengths = [200] * ((tokens - sum(tail)) // 200) + tail
    qkv = torch.randn(sum(lengths), 3, 16, 80, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    last = qkv[-sum(tail) :]
    offsets, last_offsets = offsets_of(lengths), offsets_of(tail)
    got = value_and_gradients(lambda x: ragged_attention(x, offsets, 300), [qkv], [qkv[:, 2]])
    alone = value_and_gradients(lambda x: ragged_attention(x, last_offsets, 300), [last], [last[:, 2]])
    assert all(torch.equal(a[-sum(tail) :], b) for a, b in zip(got, alone, strict=True))
    check(last, tail)
