"""The state of a run as a checkpoint holds it: everything that the next step depends on."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.checkpoint import MODELS, check_weights, load_weights, read_checkpoint, sync_folder, write_checkpoint
from fastjepa.config import Config
from fastjepa.objective import IJEPA
from fastjepa.sharding import like, whole
from fastjepa.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from fastjepa import dcp

EPOCHS_KEPT = 50  # every so many epochs a checkpoint is kept for good, as the published code does
# What the official loader expects of a gradient scaler; bf16 needs none.
SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


class Checkpoints:
    """The checkpoints of a run in its folder, which every process has one of.

    `{tag}-latest.pth.tar` is the newest, `{tag}-step{n}.pth.tar` the last `runtime.keep` of them, `{tag}-ep{n}.pth.tar`
    one every 50 epochs. A file appears whole or not at all, and `latest` moves only once its file is on the disk. With
    runtime.checkpoint=sharded they are folders, without `.pth.tar` in their names, and written while training goes on.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE, device: torch.device | None = None):
        self.config, self.ranks = config, ranks
        self.folder, self.tag = Path(config.logging.folder), config.logging.write_tag
        self.suffix = "" if config.runtime.checkpoint == "sharded" else ".pth.tar"
        self.latest = self.folder / f"{self.tag}-latest{self.suffix}"
        self.other = self.folder / f"{self.tag}-latest{'' if self.suffix else '.pth.tar'}"  # of the other kind
        self.saved = time.monotonic()
        self.behind: dcp.Saves | None = None
        if not self.suffix:
            from fastjepa import dcp

            self.behind = dcp.Saves(ranks.world > 1, device is not None and device.type == "cuda")
        if ranks.leads:
            for part in self.folder.glob(f".{self.tag}-step*.part"):  # what a run that was killed has begun
                if part.is_dir():
                    shutil.rmtree(part, ignore_errors=True)

    @property
    def takes_all(self) -> bool:
        """Whether a save takes every process."""
        return self.ranks.world > 1 and (self.behind is not None or self.config.runtime.shard)

    def is_due(self, device: torch.device) -> bool:
        """Whether runtime.save_minutes have passed since the last save, by the leader's clock; every process asks."""
        minutes = self.config.runtime.save_minutes
        if minutes <= 0:
            return False
        return self.ranks.leader_says(time.monotonic() - self.saved >= 60 * minutes, device)

    def source(self) -> Path | None:
        """The file or folder that this run starts from: None for a fresh start.

        Raises:
            ValueError: a run is already there that would be written over, or the one to resume is not there.
        """
        meta = self.config.meta
        latest = max((p for p in (self.other, self.latest) if p.exists()), key=_written, default=None)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0  # by torchrun, after a process died
        if (self.config.runtime.resume or restarted) and latest:
            return latest
        if self.config.runtime.resume and not meta.load_checkpoint:
            return None
        if not meta.load_checkpoint:
            if latest:
                raise ValueError(
                    f"{latest} holds a run already: meta.load_checkpoint=true resumes it, another logging.folder "
                    "or logging.write_tag starts a new one"
                )
            return None
        path = self.folder / meta.read_checkpoint if meta.read_checkpoint else latest or self.latest
        if not (path.is_file() or (path / ".metadata").is_file()):
            raise ValueError(f"meta.load_checkpoint: no checkpoint at {path}")
        return path

    def file(self, step: int) -> Path:
        """Where that of `step` steps is, for as long as it is kept."""
        return self.folder / f"{self.tag}-step{step:08d}{self.suffix}"

    def save(self, state: dict[str, Any], step: int, epoch: int | None) -> None:
        """Write `state`; `epoch` is the number of epochs it ends, None in the middle of one.

        A folder is on the disk after `wait` or the next `save`.

        Raises:
            OSError: it, or the one before, could not be written; every earlier checkpoint is as it was.
        """
        self.saved = time.monotonic()
        path = self.file(step)
        if self.behind is None:
            if self.config.runtime.shard:
                state = gathered(state, self.ranks.leads)
            if self.ranks.leads:
                write_checkpoint(state, path)
                self._point_to(path, epoch)
            return
        from fastjepa import dcp

        self.wait()
        part = path.with_name(f".{path.name}.part")
        rest, tensors = dcp.split(state, MODELS)

        def done() -> None:
            write_checkpoint(rest, part / dcp.REST)
            final, number = path, 1
            while final.exists():  # of a run that was taken up again from an earlier step
                final, number = path.with_name(f"{path.name}-{number}"), number + 1
            os.replace(part, final)
            sync_folder(self.folder)
            self._point_to(final, epoch)

        self.behind.begin(tensors, part, done)

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            OSError: it could not be written; every earlier checkpoint is as it was.
        """
        if self.behind is None:
            return
        try:
            self.behind.wait()
        except OSError:
            if self.ranks.leads:
                for part in self.folder.glob(f".{self.tag}-step*.part"):
                    shutil.rmtree(part, ignore_errors=True)
            raise

    def _point_to(self, path: Path, epoch: int | None) -> None:
        """Give a whole checkpoint its names, and remove those that are too many."""
        _point(self.latest, path)
        self.other.unlink(missing_ok=True)
        if epoch and epoch % EPOCHS_KEPT == 0:
            _point(self.folder / f"{self.tag}-ep{epoch}{self.suffix}", path)
        named = {link.resolve() for link in self.folder.glob(f"{self.tag}-ep*") if link.is_symlink()}
        for old in sorted(self.folder.glob(f"{self.tag}-step[0-9]*"))[: -self.config.runtime.keep]:
            if old == path or old.resolve() in named:
                continue
            if old.is_dir():  # no half of one is ever left under its name
                part = old.with_name(f".{old.name}.part")
                os.replace(old, part)
                shutil.rmtree(part, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)


def gathered(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A sharded run's state with whole tensors on the CPU, where it is to be kept. Every process calls this."""

    def of(tensor: Tensor) -> Tensor | None:
        full = whole(tensor)
        return full.cpu() if keep else None

    models = {name: {key: of(tensor) for key, tensor in state[name].items()} for name in MODELS}
    moments = {i: {key: of(tensor) for key, tensor in held.items()} for i, held in state["opt"]["state"].items()}
    return state | models | {"opt": state["opt"] | {"state": moments}}


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
    state = _restore_shards(path, model, optimizer) if path.is_dir() else _restore_file(path, model, optimizer)
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


def _restore_file(path: Path, model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = read_checkpoint(path)
    for name in MODELS:
        load_weights(getattr(model, name), state[name], f"checkpoint {path}: {name}")
    if "opt" not in state:
        raise ValueError(f"checkpoint {path} lacks opt, the optimizer's state, so a run cannot go on from it")
    with _fits(path):
        params = _params(optimizer)
        for i, held in state["opt"]["state"].items():
            held |= {key: like(value, params[i]) for key, value in held.items() if value.dim()}
        optimizer.load_state_dict(state["opt"])
    return state


def _restore_shards(path: Path, model: IJEPA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Each process reads its part, and nothing but it."""
    from fastjepa import dcp

    rest, kept = dcp.read_rest(path), dcp.kept(path)
    tensors: dict[str, Tensor] = {}
    for name in MODELS:
        own = getattr(model, name).state_dict()
        found = {key.removeprefix(f"{name}."): t.size for key, t in kept.items() if key.startswith(f"{name}.")}
        check_weights(own, found, f"checkpoint {path}: {name}")
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    with _fits(path):
        params = _params(optimizer)
        for key, t in kept.items():
            if key.startswith("opt."):
                param = params[int(key.split(".")[1])]
                tensors[key] = torch.zeros_like(param) if len(t.size) else torch.zeros(())
    dcp.read_into(path, tensors)
    with _fits(path):
        optimizer.load_state_dict(dcp.join(rest, tensors)["opt"])
    return rest


@contextmanager
def _fits(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: opt does not fit this model's optimizer ({error})") from error


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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


def _written(name: Path) -> float:
    return name.lstat().st_mtime


def _point(name: Path, path: Path) -> None:
    """Make `name` another name of `path`, atomically: of a file a copy where the file system has no hard links."""
    part = name.with_name(f".{name.name}.part")
    part.unlink(missing_ok=True)
    if path.is_dir():
        part.symlink_to(path.name)
    else:
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
    os.replace(part, name)
