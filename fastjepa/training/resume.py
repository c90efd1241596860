"""The state of a run as a checkpoint holds it: everything that the next step depends on."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastjepa.checkpoint import MODELS, load_weights, read_checkpoint, write_checkpoint
from fastjepa.config import Config
from fastjepa.objective import IJEPA

EPOCHS_KEPT = 50  # every so many epochs a checkpoint is kept for good, as the published code does
# What the official loader expects of a gradient scaler; bf16 needs none.
SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


class Checkpoints:
    """The checkpoints of a run in its folder.

    `{tag}-latest.pth.tar` is the newest, `{tag}-step{n}.pth.tar` the last `runtime.keep` of them, `{tag}-ep{n}.pth.tar`
    one every 50 epochs. A file appears whole or not at all, and `latest` moves only once its file is on the disk.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder, self.tag = Path(config.logging.folder), config.logging.write_tag
        self.latest = self.folder / f"{self.tag}-latest.pth.tar"
        self.saved = time.monotonic()

    def is_due(self) -> bool:
        """Whether runtime.save_minutes have passed since the last save; every process may ask, one saves."""
        minutes = self.config.runtime.save_minutes
        return minutes > 0 and time.monotonic() - self.saved >= 60 * minutes

    def source(self) -> Path | None:
        """The file that this run starts from: None for a fresh start.

        Raises:
            ValueError: a run is already there that would be written over, or the one to resume is not there.
        """
        meta = self.config.meta
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0  # by torchrun, after a process died
        if (self.config.runtime.resume or restarted) and self.latest.is_file():
            return self.latest
        if self.config.runtime.resume and not meta.load_checkpoint:
            return None
        if not meta.load_checkpoint:
            if self.latest.exists():
                raise ValueError(
                    f"{self.latest} holds a run already: meta.load_checkpoint=true resumes it, another logging.folder "
                    "or logging.write_tag starts a new one"
                )
            return None
        path = self.folder / meta.read_checkpoint if meta.read_checkpoint else self.latest
        if not path.is_file():
            raise ValueError(f"meta.load_checkpoint: no checkpoint at {path}")
        return path

    def file(self, step: int) -> Path:
        """Where that of `step` steps is, for as long as it is kept."""
        return self.folder / f"{self.tag}-step{step:08d}.pth.tar"

    def save(self, state: dict[str, Any], step: int, epoch: int | None) -> Path:
        """Write `state`; `epoch` is the number of epochs it ends, None in the middle of one.

        Raises:
            OSError: it could not be written; every earlier checkpoint is as it was.
        """
        path = self.file(step)
        self.saved = time.monotonic()
        write_checkpoint(state, path)
        _point(self.latest, path)
        if epoch and epoch % EPOCHS_KEPT == 0:
            _point(self.folder / f"{self.tag}-ep{epoch}.pth.tar", path)
        for old in sorted(self.folder.glob(f"{self.tag}-step*.pth.tar"))[: -self.config.runtime.keep]:
            if old != path:
                old.unlink(missing_ok=True)
        return self.latest


def run_state(
    config: Config,
    model: IJEPA,
    optimizer: torch.optim.Optimizer,
    step: int,
    steps_per_epoch: int,
    loss: float,
    world: int = 1,
) -> dict[str, Any]:
    """Everything that the step after `step` steps depends on, with the entries that the official code reads."""
    return {
        **{name: {f"module.{k}": v for k, v in getattr(model, name).state_dict().items()} for name in MODELS},
        "opt": optimizer.state_dict(),
        "scaler": dict(SCALER) if config.meta.use_bfloat16 else None,
        "epoch": step // steps_per_epoch,
        "loss": loss,
        "batch_size": config.data.batch_size,
        "world_size": world,
        "lr": config.optimization.lr,
        "fastjepa": {
            "step": step,
            "steps_per_epoch": steps_per_epoch,
            "config": config.to_dict(),
            "random": random_state(),
        },
    }


def restore(path: Path, config: Config, model: IJEPA, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> int:
    """Load a checkpoint, ours or official, into the run; returns the steps that are done.

    Raises:
        ValueError: it cannot be read, or is of another model or another run; names the file and what differs.
    """
    state = read_checkpoint(path)
    for name in MODELS:
        load_weights(getattr(model, name), state[name], f"checkpoint {path}: {name}")
    if "opt" not in state:
        raise ValueError(f"checkpoint {path} lacks opt, the optimizer's state, so a run cannot go on from it")
    try:
        optimizer.load_state_dict(state["opt"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: opt does not fit this model's optimizer ({error})") from error
    ours = state.get("fastjepa")
    if ours is None:  # an official checkpoint is saved at the end of an epoch
        return int(state["epoch"]) * steps_per_epoch
    if ours["steps_per_epoch"] != steps_per_epoch or ours["config"]["runtime"]["seed"] != config.runtime.seed:
        raise ValueError(
            f"checkpoint {path} is of a run with {ours['steps_per_epoch']} steps an epoch and seed "
            f"{ours['config']['runtime']['seed']}, this one has {steps_per_epoch} and {config.runtime.seed}: the "
            "pictures, data.batch_size or runtime.seed have changed"
        )
    set_random_state(ours["random"])
    return int(ours["step"])


def random_state() -> dict[str, Any]:
    """The state of every global generator, as plain values and tensors."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, following = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(place), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), following],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global generator back to `state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _point(name: Path, file: Path) -> None:
    """Make `name` another name of `file`, atomically; a copy where the file system has no hard links."""
    part = name.with_name(f".{name.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(file, part)
    except OSError:
        shutil.copyfile(file, part)
    os.replace(part, name)
