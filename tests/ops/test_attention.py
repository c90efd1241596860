"""The backends of attention, and the checks of offsets and indices."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from fastjepa import Ragged, ops
from fastjepa.kernels.reference import ragged_attention_ref
from fastjepa.nn import RaggedAttention, set_attention_backend
from fastjepa.ops import attention, library
from tests.helpers import distance


def batch(lengths=(3, 0, 2), **options):
    qkv = torch.randn(sum(lengths), 3, 2, 8, **options)
    return qkv, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), max(lengths)


def test_a_model_takes_a_backend_and_another_keeps_its_own():
    model, other = (torch.nn.ModuleList([RaggedAttention(16, 2), RaggedAttention(16, 2)]) for _ in "ab")
    assert set_attention_backend(model, "sdpa") == 2
    assert [module.backend for module in (*model, *other)] == ["sdpa", "sdpa", "auto", "auto"]
    assert ops.attention_backend(torch.device("cuda"), "sdpa") == "sdpa"
    assert ops.attention_backend(torch.device("cuda")) == "triton"
    with pytest.raises(ValueError, match="got 'flash'"):
        set_attention_backend(model, "flash")


@pytest.mark.parametrize("name", ["sdpa", "reference", "auto"])
def test_backends_that_take_anything(name):
    qkv, offsets, longest = batch(dtype=torch.float64)
    out = ops.ragged_attention(qkv, offsets, longest, backend=name)
    assert distance(out, ragged_attention_ref(qkv, offsets, longest)) < 1e-12


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of auto, triton, .*, got 'flash'"):
        ops.ragged_attention(*batch(), backend="flash")


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_backend_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"the {name} backend needs that package: pip install {name}"):
        ops.ragged_attention(*batch(), backend=name)


@pytest.mark.parametrize("name", ["triton", "flash-attn", "xformers"])
def test_backend_asked_for_by_name_raises_where_it_cannot_run(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())
    with pytest.raises(ValueError, match=rf"the {name} backend takes .*CUDA.* got .*\[5, 3, 2, 8\] on cpu"):
        ops.ragged_attention(*batch(), backend=name)


@pytest.mark.parametrize(
    ("width", "dtype", "options", "message"),
    [
        (8, torch.float64, {}, "fp32, fp16 or bf16"),
        (12, torch.float32, {}, "head widths"),
        (8, torch.float32, {"dropout": 0.1}, "no dropout"),
        (8, torch.float32, {"scale": -1.0}, "positive scale"),
    ],
)
def test_triton_says_what_it_does_not_take(monkeypatch, width, dtype, options, message):
    monkeypatch.setattr(library, "takes_kernels", lambda x: True)
    _, offsets, longest = batch()
    with pytest.raises(ValueError, match=message):
        ops.ragged_attention(torch.randn(5, 3, 2, width, dtype=dtype), offsets, longest, backend="triton", **options)


class OnCuda(torch.Tensor):
    """A tensor that says it lies on CUDA, for what only asks."""

    is_cuda = True


def peer(monkeypatch, name, **functions):
    module = ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_flash_attention_gets_the_packed_batch(monkeypatch):
    """The call that flash-attn's public function takes."""

    def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False):
        assert cu_seqlens.dtype == torch.int32
        assert not causal
        return ragged_attention_ref(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p)

    peer(monkeypatch, "flash_attn", flash_attn_varlen_qkvpacked_func=flash_attn_varlen_qkvpacked_func)
    qkv, offsets, longest = batch(dtype=torch.bfloat16)
    out = attention._flash(qkv.as_subclass(OnCuda), offsets, longest, 0.3, 0.0)
    assert torch.equal(out.as_subclass(torch.Tensor), ragged_attention_ref(qkv, offsets, longest, 0.3))


def test_xformers_gets_the_packed_batch(monkeypatch):
    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, lengths):
            assert lengths == [3, 2]
            return lengths

    def memory_efficient_attention(query, key, value, attn_bias=(), p=0.0, scale=None):
        assert query.shape == (1, 5, 2, 8)
        qkv = torch.stack([query, key, value], 2)[0]
        offsets = torch.tensor([0, *attn_bias]).cumsum(0, dtype=torch.int32)
        return ragged_attention_ref(qkv, offsets, max(attn_bias), scale, p).unsqueeze(0)

    for name in ("xformers", "xformers.ops.fmha"):
        peer(monkeypatch, name)
    peer(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    peer(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    qkv, offsets, longest = batch()
    out = attention._xformers(qkv.as_subclass(OnCuda), offsets, longest, 0.3, 0.0)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), ragged_attention_ref(qkv, offsets, longest, 0.3))


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([1, 3, 5], "from 1 to 5 in steps of 2..2"),
        ([0, 3, 4], "from 0 to 4 in steps of 1..3"),
        ([0, 4, 2, 5], "in steps of -2..4"),
        ([0, 5, 5], "max_length=4; they run from 0 to 5 in steps of 0..5"),
    ],
)
def test_offsets_that_lie(offsets, said):
    with pytest.raises(ValueError, match=said):
        ops.ragged_attention(torch.randn(5, 3, 2, 8), torch.tensor(offsets, dtype=torch.int32), 4)


def index_of(*values):
    return Ragged.from_list([torch.tensor(values)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ops.gather_tokens(torch.randn(1, 4, 2), index_of(0, 4)), r"index must be in 0..3, got values in 0..4"),
        (
            lambda: ops.gather_tokens(torch.randn(1, 4, 2), index_of(-1, 3)),
            r"index must be in 0..3, got values in -1..3",
        ),
        (
            lambda: ops.scatter_tokens(Ragged.from_list([torch.randn(1, 2)]), index_of(9), 4),
            r"0..3, got values in 9..9",
        ),
        (lambda: ops.take_rows(torch.randn(2, 2), torch.tensor([2])), r"rows must be in 0..1, got values in 2..2"),
        (lambda: assemble(source=[-2]), r"source must be in -1..1, got values in -2..-2"),
        (lambda: assemble(patches=[3]), r"patches must be in 0..2, got values in 3..3"),
        (
            lambda: ops.jepa_loss(Ragged.from_list([torch.randn(1, 2)]), torch.randn(1, 4, 2), index_of(4)),
            r"masks_pred must be in 0..3, got values in 4..4",
        ),
    ],
)
def test_indices_out_of_range(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def assemble(source=(0,), patches=(0,)):
    table = torch.randn(2, 4), torch.randn(4), torch.randn(3, 4)
    return ops.assemble_predictor(*table, torch.tensor(source), torch.tensor(patches))


@pytest.mark.gpu
def test_values_on_cuda_are_looked_into_only_where_asked_for():
    x, rows = torch.randn(2, 8, device="cuda"), torch.tensor([2], device="cuda")
    with pytest.raises(ValueError, match="rows must be in 0..1"):
        ops.take_rows(x, rows, check=True)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.take_rows(x, rows - 1)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ops.ATTENTION_BACKENDS)
def test_every_backend_on_a_gpu(name):
    try:
        ops.check_backend(name)
    except ValueError as error:
        pytest.skip(str(error))
    qkv, offsets, longest = batch((110, 0, 90), device="cuda", dtype=torch.bfloat16)
    offsets = offsets.cuda()
    out = ops.ragged_attention(qkv, offsets, longest, 0.3, backend=name)
    exact = ragged_attention_ref(qkv.double(), offsets, longest, 0.3)
    assert distance(out.double(), exact) < 0.02
