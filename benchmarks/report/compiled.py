"""What the `codegen` suite found, in a line for each chip: from its JSON, or from the table that is committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.devices import number
from benchmarks.report.tables import Cell, Table, table_of
from benchmarks.results import FOLDER

TABLE = FOLDER / "codegen.txt"
COUNTS = ("sm", "registers", "spill_bytes", "shared_bytes", "load_bits", "store_bits", "occupancy")


def read(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that `codegen --json` wrote; None for any other, which is then held to be a results file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = {"kernel", "config", "mma_instructions", *COUNTS}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and known <= set(row) for row in rows):
        return None
    return rows if all(number(row[key]) for row in rows for key in COUNTS) else None


def committed(path: Path = TABLE) -> Table | None:
    """The committed table in a line for each chip; None where there is none."""
    if not path.is_file():
        return None
    compiler, _, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        cells = line.split()
        counts = [cell for cell in cells if ":" not in cell]  # tensor-core instructions are kind:count, at the end
        row = dict(zip(COUNTS, map(float, counts[-len(COUNTS) :]), strict=True))
        rows.append({**row, "mma_instructions": len(cells) - len(counts)})
    return summary(rows, f" with {compiler}")


def summary(rows: Sequence[dict[str, Any]], compiler: str = "") -> Table | None:
    """What the kernels became on each chip; None of no rows."""
    lines: list[dict[str, Cell]] = []
    for sm in sorted({int(row["sm"]) for row in rows}):
        made = [row for row in rows if row["sm"] == sm]
        lines.append(
            {
                "sm": sm,
                "configurations": len(made),
                "with tensor-core instructions": sum(bool(row["mma_instructions"]) for row in made),
                "registers at most": int(max(row["registers"] for row in made)),
                "spilled bytes at most": int(max(row["spill_bytes"] for row in made)),
                "shared bytes at most": int(max(row["shared_bytes"] for row in made)),
                "occupancy at least": float(min(row["occupancy"] for row in made)),
            }
        )
    return table_of(f"Kernels compiled{compiler}, by compute capability", lines) if lines else None
