"""The `faults` suite: bad days of a run, each done to a real one, and what was lost.

A small run is taken undisturbed first. Each fault then strikes the same run at random moments, as often as it says; the
run is taken up again by the same command until it is done, and what it comes to is compared, bit for bit, with the
undisturbed one. Everything runs on the CPU, in processes of its own.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import count
from benchmarks.children import ended, forked
from benchmarks.tables import columns
from fastjepa.checkpoint import MODELS, read_checkpoint
from fastjepa.config import Config, load_config
from fastjepa.data import Batch
from fastjepa.training import train
from fastjepa.training.engine import Trainer
from fastjepa.training.stop import RESUMABLE

MARKERS = "<!-- faults -->", "<!-- end of faults -->"
PICTURES, BATCH, STEPS = 48, 4, 240
Strike = Callable[[Trainer], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often, and where the table goes."""
    parser.add_argument("--times", type=int, help="of each fault; default: 50 of SIGKILL, 10 of the others")
    parser.add_argument("--fault", action="append", choices=FAULTS, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the table between the markers there")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each fault.

    Raises:
        ValueError: a count below one, or a document without its markers.
    """
    if arguments.times is not None and arguments.times < 1:
        raise ValueError(f"--times must be at least 1, got {arguments.times}")
    if arguments.document:
        count.put("", arguments.document, MARKERS, write=False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [
            {"fault": FAULTS[name][0], **FAULTS[name][1](bench, arguments.times or FAULTS[name][2])}
            for name in arguments.fault or FAULTS
        ]
    if arguments.document:
        count.put(count.as_markdown(_shown(rows)), arguments.document, MARKERS)
    return rows


def table(rows: list[dict]) -> str:
    """For a person to read."""
    return columns(_shown(rows))


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The rows of which something was lost that must not be."""
    return [f"{row['fault']}: {row['wrong']}" for row in rows if row["wrong"]]


def _shown(rows: list[dict]) -> list[dict[str, Any]]:
    return [{**{key: row[key] for key in ("fault", "how", "times")}, "what came of it": row["outcome"]} for row in rows]


@dataclass
class Bench:
    """A folder with pictures and an undisturbed run."""

    folder: Path
    random: random.Random = field(default_factory=lambda: random.Random(0))
    runs: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        for number in range(PICTURES):
            file = self.folder / "pictures" / f"{number:03d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (48, 56, 3), dtype=np.uint8)).save(file)
        self.plain = self.config(self.folder / "plain")
        if self.life(self.plain) != 0:
            raise ValueError("the undisturbed run failed")
        self.wanted = read_checkpoint(latest(self.plain))

    def config(self, folder: Path, *more: str) -> Config:
        """A run of `STEPS` steps in that folder, taken up where it stopped."""
        settings = [f"data.root_path={self.folder}/pictures", f"logging.folder={folder}", f"data.batch_size={BATCH}"]
        settings += ["data.crop_size=32", "mask.patch_size=4", "meta.embed_dim=24", "meta.depth=2", "meta.num_heads=2"]
        settings += ["meta.pred_depth=1", "meta.pred_emb_dim=24", "runtime.resume=true", "runtime.progress=false"]
        settings += [
            f"optimization.epochs={STEPS * BATCH // PICTURES}",
            "runtime.save_every=7",
            "runtime.keep=2",
            "logging.every=3",
        ]
        return load_config("demo", [*settings, *more])

    def fresh(self, *more: str) -> Config:
        """A run in a folder of its own."""
        self.runs += 1
        return self.config(self.folder / f"run{self.runs}", *more)

    def life(
        self,
        config: Config,
        strike: Strike | None = None,
        until: float | None = None,
        number: int = 0,
        spoilt: frozenset[int] = frozenset(),
    ) -> int:
        """Exit status of a process that trains, which is sent signal `number` after `until` seconds.

        -9 and the like for one that a signal ended. The loss of `spoilt` steps is NaN.
        """
        child = forked(_live, config, strike, spoilt)
        if until is not None:
            child.join(until)
            if child.is_alive():
                os.kill(int(child.pid or 0), number)
        return ended(child)

    def lives(self, config: Config, times: int, number: int) -> list[int]:
        """Signal `number` at `times` random moments of a run, which then goes to its end.

        Gives the exit statuses of those that found it running.
        """
        ends = []
        for _ in range(times):
            status = self.life(config, None, self.random.uniform(0.02, 0.6), number)
            if status == 0:  # it was done before the signal came
                break
            ends.append(status)
        self.life(config)
        return ends

    def differs(self, config: Config, wanted: dict[str, Any] | None = None) -> str:
        """What is not as in the undisturbed run, or as `wanted`; empty where all is."""
        found, wanted = read_checkpoint(latest(config)), wanted or self.wanted
        for name in MODELS:
            if any(not torch.equal(found[name][k], v) for k, v in wanted[name].items()):
                return f"{name} differs from the undisturbed run's"
        steps = [int(row["step"]) for row in logged(config, "demo_r0.csv")]
        return "" if steps == list(range(STEPS)) else f"{len(steps)} steps are logged, not {STEPS}"


def latest(config: Config) -> Path:
    """The newest checkpoint of a run."""
    return Path(config.logging.folder) / "demo-latest.pth.tar"


def logged(config: Config, name: str) -> list[dict[str, str]]:
    """Those of a CSV file of a run."""
    with open(Path(config.logging.folder) / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _live(config: Config, strike: Strike | None, spoilt: frozenset[int]) -> None:
    """A process that trains, as the command line does; its words are dropped."""
    _spoil_losses(spoilt)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        result = train(config, strike)
    except (ValueError, OSError):
        os._exit(2)
    except FloatingPointError:
        os._exit(1)
    except BaseException:
        os._exit(3)  # what nobody expects
    os._exit(RESUMABLE if result.stopped else 0)


def _row(how: str, times: int, outcome: str, wrong: str) -> dict[str, Any]:
    return {"how": how, "times": times, "outcome": wrong or outcome, "wrong": wrong}


SAME = "the run ends bit for bit as the undisturbed one, each step once"


def killed(bench: Bench, times: int) -> dict[str, Any]:
    """SIGKILL at any moment: in a step, while a checkpoint is written, while a run starts."""
    return _signalled(bench, times, signal.SIGKILL, set(), f"{SAME}; at most the steps since the last save are redone")


def terminated(bench: Bench, times: int) -> dict[str, Any]:
    """SIGTERM, as SLURM and Kubernetes send it."""
    return _signalled(bench, times, signal.SIGTERM, {RESUMABLE}, f"saved, exit status {RESUMABLE}; {SAME}")


def _signalled(bench: Bench, times: int, number: int, ends: set[int], outcome: str) -> dict[str, Any]:
    """A signal at `times` random moments, in as many runs as it takes. Before a handler is there it ends the process,
    and nothing can be lost."""
    struck, wrong = 0, ""
    while struck < times and not wrong:
        config = bench.fresh()
        found = bench.lives(config, times - struck, number)
        struck += len(found)
        strange = set(found) - ends - {-number}
        wrong = bench.differs(config) or (f"exit statuses {sorted(strange)}" if strange else "")
    return _row(f"{signal.Signals(number).name} at a random moment", struck, outcome, wrong)


def disk_full(bench: Bench, times: int) -> dict[str, Any]:
    """No file may grow beyond a few bytes from a random step on."""
    wrong = ""
    for _ in range(times):
        config, at = bench.fresh(), bench.random.randrange(8, STEPS // 2)
        status = bench.life(config, lambda trainer, at=at: _limit(trainer, at))
        kept = read_checkpoint(latest(config))["fastjepa"]["step"]
        if status != 2 or not 0 < kept <= at:
            wrong = f"exit status {status}, newest checkpoint of step {kept}, the disk full from {at} on"
        bench.life(config)
        wrong = wrong or bench.differs(config)
    text = f"training goes on, the checkpoints before are whole, the last save fails aloud; with room again {SAME}"
    return _row("no file may grow (RLIMIT_FSIZE) from a random step on", times, text, wrong)


def _limit(trainer: Trainer, at: int) -> None:
    if trainer.step == at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def nan_loss(bench: Bench, times: int) -> dict[str, Any]:
    """The loss of some steps is NaN, the same ones in two runs, one of which is stopped and taken up again."""
    wrong = ""
    for _ in range(times):
        bad = frozenset(bench.random.sample(range(STEPS), 6))
        whole, parts = bench.fresh(), bench.fresh()
        status = bench.life(whole, spoilt=bad)
        bench.life(parts, None, bench.random.uniform(0.3, 0.9), signal.SIGTERM, spoilt=bad)
        bench.life(parts, spoilt=bad)
        kept = read_checkpoint(latest(whole))
        counts = [Counter(int(row["step"]) for row in logged(config, "demo-skipped.csv")) for config in (whole, parts)]
        skipped = {int(row["step"]) for row in logged(whole, "demo_r0.csv") if row["skipped"] == "1"}
        wrong = wrong or (f"exit status {status}" if status else "") or bench.differs(parts, kept)
        if not wrong and (skipped != bad or any(count != dict.fromkeys(bad, BATCH) for count in counts)):
            wrong = f"skipped {sorted(skipped)}, the loss was NaN at {sorted(bad)}; pictures named: {counts}"
        wrong = wrong or ("" if _finite(kept) else "a checkpoint with NaN")
    text = (
        "each is skipped, counted and its pictures named; stopped and taken up again the run ends bit for bit the same"
    )
    return _row("the loss of 6 random steps of a run is NaN", times, text, wrong)


def _spoil_losses(steps: frozenset[int]) -> None:
    real = Trainer.train_step

    def spoilt(self: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        nan = float("nan") if self.step in steps else 1.0
        hook = self.forward.register_forward_hook(lambda model, inputs, out: (out[0] * nan, out[1]))
        try:
            return real(self, batch)
        finally:
            hook.remove()

    Trainer.train_step = spoilt


def nan_weight(bench: Bench, times: int) -> dict[str, Any]:
    """A weight becomes NaN, so that no step after it is good."""
    wrong = ""
    for _ in range(times):
        config, at = bench.fresh(), bench.random.randrange(8, STEPS - 12)
        status = bench.life(config, lambda trainer, at=at: _spoil(trainer, at))
        kept = read_checkpoint(latest(config))
        if status != 1 or not _finite(kept) or kept["fastjepa"]["step"] > at:
            wrong = wrong or f"exit status {status}, or a checkpoint with NaN, after the weight was NaN from {at} on"
        bench.life(config)
        wrong = wrong or bench.differs(config)
    text = (
        "after runtime.max_skipped skipped steps, or before a checkpoint, the run ends with exit status 1 and names "
        f"the last good checkpoint, which is finite; from there {SAME}"
    )
    return _row("a weight set to NaN at a random step", times, text, wrong)


def _finite(saved: dict[str, Any]) -> bool:
    return all(bool(v.isfinite().all()) for name in MODELS for v in saved[name].values())


def _spoil(trainer: Trainer, at: int) -> None:
    if trainer.step == at:
        with torch.no_grad():
            trainer.model.encoder.blocks[0].mlp.fc1.weight.mul_(float("nan"))  # pyright: ignore


def worker_lost(bench: Bench, times: int) -> dict[str, Any]:
    """SIGKILL to a data worker."""
    wrong = ""
    for _ in range(times):
        config, at = bench.fresh("data.num_workers=2"), bench.random.randrange(1, STEPS - 8)
        status = bench.life(config, lambda trainer, at=at: _kill_a_worker(trainer, at))
        wrong = wrong or bench.differs(config) or ("" if status == 0 else f"exit status {status}")
    return _row("SIGKILL to a data worker at a random step", times, f"said, workers started anew; {SAME}", wrong)


def _kill_a_worker(trainer: Trainer, at: int) -> None:
    if trainer.step == at:
        os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)


def cut_checkpoint(bench: Bench, times: int) -> dict[str, Any]:
    """The newest checkpoint is cut at a random byte, as a file system may leave it."""
    wrong = ""
    for _ in range(times):
        config = bench.fresh()
        folder = Path(config.logging.folder)
        bench.life(bench.config(folder, f"runtime.stop_after={bench.random.randrange(16, STEPS)}"))
        saved = sorted(folder.glob("demo-step*.pth.tar"))
        data = saved[-1].read_bytes()
        latest(config).unlink()
        latest(config).write_bytes(data[: bench.random.randrange(len(data))])
        status = bench.life(config)
        again = bench.config(
            folder,
            "runtime.resume=false",
            "meta.load_checkpoint=true",
            f"meta.read_checkpoint={saved[-2].name}",
        )
        bench.life(again)
        wrong = wrong or ("" if status == 2 else f"exit status {status}") or bench.differs(config)
    text = f"refused in one line that names the file; from the checkpoint before it {SAME}"
    return _row("the newest checkpoint cut at a random byte", times, text, wrong)


def bad_pictures(bench: Bench, times: int) -> dict[str, Any]:
    """Pictures that cannot be read, or hardly."""
    folder = bench.folder / "bad"
    folder.mkdir()
    files = sorted((bench.folder / "pictures").glob("*.png"))
    whole = files[0].read_bytes()
    for number in range(60):
        (folder / f"good{number:02d}.png").write_bytes(files[number % len(files)].read_bytes())
    kinds = {"cut.png": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"not a picture", "cut.jpg": whole[:9]}
    for name, data in kinds.items():
        (folder / name).write_bytes(data)
    (folder / "loop").symlink_to(folder)
    odd = {"grey.png": ("L", 40), "cmyk.jpg": ("CMYK", (1, 2, 3, 4)), "deep.png": ("I;16", 3000), "p.png": ("P", 3)}
    for name, (mode, colour) in odd.items():
        Image.new(mode, (40, 50), colour).save(folder / name)
    Image.new("RGB", (30, 30)).save(folder / "ünïcode ☃.png")
    config = bench.fresh(f"data.root_path={folder}", "optimization.epochs=2")
    said = bench.folder / "said.txt"
    status = ended(forked(_say_to, config, said))
    text = said.read_text()
    lines = [line for line in text.splitlines() if "cannot be read" in line]
    unsaid = [name for name in kinds if not any(name in line for line in lines)]
    refused = [name for name in odd if any(name in line for line in lines)]
    wrong = f"exit status {status}" if status else ""
    wrong = wrong or (f"nothing said of {unsaid}" if unsaid else f"{refused} refused" if refused else "")
    how = f"{len(kinds)} unreadable files, {len(odd)} odd kinds, a loop of links and a name in unicode in one folder"
    return _row(how, 1, "each unreadable one is named, counted and replaced; the others are trained on", wrong)


def _say_to(config: Config, file: Path) -> None:
    with open(file, "w", encoding="utf-8") as sys.stderr:
        train(config)


class _Hostile:
    """What runs a command as soon as it is unpickled."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def hostile(bench: Bench, times: int) -> dict[str, Any]:
    """A checkpoint that would run code."""
    config, mark = bench.fresh(), bench.folder / "ran"
    latest(config).parent.mkdir()
    torch.save({"encoder": _Hostile(str(mark)), "predictor": {}, "target_encoder": {}}, latest(config))
    status = bench.life(config)
    wrong = "the code ran" if mark.exists() else "" if status == 2 else f"exit status {status}"
    return _row("a checkpoint that makes a folder as it is unpickled", 1, "refused in one line, nothing has run", wrong)


# name: what it is called, what does it, and how often by default.
FAULTS: dict[str, tuple[str, Callable[[Bench, int], dict[str, Any]], int]] = {
    "kill": ("the machine is gone", killed, 50),
    "term": ("preemption", terminated, 20),
    "disk": ("the disk is full", disk_full, 10),
    "nan": ("the loss is NaN at times", nan_loss, 10),
    "weight": ("the weights are NaN", nan_weight, 10),
    "worker": ("a data worker dies", worker_lost, 10),
    "cut": ("a checkpoint is cut off", cut_checkpoint, 10),
    "pictures": ("bad pictures", bad_pictures, 1),
    "hostile": ("a hostile checkpoint", hostile, 1),
}
