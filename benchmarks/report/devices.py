"""Results as the report takes them: checked, by device, the newest run of each command, no time on a wrong row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import summary
from fastjepa.chips import CHIPS

Row = dict[str, Any]
Run = dict[str, Any]

SUITES = {  # in the order that they are shown
    "step": "Training steps",
    "kernels": "Operations against their peers",
    "scaling": "How a step's cost grows",
    "swap": "Other codebases before and after the swap",
    "masks": "Drawing masks",
    "input": "Reading pictures",
    "host": "Launching, on the processor",
}
# What each row of a suite must say, and what else it says whether it was timed or not.
NAMES = {
    "step": ("row", "model", "batch"),
    "kernels": ("operation", "case", "peer"),
    "scaling": ("axis", "value", "row"),
    "swap": ("codebase", "model"),
    "masks": ("patches", "batch", "form"),
    "input": ("engine",),
    "host": ("operation",),
}
SETTINGS = ("model", "pixels", "batch", "dtype", "predictor_width", "predictor_depth", "npred", "steps")
UNTIMED = {
    *SETTINGS, "workers", "note", "bytes", "flops", "launches", "tokens", "parameters", "width", "depth",
    "absent", "wrong",
}  # fmt: skip
NUMBERS = {  # that are drawn or counted with
    "ms", "spread_ms", "images_per_second", "context_tokens_per_second", "mfu", "of_matmul_rate", "peak_memory_bytes",
    "joules_per_1000_images", "eager_over_this", "GB/s", "TFLOP/s", "roof", "bytes", "flops", "best_peer_over_ours",
    "graph_ms", "median_ms", "min_ms", "images_per_second_per_core", "spread", "parameters", "tokens", "value",
    "ours_us", "torch_us", "before_ms", "after_ms", "speedup", "outputs", "gradients", "places",
}  # fmt: skip
MACHINE = ("device", "kind", "chip", "threads", "torch", "triton", "python", "cuda", "driver", "commit")


@dataclass(frozen=True)
class Device:
    """A machine, and the newest run of each command on it.

    Attributes:
        name: as people write it. slug: of its folder. machine: of its newest run.
        runs: those of one suite together, in the order of `SUITES`, and by command in one.
    """

    name: str
    slug: str
    machine: dict[str, Any]
    runs: tuple[Run, ...]

    def of(self, suite: str) -> list[Run]:
        """Its runs of a suite."""
        return [run for run in self.runs if run["suite"] == suite]

    @property
    def unmeasured(self) -> list[str]:
        """Suites that it has no run of."""
        return [suite for suite in SUITES if not self.of(suite)]


def read(paths: Sequence[Path]) -> tuple[list[Device], list[str]]:
    """(devices, suites that are not known here and were skipped) of results files.

    Raises:
        ValueError: a file that cannot be read, is no results file, or has a run without what its suite has to say.
    """
    return grouped((str(path), run) for path in paths for run in results.read(path))


def committed(folder: Path = results.FOLDER) -> tuple[list[Device], list[str]]:
    """The same of the files kept in the repository."""
    return read(sorted(folder.glob("*/*.json")))


def grouped(found: Iterable[tuple[str, Run]]) -> tuple[list[Device], list[str]]:
    """Runs, each with the name of where it is from, as devices: GPUs first, then by name."""
    newest: dict[tuple[str, str, str], Run] = {}
    skipped: list[str] = []
    for source, run in sorted(found, key=lambda pair: pair[1]["date"]):
        if run["suite"] not in SUITES:
            skipped.append(f"{run['suite']!r} in {source}")
            continue
        check(run, source)
        run = {**run, "rows": [without_times(row) for row in run["rows"]]}
        newest[results.slug(run["machine"]), run["suite"], run["command"]] = run
    devices = []
    for slug in dict.fromkeys(key[0] for key in newest):
        runs = [run for key, run in newest.items() if key[0] == slug]
        last = max(runs, key=lambda run: run["date"])["machine"]
        runs.sort(key=lambda run: (list(SUITES).index(run["suite"]), run["command"]))
        threads = f", {last['threads']} threads" if last["kind"] == "cpu" else ""
        devices.append(Device(last["device"] + threads, slug, last, tuple(runs)))
    devices.sort(key=lambda device: (device.machine["kind"] == "cpu", device.name))
    return devices, list(dict.fromkeys(skipped))


def check(run: Run, source: str) -> None:
    """Hold a run to what the tables need of it.

    Raises:
        ValueError: naming what it lacks.
    """
    where = f"{source}, suite {run['suite']}"
    machine = run["machine"]
    lacking = [key for key in MACHINE if key not in machine]
    lacking += [key for key in ("device", "kind", "commit") if not isinstance(machine.get(key), str)]
    lacking += [key for key in ("copy_bandwidth", "matmul_rate") if not number(machine.get(key)) or not machine[key]]
    if lacking:
        raise ValueError(f"{where}: its machine says no {', '.join(dict.fromkeys(lacking))}; run the suite again")
    for place, row in enumerate(run["rows"]):
        if not isinstance(row, dict) or any(key not in row for key in NAMES[run["suite"]]):
            raise ValueError(f"{where}: row {place} must have {', '.join(NAMES[run['suite']])}; run the suite again")
        odd = [key for key in row if key in NUMBERS and row[key] is not None and not number(row[key])]
        parts = row.get("parts_ms") or {}
        if not isinstance(parts, dict) or not all(map(number, parts.values())):
            odd.append("parts_ms")
        if odd:
            raise ValueError(f"{where}: row {place} has {odd[0]} {row[odd[0]]!r}, no number; run the suite again")


def number(value: Any) -> bool:
    """Whether it is a number of something that can be measured: finite, and not below zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def without_times(row: Row) -> Row:
    """A row as it is; a wrong or absent one with its names and counts alone."""
    names = {key for keys in NAMES.values() for key in keys}
    if not failure(row):
        return row
    return {k: v for k, v in row.items() if k in names | UNTIMED or "error" in k or k.startswith("floor_")}


def failure(row: Row) -> str | None:
    """Why a row has no time: "WRONG: ..." or "absent: ...", in one line; None for one that has."""
    if row.get("wrong"):
        return f"WRONG: {' '.join(str(row['wrong']).split())}"
    return f"absent: {' '.join(str(row['absent']).split())}" if row.get("absent") else None


def ours(row: Row) -> bool:
    """Whether a row of the kernels suite is this library's."""
    return str(row["peer"]).startswith("fastjepa")


def operations(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the kernels suite, those of one operation on one case together."""
    keys = dict.fromkeys((row["operation"], row["case"]) for row in rows)
    return [[row for row in rows if (row["operation"], row["case"]) == key] for key in keys]


def title(row: Row) -> str:
    """The operation of a row of the kernels suite, with the word that tells its cases apart where it has one."""
    word, colon, _ = str(row["case"]).partition(":")
    return f"{row['operation']}, {word}" if colon else str(row["operation"])


def settings(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(what all of these rows share of their settings, in words; the keys of those that differ)."""
    values = {key: {row.get(key) for row in rows} for key in SETTINGS if any(row.get(key) is not None for row in rows)}
    words = {
        "model": "{}", "pixels": "{} px", "batch": "batch {}", "dtype": "{}", "predictor_width": "predictor {} wide",
        "predictor_depth": "predictor {} deep", "npred": "{} target blocks", "steps": "{} steps",
    }  # fmt: skip
    shared = [words[key].format(*found) for key, found in values.items() if len(found) == 1]
    return shared, [key for key, found in values.items() if len(found) > 1]


def source(run: Run) -> str:
    """Where and with what a run was made, in one line: device, versions, commit, rates, day."""
    clocks = run["machine"].get("clocks") or {}
    clock = f", SM clock at most {clocks['sm_max']} MHz" if clocks.get("sm_max") else ""
    return f"{summary(run['machine'])}{clock}; {run['date'][:10]}"


def unmeasured_chips(devices: Sequence[Device]) -> list[str]:
    """The GPUs of `fastjepa.chips` that no device here is one of."""
    seen = {device.machine["chip"] for device in devices}
    return [chip.name for chip in CHIPS if chip.name not in seen]
