"""The results of suites as files: written whole, read back with their version checked, kept by device and date."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT, VERSION = "fastjepa benchmarks", 1
FOLDER = Path(__file__).parent / "results"


def run_of(suite: str, command: str, machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run of a suite: {suite, command, date, machine, rows}."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"suite": suite, "command": command, "date": date, "machine": machine, "rows": list(rows)}


def document(runs: Sequence[dict[str, Any]]) -> str:
    """Runs as the text of a results file."""
    return json.dumps({"format": FORMAT, "version": VERSION, "runs": list(runs)}, indent=1) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file.

    Raises:
        ValueError: no such file, no JSON, other JSON than a results file, or one of another version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file that a suite wrote with --json") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); name a file that a suite wrote with --json") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file; name one that a suite wrote with --json")
    if tree.get("version") != VERSION:
        raise ValueError(f"{path} has version {tree.get('version')!r}, and {VERSION} is read here; run the suite again")
    runs = tree.get("runs")
    keys = {"suite": str, "command": str, "date": str, "machine": dict, "rows": list}
    if not isinstance(runs, list) or not all(
        isinstance(run, dict) and all(isinstance(run.get(key), kind) for key, kind in keys.items()) for run in runs
    ):
        raise ValueError(f"{path}: each of its runs must have {', '.join(keys)}; run the suite again")
    return runs


def write(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write a results file, whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(document(runs), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def save(run: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Put a run into <folder>/<device>/<date>.json, in the place of that day's run by the same command."""
    path = folder / slug(run["machine"]) / f"{run['date'][:10]}.json"
    others = [r for r in read(path) if r["command"] != run["command"]] if path.exists() else []
    write(path, [*others, run])
    return path


def slug(machine: dict[str, Any]) -> str:
    """A folder's name for a device: "NVIDIA H200" -> nvidia-h200; processors with their number of threads."""
    threads = f"-{machine['threads']}-threads" if machine["kind"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + threads


def committed(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every run kept there, the oldest first."""
    runs = [run for path in sorted(folder.glob("*/*.json")) for run in read(path)]
    return sorted(runs, key=lambda run: run["date"])
