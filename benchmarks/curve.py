"""The `curve` suite: does training in bf16 come to the same with ours as with eager PyTorch?

A small model is trained on the demo's pictures under bf16 autocast, eager as published and ours, from several seeds:
each seed has its own weights, pictures and masks, the same for every way. The seeds' losses scatter; ours has to lie
where eager's do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import here
from benchmarks.tables import columns
from benchmarks.ways import Eager, Fast, Way, naive_models
from fastjepa.config import Config, load_config
from fastjepa.data import Batch
from fastjepa.demo import CONTRAST, GREY, demo_data
from fastjepa.nn import set_fp8, set_narrow_stream
from fastjepa.schedules import Schedules
from fastjepa.training import build_models
from fastjepa.training.engine import prepare_data, seed_everything

WAYS = ("eager", "fastjepa", "fastjepa narrow stream", "fastjepa fp8 target")
STYLES = ((":", "#444444"), ("-", "#0b3c6f"), ("--", "#c8501e"), ("-.", "#3f8f3f"))
WINDOW = 25  # steps that are averaged before curves are compared
# Learning rate and momentum as published for large models: at those of the demo, a training of minutes, the loss is a
# matter of luck, and runs that differ in the last bit come apart.
SETTINGS = (
    "data.crop_size=64 data.batch_size=32 mask.ragged=false mask.min_keep=4 meta.embed_dim=96 meta.depth=4 "
    "meta.num_heads=3 meta.pred_emb_dim=48 meta.use_bfloat16=true optimization.lr=5e-4 optimization.start_lr=1e-4 "
    "optimization.ema=[0.996,1.0]"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, how often, and where the picture goes."""
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2: their scatter is the yardstick")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there (.svg or .png)")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each way and seed, with the loss of every step.

    Raises:
        ValueError: too few steps or seeds, or a figure of another kind.
    """
    if arguments.steps < 2 * WINDOW or arguments.seeds < 2:
        raise ValueError(f"--steps must be at least {2 * WINDOW} and --seeds at least 2")
    if arguments.figure and arguments.figure.suffix not in (".svg", ".png"):
        raise ValueError(f"--figure {arguments.figure}: the name must end in .svg or .png")
    with tempfile.TemporaryDirectory() as folder:
        demo_data(Path(folder))
        rows = [
            {"row": name, "seed": seed, "losses": losses(_config(folder, seed), name, arguments.steps)}
            for seed in range(arguments.seeds)
            for name in WAYS
        ]
    rows = judged(rows)
    if arguments.figure:
        draw(rows, arguments.figure)
    return rows


def losses(config: Config, name: str, steps: int) -> list[float]:
    """The loss of each of `steps` steps of a way."""
    batches, _ = prepare_data(config)
    seed_everything(config.runtime.seed)
    way, device = _way(config, name), here()
    schedules = Schedules(config.optimization, batches.steps_per_epoch)
    found = []
    for step, batch in enumerate(batches.loader(0, steps, 0, False)):
        _schedule(way, schedules, step)
        loss = way.loss(_images(batch, device), *way.inputs(batch.masks_enc, batch.masks_pred, len(batch.images)))
        way.backward(loss)
        way.update(schedules.momentum(step))
        found.append(round(float(loss), 6))
    return found


def judged(rows: Sequence[dict[str, Any]]) -> list[dict]:
    """The rows with `distance`: how far a way's mean curve is from eager's, in units of the seeds' spread there.

    Curves are means over `WINDOW` steps; distance and spread are means over the curve.
    """
    curves = {name: [_smooth(row["losses"]) for row in rows if row["row"] == name] for name in WAYS}
    spread = statistics.fmean(max(at) - min(at) for at in zip(*curves["eager"], strict=True))
    means = {name: [statistics.fmean(at) for at in zip(*found, strict=True)] for name, found in curves.items()}

    def distance(name: str) -> float:
        return statistics.fmean(abs(a - b) for a, b in zip(means[name], means["eager"], strict=True)) / spread

    return [row | {"last": _smooth(row["losses"])[-1], "distance": distance(row["row"])} for row in rows]


def table(rows: list[dict]) -> str:
    """For a person to read."""
    return columns([{key: row[key] for key in ("row", "seed", "last", "distance")} for row in rows])


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The ways whose curve is outside the seeds' spread."""
    far = {row["row"]: row["distance"] for row in rows if not row["distance"] <= 1.0}
    return [f"{name}: {distance:.2f} times eager's spread away from it" for name, distance in far.items()]


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Eager's seeds as a band, every seed of ours as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = {name: [_smooth(row["losses"]) for row in rows if row["row"] == name] for name in WAYS}
    steps = [WINDOW * (i + 0.5) for i in range(len(curves["eager"][0]))]
    low, high = ([limit(at) for at in zip(*curves["eager"], strict=True)] for limit in (min, max))
    axes.fill_between(steps, low, high, color="#d0d0d0", label=f"eager, between its {len(curves['eager'])} seeds")
    for name, style in zip(WAYS, STYLES, strict=True):
        for place, curve in enumerate(curves[name]):
            axes.plot(steps, curve, linestyle=style[0], color=style[1], lw=1.3, label=name if place == 0 else None)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {WINDOW} steps")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _smooth(values: Sequence[float]) -> list[float]:
    whole = len(values) - len(values) % WINDOW
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, whole, WINDOW)]


def _config(folder: str, seed: int) -> Config:
    paths = [f"data.root_path={folder}", "data.image_folder=train", f"logging.folder={folder}/run"]
    return load_config("demo", [*paths, *SETTINGS.split(), f"runtime.seed={seed}"])


def _way(config: Config, name: str) -> Way:
    model = build_models(config).to(here())
    if name == "eager":
        return Eager(naive_models(model), bf16=True)
    set_narrow_stream(model, name.endswith("narrow stream"))
    set_fp8(model.target_encoder, name.endswith("fp8 target"))
    return Fast(model, bf16=True)


def _schedule(way: Way, schedules: Schedules, step: int) -> None:
    for group in way.optimizer.param_groups:  # type: ignore[attr-defined]
        group["lr"] = schedules.lr(step)
        if not group.get("WD_exclude"):
            group["weight_decay"] = schedules.weight_decay(step)


def _images(batch: Batch, device: torch.device) -> torch.Tensor:
    return (batch.images.to(device).float() / 255 - GREY) / CONTRAST
