"""Evaluation during training: its table, what it leaves alone, and what ends it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastjepa import read_checkpoint
from fastjepa.training import train
from fastjepa.training.judging import Judging
from fastjepa.training.stop import StopSignals
from tests.helpers import make_pictures, tiny_config

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "jepa_evaluation.csv", newline="") as file:
        return list(csv.DictReader(file))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


class Said(list[str]):
    def __contains__(self, words: object) -> bool:
        return any(str(words) in line for line in self)


def judging(pictures: Path, folder: Path, command: list[str], epochs: int = 9) -> tuple[Judging, Said]:
    """One whose evaluations are `command`, of a run with 6 steps an epoch, and what it said."""
    said = Said()
    settings = tiny_config(
        pictures, folder, optimization={"epochs": epochs, "warmup": 1}, evaluation={"every": 2, "data": str(pictures)}
    )
    made = Judging(settings, True, torch.device("cpu"), 0, 6, StopSignals(), said.append)
    made._command = lambda checkpoint: command  # type: ignore[method-assign]
    return made, said


def test_a_run_with_evaluation_is_the_same_run_and_has_a_table(pictures, tmp_path, capsys):
    plain = train(tiny_config(pictures, tmp_path / "plain"))
    judged = train(tiny_config(pictures, tmp_path / "judged", evaluation={"every": 2, "probes": "knn,linear"}))
    assert [row["loss"] for row in plain.rows] == [row["loss"] for row in judged.rows]
    for ours, theirs in zip(plain.model.parameters(), judged.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (read_checkpoint(r.checkpoint)["fastjepa"]["random"] for r in (plain, judged))
    assert torch.equal(ours["torch"], theirs["torch"])
    rows = table(tmp_path / "judged")
    assert [(row["epoch"], row["step"], row["probe"]) for row in rows] == [
        ("2", "12", "knn"),
        ("2", "12", "linear"),
        ("2", "12", "linear"),
    ]
    assert all(0 <= float(row["accuracy"]) <= 100 and float(row["rankme"]) >= 1 for row in rows)
    assert f"knn (last layer) {rows[0]['accuracy']} %" in capsys.readouterr().err
    assert not (tmp_path / "judged" / "jepa-evaluating").exists()
    assert not (tmp_path / "plain" / "jepa_evaluation.csv").exists()

    again = {"evaluation": {"every": 1, "probes": "knn"}, "optimization": {"epochs": 3, "warmup": 1}}
    train(tiny_config(pictures, tmp_path / "judged", runtime={"resume": True}, **again))
    assert [row["epoch"] for row in table(tmp_path / "judged")] == ["2", "2", "2", "3"]


def test_checkpoints_that_are_folders(pictures, tmp_path, capsys):
    """They are written behind the training, and judged when they are whole."""
    settings = {"evaluation": {"every": 1, "probes": "knn"}, "optimization": {"epochs": 2, "warmup": 1}}
    marks = []
    for kind in ("file", "sharded"):
        train(tiny_config(pictures, tmp_path / kind, runtime={"checkpoint": kind}, **settings))
        rows = table(tmp_path / kind)
        assert rows[-1]["epoch"] == "2"
        marks.append(rows[-1])
        assert "warning" not in capsys.readouterr().err
    assert marks[0] == marks[1]


def test_an_evaluation_that_fails_is_a_warning(pictures, tmp_path, capsys):
    one = tmp_path / "one" / "class"
    one.mkdir(parents=True)
    settings = {"every": 1, "data": str(tmp_path / "one")}
    result = train(
        tiny_config(pictures, tmp_path / "run", evaluation=settings, optimization={"epochs": 1, "warmup": 0})
    )
    assert result.steps == 6
    assert "warning: the evaluation of epoch 1 failed: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "jepa_evaluation.csv").exists()


def test_only_written_checkpoints_at_their_turn_and_one_at_a_time(pictures, tmp_path):
    made, said = judging(pictures, tmp_path, SLEEP)
    there = tmp_path / "there"
    there.touch()
    with made:
        for checkpoint, step in ((there, 0), (there, 6), (there, 13), (tmp_path / "not written", 12)):
            made.offer(checkpoint, step)
            assert made.running is None
        made.offer(there, 12)
        assert made.running is not None
        made.offer(there, 24)
        assert "epoch 4 is not evaluated: epoch 2 still is" in said
        pid = made.running.process.pid
    assert not alive(pid)
    assert "epoch 2 was ended with the run" in said


def test_the_last_of_a_run_waits_for_its_turn(pictures, tmp_path):
    made, said = judging(pictures, tmp_path, [sys.executable, "-c", "import time; time.sleep(1); print(1/0)"], 3)
    there = tmp_path / "there"
    there.touch()
    with made:
        made.offer(there, 12)
        made.offer(there, 18)
        assert "warning: the evaluation of epoch 2 failed: ZeroDivisionError" in said
        assert made.running is not None
        made.finish()
        assert "warning: the evaluation of epoch 3 failed: ZeroDivisionError" in said
        made.signals.asked = "SIGTERM"
        made.offer(there, 12)
        began = time.monotonic()
        made.finish()
        assert time.monotonic() - began < 0.5


def test_sigterm_leaves_no_evaluation_behind(pictures, tmp_path):
    pids = []

    def stop(trainer):
        if trainer.step == 7:
            pids.extend(
                int(p.name) for p in Path("/proc").glob("[0-9]*") if str(tmp_path / "jepa-evaluating") in line(p)
            )
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"every": 1, "data": str(pictures)}
    result = train(tiny_config(pictures, tmp_path, evaluation=settings), stop)
    assert result.stopped == "SIGTERM"
    assert pids
    assert not any(alive(pid) for pid in pids)


def line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_a_command_apart_ends_with_its_parent(tmp_path):
    os.mkfifo(tmp_path / "checkpoint")  # reading it waits for ever
    parent = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'fastjepa.apart', str(os.getpid()), 'eval', sys.argv[1], '--data', '.']\n"
        "print(subprocess.Popen(command, stdout=2).pid, flush=True)\n"
        "time.sleep(4)\n"
        "os._exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path / "checkpoint")], capture_output=True, text=True, timeout=60
    )
    pid = int(done.stdout)
    end = time.monotonic() + 30
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "/nowhere"}, "evaluation.data: no such folder: /nowhere"),
        ({"probes": "lnear"}, "evaluation.probes: some of linear,knn,low-shot,attentive, got 'lnear'"),
        ({"device": "abacus"}, "evaluation.device: 'abacus' cannot be used here"),
    ],
)
def test_bad_settings(pictures, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.split("(", maxsplit=1)[0]):
        train(tiny_config(pictures, tmp_path, evaluation={"every": 1, **settings}))
