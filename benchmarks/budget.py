"""The `budget` suite: one training step of ours launch by launch, and the time that each chip needs for it at least.

The launches are those of the `count` suite, on the meta device. A launch takes at least its FLOPs at the chip's peak or
its bytes at the chip's bandwidth, whichever is longer; launches follow one another. Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import count, step
from benchmarks.counter import Event
from benchmarks.laps import PARTS
from benchmarks.step import Work
from benchmarks.tables import columns
from fastjepa.chips import Chip, chip

CHIPS = ("a100-80g", "h200")
ROWS = ("fastjepa truncated", "fastjepa ragged")
MARKERS = "<!-- budget -->", "<!-- end of budget -->"
# A launch belongs to the first of these of which its name holds a part.
GROUPS = {
    "residual + LayerNorm": ("layer_norm",),
    "bias + GELU": ("gelu",),
    "loss": ("jepa_loss", "_mean_kernel", "ones_like"),
    "AdamW + EMA": ("adamw_ema",),
    "gather and scatter": ("gather", "scatter", "assemble", "mask_token", "place_kernel", "index_select"),
    "sums over tokens": ("sum",),
    "cutting into patches": ("clone",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and its batch, as the `count` suite takes them."""
    count.add_work(parser)
    step.add_rows(parser, [row for row in count.ROWS if row.startswith("fastjepa")], f"default: {', '.join(ROWS)}")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the tables between the markers there")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each kind of launch in each part of the step, then one for each part and the whole.

    Raises:
        ValueError: sizes that do not go together, a count below one, or a document without its markers.
    """
    work = count.work_of(arguments)
    if arguments.document:
        count.put("", arguments.document, MARKERS, write=False)
    rows = [row for name in arguments.row or ROWS for row in budget(work, name)]
    if arguments.document:
        count.put(markdown(rows), arguments.document, MARKERS)
    return rows


def budget(work: Work, name: str) -> list[dict[str, Any]]:
    """The rows of one way to take the step."""
    parts, found = count.count(work, name), []
    for part in PARTS:
        groups: dict[str, list[Event]] = {}
        for event in parts[part]:
            if event.launches:
                groups.setdefault(group_of(event), []).append(event)
        found += [_row(name, part, group, events) for group, events in groups.items()]
        found.append(_row(name, part, "all", parts[part]))
    return [*found, _row(name, "step", "all", [event for part in PARTS for event in parts[part]], work.batch)]


def group_of(event: Event) -> str:
    """What kind of launch an event is."""
    if event.kind == "gemm":
        return "products"
    if event.kind == "attention":
        return "attention"
    return next((group for group, names in GROUPS.items() if any(n in event.name for n in names)), "other")


def floor(event: Event, gpu: Chip) -> float:
    """Seconds that a launch needs at least."""
    return max(event.flops / gpu.flops, event.bytes / gpu.bandwidth)


def table(rows: Sequence[dict]) -> str:
    """For a person to read: each way on its own."""
    return "\n\n".join(f"{name}:\n{columns(shown(rows, name))}" for name in _names(rows))


def markdown(rows: Sequence[dict]) -> str:
    """The same as Markdown."""
    return "\n\n".join(f"{name}:\n\n{count.as_markdown(shown(rows, name))}" for name in _names(rows))


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """Nothing can be wrong that counting would show."""
    return []


def shown(rows: Sequence[dict], name: str) -> list[dict[str, Any]]:
    """The lines of one way's table."""
    lines = []
    for row in rows:
        if row["row"] != name:
            continue
        line = {"part": row["part"], "launches of": row["group"], "launches": row["launches"]}
        line |= {"TFLOP": row["flops"] / 1e12, "GB": row["bytes"] / 1e9}
        for gpu in CHIPS:
            line |= {f"{gpu} ms": 1e3 * row["floors"][gpu]}
        whole = next(r for r in rows if r["row"] == name and r["part"] == "step")
        line |= {f"share, {CHIPS[0]}": f"{row['floors'][CHIPS[0]] / whole['floors'][CHIPS[0]]:.1%}"}
        lines.append(line)
    return lines


def _names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(row["row"] for row in rows))


def _row(name: str, part: str, group: str, events: Sequence[Event], images: int | None = None) -> dict[str, Any]:
    floors = {gpu: sum(floor(event, chip(gpu)) for event in events) for gpu in CHIPS}
    row = {
        "row": name,
        "part": part,
        "group": group,
        "launches": sum(event.launches for event in events),
        "flops": sum(event.flops for event in events),
        "bytes": sum(event.bytes for event in events),
        "floors": floors,
    }
    return row if images is None else row | {"images_per_second": {gpu: images / floors[gpu] for gpu in CHIPS}}
