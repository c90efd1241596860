"""The committed table of compiled kernels in a line for each chip."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.tables import Cell, Table, table_of
from benchmarks.results import FOLDER

TABLE = FOLDER / "codegen.txt"
COLUMNS: tuple[str, ...] = (
    "sm",
    "registers",
    "spill",
    "shared",
    "load",
    "store",
    "occupancy",
)  # at a line's end, before instructions


def summary(path: Path = TABLE) -> Table | None:
    """What the kernels became on each chip, by the `codegen` suite's table; None where there is none."""
    if not path.is_file():
        return None
    compiler, _, *lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[int, list[dict[str, float]]] = {}
    for line in lines:
        cells = line.split()
        plain = [cell for cell in cells if ":" not in cell]
        row: dict[str, float] = dict(zip(COLUMNS, map(float, plain[-len(COLUMNS) :]), strict=True))
        row["tensor cores"] = len(plain) < len(cells)
        found.setdefault(int(row["sm"]), []).append(row)
    rows: list[dict[str, Cell]] = [
        {
            "sm": sm,
            "configurations": len(made),
            "with tensor-core instructions": sum(bool(row["tensor cores"]) for row in made),
            "registers at most": int(max(row["registers"] for row in made)),
            "spilled bytes at most": int(max(row["spill"] for row in made)),
            "shared bytes at most": int(max(row["shared"] for row in made)),
            "occupancy at least": min(row["occupancy"] for row in made),
        }
        for sm, made in sorted(found.items())
    ]
    return table_of(f"Kernels compiled with {compiler}, by compute capability", rows)
