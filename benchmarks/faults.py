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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import count
from benchmarks.tables import columns
from fastjepa.checkpoint import read_checkpoint
from fastjepa.config import Config, load_config
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
        torch.set_num_threads(1)  # children are forked, and threads of the parent would not come with them
        self.plain = self.config(self.folder / "plain")
        if self.life(self.plain) != 0:
            raise ValueError("the undisturbed run failed")
        self.wanted = read_checkpoint(latest(self.plain))

    def config(self, folder: Path, *more: str) -> Config:
        """A run of `STEPS` steps in that folder, taken up where it stopped."""
        settings = [f"data.root_path={self.folder}/pictures", f"logging.folder={folder}", f"data.batch_size={BATCH}"]
        settings += ["data.crop_size=32", "mask.patch_size=4", "meta.embed_dim=24", "meta.depth=2", "meta.num_heads=2"]
        settings += ["meta.pred_depth=1", "meta.pred_emb_dim=24", "runtime.resume=true", "runtime.progress=false"]
        settings += [f"optimization.epochs={STEPS * BATCH // PICTURES}", "runtime.save_every=7", "logging.every=3"]
        return load_config("demo", [*settings, *more])

    def fresh(self, *more: str) -> Config:
        """A run in a folder of its own."""
        self.runs += 1
        return self.config(self.folder / f"run{self.runs}", *more)

    def life(self, config: Config, strike: Strike | None = None, until: float | None = None, number: int = 0) -> int:
        """Exit status of a process that trains, which is sent signal `number` after `until` seconds.

        -9 and the like for one that a signal ended.
        """
        child = multiprocessing.get_context("fork").Process(target=_live, args=(config, strike))
        child.start()
        child.join(until)
        if child.is_alive() and until is not None:
            os.kill(int(child.pid or 0), number)
            child.join()
        return int(child.exitcode or 0)

    def lives(self, config: Config, times: int, number: int) -> tuple[int, list[int]]:
        """Signal `number` at `times` random moments of a run, which then goes to its end.

        Gives how many of them found it running, and their exit statuses.
        """
        ends = []
        for _ in range(times):
            status = self.life(config, None, self.random.uniform(0.02, 0.6), number)
            if status == 0:  # it was done before the signal came
                break
            ends.append(status)
        self.life(config)
        return len(ends), ends

    def differs(self, config: Config) -> str:
        """What is not as in the undisturbed run; empty where all is."""
        found = read_checkpoint(latest(config))
        for name in ("encoder", "predictor", "target_encoder"):
            if any(not torch.equal(found[name][k], v) for k, v in self.wanted[name].items()):
                return f"{name} differs from the undisturbed run's"
        with open(Path(config.logging.folder) / "demo_r0.csv", newline="", encoding="utf-8") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        return "" if steps == list(range(STEPS)) else f"{len(steps)} steps are logged, not {STEPS}"


def latest(config: Config) -> Path:
    """The newest checkpoint of a run."""
    return Path(config.logging.folder) / "demo-latest.pth.tar"


def _live(config: Config, strike: Strike | None) -> None:
    """A process that trains, as the command line does; its words are dropped."""
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
    struck, config = 0, bench.fresh()
    wrong = ""
    while struck < times and not wrong:
        found, ends = bench.lives(config, times - struck, signal.SIGKILL)
        struck += found
        wrong = bench.differs(config) or ("" if set(ends) <= {-9} else f"exit statuses {sorted(set(ends))}")
        config = bench.fresh()
    return _row(
        "SIGKILL at a random moment", struck, f"{SAME}; at most the steps since the last save are redone", wrong
    )


def terminated(bench: Bench, times: int) -> dict[str, Any]:
    """SIGTERM, as SLURM and Kubernetes send it."""
    struck, config, wrong = 0, bench.fresh(), ""
    while struck < times and not wrong:
        found, ends = bench.lives(config, times - struck, signal.SIGTERM)
        struck += found
        early = set(ends) - {RESUMABLE, -signal.SIGTERM}  # before the handler is there nothing can be lost
        wrong = bench.differs(config) or (f"exit statuses {sorted(early)}" if early else "")
        config = bench.fresh()
    return _row("SIGTERM at a random moment", struck, f"saved, exit status {RESUMABLE}; {SAME}", wrong)


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


def not_finite(bench: Bench, times: int) -> dict[str, Any]:
    """A weight becomes NaN."""
    wrong = ""
    for _ in range(times):
        config, at = bench.fresh(), bench.random.randrange(8, STEPS - 8)
        status = bench.life(config, lambda trainer, at=at: _spoil(trainer, at))
        saved = read_checkpoint(latest(config))
        if status != 1 or not all(bool(v.isfinite().all()) for v in saved["encoder"].values()):
            wrong = f"exit status {status}, or a checkpoint with NaN"
        bench.life(config)
        wrong = wrong or bench.differs(config)
    text = f"the run ends with exit status 1 and names the last checkpoint, which is finite; from there {SAME}"
    return _row("a weight set to NaN at a random step", times, text, wrong)


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
        bench.life(config, None, bench.random.uniform(0.5, 0.9), signal.SIGTERM)
        saved = sorted(Path(config.logging.folder).glob("demo-step*.pth.tar"))
        if len(saved) < 2:
            continue
        data = saved[-1].read_bytes()
        latest(config).unlink()
        latest(config).write_bytes(data[: bench.random.randrange(len(data))])
        status = bench.life(config)
        again = bench.config(
            Path(config.logging.folder),
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
    child = multiprocessing.get_context("fork").Process(target=_say_to, args=(config, said))
    child.start()
    child.join()
    text = said.read_text()
    unsaid = [name for name in kinds if name not in text]
    wrong = f"exit status {child.exitcode}" if child.exitcode else f"nothing said of {unsaid}" if unsaid else ""
    wrong = wrong or (
        "a readable picture was refused" if any(name in text for name in odd if "refused" in text) else ""
    )
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
    "nan": ("the loss is NaN", not_finite, 10),
    "worker": ("a data worker dies", worker_lost, 10),
    "cut": ("a checkpoint is cut off", cut_checkpoint, 10),
    "pictures": ("bad pictures", bad_pictures, 1),
    "hostile": ("a hostile checkpoint", hostile, 1),
}
