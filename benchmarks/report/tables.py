"""Rows of suites as tables: what a reader compares side by side, each headed by what made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report.devices import (
    NUMBERS,
    SUITES,
    Device,
    Row,
    Run,
    failure,
    operations,
    ours,
    settings,
    source,
    title,
    unmeasured_chips,
)

NOT_MEASURED = "not measured"
Cell = str | float | int | None
WORDS = {"predictor_width": "predictor width", "predictor_depth": "predictor depth", "npred": "target blocks"}
SMALL: dict[str, tuple[str, dict[str, str]]] = {  # suite -> caption, and words for the keys that are shown
    "swap": (
        "Models of other codebases, forward and backward, in ms, and the relative difference of their numbers",
        {
            "codebase": "codebase",
            "model": "model",
            "before_ms": "before",
            "after_ms": "after",
            "speedup": "times as fast",
            "outputs": "outputs differ by",
            "gradients": "gradients differ by",
        },
    ),
    "masks": (
        "Milliseconds to draw the masks of a batch, on one core",
        {"patches": "patches", "batch": "images", "form": "form", "median_ms": "ms", "min_ms": "ms at least"},
    ),
    "input": (
        "Pictures read, cropped and made into a batch",
        {
            "engine": "engine",
            "workers": "workers",
            "images_per_second": "images/s",
            "images_per_second_per_core": "images/s a core",
            "spread": "spread, images/s",
        },
    ),
    "host": (
        "Microseconds that one call takes the processor, forward and backward",
        {"operation": "operation", "launches": "launches", "ours_us": "ours, us", "torch_us": "torch, us"},
    ),
}
AXES = {"batch": "images in a batch", "pixels": "pixels a side", "width": "width", "depth": "layers"}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows, with the settings that all of its rows share.
        rows: the cells of each line; one cell alone is a heading over the lines below it.
        sources: device, versions, commit and command, a pair (made with, command) for each run in it.
        notes: lines below it.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sources: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, words aside where one is missing."""
        return any(isinstance(cell, int | float) for row in self.rows for cell in row[column : column + 1])


def table_of(caption: str, lines: Sequence[dict[str, Cell] | str], runs: Sequence[Run] = ()) -> Table:
    """Lines under their keys, and headings between them; a column with nothing in it is left out."""
    keyed = [line for line in lines if isinstance(line, dict)]
    keys = dict.fromkeys(key for line in keyed for key in line)
    heads = tuple(key for key in keys if any(line.get(key) is not None for line in keyed))
    rows = ((line,) if isinstance(line, str) else tuple(line.get(head) for head in heads) for line in lines)
    return Table(caption, heads, tuple(rows), tuple((source(run), run["command"]) for run in runs))


def text(cell: Cell) -> str:
    """A cell as it is read: three digits, thousands apart, a dash where nothing was measured."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else digits(cell)


def digits(value: float) -> str:
    """Three digits of a number, all of those before the point.

    >>> digits(0.01234), digits(1.5), digits(99.99), digits(12345.6), digits(0.0)
    ('0.0123', '1.50', '100', '12,346', '0')
    """
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:#.3g}"


def tables_of(device: Device, suite: str) -> list[Table]:
    """The tables of a device's runs of a suite."""
    makers: dict[str, Callable[[Run], Iterable[Table]]] = {
        "step": lambda run: [step([run])],
        "kernels": lambda run: [kernels(run)],
        "scaling": scaling,
    }
    make = makers.get(suite, lambda run: [plain(run)])
    return [table for run in device.of(suite) if run["rows"] for table in make(run)]


def step(runs: Sequence[Run]) -> Table:
    """Training steps, a line for each row."""
    rows = [row for run in runs for row in run["rows"]]
    shared, differing = settings(rows)
    lines: list[dict[str, Cell]] = []
    for row in rows:
        line: dict[str, Cell] = {"step": row["row"]}
        line |= {WORDS.get(key, key): row.get(key) for key in differing}
        line |= {
            "ms": failure(row) or row.get("ms"),
            "images/s": row.get("images_per_second"),
            "context tokens/s": row.get("context_tokens_per_second"),
            "% of peak": percent(row.get("mfu")),
            "% of matmul rate": percent(row.get("of_matmul_rate")),
            "peak GiB": gib(row.get("peak_memory_bytes")),
            "J per 1,000 images": row.get("joules_per_1000_images"),
            "eager over this": row.get("eager_over_this"),
        }
        lines.append(line)
    return table_of(f"Training step: {', '.join(shared)}", lines, runs)


def kernels(run: Run) -> Table:
    """Operations by their peers, each with its time over ours; ours with its lead over the best of the others."""
    lines: list[dict[str, Cell] | str] = []
    for rows in operations(run["rows"]):
        note = f" ({rows[0]['note']})" if rows[0].get("note") else ""
        lines.append(f"{rows[0]['operation']}: {rows[0]['case']}{note}")
        mine = [row["ms"] for row in rows if ours(row) and row.get("ms")]
        for row in rows:
            times = row.get("ms")
            lines.append(
                {
                    "by": row["peer"],
                    "ms": failure(row) or times,
                    "ms by graph replay": row.get("graph_ms"),
                    "GB/s": row.get("GB/s"),
                    "TFLOP/s": row.get("TFLOP/s"),
                    "% of roof": percent(row.get("roof")),
                    "time over ours": times / min(mine) if times and mine else None,
                    "best peer over ours": row.get("best_peer_over_ours") if ours(row) else "",
                }
            )
    table = table_of("Operations by their peers, each held to the fp64 answer before it was timed", lines, [run])
    return replace(table, notes=on_processors([run]))


def leads(devices: Sequence[Device]) -> Table:
    """The best peer's time over ours, operations by devices, the newest run of each; for the README."""
    with_rows = [device for device in devices if device.of("kernels")]
    found: dict[str, dict[str, Cell]] = {}
    for device in with_rows:
        for run in sorted(device.of("kernels"), key=lambda run: run["date"]):
            for rows in operations(run["rows"]):
                found.setdefault(title(rows[0]), {})[device.name] = lead(rows)
    names = [device.name for device in with_rows]
    lines: list[dict[str, Cell]] = [
        {"operation": operation, **{name: cells.get(name, NOT_MEASURED) for name in names}}
        for operation, cells in found.items()
    ]
    runs = [run for device in with_rows for run in device.of("kernels")]
    table = table_of("Operations: the best peer's time over ours, and which peer that is", lines, runs)
    return replace(table, notes=on_processors(runs))


def on_processors(runs: Sequence[Run]) -> tuple[str, ...]:
    """What to know of runs of the kernels suite without a GPU."""
    plain = any(run["machine"]["kind"] == "cpu" for run in runs)
    return ("On a processor the operations of fastjepa are PyTorch code: its kernels need a GPU",) if plain else ()


def lead(rows: Sequence[Row]) -> str:
    """How ours stands on one operation: "1.31x torch SDPA", or why that cannot be said."""
    mine = [row for row in rows if ours(row)]
    timed = [row for row in mine if row.get("best_peer_over_ours")]
    if not timed:
        return next((failure(row) or NOT_MEASURED for row in mine), NOT_MEASURED)
    best = max(timed, key=lambda row: row["best_peer_over_ours"])
    peers = [row for row in rows if not ours(row) and row.get("ms")]
    against = f" {min(peers, key=lambda row: row['ms'])['peer']}" if peers else ""
    form = "" if best["peer"] == "fastjepa" else f" ({best['peer']})"
    return f"{digits(best['best_peer_over_ours'])}x{against}{form}"


def scaling(run: Run) -> list[Table]:
    """Images a second and peak memory of each row, a table for each axis."""
    tables = []
    for axis in dict.fromkeys(row["axis"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["axis"] == axis]
        lines = []
        for value in dict.fromkeys(row["value"] for row in rows):
            at = {row["row"]: row for row in rows if row["value"] == value}
            line: dict[str, Cell] = {str(AXES.get(axis, axis)): value}
            if len({row.get("parameters") for row in rows}) > 1:
                count = next(iter(at.values())).get("parameters")
                line["M parameters"] = count and count / 1e6
            for way, row in at.items():
                why = failure(row)
                line[f"{way}, images/s"] = why.partition(":")[0] if why else row.get("images_per_second")
            for way, row in at.items():  # all speeds first, then all memory
                line[f"{way}, GiB"] = gib(row.get("peak_memory_bytes"))
            lines.append(line)
        caption = f"Training step against {AXES.get(axis, axis)}: {', '.join(settings(rows)[0])}"
        found = table_of(caption, lines, [run])
        tables.append(replace(found, notes=tuple(missed(rows))))
    return tables


def missed(rows: Sequence[Row]) -> list[str]:
    """Why rows of the scaling suite have no time, a line for each."""
    return [f"{row['row']} at {row['value']}: {why}" for row in rows if (why := failure(row))]


def plain(run: Run) -> Table:
    """The rows of a small suite, under words for their keys; where there is no time, why."""
    caption, heads = SMALL[run["suite"]]
    first = next(key for key in heads if key in NUMBERS)
    lines: list[dict[str, Cell]] = [
        {head: (failure(row) if key == first else None) or row.get(key) for key, head in heads.items()}
        for row in run["rows"]
    ]
    return table_of(caption, lines, [run])


def every_row(run: Run) -> Table:
    """All that a run's rows say, under their own keys; lists and parts of a time in a few words."""
    lines: list[dict[str, Cell]] = []
    for row in run["rows"]:
        line: dict[str, Cell] = {}
        for key, value in row.items():
            if isinstance(value, dict):
                line[key] = ", ".join(f"{part} {text(v)}" for part, v in value.items())
            elif isinstance(value, list):
                line[key] = ", ".join(map(str, value))
            else:
                line[key] = str(value) if isinstance(value, bool) else value
        lines.append(line)
    return table_of(f"{run['suite']}: every row", lines, [run])


def coverage(devices: Sequence[Device]) -> Table:
    """What was run on each device, by the day of the newest run; known GPUs that nothing was run on are there too."""
    lines: list[dict[str, Cell]] = []
    for device in devices:
        days: dict[str, Cell] = {
            s: max((run["date"][:10] for run in device.of(s)), default=NOT_MEASURED) for s in SUITES
        }
        lines.append({"device": device.name, **days})
    for chip in unmeasured_chips(devices):
        lines.append({"device": chip, **dict.fromkeys(SUITES, NOT_MEASURED)})
    return table_of("The day of the newest run of each suite", lines)


def spans(row: Sequence[Cell], numeric: Callable[[int], bool]) -> int | None:
    """The place of the words that stand for all numbers after them, as a reason for none does; None without."""
    for place, cell in enumerate(row):
        if isinstance(cell, str) and cell and numeric(place):
            return place if not any(row[place + 1 :]) else None
    return None


def percent(share: float | None) -> float | None:
    """Of a share; nothing of nothing."""
    return None if share is None else 100 * share


def gib(size: Any) -> float | None:
    """Bytes as GiB; nothing of nothing."""
    return size / 2**30 if size else None
