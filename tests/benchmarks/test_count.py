"""The count suite: what it counts is what a hand counts, what runs, and what kernels declare; ours stays as lean."""

from __future__ import annotations

import argparse
from collections import Counter as Bag
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import count, counter, ways
from benchmarks.__main__ import _Parser
from benchmarks.count import CPU, META, TOWERS
from benchmarks.counter import Counter, CudaAutocast, Event, kernel_path
from benchmarks.inductor import scheduled
from benchmarks.laps import PARTS
from benchmarks.step import Work, build
from fastjepa.kernels.launch import Cost
from fastjepa.nn import Block, fused_block
from tests.helpers import of_counted_torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "counts.md"
SMALL = Work("vit_tiny", 8, 96, 8, (96, 2), {"depth": 2}, bf16=True, device=META)
DEEPER = {
    "target": replace(SMALL, sizes={"depth": 3}),
    "context": replace(SMALL, sizes={"depth": 3}),
    "predictor": replace(SMALL, predictor=(96, 3)),
}
OURS = ("fastjepa truncated", "fastjepa ragged")


def layer(name: str, part: str) -> list[Event]:
    """The events of one more layer of a part, which is none of its ends."""
    fewer, more = (Bag(e for e in count.count(work, name)[part]) for work in (SMALL, DEEPER[part]))
    assert not fewer - more
    return list((more - fewer).elements())


def total(events: list[Event], what: str, kind: str | None = None) -> float:
    return sum(getattr(event, what) for event in events if kind in (None, event.kind))


def launches(events: list[Event]) -> Bag:
    found: Bag = Bag()
    for event in events:
        found[event.name] += event.launches
    return +found


def test_a_layer_of_eager_by_hand():
    """A layer of the target encoder under autocast: x fp32, weights fp32, products and attention bf16."""
    width, heads, tokens, images = 192, 3, 8 * 144, 8
    found = layer("eager", "target")
    assert launches(found) == {
        "native_layer_norm": 2,
        "_to_copy": 4 + 4 + 2 + 2,  # weights and biases of four products, what the norms gave, softmax's two ends
        "addmm": 4,
        "clone": 4,  # q, k and v out of qkv, the heads back
        "bmm": 2,
        "mul": 1,  # by the scale
        "_softmax": 1,
        "gelu": 1,
        "add": 2,
    }
    x, weights = tokens * width, images * heads * 144 * 144
    assert total(found, "bytes", "rest") == (
        2 * ((4 + 4) * x + 2 * 4 * width + 2 * 4 * tokens)  # LayerNorm: x, y, weight, bias, mean, rstd
        + 2 * (4 + 2) * x  # its result to bf16
        + (4 + 2) * (12 * width * width + 9 * width)  # weights and biases to bf16
        + 4 * (2 + 2) * x
        + (2 + 2) * weights  # scaled
        + (2 + 4) * weights + (4 + 4) * weights + (4 + 2) * weights  # to fp32, softmax, to bf16
        + (2 + 2) * 4 * x  # GELU
        + 2 * (4 + 2 + 4) * x  # residual, branch, sum
    )  # fmt: skip
    assert total(found, "flops", "gemm") == 2 * 12 * width * width * tokens
    assert total(found, "flops", "attention") == 2 * 2 * width * 144 * tokens
    assert total(found, "allocations") == sum(launches(found).values()) + 4  # mean and rstd of both norms
    assert total(found, "syncs") == 0


def test_backward_is_twice_forward_in_eager():
    tokens = count._of_sequences(SMALL.masks(8, 0, ragged=False)[0])
    found = layer("eager", "context")
    assert total(found, "flops", "gemm") == 3 * 2 * 12 * 192**2 * float(tokens.sum())
    assert total(found, "flops", "attention") == 3 * 2 * 2 * 192 * float((tokens**2).sum())


@of_counted_torch
def test_the_meta_device_sees_what_runs():
    """The eager step in fp32 on real tensors and on the meta device: the same operators, bytes, FLOPs and memory."""
    seen = []
    for device in (META, CPU):
        work = replace(SMALL, device=device, bf16=False)
        way, found = build(work, "eager"), Counter(fake=device == CPU)
        assert isinstance(way, ways.Eager)
        for group in way.optimizer.param_groups:
            group["foreach"] = True
        masks = way.inputs(*work.masks(8, 0, ragged=False), 8)
        images = work.images(8)
        with found, counter.replaced([(way, "autocast", nullcontext)]):
            for _ in range(2):
                found.clear()
                count._step(way, found, images, masks)
        # On the CPU the numbers of steps are seen too, and a loss keeps its elements until it has their mean.
        own = ("_local_scalar_dense", "smooth_l1_loss", "_foreach_add_")
        seen.append({part: Bag(e for e in found.events[part] if e.launches and e.name not in own) for part in PARTS})
    assert seen[0] == seen[1]
    assert all(sum(bag.values()) > 1 for bag in seen[0].values())


@pytest.mark.parametrize("name", ["eager", *OURS])
def test_products_are_bf16(name: str):
    products = [e for events in count.count(SMALL, name).values() for e in events if e.kind in ("gemm", "attention")]
    kinds = {e.what.removesuffix(" weights") for e in products if e.kind == "gemm"}
    assert kinds == {"bf16 -> bf16"} if name == "eager" else {"bf16 -> bf16", "bf16 -> fp32"}  # gradients of weights
    assert all("bf16" in e.what for e in products)


def test_autocast_casts_as_torch_does():
    """Our lists hold every function of the models that torch casts on CUDA, and none that it does not."""

    class Seen(CudaAutocast):
        names: set[str] = set()  # noqa: RUF012

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
                self.names.add(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    def casts(name: str) -> bool:
        packet = getattr(torch.ops.aten, name.strip("_"), None)
        overloads = packet.overloads() if packet is not None else []
        names = [f"aten::{packet.__name__}" + ("" if o == "default" else f".{o}") for o in overloads]
        names = [n for n in names if torch._C._dispatch_has_kernel(n)]
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "AutocastCUDA") for n in names)

    for name in ("eager", *OURS):
        way = build(replace(SMALL, bf16=False), name)
        masks = SMALL.masks(8, 0, name == "fastjepa ragged")
        with kernel_path(Counter(count._lengths(SMALL, masks))), Seen():
            way.objective(SMALL.images(8), *way.inputs(*masks, 8))
    assert {name for name in Seen.names if casts(name)} == Seen.names & (counter.NARROW | counter.WIDE)
    assert {"linear", "layer_norm", "softmax", "smooth_l1_loss"} <= Seen.names
    assert all(map(casts, counter.NARROW | counter.WIDE))


def declared() -> dict[str, tuple[Callable[[], object], Cost]]:
    """A call on meta tensors of every operation in a layer or around it, and the cost that its kernel file declares."""
    from fastjepa.kernels import attention, gather, gelu, jepa_loss, layer_norm
    from fastjepa.kernels.attention_bwd import attention_bwd

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    tokens, width, lengths = 1000, 192, [150] * 6 + [100]
    sizes = tokens, width, torch.bfloat16
    stats, rows = new(tokens, dtype=torch.float32), new(tokens, dtype=torch.int32)
    x, residual, weight, bias = new(tokens, width), new(tokens, width), new(width), new(width)
    wide, dy, wide_bias = new(tokens, 4 * width), new(tokens, 4 * width), new(4 * width)
    qkv, out, dout, lse = (
        new(tokens, 3, 3, 64),
        new(tokens, 3, 64),
        new(tokens, 3, 64),
        new(3, tokens, dtype=torch.float32),
    )
    offsets, table = new(len(lengths) + 1, dtype=torch.int32), new(4000, width)
    inverse = gather.RowInverse(new(4000, dtype=torch.int32), None)
    wider = new(tokens, width, dtype=torch.float32)
    norm, heads = layer_norm.add_layer_norm_cost, (lengths, 3, 64, 2)
    return {
        "norm": (lambda: layer_norm.layer_norm_fwd(x, None, weight, bias, 1e-6), norm(*sizes, residual=False)),
        "residual": (lambda: layer_norm.layer_norm_fwd(x, residual, weight, bias, 1e-6), norm(*sizes)),
        "norm back": (
            lambda: layer_norm.layer_norm_bwd(dy[:, :width], residual, x, weight, stats, new(tokens)),
            norm(*sizes, backward=True),
        ),
        "norm back, y over dy": (
            lambda: layer_norm.layer_norm_bwd(x, residual, table[:tokens], weight, stats, new(tokens), bias=bias, y=x),
            norm(*sizes, backward=True, again="y"),
        ),
        "norm back, s again": (
            lambda: layer_norm.layer_norm_bwd(
                x, wider.clone(), (residual, wider), weight, stats, new(tokens), bias=bias, y=dy[:, :width]
            ),
            norm(*sizes, backward=True, residual_dtype=torch.float32, out_dtype=torch.bfloat16, again="y, s"),
        ),
        "gelu": (lambda: gelu.gelu_fwd(wide, wide_bias), gelu.bias_gelu_cost(tokens, 4 * width, torch.bfloat16)),
        "gelu back": (
            lambda: gelu.gelu_bwd(dy, wide, wide_bias),
            gelu.bias_gelu_cost(tokens, 4 * width, torch.bfloat16, backward=True),
        ),
        "gelu back, and forth": (
            lambda: gelu.gelu_bwd(dy, wide, wide_bias, new(tokens, 4 * width)),
            gelu.bias_gelu_cost(tokens, 4 * width, torch.bfloat16, backward=True, again=True),
        ),
        "gather": (lambda: gather.gather_rows_fwd(table, rows), gather.gather_rows_cost(*sizes)),
        "scatter": (
            lambda: gather.scatter_rows_fwd(x, inverse, 4000),
            gather.scatter_rows_cost(tokens, 4000, width, torch.bfloat16, unique=True, inverse=True),
        ),
        "loss": (lambda: jepa_loss.jepa_loss_fwd(x, table, rows, 1e-5), jepa_loss.jepa_loss_cost(*sizes)),
        "loss back": (
            lambda: jepa_loss.jepa_loss_bwd(x, new(1, dtype=torch.float32)),
            jepa_loss.jepa_loss_cost(*sizes, backward=True),
        ),
        "attention": (lambda: attention.attention_fwd(qkv, offsets, 150, 0.125), attention.attention_cost(*heads)),
        "attention back": (
            lambda: attention_bwd(dout, qkv, out, lse, offsets, 150, 0.125),
            attention.attention_cost(*heads, backward=True),
        ),
    }


@pytest.mark.parametrize("name", list(declared()))
def test_launches_move_what_their_kernels_declare(name: str):
    """By the tensors that a launch is given, within what the declarations leave out: sums of programs, statistics."""
    call, cost = declared()[name]
    found = Counter({(1000, 7): torch.tensor([150] * 6 + [100])})
    with kernel_path(found), found:
        call()
    found.mark("")
    ours = [event for event in found.events[""] if event.name.endswith("_kernel")]
    assert total(ours, "launches") == cost.launches
    partial = sum(event.bytes for event in ours if "sum_partials" in event.name)
    assert cost.bytes <= total(ours, "bytes") <= 1.02 * cost.bytes + 2 * partial
    if "attention" in name:
        assert cost.flops < total(ours, "flops") < 2.5 * cost.flops  # whole tiles, and 7 products for 5 in backward


# What one more layer of ours costs at most: launches, allocations, and bytes of the rest. Lower them with every gain.
HELD = {
    ("fastjepa truncated", "target"): (8, 15, 8871936),
    ("fastjepa truncated", "context"): (26, 40, 6728192),
    ("fastjepa truncated", "predictor"): (26, 40, 23194496),
    ("fastjepa ragged", "target"): (8, 15, 8871936),
    ("fastjepa ragged", "context"): (26, 40, 11491552),
    ("fastjepa ragged", "predictor"): (26, 40, 32408320),
}


@pytest.mark.parametrize("name, part", list(HELD))
def test_a_layer_of_ours_costs_no_more_than_it_did(name: str, part: str):
    found = layer(name, part)
    assert total(found, "launches") <= HELD[name, part][0]
    assert total(found, "allocations") <= HELD[name, part][1]
    assert total(found, "bytes", "rest") <= HELD[name, part][2]
    kernels = launches(found)
    assert kernels["_attention_fwd_kernel"] == kernels["_gelu_fwd_kernel"] == 1
    assert kernels["_attention_bwd_kernel"] == kernels["_gelu_bwd_kernel"] == (part != "target")
    assert kernels["native_layer_norm"] == kernels["gelu"] == kernels["clone"] == 0
    assert total(found, "launches") < total(layer("eager", part), "launches")
    products = (1 if part == "target" else 3) * 4
    assert total(found, "launches", "gemm") == products
    assert total(found, "syncs") == 0


def test_one_pass_more_shows(monkeypatch):
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest, **more: forward(self, x.clone(), *rest, **more))
    found = layer("fastjepa truncated", "target")
    assert launches(found)["clone"] == 1
    assert total(found, "bytes", "rest") > HELD["fastjepa truncated", "target"][2]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return count.measure(SMALL, ["eager", *OURS])


def test_rows(rows: list[dict]):
    assert [row["row"] for row in rows] == ["eager", *OURS]
    eager, cut, whole = rows
    assert cut["peak_memory_bytes"] < 0.8 * eager["peak_memory_bytes"]
    assert cut["peak_memory_bytes"] < whole["peak_memory_bytes"] < 2 * cut["peak_memory_bytes"]
    for row in rows:
        assert row["launches"] == sum(row["launches_by_kind"].values())
        assert row["rest_bytes"] == sum(row["rest_bytes_by_part"].values())
        assert row["dtype"] == "bf16"
    for row in (cut, whole):
        assert row["flops_over_needed"] <= count.MOST
        assert row["syncs"] == 0
        assert row["launches"] < eager["launches"]
        assert row["rest_bytes_by_part"]["optimizer"] < eager["rest_bytes_by_part"]["optimizer"] / 2.5
        assert all(row["rest_bytes_per_token_layer"][t] < eager["rest_bytes_per_token_layer"][t] for t in TOWERS)
        sizes = [source["bytes"] for source in row["sources"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == count.SOURCES
    assert eager["syncs"] == (1 + 2 * 4) + 2  # the norm of each weight's gradient in the encoder, the scaler, the loss
    assert cut["context_tokens"] < whole["context_tokens"]
    assert count.faults(rows, argparse.Namespace()) == []
    worse = [cut | {"flops_over_needed": 1.03}, whole | {"syncs": 2}]
    assert len(count.faults(worse, argparse.Namespace())) == 2


@pytest.mark.parametrize("part", ["context", "predictor"])
def test_what_is_computed_again(part: str):
    """Of a layer all but its GELU and the product behind, which keep nothing: three products of twelve more."""
    row = "fastjepa truncated"
    plain, again = (layer(name, part) for name in (row, f"{row}, checkpointing"))
    assert launches(again) - launches(plain) == {
        "_layer_norm_fwd_kernel": 2,
        "_attention_fwd_kernel": 1,
        **(launches([e for e in again if e.kind == "gemm"]) - launches([e for e in plain if e.kind == "gemm"])),
    }
    assert total(again, "launches", "gemm") - total(plain, "launches", "gemm") == 3
    assert total(again, "flops", "gemm") == pytest.approx(total(plain, "flops", "gemm") * (1 + 16 / 72))


def test_a_batch_that_has_no_equal_parts_is_said():
    plain, parts = count.measure(replace(SMALL, batch=6), [OURS[0], f"{OURS[0]}, 4 parts"])
    assert plain["launches"] > 0
    assert parts["absent"] == "6 images cannot be taken in equal parts"
    assert parts["absent"] in count.table([plain, parts])


def test_settings_save_memory():
    """Checkpointing computes more, and is no fault; parts launch more, and their products are the same."""
    work = replace(SMALL, batch=32, sizes={"depth": 8}, predictor=(96, 6))
    names = ("fastjepa truncated", *(row for row in count.ROWS if row.startswith("fastjepa truncated, ")))
    plain, narrow, again, some, parts = (count._row(work, name) for name in names)
    assert narrow["peak_memory_bytes"] < plain["peak_memory_bytes"]
    assert max(again["peak_memory_bytes"], parts["peak_memory_bytes"]) < 0.7 * plain["peak_memory_bytes"]
    assert again["peak_memory_bytes"] < some["peak_memory_bytes"] < 0.9 * plain["peak_memory_bytes"]
    assert narrow["rest_bytes"] < plain["rest_bytes"] < min(some["rest_bytes"], parts["rest_bytes"])
    assert some["rest_bytes"] < again["rest_bytes"]
    assert narrow["gemm_flops"] == parts["gemm_flops"] == plain["gemm_flops"] < some["gemm_flops"] < again["gemm_flops"]
    assert again["flops_over_needed"] > count.MOST
    assert count.faults([again], argparse.Namespace()) == []
    assert len(count.faults([again | {"row": plain["row"]}], argparse.Namespace())) == 1


@of_counted_torch
def test_compiled_is_inductors_own_account():
    """Of one layer each: fewer launches and bytes than eager, the same products, and its parts add up."""
    work = replace(SMALL, sizes={"depth": 1}, predictor=(96, 1))
    eager, compiled = count.measure(work, ["eager", "compiled"])
    assert compiled["gemm_flops"] == eager["gemm_flops"]
    assert compiled["launches_by_kind"]["gemm"] == eager["launches_by_kind"]["gemm"]
    assert compiled["launches_by_kind"]["attention"] == 1 + 2 + 2  # fused: target; context and predictor, both ways
    assert 0 < compiled["launches"] < eager["launches"] / 1.5
    assert 0 < compiled["rest_bytes"] < eager["rest_bytes"] / 2
    assert 0 < compiled["allocations"] < eager["allocations"]
    assert 0 < compiled["casts"] < eager["casts"]
    assert compiled["syncs"] == 0
    optimizer = compiled["rest_bytes_by_part"]["optimizer"]
    parameters = [p for m in (work.model().encoder, work.model().predictor) for p in m.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    whole = sum(p.numel() for p in work.model().encoder.parameters())
    assert optimizer == pytest.approx(28 * trained + 12 * whole, rel=1e-3)  # AdamW: p, g, m, v and back; EMA


def test_compiled_that_cannot_be_counted_says_why(monkeypatch):
    def gone(*_):
        raise AttributeError("module 'torch._inductor' has no attribute 'graph'\nmore")

    monkeypatch.setattr(count, "_count_compiled", gone)
    (row,) = count.measure(SMALL, ["compiled"])
    assert row["absent"] == "fails: AttributeError: module 'torch._inductor' has no attribute 'graph'"
    assert row["absent"] in count.table([row])


def test_compiled_that_is_not_compiled_is_no_row(monkeypatch):
    monkeypatch.setattr(ways.torch, "compile", lambda model: model)
    (row,) = count.measure(SMALL, ["compiled"])
    assert row["absent"] == "fails: RuntimeError: torch.compile made 0 graphs of the models, not 5"


def test_everything_is_back_afterwards():
    from torch._inductor.graph import GraphLowering
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fastjepa.ops import library
    from fastjepa.optim import AdamWEMA

    def held() -> list[object]:
        step = AdamWEMA._takes_kernels, AdamWEMA._step_kernels
        return [InterpretedFunction.run, JITFunction.run, library.takes_kernels, GraphLowering.compile_to_module, *step]

    before = held()

    def changed() -> None:
        with kernel_path(Counter()), scheduled(Counter()):
            assert not set(before) & set(held())
            raise KeyError

    with pytest.raises(KeyError):
        changed()
    assert held() == before


def test_attention_over_unknown_lengths():
    from fastjepa.kernels.attention import attention_fwd

    qkv, offsets = torch.empty(5, 3, 2, 16, device=META), torch.empty(3, dtype=torch.int32, device=META)
    with kernel_path(Counter()), pytest.raises(ValueError, match="2 unknown sequences of 5 tokens"):
        attention_fwd(qkv, offsets, 3, 1.0)


def test_document(tmp_path: Path, rows: list[dict]):
    """The tables go between the markers, and the committed document holds the same columns."""
    path = tmp_path / "counts.md"
    path.write_text(f"before\n{count.MARKERS[0]}\nold\n{count.MARKERS[1]}\nafter\n")
    count.put(count.markdown(rows), path, count.MARKERS)
    text = path.read_text()
    assert text.startswith(f"before\n{count.MARKERS[0]}\n| row |")
    assert text.endswith(f"{count.MARKERS[1]}\nafter\n")
    assert "old" not in text
    heads = next(line for line in text.splitlines() if line.startswith("| row |"))
    committed = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert heads in committed
    assert [line.split(" | ")[0] for line in committed if line.startswith(("| eager", "| compiled", "| fastjepa"))] == [
        f"| {name}" for name in count.ROWS
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--patch-size", "13"], "patch_size=13 does not divide"),
        (["--document", "/nowhere/counts.md"], "--document: /nowhere/counts.md: No such file"),
        (["--document", __file__], "must hold <!-- counts -->"),
    ],
)
def test_bad_input(words: list[str], said: str):
    parser = _Parser()
    count.add_arguments(parser)
    with pytest.raises(ValueError, match=said):
        count.run(parser.parse_args(["--model", "vit_tiny", "--row", "eager", *words]))


def test_held_is_what_is_there_at_most():
    """Views make nothing, what is dropped leaves, and what a kernel is given to write counts as it is made."""
    first = torch.zeros(100, device=META)
    with counter.Held([first, first[:3]]) as held:
        assert held.most == 400
        x = first + 1  # 800
        y = x.view(10, 10) * 2  # 1200
        del x
        z = torch.empty(50, device=META)  # 400 + 400 + 200
        assert held.most == 1200
        z.add_(1)
        more = [y + 1, y + 2]  # 1800
        assert held.most == 1800
        del more
    assert y.shape == (10, 10)


def test_norms_and_gelus_are_not_kept(monkeypatch):
    """Part by part a layer keeps the outputs of its norms, of 2 D bytes a token, of its GELU, of 8 D, and the second
    norm's sum, of 4 D, in the place of a branch of 2 D.

    Less what is made of them again in one layer at a time.
    """
    work = replace(SMALL, batch=32, sizes={"depth": 4}, predictor=(96, 4))
    lean = count.most_held(work, "fastjepa truncated")
    monkeypatch.setattr(fused_block, "fused_block", lambda *_: None)
    masks = work.masks(32, 0, ragged=False)
    context = masks[0][0].numel()
    targets = sum(m.numel() for m in masks[1])
    pairs = 4 * context + targets
    encoder, predictor = work.model().encoder, work.predictor
    kept = 14 * (context * encoder.embed_dim * len(encoder.blocks) + pairs * predictor[0] * (predictor[1] - 1))
    kept += (2 * pairs + 10 * targets) * predictor[0]  # the last layer ends for the targets' tokens
    assert 0.75 * kept < count.most_held(work, "fastjepa truncated") - lean < kept
