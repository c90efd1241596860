"""Calls with one thing wrong: each is refused in a sentence, or gives what plain loops give. Never silent garbage.

Each test draws a valid call, then spoils one argument: another dtype, another device ("meta"), another shape, strides,
an index or offset that lies, a number out of range. On CUDA values are looked into with `check=True` alone, since that
waits for the device; the operations have no other switch.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa
from fastjepa import Ragged, kernels, ops, ragged
from fastjepa.ops.checks import check_range
from fastjepa.ragged import image_rows, sequence_ids

DEVICES = [
    torch.device("cpu"),
    pytest.param(torch.device("cuda"), marks=pytest.mark.gpu),
]
EXTREMES = (-1, -(2**31), 2**31 - 1, 2**40, -(2**63))
Call = tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]  # the operation, plain loops, arguments


def same_values(x: Tensor, data: st.DataObject) -> Tensor:
    """x, laid out otherwise in memory."""
    how = data.draw(st.sampled_from(["strided", "reversed order", "shifted", "expanded"]))
    if how == "strided":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if how == "reversed order":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if how == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:1].expand(x.shape) if x.dim() and len(x) else x


def spoilt(x: Any, data: st.DataObject) -> Any:
    """One argument with something wrong, or merely unusual, about it."""
    if isinstance(x, Ragged):
        return spoilt_ragged(x, data)
    if isinstance(x, list):
        at = data.draw(st.integers(0, len(x)))
        if at == len(x):
            return data.draw(st.sampled_from([[], [*x, x[0]], x[:-1]]))
        return [spoilt(t, data) if i == at else t for i, t in enumerate(x)]
    if not isinstance(x, Tensor):
        return data.draw(st.sampled_from([-1, 0, 1, 7, 2**40, -0.5, float("nan"), float("inf"), 3.5]))
    kind = data.draw(st.sampled_from(["layout", "device", "dtype", "shape", "value", "value"]))
    if kind == "layout":
        return same_values(x, data)
    if kind == "device":
        return x.to("meta" if x.device.type == "cpu" else "cpu")
    if kind == "dtype":
        kinds = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
        return x.to(data.draw(st.sampled_from([*kinds, torch.float32, torch.float64, torch.complex64])))
    if kind == "shape":
        shapes = [x.unsqueeze(0), x.unsqueeze(-1), x[:0], x[..., :0], torch.cat([x, x])]
        shapes += [x[:-1], x[..., :-1], x.flatten()] if x.dim() else []
        return data.draw(st.sampled_from(shapes))
    if x.is_floating_point() or not x.numel():
        return x
    x = x.clone()
    x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(
        st.sampled_from([v for v in (*EXTREMES, 0, 1, 3, 5, 6, 7, 9) if x.dtype == torch.int64 or abs(v) < 2**31])
    )
    return x


def spoilt_ragged(x: Ragged, data: st.DataObject) -> Ragged:
    kind = data.draw(st.sampled_from(["values", "offsets", "per_image", "max_length"]))
    values, offsets = (spoilt(t, data) if k == kind else t for k, t in (("values", x.values), ("offsets", x.offsets)))
    per_image = spoilt(0, data) if kind == "per_image" else x.per_image
    return Ragged(values, offsets, per_image, max_length=spoilt(0, data) if kind == "max_length" else None)


def index_of(data: st.DataObject, batch: int, patches: int, per_image: int = 1) -> Ragged:
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    lists = st.lists(st.integers(0, patches - 1), max_size=4, unique=True)
    return Ragged.from_list([torch.tensor(data.draw(lists), dtype=dtype) for _ in range(batch * per_image)], per_image)


# Plain loops. Numbers are taken one by one, so that what is no number of a place raises.


def numbers(x: Tensor, low: int, high: int) -> list[int]:
    assert x.dtype in (torch.int32, torch.int64), x.dtype
    found = x.flatten().tolist()
    assert all(low <= n <= high for n in found), (found, low, high)
    return found


def sequences(offsets: Tensor, total: int) -> list[range]:
    found = numbers(offsets, 0, total)
    assert found[0] == 0
    assert found[-1] == total
    assert found == sorted(found)
    return [range(a, b) for a, b in itertools.pairwise(found)]


def stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros(0, like.shape[-1])


def gathered(x: Tensor, index: Ragged, pos_embed: Tensor | None = None) -> Tensor:
    places = numbers(index.values, 0, x.shape[1] - 1)
    found = sequences(index.offsets, len(places))
    assert len(found) == 0 or len(found) % (len(x) * index.per_image) == 0
    assert pos_embed is None or pos_embed.shape == x.shape[1:]
    rows = []
    for s, sequence in enumerate(found):
        for t in sequence:
            row = x[s // index.per_image % len(x), places[t]]
            rows.append(row if pos_embed is None else (row + pos_embed[places[t]]).to(x.dtype))
    return stacked(rows, x)


def scattered(tokens: Ragged, index: Ragged, num_tokens: int) -> Tensor:
    places = numbers(index.values, 0, num_tokens - 1)
    found = sequences(index.offsets, len(places))
    assert found == sequences(tokens.offsets, len(tokens.values))
    out = tokens.values.new_zeros(len(found), num_tokens, tokens.values.shape[1])
    for s, sequence in enumerate(found):
        for t in sequence:
            out[s, places[t]] += tokens.values[t]
    return out


def assembled(context: Tensor, mask_token: Tensor, pos_embed: Tensor, source: Tensor, patches: Tensor) -> Tensor:
    rows = []
    assert source.shape == patches.shape
    assert mask_token.shape == context.shape[1:] == pos_embed.shape[1:]
    for s, p in zip(numbers(source, -1, len(context) - 1), numbers(patches, 0, len(pos_embed) - 1), strict=True):
        row = context[s] if s >= 0 else mask_token.to(context.dtype)
        rows.append((row + pos_embed[p]).to(context.dtype))
    return stacked(rows, context)


def taken(x: Tensor, rows: Tensor) -> Tensor:
    assert rows.dim() == 1
    return stacked([x[n] for n in numbers(rows, 0, len(x) - 1)], x)


def attended(qkv: Tensor, offsets: Tensor, max_length: int, scale: float | None = None) -> Tensor:
    assert qkv.shape[1] == 3
    found = sequences(offsets, len(qkv))
    assert all(len(sequence) <= max_length for sequence in found)
    factor = qkv.shape[3] ** -0.5 if scale is None else scale
    out = torch.zeros(len(qkv), *qkv.shape[2:], dtype=torch.float64)
    for sequence in found:
        q, k, v = qkv[list(sequence)].double().permute(1, 2, 0, 3)
        out[list(sequence)] = ((q @ k.transpose(1, 2) * factor).softmax(-1) @ v).transpose(0, 1)
    return out.to(qkv.dtype)


def normed(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    assert total.shape == x.shape
    assert weight.shape == bias.shape == x.shape[1:]
    wide = total.double()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()
    return y.to(total.dtype), total


def activated(x: Tensor, bias: Tensor) -> Tensor:
    assert bias.shape == x.shape[1:]
    return F.gelu(x.double() + bias.double()).to(x.dtype)


def lost(prediction: Tensor, target_features: Tensor, masks_pred: list[Tensor]) -> Tensor:
    places = [numbers(mask, 0, target_features.shape[1] - 1) for mask in masks_pred]
    assert all(mask.shape == masks_pred[0].shape and len(mask) == len(target_features) for mask in masks_pred)
    normal = F.layer_norm(target_features.double(), target_features.shape[-1:])
    batch, length = masks_pred[0].shape
    target = torch.stack([normal[i // length, p] for mask in places for i, p in enumerate(mask)])
    contexts = prediction.numel() // target.numel()
    target = target.view(len(masks_pred), 1, batch * length, -1).expand(-1, contexts, -1, -1)
    ours = prediction.double().reshape(target.shape)
    return F.smooth_l1_loss(ours, target).to(torch.promote_types(prediction.dtype, torch.float32))


def averaged(targets: list[Tensor], sources: list[Tensor], momentum: float) -> list[Tensor]:
    assert 0 <= momentum <= 1
    for t, s in zip(targets, sources, strict=True):
        assert t.shape == s.shape
    return [
        (momentum * t.double() + (1 - momentum) * s.double()).to(t.dtype) for t, s in zip(targets, sources, strict=True)
    ]


def ema(targets: list[Tensor], sources: list[Tensor], momentum: float) -> list[Tensor]:
    expanded = [any(n > 1 and not step for n, step in zip(t.shape, t.stride(), strict=True)) for t in targets]
    ours = [
        t if shared else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        for t, shared in zip(targets, expanded, strict=True)
    ]
    ops.ema_update_(ours, sources, momentum)
    return ours


def masked(x: Tensor, masks: list[Tensor]) -> Tensor:
    assert all(mask.shape == (len(x), masks[0].shape[1]) for mask in masks)
    rows = [x[i // mask.shape[1], n] for mask in masks for i, n in enumerate(numbers(mask, 0, x.shape[1] - 1))]
    return stacked(rows, x).view(len(masks) * len(x), masks[0].shape[1], x.shape[2])


def packed(tensors: list[Tensor], per_image: int) -> list[Tensor]:
    assert len(tensors) % per_image == 0
    assert len({(t.device, t.shape[1:]) for t in tensors}) == 1
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    return [t.to(dtype) for t in tensors]


def calls(name: str, data: st.DataObject) -> Call:
    """A valid call."""
    batch, patches, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    x = torch.randn(batch, patches, width)
    if name == "gather_tokens":
        index = index_of(data, batch, patches, data.draw(st.integers(1, 2)))
        pos_embed = data.draw(st.sampled_from([None, torch.randn(patches, width)]))
        return (
            lambda **k: ops.gather_tokens(**k, check=True).values,
            gathered,
            {"x": x, "index": index, "pos_embed": pos_embed},
        )
    if name == "scatter_tokens":
        index = index_of(data, batch, patches)
        tokens = index.with_values(torch.randn(len(index.values), width))
        return (
            lambda **k: ops.scatter_tokens(**k, check=True),
            scattered,
            {"tokens": tokens, "index": index, "num_tokens": patches},
        )
    if name == "assemble_predictor":
        total = data.draw(st.integers(0, 6))
        source, places = torch.randint(-1, batch, (total,)), torch.randint(0, patches, (total,))
        tables = {
            "context": torch.randn(batch, width),
            "mask_token": torch.randn(width),
            "pos_embed": torch.randn(patches, width),
        }
        return (
            lambda **k: ops.assemble_predictor(**k, check=True),
            assembled,
            dict(**tables, source=source, patches=places),
        )
    if name == "take_rows":
        return lambda **k: ops.take_rows(**k, check=True), taken, {"x": x[0], "rows": torch.randperm(patches)[:3]}
    if name == "ragged_attention":
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        qkv = torch.randn(sum(lengths), 3, 2, 8)
        call = {
            "qkv": qkv,
            "offsets": offsets,
            "max_length": max(lengths),
            "scale": data.draw(st.sampled_from([None, 0.5])),
        }
        return lambda **k: ops.ragged_attention(**k, check=True), attended, call
    if name == "add_layer_norm":
        rows = {"x": x[0], "residual": data.draw(st.sampled_from([None, torch.randn(patches, width)]))}
        return ops.add_layer_norm, normed, dict(**rows, weight=torch.randn(width), bias=torch.randn(width), eps=1e-5)
    if name == "bias_gelu":
        return ops.bias_gelu, activated, {"x": x[0], "bias": torch.randn(width)}
    masks = [
        torch.stack([torch.randperm(patches)[:2] for _ in range(batch)]) for _ in range(data.draw(st.integers(1, 2)))
    ]
    if name == "jepa_loss":
        prediction = torch.randn(len(masks) * batch * data.draw(st.integers(1, 2)), masks[0].shape[1], width)
        call = {"prediction": prediction, "target_features": x, "masks_pred": masks}
        return lambda **k: ops.jepa_loss(**k, check=True), lost, call
    if name == "ema_update_":
        targets, sources = ([torch.randn(width), torch.randn(patches, 2)] for _ in range(2))
        return ema, averaged, {"targets": targets, "sources": sources, "momentum": 0.75}
    if name == "apply_masks":
        return fastjepa.apply_masks, masked, {"x": x, "masks": masks}
    assert name == "Ragged.from_list"
    tensors = [torch.randn(data.draw(st.integers(0, 3)), width) for _ in range(2)]
    return lambda **k: Ragged.from_list(**k).unbind(), packed, {"tensors": tensors, "per_image": 1}


CALLS = (
    *("gather_tokens", "scatter_tokens", "assemble_predictor", "take_rows", "ragged_attention", "add_layer_norm"),
    *("bias_gelu", "jepa_loss", "ema_update_", "apply_masks", "Ragged.from_list"),
)


def moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, list):
        return [moved(t, device) for t in x]
    return x.to(device) if isinstance(x, (Tensor, Ragged)) else x


def near(ours: Any, theirs: Any) -> None:
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            near(a, b)
        return
    tolerance = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=60)
@given(st.data())
def test_a_spoilt_call_is_refused_or_right(name: str, device: torch.device, data: st.DataObject):
    operation, loops, arguments = calls(name, data)
    arguments = {key: moved(value, device) for key, value in arguments.items()}
    near(operation(**arguments), loops(**arguments))
    key = data.draw(st.sampled_from([key for key, value in arguments.items() if value is not None]))
    try:
        arguments[key] = spoilt(arguments[key], data)
        assume(key != "num_tokens" or arguments[key] != 2**40)  # that much memory is a wish, not a mistake
        found = operation(**arguments)
    except (ValueError, TypeError):
        return
    near(found, loops(**arguments))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(max_examples=100)
@given(st.data())
def test_a_spoilt_ragged_is_refused_or_consistent(device: torch.device, data: st.DataObject):
    index = moved(index_of(data, data.draw(st.integers(1, 3)), 5, 2), device)
    try:
        found = spoilt_ragged(index, data)
    except (ValueError, TypeError):
        return
    if found.device.type == "cpu":  # on other devices offsets are not read
        lengths = [len(sequence) for sequence in sequences(found.offsets, len(found.values))]
        assert found.max_length >= max(lengths, default=0)
        assert found.num_sequences % found.per_image == 0
        assert [len(part) for part in found.unbind()] == lengths


@given(st.data())
def test_a_spoilt_optimizer_is_refused_or_steps(data: st.DataObject):
    weights = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4))]
    call = {
        "params": weights,
        "target_params": [torch.randn(2, 3), torch.randn(4)],
        "momentum": 0.5,
        "lr": 0.1,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    key = data.draw(st.sampled_from(list(call)))
    try:
        call[key] = spoilt([w.detach() for w in weights] if key == "params" else call[key], data)
        optimizer = fastjepa.AdamWEMA(**call)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.ones_like(p)
        before = [t.clone() for t in call["target_params"] if t is not None]
        optimizer.step()
    except (ValueError, TypeError):
        return
    for p, t, old in zip(params, call["target_params"], before, strict=True):
        if p.device.type == "cpu":
            expected = call["momentum"] * old.double() + (1 - call["momentum"]) * p.double()
            torch.testing.assert_close(t.double(), expected, rtol=2e-2, atol=2e-2)


def test_rows_beyond_32_bits():
    """Where image times patches is more than int32 holds; the tests of kernels on such tensors need a GPU."""
    images, patches = 70_000, 40_000
    offsets = torch.zeros(images + 1, dtype=torch.int32)
    offsets[-1] = 1
    index = Ragged(torch.tensor([patches - 1], dtype=torch.int32), offsets)
    assert image_rows(index, images, patches).tolist() == [images * patches - 1]
    assert (sequence_ids(index) * patches + index.values).tolist() == [images * patches - 1]
    with pytest.raises(ValueError, match=r"0..39998, got values in 39999..39999"):
        check_range("index", index.values, 0, patches - 2, False)
    x = torch.empty(images, patches, 8, device="meta")
    assert ops.gather_tokens(x, index.to("meta")).values.shape == (1, 8)


def test_every_launch_says_that_nothing_is_fused_unasked():
    """Or a release of Triton, or an environment variable, would decide how sums are rounded."""
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        launches = len(re.findall(r"_kernel\[", text))
        assert text.count("enable_fp_fusion=False") == launches, path.name


def test_programs_are_numbered_in_64_bits():
    """Addresses in kernels follow from the number of the program, so it is widened before anything is multiplied."""
    bare = []
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        bare += [f"{path.name}: {line.strip()}" for line in lines if "tl.program_id(" in line and "int64" not in line]
    assert bare == [  # a place among at most 1024 sums, and a column
        "grad_norm.py: tl.store(partials_ptr + tl.program_id(0), tl.sum(acc) + tl.sum(rest))",
        "rows.py: cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)",
    ]


@pytest.mark.parametrize("offsets", [[0, 7, 4, 6], [0, 2, 4, 5], [1, 2, 4, 6], [0, 9, 9, 9]])
def test_offsets_that_lie_on_a_device_are_found_where_asked_for(offsets, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ragged, "can_look", lambda tensor: False)  # as on CUDA
    index = Ragged(torch.zeros(6, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int32))
    tokens = index.with_values(torch.randn(6, 4))
    x = torch.randn(3, 2, 4)
    calls = (
        lambda check: ops.gather_tokens(x, index, check=check),
        lambda check: ops.scatter_tokens(tokens, index, 2, check=check),
        lambda check: ops.jepa_loss(tokens, x, index, check=check),
    )
    for call in calls:
        with pytest.raises(ValueError, match="offsets must run from 0 to the 6 tokens"):
            call(True)
