"""The input suite: the pictures, right before timed, absent said, and every engine that is here through it."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import input as suite
from benchmarks import pipelines
from benchmarks.__main__ import main

RATES = ("images_per_second", "images_per_second_per_core", "spread", "cores_for_755", "cores_for_2300")


class Shifted(pipelines.Published):
    """Crops a little beside its box."""

    name = "shifted"

    def crop(self, path, draw):
        return super().crop(path, draw).roll(2, dims=-1)


class Failing(pipelines.Published):
    """Cannot."""

    name = "failing"

    def crop(self, path, draw):
        raise RuntimeError("no decoder for this")


class Misshapen(pipelines.Published):
    """Its crops are right and its batches are not."""

    name = "misshapen"

    def batches(self, workers):
        return iter([(torch.zeros(1, 3, 7, 7),)])


class NvJPEGOnCPU(pipelines.NvJPEG):
    """The code of the GPU engine, with torchvision's other decoder."""

    name = "nvJPEG's code on the CPU"
    device = "cpu"

    @classmethod
    def absent(cls):
        return pipelines.Torchvision.absent()


class DALIInProcess(pipelines.DALI):
    """DALI as it decodes on the GPU, without workers, on the CPU."""

    name = "DALI in process"
    in_process = True


class Slow(pipelines.Engine):
    """Made by this process: the first batch in 200 ms, every other in 10."""

    name = "slow"
    allowed = None
    in_process = True

    def __getitem__(self, step):
        time.sleep(0.01 if step else 0.2)


def rows_of(*engines, pictures=3, workers=(1,), seconds=0.05) -> list[dict]:
    return suite.measure(pictures, workers, seconds, engines, repeats=2)


@pytest.mark.parametrize("engine", [*suite.ENGINES, NvJPEGOnCPU, DALIInProcess], ids=lambda engine: engine.name)
def test_every_engine_is_right_or_says_why_it_is_absent(engine):
    (row,) = rows_of(engine)
    assert "wrong" not in row
    if "absent" in row:
        assert row["absent"] == engine.absent()  # not for a failure
        assert not any(key in row for key in (*RATES, "error"))
        return
    assert row["images_per_second"] > 0
    assert row["spread"] >= 0
    assert row["cores_for_755"] == math.ceil(755 / row["images_per_second_per_core"])
    assert row["cores_for_2300"] == math.ceil(2300 / row["images_per_second_per_core"])
    if engine.allowed is not None:
        assert row["error"] <= row["error_allowed"]


def test_rows_of_several_workers():
    rows = rows_of(pipelines.FastJEPA, pipelines.Published, pipelines.DecodeOnly, workers=(1, 2, 2), pictures=5)
    assert [(row["engine"], row["workers"]) for row in rows] == [
        (name, count) for name in ("fastjepa", "pillow, as published", "pillow, decode only") for count in (1, 2)
    ]
    published = {row["workers"]: row["images_per_second"] for row in rows if row["engine"] == "pillow, as published"}
    alone = {row["engine"]: row["images_per_second"] for row in rows if row["workers"] == 1}
    cores = len(suite._cores())
    for row in rows:
        assert row["over_published"] == row["images_per_second"] / published[row["workers"]]
        if row["workers"] == 2:
            assert row["over_one_worker"] == row["images_per_second"] / alone[row["engine"]]
        assert row["images_per_second_per_core"] == row["images_per_second"] / min(row["workers"], cores)
        assert (row["pictures"], row["batch"]) == (5, 5)
        assert 100e3 < row["picture_bytes"] < 120e3
    assert not multiprocessing.active_children()  # workers end with their window
    text = suite.table(rows)
    assert "fastjepa" in text
    assert "decode only" in text


def test_wrong_shows_no_rate():
    rows = rows_of(Shifted, Misshapen, pipelines.Published, workers=(1, 2))
    shifted, misshapen, right = rows[::2]
    for row in rows[:4]:
        assert not any(key in row for key in RATES)
    assert shifted["error"] > 1
    assert shifted["wrong"].endswith("grey levels from Pillow's crops, 1 allowed")
    assert misshapen["wrong"] == "batches have shape (1, 3, 7, 7), not (3, 3, 224, 224)"
    assert right["error"] < 0.01  # it is Pillow's, normalised and back
    assert suite.faults(rows, None) == [f"shifted: {shifted['wrong']}", f"misshapen: {misshapen['wrong']}"]
    assert suite.table(rows).count("shifted: WRONG: ") == 1


def test_a_peer_that_fails_is_absent_and_ours_is_wrong(monkeypatch):
    (row,) = rows_of(Failing)
    assert not multiprocessing.active_children()
    assert row["absent"] == "fails: RuntimeError: no decoder for this"  # said in a worker
    monkeypatch.setattr(pipelines.FastJEPA, "samples", Failing.__getitem__)
    (row,) = rows_of(pipelines.FastJEPA)
    assert row["wrong"].startswith("fails: ")
    assert "\n" not in row["wrong"]


@pytest.mark.parametrize(
    "engine, module",
    [
        (pipelines.SimpleJPEG, "simplejpeg"),
        (pipelines.SimpleJPEG, "cv2"),
        (pipelines.Torchvision, "torchvision"),
        (pipelines.NvJPEG, "torchvision"),
        (pipelines.DALI, "nvidia.dali"),
        (pipelines.DALIOnGPU, "nvidia.dali"),
    ],
)
def test_not_installed(monkeypatch, engine, module):
    if engine is pipelines.SimpleJPEG:
        monkeypatch.setitem(sys.modules, "simplejpeg", torch)  # whether or not it is here
    monkeypatch.setitem(sys.modules, module, None)
    row, *_ = rows_of(engine)
    assert row["absent"] == f"{module} is not installed"
    assert suite.table([row]).splitlines()[1:] == [f"{engine.name}: {module} is not installed"]


def test_installed_for_another_torch(monkeypatch):
    def refuse(name):
        raise RuntimeError(f"operator {name}::nms does not exist\nat all")

    monkeypatch.setattr(pipelines, "import_module", refuse)
    absent = "torchvision cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    assert pipelines.Torchvision.absent() == absent


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(pipelines, "_missing", lambda *names: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for engine in (pipelines.NvJPEG, pipelines.DALIOnGPU):
        assert engine.absent() == "decodes on the GPU, and there is none"


def test_the_first_round_is_not_timed():
    (row,) = rows_of(Slow, workers=(1, 2), seconds=0.05)  # no workers of its own, so one row
    assert row["workers"] == 1
    assert 3 / 0.2 < row["images_per_second"] <= 3 / 0.01


def test_pictures_follow_from_the_seed(tmp_path):
    for name, count, seed in (("a", 3, 0), ("b", 2, 0), ("c", 2, 1)):
        (tmp_path / name).mkdir()
        mean = suite.make_pictures(tmp_path / name, count, seed)
        assert mean == statistics.fmean(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert 100e3 < mean < 120e3
    a, b, c = ([p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert a[:2] == b
    assert a[0] != a[1]
    assert not set(a) & set(c)
    with Image.open(tmp_path / "a" / "000000.jpg") as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (500, 375))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system tells no times of processes")
def test_time_of_a_processor_is_that_of_the_processes():
    before, start = suite._cpu_time([os.getpid()]), time.process_time()
    while time.process_time() < start + 0.1:
        pass
    assert 0.05 < suite._cpu_time([os.getpid()]) - before < 0.3
    assert suite._cpu_time([]) == suite._cpu_time([2**30]) == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system holds no process on a core")
def test_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with suite._on_cores(1):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine", "pillow"], "--engine: no engine 'pillow'; there are fastjepa; fastjepa, restart markers;"),
        (["--pictures", "0"], "--pictures must be more than 0, got 0"),
        (["--workers", "2", "--workers", "-1"], "--workers must be more than 0, got -1"),
        (["--seconds", "nan"], "--seconds must be more than 0, got nan"),
        (["--repeats", "0"], "--repeats must be more than 0, got 0"),
    ],
)
def test_bad_input_is_one_line(capsys, words, said):
    assert main(["input", *words]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
