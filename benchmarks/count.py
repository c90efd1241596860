"""The `count` suite: what one training step launches, moves, computes and allocates, by count: nothing is computed.

Eager and ours take a whole step (forward, backward, optimizer, EMA) on the meta device, under CUDA's rules of bf16
autocast, ours with its kernels; the compiled step is traced on fake tensors and scheduled by Inductor. `counter` says
what counts as what, `inductor` what is taken from Inductor's own account. Copies of a batch to the device are left out.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counter import KINDS, Counter, CudaAutocast, Event, Held, kernel_path, replaced
from benchmarks.inductor import scheduled
from benchmarks.laps import PARTS, Laps, _borders
from benchmarks.step import MOMENTUM, SET, USUAL, Work, add_rows, build, in_equal_parts, is_ragged
from benchmarks.tables import columns
from benchmarks.ways import Compiled, Eager, Fast, Masks, Way, naive_models
from fastjepa import Ragged
from fastjepa.plan.settings import Settings
from fastjepa.training.models import ENCODERS, build_optimizer, step_flops

META, CPU = torch.device("meta"), torch.device("cpu")
ROWS = (*USUAL, *SET)
TOWERS = ("target", "context", "predictor")
MOST = 1.02  # FLOPs launched over needed, of ours, unless they are meant to be launched twice
SOURCES = 10
MARKERS = "<!-- counts -->", "<!-- end of counts -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its batch, and which rows."""
    add_work(parser)
    add_rows(parser, ROWS, "default: all; compiled takes minutes")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the tables between the markers there")


def add_work(parser: argparse.ArgumentParser) -> None:
    """The model and its batch."""
    parser.add_argument("--model", default="vit_huge", choices=ENCODERS, metavar="NAME", help=", ".join(ENCODERS))
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--crop-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=128, help="images")
    parser.add_argument("--pred-emb-dim", type=int, default=384)
    parser.add_argument("--pred-depth", type=int, help="default: 12 from vit_large on, 6 below, as published")


def work_of(arguments: argparse.Namespace) -> Work:
    """The step that the arguments of `add_work` name, in bf16 on the meta device.

    Raises:
        ValueError: a count below one.
    """
    for name in ("patch_size", "crop_size", "batch_size", "pred_depth", "pred_emb_dim"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    deep = arguments.model in ("vit_large", "vit_huge", "vit_giant")
    predictor = arguments.pred_emb_dim, arguments.pred_depth or (12 if deep else 6)
    sizes = arguments.patch_size, arguments.crop_size, arguments.batch_size
    return Work(arguments.model, *sizes, predictor, bf16=True, device=META)


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each way to take the step.

    Raises:
        ValueError: sizes that do not go together, a count below one, or a document without its markers.
    """
    work = work_of(arguments)
    if arguments.document:
        put("", arguments.document, MARKERS, write=False)
    rows = measure(work, arguments.row or ROWS)
    if arguments.document:
        put(markdown(rows), arguments.document, MARKERS)
    return rows


def table(rows: Sequence[dict]) -> str:
    """For a person to read: a line for each row, then where the bytes of ours come from."""
    texts = [columns(_shown(rows))]
    texts += [
        f"{row['row']}, the rest's largest sources:\n{columns(_sources(row))}" for row in rows if _has_sources(row)
    ]
    return "\n\n".join(texts)


def markdown(rows: Sequence[dict]) -> str:
    """The same as Markdown."""
    texts = [as_markdown(_shown(rows))]
    texts += [
        f"The largest sources of the rest's bytes, {row['row']}:\n\n{as_markdown(_sources(row))}"
        for row in rows
        if _has_sources(row)
    ]
    return "\n\n".join(texts)


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """Rows of ours that compute too much or wait for the device."""
    found = []
    for row in filter(_is_ours, rows):
        if row["flops_over_needed"] > MOST and not Settings.of_row(row["row"]).activation_checkpointing:
            found.append(f"{row['row']}: {row['flops_over_needed']:.4f} FLOPs launched over needed, {MOST} allowed")
        if row["syncs"]:
            found.append(f"{row['row']}: waits for the device {row['syncs']} times")
    return found


def measure(work: Work, names: Sequence[str]) -> list[dict]:
    """The rows of these names, in the order of `ROWS`."""
    return [_row(work, name) for name in ROWS if name in names]


def count(work: Work, name: str) -> dict[str, list[Event]]:
    """Every event of one step in the steady state, by part: the second step, when optimizer state is there."""
    return _count(work, name)[0]


def most_held(work: Work, name: str) -> int | None:
    """Bytes that this step holds at most, parameters, optimizer state and images among them; None of the compiled one.

    An allocator's gaps are not in it, nor what an operator of PyTorch makes within itself.
    """
    return _count(work, name)[1]


def _count(work: Work, name: str) -> tuple[dict[str, list[Event]], int | None]:
    masks = work.masks(work.batch, 0, is_ragged(name))
    if name == "compiled":
        return _count_compiled(work, masks), None
    return _count_eager(work, name, masks)


def _count_eager(work: Work, name: str, masks: tuple[Masks, Masks]) -> tuple[dict[str, list[Event]], int]:
    """On the meta device, which has no values: lengths are given, and whatever is read back is 0."""
    way = build(replace(work, device=META, bf16=False), name)
    if isinstance(way, Eager):  # what it is on a GPU, and the meta device is none
        way.scaler = torch.amp.GradScaler("cpu", enabled=True)
        for group in way.optimizer.param_groups:
            group["foreach"] = True
    elif isinstance(way, Fast):
        way.optimizer = build_optimizer(way.model, bf16=True)
    parameters = [p.shape for model in way.models for p in model.parameters()]
    lengths = _lengths(work, masks, Settings.of_row(name).accumulate)
    counter = Counter(lengths, [shape for shape in parameters if len(shape) > 1])
    images = replace(work, device=META).images(work.batch)
    inputs = way.inputs(*masks, work.batch)

    with kernel_path(counter), replaced([(way, "autocast", CudaAutocast)]), counter:
        _step(way, counter, images, inputs)
        counter.clear()
        with Held([images, *way.tensors()]) as held:
            _step(way, counter, images, inputs)
    return dict(counter.events), held.most


def _count_compiled(work: Work, masks: tuple[Masks, Masks]) -> dict[str, list[Event]]:
    """On fake tensors that lie on the CPU, whose autocast makes the same casts in these models."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    models = naive_models(replace(work, device=META).model(), plain=False)
    counter = Counter(fake=True)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake, scheduled(counter) as graphs:
        warnings.simplefilter("ignore", UserWarning)  # of torch's own doings: copies of fake tensors, caches left out
        for model in models:
            _materialise(model)
        way = Compiled(models, bf16=True)
        masks_enc, masks_pred = ([fake.from_tensor(m) for m in listed] for listed in masks if isinstance(listed, list))
        images = torch.empty(work.batch, 3, work.pixels, work.pixels)
        with counter:
            for _ in range(2):
                counter.clear()
                _step(way, counter, images, (masks_enc, masks_pred))
    if len(graphs) != 5:  # forward of three models, backward of two
        raise RuntimeError(f"torch.compile made {len(graphs)} graphs of the models, not 5")
    return dict(counter.events)


def _materialise(model: nn.Module) -> None:
    """Parameters on the meta device become new ones on the CPU."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made = torch.empty(p.shape, dtype=p.dtype, device=CPU)
                module._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)


class _Marks(Laps):
    """Marks in what was counted, at the places where the `step` suite has marks in time."""

    def __init__(self, counter: Counter):
        super().__init__(META)
        self.counter = counter

    def mark(self, part: str) -> None:
        self.counter.mark(part)


def _step(way: Way, counter: Counter, images: Tensor, inputs: tuple[Any, ...]) -> None:
    marks = _Marks(counter)
    with _borders(way, marks):
        way.take(images, inputs, marks.mark)
        way.update(MOMENTUM)
        marks.mark("optimizer")


def _lengths(work: Work, masks: tuple[Masks, Masks], parts: int = 1) -> dict[tuple[int, int], Tensor]:
    """Of contexts, whole images and the predictor's sequences in each part, by (tokens, sequences)."""
    context, target = (_of_sequences(m).view(work.batch, -1) for m in masks)
    pairs = context[:, None] + target[:, :, None]
    whole = torch.full((work.batch,), (work.pixels // work.patch) ** 2)
    found = [part.flatten() for lengths in (context, whole, pairs) for part in lengths.chunk(parts)]
    return {(int(lengths.sum()), len(lengths)): lengths for lengths in found}


def _of_sequences(masks: Masks) -> Tensor:
    """int64 [S], image by image."""
    if isinstance(masks, Ragged):
        return masks.lengths.long()
    return torch.full((len(masks) * len(masks[0]),), masks[0].shape[1])


def _row(work: Work, name: str) -> dict[str, Any]:
    masks = work.masks(work.batch, 0, is_ragged(name))
    context, target = (_of_sequences(m) for m in masks)
    model = replace(work, device=META).model()
    row: dict[str, Any] = {
        "row": name,
        "model": f"{work.name}/{work.patch}",
        "pixels": work.pixels,
        "batch": work.batch,
        "dtype": "bf16",
        "predictor_width": work.predictor[0],
        "predictor_depth": work.predictor[1],
        "context_tokens": float(context.sum()) / work.batch,
    }
    if not in_equal_parts(work, name):
        return row | {"absent": f"{work.batch} images cannot be taken in equal parts"}
    try:
        parts, held = _count(work, name)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        if name != "compiled":
            raise
        return row | {"absent": f"fails: {type(error).__name__}: {error}".splitlines()[0][:120]}
    events = [event for part in PARTS for event in parts[part]]
    pairs = len(target) // work.batch * float(context.sum()) + len(context) // work.batch * float(target.sum())
    tokens = {
        "target": work.batch * model.encoder.patch_embed.num_patches * len(model.encoder.blocks),
        "context": float(context.sum()) * len(model.encoder.blocks),
        "predictor": pairs * work.predictor[1],
    }
    needed = step_flops(model)(work.batch, *masks)
    flops = {kind: sum(e.flops for e in events if e.kind == kind) for kind in KINDS}
    moved = {part: sum(e.bytes for e in parts[part] if e.kind == "rest") for part in PARTS}
    return row | {
        "launches": sum(e.launches for e in events),
        "launches_by_kind": {kind: sum(e.launches for e in events if e.kind == kind) for kind in KINDS},
        "gemm_flops": flops["gemm"],
        "attention_flops": flops["attention"],
        "needed_flops": needed,
        "flops_over_needed": (flops["gemm"] + flops["attention"]) / needed,
        **{f"{kind}_bytes": sum(e.bytes for e in events if e.kind == kind) for kind in KINDS},
        "rest_bytes_by_part": moved,
        "rest_bytes_per_token_layer": {part: moved[part] / tokens[part] for part in TOWERS},
        "allocations": sum(e.allocations for e in events),
        "allocated_bytes": sum(e.allocated for e in events),
        "peak_memory_bytes": held,
        "syncs": sum(e.syncs for e in events),
        "casts": sum(e.casts for e in events),
        "cast_bytes": sum(e.bytes for e in events if e.casts),
        "sources": _largest(parts),
    }


def _largest(parts: dict[str, list[Event]]) -> list[dict[str, Any]]:
    """What the rest's bytes are, the largest sums first."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for part, events in parts.items():
        for event in events:
            if event.kind == "rest":
                empty = {"name": event.name, "what": event.what, "launches": 0, "bytes": 0, "bytes_by_part": {}}
                source = sums.setdefault((event.name, event.what), empty)
                source["launches"] += event.launches
                source["bytes"] += event.bytes
                source["bytes_by_part"][part] = source["bytes_by_part"].get(part, 0) + event.bytes
    return sorted(sums.values(), key=lambda source: -source["bytes"])[:SOURCES]


def _has_sources(row: dict) -> bool:
    return _is_ours(row) and row["row"] in USUAL


def _is_ours(row: dict) -> bool:
    return row["row"].startswith("fastjepa") and "launches" in row


def _shown(rows: Sequence[dict]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        line = {"row": row["row"]}
        if "absent" in row:
            shown.append(line | {"launches": row["absent"]})
            continue
        line |= {"launches": row["launches"]}
        line |= {f"{kind} launches": row["launches_by_kind"][kind] for kind in KINDS}
        line |= {"GEMM TFLOP": row["gemm_flops"] / 1e12, "attention TFLOP": row["attention_flops"] / 1e12}
        line |= {"over needed": f"{row['flops_over_needed']:.4f}"}
        line |= {"rest GB": row["rest_bytes"] / 1e9, "attention GB": row["attention_bytes"] / 1e9}
        line |= {f"{part} B/token/layer": round(row["rest_bytes_per_token_layer"][part]) for part in TOWERS}
        line |= {"optimizer GB": row["rest_bytes_by_part"]["optimizer"] / 1e9}
        line |= {"allocations": row["allocations"], "allocated GB": row["allocated_bytes"] / 1e9}
        line |= {"peak GiB": "" if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 2**30}
        shown.append(line | {"syncs": row["syncs"], "casts": row["casts"], "cast GB": row["cast_bytes"] / 1e9})
    return shown


def _sources(row: dict) -> list[dict[str, Any]]:
    return [
        {
            "operator or kernel": source["name"],
            "of": source["what"],
            "launches": source["launches"],
            "GB": source["bytes"] / 1e9,
            "share": f"{source['bytes'] / row['rest_bytes']:.1%}",
        }
        | {f"{part} GB": source["bytes_by_part"].get(part, 0) / 1e9 for part in TOWERS}
        for source in row["sources"]
    ]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows, its columns all keys that come."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row.get(head, "")) for head in heads) + " |" for row in rows)])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def put(text: str, path: Path, markers: tuple[str, str], write: bool = True) -> None:
    """Put a text between the markers of a file.

    Raises:
        ValueError: no such file, or one without the markers.
    """
    try:
        whole = path.read_text(encoding="utf-8")
        before, rest = whole.split(markers[0])
        after = rest.split(markers[1])[1]
        if write:
            path.write_text(f"{before}{markers[0]}\n{text}\n{markers[1]}{after}", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--document: {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"--document: {path} must hold {markers[0]} and then {markers[1]}, once each") from error
