"""Probes of a run's checkpoints while it goes on, in a process of their own: `fastjepa eval` on the newest one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastjepa
from fastjepa.chips import find_device
from fastjepa.config import Config
from fastjepa.evaluation.judge import PROBES
from fastjepa.training.stop import StopSignals

COLUMNS = ("epoch", "step", "probe", "features", "setting", "accuracy", "spread", "rankme")
GRACE = 10.0  # seconds between asking an evaluation to end and killing it


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    epoch: int
    step: int


class Judging:
    """The evaluations of a run, one at a time. Within `with`; on the way out what still runs is ended.

    It keeps `{tag}_evaluation.csv` in the run's folder. Nothing that goes wrong with an evaluation ends the run, and
    nothing here draws from a generator or touches the device.

    Arguments:
        leads: whether this process speaks for all; another one judges nothing.
        device: that is trained on, which `evaluation.device: auto` stands for.
        start: steps that were done before; rows of later ones are dropped.
        signals: those that ask the run to stop, which nothing here then waits for.

    Raises:
        ValueError: a setting of section evaluation that will not do; says what would.
    """

    def __init__(
        self,
        config: Config,
        leads: bool,
        device: torch.device,
        start: int,
        steps_per_epoch: int,
        signals: StopSignals,
        say: Callable[[str], None],
    ):
        settings = config.evaluation
        self.config, self.settings, self.say, self.signals = config, settings, say, signals
        self.steps_per_epoch = steps_per_epoch
        self.every = settings.every if leads else 0
        self.folder = Path(config.logging.folder)
        self.table = self.folder / f"{config.logging.write_tag}_evaluation.csv"
        self.work = self.folder / f"{config.logging.write_tag}-evaluating"
        self.running: _Running | None = None
        if not self.every:
            return
        self.data = Path(settings.data or Path(config.data.root_path) / config.data.image_folder)
        for key, folder in (("data", self.data), ("test", settings.test)):
            if folder is not None and not Path(folder).exists():
                raise ValueError(f"evaluation.{key}: no such folder: {folder}")
        names = settings.probes.split(",")
        if any(name not in PROBES for name in names):
            raise ValueError(f"evaluation.probes: some of {','.join(PROBES)}, got {settings.probes!r}")
        auto = settings.device == "auto"
        self.device = device if auto else find_device(settings.device, "evaluation.device:")
        self.judged = _keep_until(self.table, start)

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the evaluation that still runs, and say so."""
        if self.running is not None:
            process = self.running.process
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.say(f"the evaluation of epoch {self.running.epoch} was ended with the run")
            self.running = None
        if self.every:
            shutil.rmtree(self.work, ignore_errors=True)

    def offer(self, checkpoint: Path, step: int) -> None:
        """Judge `checkpoint`, of `step` steps, if it was written and ends an epoch whose turn it is, not judged so far.

        One that comes while another is judged is left out, aloud; the last of the run waits for its turn.
        """
        epoch, rest = divmod(step, self.steps_per_epoch)
        last = epoch == self.config.optimization.epochs
        if not self.every or rest or not epoch or (epoch % self.every and not last):
            return
        if step in self.judged or not checkpoint.exists():
            return
        self.look()
        if last:
            self.finish()
        if self.running is not None:
            self.say(f"epoch {epoch} is not evaluated: epoch {self.running.epoch} still is")
            return
        try:
            self.running = _Running(self._start(checkpoint), epoch, step)
        except OSError as error:
            self.say(f"warning: epoch {epoch} is not evaluated: {error}")

    def look(self) -> None:
        """Take in the evaluation that runs, if it is done."""
        if self.running is None or self.running.process.poll() is None:
            return
        done, self.running = self.running, None
        try:
            if done.process.returncode != 0:
                said = (self.work / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                why = said[-1] if said else f"exit status {done.process.returncode}"
                raise ValueError(why)
            self._note(done, json.loads((self.work / "marks.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            self.say(f"warning: the evaluation of epoch {done.epoch} failed: {error}")

    def finish(self) -> None:
        """Wait for the evaluation that runs, unless the run is asked to stop."""
        if self.running is not None and self.signals.asked is None:
            self.say(f"waiting for the evaluation of epoch {self.running.epoch}")
        while self.running is not None and self.signals.asked is None:
            time.sleep(0.1)
            self.look()

    def _command(self, checkpoint: Path) -> list[str]:
        s = self.settings
        options = {
            "--data": self.data,
            "--test": s.test,
            "--probes": s.probes,
            "--workers": s.workers,
            "--seed": self.config.runtime.seed,
            "--device": self.device,
            "--json": self.work / "marks.json",
        }
        heads = self.config.meta.num_heads
        given = options | ({"--num-heads": heads} if heads else {})
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        module = [sys.executable, "-m", "fastjepa.apart", str(os.getpid())]
        return [*module, "eval", str(checkpoint), *words]

    def _start(self, checkpoint: Path) -> subprocess.Popen[bytes]:
        """Start the process on another name of `checkpoint`, which may be removed while it is judged."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        kept = self.work / "checkpoint.pth.tar"
        try:
            os.link(checkpoint, kept)
        except OSError:  # a file system without hard links
            shutil.copyfile(checkpoint, kept)
        package = str(Path(fastjepa.__file__).parent.parent)  # where this one was imported from
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(self.work / "said.txt", "wb") as said:
            return subprocess.Popen(
                self._command(kept),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the run, which ends this one
            )

    def _note(self, done: _Running, result: dict[str, Any]) -> None:
        at = {"epoch": done.epoch, "step": done.step, "rankme": f"{result['rankme']:.2f}"}
        rows = [{**row, **at, "accuracy": f"{row['accuracy']:.2f}"} for row in result["rows"]]
        for row in rows:
            row["spread"] = "" if row["spread"] is None else f"{row['spread']:.2f}"
        _append(self.table, rows)
        self.judged.add(done.step)
        marks = ", ".join(f"{row['probe']} ({row['features']}) {row['accuracy']} %" for row in rows)
        self.say(f"epoch {done.epoch} on {result['test']} held-out pictures: {marks}; RankMe {at['rankme']}")


def _keep_until(path: Path, step: int) -> set[int]:
    """Drop the rows of steps after `step` from the table; the steps that are left."""
    if not path.is_file():
        return set()
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
    kept = [row for row in rows if int(row["step"]) <= step]
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    _append(part, kept)
    os.replace(part, path)
    return {int(row["step"]) for row in kept}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
