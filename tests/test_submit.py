"""Jobs of submitit: on this machine, in processes of their own, since SLURM is not here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastjepa import read_checkpoint
from fastjepa.checkpoint import MODELS
from fastjepa.cli import main
from fastjepa.submit import Job, submit
from fastjepa.training import train
from tests.helpers import make_pictures, tiny_config

submitit = pytest.importorskip("submitit", reason="the slurm extra: pip install submitit")

HERE = {"cluster": "local", "gpus_per_node": 0, "cpus_per_process": 1}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=24)


def settings(pictures: Path, folder: Path, batch_size: int, epochs: int = 2):
    return tiny_config(
        pictures,
        folder,
        data={"batch_size": batch_size},
        mask={"ragged": True},
        optimization={"epochs": epochs, "warmup": 1},
        logging={"every": 1},
        runtime={"save_every": 10**6},
    )


def written(config, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    return str(file)


def children(pid: int) -> list[int]:
    """Processes that this one started, and still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    return found


def strike(job, log: Path, number: int, processes: int) -> None:
    """Send a signal to the job's processes once they have trained for some steps."""
    end = time.monotonic() + 300
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    first = children(int(job.job_id))
    assert len(first) == processes
    for pid in first:
        os.kill(pid, number)


def newest(folder: Path) -> dict:
    return read_checkpoint(folder / "jepa-latest.pth.tar")


def test_two_processes_that_are_preempted_are_started_again(pictures, tmp_path):
    """And come to what one process comes to that nobody stops."""
    epochs = 40
    alone = train(settings(pictures, tmp_path / "alone", 8, epochs))
    folder = tmp_path / "job"
    job = submit(
        written(settings(pictures, folder, 4, epochs), folder), folder=tmp_path / "logs", processes_per_node=2, **HERE
    )
    log = folder / "jepa_r0.csv"
    strike(job, log, signal.SIGUSR2, processes=2)
    results = job.results()
    said = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.err"))
    assert said.count("stopped by SIGUSR2") == 1
    assert "goes on from there" in said
    assert [result["steps"] for result in results] == [alone.steps] * 2
    found, wanted = newest(folder), newest(tmp_path / "alone")
    for name in MODELS:
        for key, value in wanted[name].items():
            assert torch.allclose(found[name][key], value, rtol=1e-4, atol=1e-5), (name, key)
    steps = [int(row.split(",")[1]) for row in log.read_text().splitlines()[1:]]
    assert len(steps) == alone.steps


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(pictures, tmp_path):
    folder = tmp_path / "job"
    job = submit(written(settings(pictures, folder, 8, 500), folder), folder=tmp_path / "logs", **HERE)
    strike(job, folder / "jepa_r0.csv", signal.SIGTERM, processes=1)
    job.wait()
    assert newest(folder)["fastjepa"]["step"] > 3
    assert "stopped by SIGTERM" in job.stderr()
    assert job.exception() is not None


def test_the_command_waits_and_says_what_failed(pictures, tmp_path, capfd):
    file = written(settings(pictures, tmp_path / "run", 4, 1), tmp_path / "run")
    words = ["submit", file, "--cluster", "local", "--gpus-per-node", "0", "--wait", "--folder", str(tmp_path / "logs")]
    assert main([*words, "--processes-per-node", "2", "--json", "-"]) == 0
    assert '"steps": 3' in capfd.readouterr().out
    (tmp_path / "run" / "jepa-latest.pth.tar").unlink()
    (tmp_path / "run" / "jepa-latest.pth.tar").write_bytes(b"no checkpoint")
    assert main(words) == 1
    assert "fastjepa submit: the job failed: ValueError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster": "slurm"}, 'no job for cluster slurm: Could not detect "srun"'),
        ({"nodes": 2}, "only one node"),
        ({"nodes": 0}, "--nodes must be at least 1, got 0"),
        ({"processes_per_node": 0}, "--processes-per-node must be at least 1, got 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node must be at least 0, got -1"),
        ({"hours": 0.05}, "--hours must be more than 0.07, got 0.05"),
        ({"hours": float("nan")}, "--hours must be more than"),
        ({"overrides": ["mask.min_keep=x"]}, "mask.min_keep"),
        ({"moon": "full"}, "Unknown argument 'moon'"),
    ],
)
def test_bad_input_is_said_before_anything_is_submitted(pictures, tmp_path, monkeypatch, options, said):
    monkeypatch.setenv("PATH", str(tmp_path))  # without SLURM, wherever this runs
    file = written(settings(pictures, tmp_path / "run", 8), tmp_path / "run")
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        submit(file, folder=tmp_path / "logs", **{**HERE, **options})
    assert not list(tmp_path.glob("logs/*.pkl"))


def test_it_is_queued_again_as_it_was():
    again = Job("some.yaml", ["data.batch_size=4"]).checkpoint()
    assert again.function.overrides == ["data.batch_size=4", "runtime.resume=true"]
