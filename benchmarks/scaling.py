"""The `scaling` suite: what a training step costs against batch, tokens, width and depth, one of them at a time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.machine import here
from benchmarks.step import Work, measure
from benchmarks.tables import columns

ROWS = ["eager", "fastjepa truncated", "fastjepa ragged"]
KEPT = ("row", "model", "pixels", "batch", "dtype", "ms", "spread_ms", "images_per_second", "flops_per_image")
KEPT += ("mfu", "of_matmul_rate", "peak_memory_bytes", "eager_over_this", "absent", "wrong")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which axes, and how often."""
    parser.add_argument("--axis", action="append", choices=tuple(_values(True)), help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="timed at each point, after the warm-up")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each axis, value on it, and way to take the step.

    Raises:
        ValueError: fewer than one step.
    """
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {arguments.steps}")
    cuda = here().type == "cuda"
    base = Work("vit_base", batch=64, bf16=True) if cuda else Work("vit_tiny", batch=4, predictor=(192, 2))
    return measure_all(base, arguments.axis or list(_values(cuda)), arguments.steps)


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The rows whose numbers are wrong."""
    return [f"{row['axis']} {row['value']}, {row['row']}: {row['wrong']}" for row in rows if "wrong" in row]


def table(rows: list[dict]) -> str:
    """For a person to read."""
    left = ("model", "pixels", "batch", "dtype", "peak_memory_bytes")
    shown = [{key: value for key, value in row.items() if key not in left and value is not None} for row in rows]
    for line, row in zip(shown, rows, strict=True):
        if row.get("peak_memory_bytes"):
            line["peak GiB"] = row["peak_memory_bytes"] / 2**30
    return columns(shown)


def measure_all(base: Work, axes: list[str], steps: int) -> list[dict]:
    """Every point of these axes; a point on several of them is measured once."""
    known: dict[str, list[dict]] = {}
    rows = []
    for axis, value, work in points(base, axes):
        if repr(work) not in known:
            known[repr(work)] = measure(work, steps, ROWS)
        encoder = replace(work, device=torch.device("meta")).model().encoder
        shape = {
            "axis": axis,
            "value": value,
            "width": encoder.embed_dim,
            "depth": len(encoder.blocks),
            "tokens": encoder.patch_embed.num_patches,
            "parameters": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        }
        rows += [shape | {key: row[key] for key in KEPT if key in row} for row in known[repr(work)]]
    return rows


def points(base: Work, axes: list[str]) -> Iterator[tuple[str, int, Work]]:
    """(axis, value on it, work) of every point, `base` but for that value."""
    for axis in axes:
        for value in _values(base.device.type == "cuda")[axis]:
            if axis == "batch":
                yield axis, value, replace(base, batch=value)
            elif axis == "pixels":
                yield axis, value, replace(base, pixels=value)
            elif axis == "width":
                yield axis, value, replace(base, sizes={"embed_dim": value, "num_heads": min(16, value // 64)})
            else:
                yield axis, value, replace(base, sizes={"depth": value})


def _values(cuda: bool) -> dict[str, tuple[int, ...]]:
    """The values on each axis."""
    if cuda:
        return {
            "batch": (8, 16, 32, 64, 128, 256),
            "pixels": (224, 288, 352, 448),
            "width": (384, 768, 1024, 1280),
            "depth": (6, 12, 24, 32),
        }
    return {"batch": (1, 2, 4, 8), "pixels": (224, 320, 448), "width": (192, 384, 768), "depth": (6, 12, 24)}
