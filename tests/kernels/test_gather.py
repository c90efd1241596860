"""Gather, scatter and the predictor's input against their references: values, gradients, order, launches, code."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels.gather import (
    _gather_kernel,
    assemble_predictor,
    assemble_predictor_cost,
    assemble_predictor_fwd,
    gather_rows,
    gather_rows_cost,
    gather_rows_fwd,
    mask_token_bwd,
    row_inverse,
    scatter_rows,
    scatter_rows_cost,
    scatter_rows_fwd,
)
from fastjepa.kernels.reference import assemble_predictor_ref, gather_rows_ref, scatter_rows_ref
from tests.kernels.row_checks import (
    DEVICE,
    MANY,
    ON_A_CHIP,
    assert_compiles_well,
    compare,
    launches,
    randn,
    strange_layouts,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poison")
PATCHES = 16
DTYPES = [torch.float32, torch.float16]
LAYOUTS = ["rows apart", "misaligned", "rows apart and misaligned", "columns apart"]


def some_rows(tokens: int, table: int, unique: bool = False, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """int [tokens] in 0..table-1."""
    rows = torch.randperm(table)[:tokens] if unique else torch.randint(max(1, table), (tokens,))
    return rows.to(dtype).to(DEVICE)


def check_gather(
    x: torch.Tensor,
    rows: torch.Tensor,
    pos_embed: torch.Tensor,
    unique: bool,
    upstream: torch.Tensor,
    few: bool = False,
) -> None:
    """With and without positions, the inverse made here and given."""
    for inverse in (None, row_inverse(rows.contiguous(), x.shape[0], unique)):
        compare(
            lambda x, pos, inverse=inverse: gather_rows(x, rows, pos, unique, inverse),
            lambda x, pos: gather_rows_ref(x, rows, pos),
            [x, pos_embed],
            [upstream],
            few,
        )
        compare(
            lambda x, inverse=inverse: gather_rows(x, rows, None, unique, inverse),
            lambda x: gather_rows_ref(x, rows),
            [x],
            [upstream],
            few,
        )


def check_scatter(
    x: torch.Tensor, rows: torch.Tensor, table: int, unique: bool, upstream: torch.Tensor, few: bool = False
) -> None:
    compare(
        lambda x: scatter_rows(x, rows, table, unique),
        lambda x: scatter_rows_ref(x, rows, table),
        [x],
        [upstream],
        few,
    )


def predictor_inputs(tokens: int, width: int, dtype: torch.dtype, index: torch.dtype = torch.int32) -> list:
    """context, mask_token, pos_embed, source, patches: context tokens repeat, a third are mask tokens."""
    context = max(1, tokens // 6)
    source = some_rows(tokens, context, dtype=index)
    source[::3] = -1
    tables = [randn(context, width, dtype=dtype), randn(width, dtype=dtype), randn(PATCHES, width, dtype=dtype)]
    return [*tables, source, some_rows(tokens, PATCHES, dtype=index)]


def check_predictor(inputs: list, upstream: torch.Tensor, few: bool = False) -> None:
    *tables, source, patches = inputs
    for inverse in (None, row_inverse(source.contiguous(), tables[0].shape[0])):
        compare(
            lambda *t, inverse=inverse: assemble_predictor(*t, source, patches, inverse),
            lambda *t: assemble_predictor_ref(*t, source, patches),
            tables,
            [upstream],
            few,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("width", [100, 384, 1280, 1408])
def test_gather_and_scatter(width: int, unique: bool, dtype: torch.dtype):
    index = torch.int64 if unique else torch.int32
    rows = some_rows(41, 4 * PATCHES, unique, index)
    table, tokens = randn(4 * PATCHES, width, dtype=dtype), randn(41, width, dtype=dtype)
    check_gather(table, rows, randn(PATCHES, width, dtype=dtype), unique, tokens)
    check_scatter(tokens, rows, 4 * PATCHES, unique, table)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 384, 1280, 1408])
def test_assemble_predictor(width: int, dtype: torch.dtype):
    index = torch.int64 if width == 384 else torch.int32
    check_predictor(predictor_inputs(50, width, dtype, index), randn(50, width, dtype=dtype))


def test_mask_tokens_of_several_programs():
    check_predictor(predictor_inputs(600, 128, torch.float32), randn(600, 128))


def test_dtypes_may_differ():
    rows = some_rows(41, 4 * PATCHES)
    x, pos_embed = randn(4 * PATCHES, 64, dtype=torch.float16), randn(PATCHES, 64)
    upstream = [randn(41, 64).half()]
    compare(
        lambda x, pos: gather_rows(x, rows, pos),
        lambda x, pos: gather_rows_ref(x, rows, pos.to(x.dtype)),
        [x, pos_embed],
        upstream,
    )
    _, token, _, source, patches = predictor_inputs(41, 64, torch.float32)
    compare(
        lambda x, token, pos: assemble_predictor(x, token, pos, source, patches),
        lambda x, token, pos: assemble_predictor_ref(x, token, pos.to(x.dtype), source, patches),
        [x, token, pos_embed],
        upstream,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strange_layouts(layout: str):
    rows = torch.stack([some_rows(29, 32), some_rows(29, 32)], dim=1)[:, 1]
    x, pos, dy = (strange_layouts(randn(n, 192))[layout] for n in (32, PATCHES, 29))
    check_gather(x, rows, pos, False, dy)
    check_scatter(dy, rows, 32, False, x)
    context, token, pos, source, patches = predictor_inputs(29, 192, torch.float32)
    odd = [strange_layouts(t)[layout] for t in (context, token[None], pos)]
    twice = [torch.stack([t, t], dim=1)[:, 0] for t in (source, patches)]
    check_predictor([odd[0], odd[1][0], odd[2], *twice], dy)
    check_predictor([context, token, pos, source, patches], randn(192)[None].expand(29, 192))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject):
    width = data.draw(st.integers(1, 300))
    unique = data.draw(st.booleans())
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([torch.int32, torch.int64]))
    table = PATCHES * data.draw(st.integers(1, 5))
    tokens = data.draw(st.integers(0, table))
    rows = some_rows(tokens, table, unique, index)
    x, dy = randn(table, width, dtype=dtype), randn(tokens, width, dtype=dtype)
    check_gather(x, rows, randn(PATCHES, width, dtype=dtype), unique, dy, few=True)
    check_scatter(dy, rows, table, unique, x, few=True)
    check_predictor(predictor_inputs(tokens, width, dtype, index), dy, few=True)


def test_no_rows_no_context_no_mask_token():
    nothing = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    assert gather_rows(randn(0, 16), nothing).shape == (0, 16)
    assert torch.equal(scatter_rows(randn(0, 16), nothing, 3), torch.zeros(3, 16, device=DEVICE))
    assert scatter_rows(randn(0, 16), nothing, 0).shape == (0, 16)
    row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert gather_rows(randn(3, 0), row).shape == (1, 0)
    assert scatter_rows(randn(1, 0), row, 3).shape == (3, 0)
    _, token, pos, source, patches = predictor_inputs(20, 16, torch.float32)
    check_predictor([randn(0, 16), token, pos, torch.full_like(source, -1), patches], randn(20, 16))
    check_predictor([randn(9, 16), token, pos, torch.zeros_like(source), patches], randn(20, 16))


@pytest.mark.gpu
def test_rows_beyond_2_to_the_31_elements_on_a_gpu():
    """Of a table of 4.3 GB."""
    x = torch.empty(2**21 + 8, 1024, dtype=torch.float16, device=DEVICE)
    x[-8:] = randn(8, 1024)
    rows = torch.tensor([2**21 + 7, 2**21, 2**21 + 3], device=DEVICE)
    assert int(rows.min()) * x.shape[1] >= 2**31
    assert torch.equal(gather_rows(x, rows), x[-8:][rows - 2**21])


def test_inverse_lists_tokens_in_order():
    rows = torch.tensor([2, 0, 2, -1, 3, 2, -1], dtype=torch.int32, device=DEVICE)
    order, starts = row_inverse(rows, 5)
    assert [order[a:b].tolist() for a, b in pairwise(starts)] == [[1], [], [0, 2, 5], [4], []]
    unique = row_inverse(torch.tensor([3, 0, 2], device=DEVICE), 5, unique=True)
    assert unique.order.tolist() == [1, -1, 2, 0, -1]
    assert unique.starts is None


def test_inverse_is_two_tensors():
    """What a data loader has to send: int32, no width."""
    order, starts = row_inverse(some_rows(9, 4), 4)
    assert order.dtype == starts.dtype == torch.int32
    assert (order.shape, starts.shape) == ((9,), (5,))


def test_repeated_rows_add_in_order_and_in_fp32():
    """2048 ones in fp16: one after another in fp16 they would stay 2048 for ever; in fp32 none is lost."""
    rows = torch.zeros(4099, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(4099, 16, dtype=torch.float16, device=DEVICE)
    assert scatter_rows(ones, rows, 2).tolist() == [[4100.0] * 16, [0.0] * 16]


def test_repeats_bitwise():
    rows = some_rows(300, 64)
    tables, upstream = [randn(64, 384).half(), randn(PATCHES, 384).half()], [randn(300, 384).half()]
    first, second = (value_and_gradients(lambda x, p: gather_rows(x, rows, p), tables, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    *tables, source, patches = predictor_inputs(300, 384, torch.float16)
    first, second = (
        value_and_gradients(lambda *t: assemble_predictor(*t, source, patches), tables, upstream) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_declared_launches(monkeypatch: pytest.MonkeyPatch):
    x, rows, pos_embed = randn(64, 32), some_rows(40, 64, unique=True), randn(PATCHES, 32)
    key = 32, torch.float32
    assert launches(monkeypatch, lambda: gather_rows_fwd(x, rows, pos_embed)) == gather_rows_cost(40, *key).launches
    dy = randn(40, 32)
    for unique in (False, True):
        inverse = row_inverse(rows, 64, unique)
        declared = [scatter_rows_cost(40, 64, *key, unique=unique, inverse=given).launches for given in (False, True)]
        assert declared[1] == launches(monkeypatch, lambda inverse=inverse: scatter_rows_fwd(dy, inverse, 64))
        assert declared[0] == launches(
            monkeypatch, lambda unique=unique: scatter_rows_fwd(dy, row_inverse(rows, 64, unique), 64)
        )
    *tables, source, patches = predictor_inputs(40, 32, torch.float32)
    inverse = row_inverse(source, tables[0].shape[0])

    def backward() -> None:
        scatter_rows_fwd(dy, inverse, tables[0].shape[0])
        mask_token_bwd(dy, source, torch.float32)

    cost = [assemble_predictor_cost(40, 6, PATCHES, *key, backward=b).launches for b in (False, True)]
    assert launches(monkeypatch, lambda: assemble_predictor_fwd(*tables, source, patches)) == cost[0]
    assert launches(monkeypatch, backward) == cost[1]


def test_declared_bytes():
    """ViT-H, 128 images, 110 of 256 tokens of 1280 in bf16; the predictor's 512 sequences of 154."""
    row = 1280 * 2
    assert 2 * 14080 * row < gather_rows_cost(14080, 1280, torch.bfloat16).bytes < 2.01 * 14080 * row
    back = scatter_rows_cost(14080, 32768, 1280, torch.bfloat16, unique=True)
    assert (14080 + 32768) * row < back.bytes < 1.01 * (14080 + 32768) * row
    tokens, least = 512 * 154, (512 * 154 + 14080) * 768
    for backward in (False, True):
        cost = assemble_predictor_cost(tokens, 14080, 256, 384, torch.bfloat16, backward=backward)
        assert least < cost.bytes < 1.02 * least


def test_refuses_what_it_cannot_do():
    x, rows, pos = randn(8, 16), some_rows(4, 8), randn(4, 16)
    with pytest.raises(ValueError, match=r"rows must be int32 or int64 \[T\], got torch\.float32"):
        gather_rows(x, rows.float())
    with pytest.raises(ValueError, match=r"\[8, 16\] and \[4, 15\]"):
        gather_rows(x, rows, pos[:, :15])
    with pytest.raises(ValueError, match="float64"):
        gather_rows(x.double(), rows)
    with pytest.raises(ValueError, match=r"\[8, 16\] and \[4\]"):
        scatter_rows(x, rows, 9)
    with pytest.raises(ValueError, match=r"\[8, 16\], \[15\]"):
        assemble_predictor(x, pos[0, :15], pos, rows, rows)
    with pytest.raises(ValueError, match=r"\[4\] and \[3\]"):
        assemble_predictor(x, pos[0], pos, rows, rows[:3])


@pytest.mark.parametrize("arch, widths", [(80, "1280|1408"), (90, "1280|384")])
def test_compiled_code(arch: int, widths: str):
    kernels = "(gather_rows|scatter_rows|assemble_predictor|mask_token_bwd)"
    assert_compiles_well("gather", arch, f"{kernels} d({widths}) bf16", expected=14)


@pytest.mark.parametrize("dtype", ON_A_CHIP)
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280, 1408, 100])
def test_on_a_chip(width: int, dtype: torch.dtype):
    for unique in (False, True):
        rows = some_rows(MANY, 512 * PATCHES, unique)
        table, tokens = randn(512 * PATCHES, width, dtype=dtype), randn(MANY, width, dtype=dtype)
        check_gather(table, rows, randn(PATCHES, width, dtype=dtype), unique, tokens)
        check_scatter(tokens, rows, 512 * PATCHES, unique, table)
    check_predictor(predictor_inputs(MANY, width, dtype), randn(MANY, width, dtype=dtype))
    test_repeats_bitwise()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_a_gpu():
    rows = torch.tensor([2_100_000, 0, 1_099_999], device=DEVICE)
    x = torch.zeros(2_100_001, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[rows] = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16, device=DEVICE)
    y = gather_rows(x, rows)
    assert y[:, 0].tolist() == y[:, -1].tolist() == [1.0, 2.0, 3.0]
    back = scatter_rows_fwd(y, row_inverse(rows, x.shape[0], unique=True), x.shape[0])
    assert torch.equal(back, x)


@pytest.mark.gpu
def test_counts_compile_nothing_on_a_gpu():
    x, pos_embed = randn(512, 384), randn(PATCHES, 384)
    gather_rows_fwd(x, some_rows(7, 512), pos_embed)
    index = torch.cuda.current_device()
    before = len(_gather_kernel.device_caches[index][0])
    for tokens in range(1, 51):
        gather_rows_fwd(x, some_rows(16 * tokens if tokens % 2 else tokens, 512), pos_embed)
    assert len(_gather_kernel.device_caches[index][0]) == before
