"""Measured training steps: read from results files of `python -m benchmarks`, and what of the roof they reached."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.chips import Chip, chip
from fastjepa.config import Config, parse_config
from fastjepa.plan.cost import PARTS, Step
from fastjepa.plan.layers import AUTOCAST, FP32
from fastjepa.plan.settings import NAMED, Settings
from fastjepa.plan.work import Models, draw

FORMAT, VERSION = "fastjepa benchmarks", 1
SHARPNESS = 2.0  # of the weights of measured rows; by leaving out one at a time, of 0, 1/2, 1 and 2
PACKAGED = Path(__file__).with_name("measured.json")
NEEDED = {
    "model": str, "pixels": int, "batch": int, "dtype": str, "predictor_depth": int, "predictor_width": int,
    "context_tokens": float, "target_tokens": float, "npred": int, "ms": float, "parts_ms": dict,
}  # fmt: skip
# Rows of the step suite, and what they are counted as; the published code takes the step as eager does.
OURS = ("fastjepa truncated", "fastjepa ragged")
ROWS = {
    "eager": "eager",
    "official": "eager",
    "compiled": "compiled",
    **dict.fromkeys([*OURS, *(f"{row}, {name}" for row in OURS for name in NAMED)], "fastjepa"),
}
ENGINE = "fastjepa"  # of the input suite, as data.engine=auto has it; with ", engine NAME" as that engine has it
MACHINE = ("device", "kind", "chip", "threads", "copy_bandwidth", "matmul_rate", "commit")
USED = {*NEEDED, "row", "joules_per_1000_images", "engine", "workers", "images_per_second_per_core"}


@dataclass(frozen=True)
class Measured:
    """One timed step of the `step` suite.

    Attributes:
        device: of the machine, with its threads where it is a processor. kind: "cuda" or "cpu". chip: by name, if it is
            in `fastjepa.chips`. peak, bandwidth: its roof, of a known chip's data sheet, else as measured of matmul and
            copy.
        row, model, batch, dtype: as in the row. step: what was counted of it. parts_ms: what was measured, as means.
        watts: while it ran, None where nobody told.
    """

    device: str
    kind: str
    chip: str | None
    peak: float
    bandwidth: float
    row: str
    model: str
    batch: int
    dtype: str
    step: Step
    parts_ms: dict[str, float]
    watts: float | None

    @property
    def ms(self) -> float:
        """Of the whole step."""
        return sum(self.parts_ms.values())

    @property
    def implementation(self) -> str:
        """One of `IMPLEMENTATIONS`."""
        return self.step.implementation

    def floor(self, part: str) -> float:
        """Seconds of a part at the whole of the roof."""
        return self.step.costs()[part].seconds(self.peak, self.bandwidth)

    def seconds(self, part: str) -> float:
        """Seconds that a part took."""
        return self.parts_ms[part] / 1e3

    def fractions(self) -> dict[str, float]:
        """What each part reached of the roof."""
        return {part: self.floor(part) / self.seconds(part) for part in PARTS}

    def __str__(self) -> str:
        return f"{self.row}, {self.model}, batch {self.batch}, {self.dtype} on {self.device}"


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file that a suite wrote with --json.

    Raises:
        ValueError: no such file, no JSON, other JSON than a results file, or one of another version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file of `python -m benchmarks step --json FILE`") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON; name a file of `python -m benchmarks step --json FILE`") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"{path} is no results file; name one of `python -m benchmarks step --json FILE`")
    if tree.get("version") != VERSION:
        raise ValueError(f"{path} has version {tree.get('version')!r}, and {VERSION} is read here; run the suite again")
    runs = tree.get("runs")
    keys = {"suite": str, "machine": dict, "rows": list}
    if not isinstance(runs, list) or not all(
        isinstance(run, dict)
        and all(isinstance(run.get(key), kind) for key, kind in keys.items())
        and all(isinstance(row, dict) for row in run["rows"])
        for run in runs
    ):
        raise ValueError(f"{path}: each of its runs must have {', '.join(keys)}; run the suite again")
    return runs


def steps_of(runs: Iterable[dict[str, Any]], source: str = "results") -> list[Measured]:
    """The timed steps of runs that the planner has a count for, the rows that are absent or wrong left out.

    fp32 on a GPU is left out too: neither a data sheet's peak nor the measured one is that of its products.

    Raises:
        ValueError: a row that lacks something, or a model that is not there; names it.
    """
    known: dict[tuple, tuple[Config, Models]] = {}
    return [
        _measured(run["machine"], row, known, source)
        for run in runs
        if run["suite"] == "step"
        for row in run["rows"]
        if is_used(run, row)
    ]


def is_used(run: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the planner can use a row: a timed step of a known way, or the rate of our own reading of pictures."""
    if run["suite"] == "input":
        ours = str(row.get("engine", "")).partition(", engine ")[0] == ENGINE
        return ours and bool(row.get("images_per_second_per_core"))
    on_gpu = run["machine"].get("kind") == "cuda"
    timed = row.get("row") in ROWS and row.get("ms") is not None
    return run["suite"] == "step" and timed and not (on_gpu and row.get("dtype") != "bf16")


def used_of(run: dict[str, Any], row: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a run, or of one of its rows, the entries that are read here."""
    if row is not None:
        return {key: value for key, value in row.items() if key in USED}
    machine = {key: value for key, value in run["machine"].items() if key in MACHINE}
    return {key: run[key] for key in ("suite", "command", "date") if key in run} | {"machine": machine}


def images_per_core(runs: Iterable[dict[str, Any]]) -> tuple[float, str] | None:
    """The most pictures a second and core that our reading was measured at, with which engine and on what."""
    rates = [
        (
            float(row["images_per_second_per_core"]),
            f"measured: {row['engine']}, {row.get('workers')} workers, {_device(run)}",
        )
        for run in runs
        if run["suite"] == "input"
        for row in run["rows"]
        if is_used(run, row)
    ]
    return max(rates, default=None)


def unlikeness(measured: Measured, step: Step, part: str, row: str) -> float:
    """Of a measured row and `part` of a step that is called `row`, by which a row's weight falls: 0 of the very same.

    Width and tokens taken at once differ as logarithms, the width counting twice; another name of a row counts 1.
    """
    (width, tokens), (w, t) = _size(step, part), _size(measured.step, part)
    return 2 * abs(math.log(w / width)) + abs(math.log(t / tokens)) + (measured.row != row)


def fitted(rows: Sequence[Measured], step: Step, part: str, row: str) -> tuple[float, float]:
    """(slope, each) of the seconds that `part` took in rows like `step`: slope * floor + each * passes through layers.

    Floor: at the whole of the roof. Least squares of the relative error, rows weighted by exp(-SHARPNESS * unlikeness),
    both at least 0. `each` is what a layer takes however few its tokens are; 0 where all rows do as much in a pass.
    """
    weights = np.exp([-SHARPNESS * unlikeness(r, step, part, row) for r in rows])
    shares = np.array([[r.floor(part), r.step.passes(part)] for r in rows]) / [[r.seconds(part)] for r in rows]
    sizes, root = np.linalg.norm(shares, axis=0), np.sqrt(weights)
    found, _, rank, _ = np.linalg.lstsq(root[:, None] * shares / sizes, root, rcond=1e-3)
    if rank == 2 and found.min() > 0:
        slope, each = found / sizes
        return float(slope), float(each)
    floors = shares[:, 0]
    return float(weights @ floors / (weights @ floors**2)), 0.0


def _size(step: Step, part: str) -> tuple[float, float]:
    tokens, parts = step.batch.tokens, step.settings.accumulate
    wide, narrow = step.encoder.width, step.predictor.width
    return {
        "target": (wide, step.patches / parts),
        "context": (wide, tokens.context / parts),
        "predictor": (narrow, tokens.pairs / parts),
        "loss": (wide, tokens.predicted / parts),
        "optimizer": (step.models.parameters, 1.0),
    }[part]


def _measured(
    machine: dict[str, Any], row: dict[str, Any], known: dict[tuple, tuple[Config, Models]], source: str
) -> Measured:
    label = f"{source}: row {row['row']!r}"
    for key, kind in NEEDED.items():
        if not isinstance(row.get(key), (int, float) if kind is float else kind):
            raise ValueError(f"{label}: {key} is {row.get(key)!r}, and must be {kind.__name__}; run the suite again")
    missing = [part for part in PARTS if not row["parts_ms"].get(part)]
    if missing or row["ms"] <= 0 or min(row["context_tokens"], row["target_tokens"], row["batch"]) <= 0:
        raise ValueError(f"{label}: no positive time or size of {', '.join(missing) or 'it'}; run the suite again")
    name, _, patch = row["model"].partition("/")
    key = (row["model"], row["pixels"], row["predictor_depth"], row["predictor_width"], row["npred"])
    if key not in known:
        tree = {
            "data": {"root_path": ".", "crop_size": row["pixels"]},
            "mask": {"patch_size": int(patch) if patch.isdigit() else patch, "num_pred_masks": row["npred"]},
            "meta": {
                "model_name": name, "pred_depth": row["predictor_depth"], "pred_emb_dim": row["predictor_width"]
            },
            "logging": {"folder": "."},
        }  # fmt: skip
        config = parse_config(tree, label)
        try:
            known[key] = config, Models.build(config)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
    config, models = known[key]
    drawn = draw(config, row["batch"], row["row"].startswith("fastjepa ragged"))
    batch = drawn.mean.scaled(row["context_tokens"] / drawn.context, row["target_tokens"] / drawn.target)
    precision = AUTOCAST if row["dtype"] == "bf16" else FP32
    step = Step(models, batch, ROWS[row["row"]], precision, Settings.of_row(row["row"]))
    roof = _roof(machine, label)
    joules = row.get("joules_per_1000_images")
    return Measured(
        device=_device({"machine": machine}),
        kind=str(machine.get("kind")),
        chip=machine.get("chip"),
        peak=roof[0],
        bandwidth=roof[1],
        row=row["row"],
        model=row["model"],
        batch=row["batch"],
        dtype=row["dtype"],
        step=step,
        parts_ms={part: float(row["parts_ms"][part]) for part in PARTS},
        watts=joules * row["batch"] / row["ms"] if joules else None,  # joules a 1000 images, ms a batch
    )


def _roof(machine: dict[str, Any], label: str) -> tuple[float, float]:
    if machine.get("chip"):
        found: Chip = chip(machine["chip"])
        return found.flops, found.bandwidth
    rates = machine.get("matmul_rate"), machine.get("copy_bandwidth")
    if not all(isinstance(rate, float | int) and rate > 0 for rate in rates):
        raise ValueError(f"{label}: its machine has no matmul_rate and copy_bandwidth; run the suite again")
    return float(rates[0]), float(rates[1])  # type: ignore[arg-type]


def _device(run: dict[str, Any]) -> str:
    machine = run["machine"]
    threads = f", {machine.get('threads')} threads" if machine.get("kind") == "cpu" else ""
    return f"{machine.get('device', 'an unnamed device')}{threads}"
