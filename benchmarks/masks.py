"""The `masks` suite: what drawing the masks of a batch costs on one core."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.tables import columns
from benchmarks.timing import clock
from fastjepa import MaskCollator

SETTINGS = {
    "enc_mask_scale": (0.85, 1.0),
    "pred_mask_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "npred": 4,
    "min_keep": 10,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeats", type=int, default=300)


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each size and form of masks."""
    return measure(arguments.repeats)


table = columns


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """None: there is nothing to be right or wrong."""
    return []


def measure(repeats: int = 300) -> list[dict]:
    """Milliseconds of `MaskCollator` on a batch of labels, images left out."""
    rows = []
    for pixels, patch, batch in ((224, 14, 128), (224, 16, 256), (448, 16, 128)):
        for ragged in (False, True):
            collate = MaskCollator((pixels, pixels), patch, **SETTINGS, ragged=ragged)
            samples, times = [0] * batch, []
            for _ in range(repeats):
                start = clock()
                collate(samples)
                times.append(1e3 * (clock() - start))
            rows.append(
                {
                    "patches": f"{pixels // patch}x{pixels // patch}",
                    "batch": batch,
                    "form": "ragged" if ragged else "lists",
                    "median_ms": statistics.median(times),
                    "min_ms": min(times),
                }
            )
    return rows
