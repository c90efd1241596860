"""The `faults` suite: each fault strikes once, and its check notices a loss that is put there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import faults

COMPARED = ("kill", "term", "disk", "weight", "worker", "cut")  # with the undisturbed run


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[faults.Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "STEPS", 36)
        yield faults.Bench(tmp_path_factory.mktemp("bench"))


def strike(bench: faults.Bench, name: str) -> dict:
    bench.random = random.Random(1)
    _, fault, _ = faults.FAULTS[name]
    return fault(bench, 1)


@pytest.mark.parametrize("name", [name for name in faults.FAULTS if name != "pictures"])
def test_nothing_is_lost(bench, name):
    row = strike(bench, name)
    assert row["wrong"] == ""
    assert row["times"] == 1


@pytest.mark.parametrize("name", COMPARED)
def test_another_end_is_noticed(bench, name, monkeypatch):
    """The smallest change of one weight of the target encoder."""
    key, value = next(iter(bench.wanted["target_encoder"].items()))
    changed = value.clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(torch.inf))
    monkeypatch.setitem(bench.wanted["target_encoder"], key, changed)
    assert "target_encoder differs" in strike(bench, name)["wrong"]
    assert faults.faults([{"fault": name, "wrong": "lost"}, {"fault": name, "wrong": ""}], None) == [f"{name}: lost"]


def test_a_step_that_is_logged_twice_is_noticed(bench):
    log = Path(bench.plain.logging.folder) / "demo_r0.csv"
    whole = log.read_text()
    log.write_text(whole + whole.splitlines()[-1] + "\n")
    try:
        assert bench.differs(bench.plain) == f"{faults.STEPS + 1} steps are logged, not {faults.STEPS}"
    finally:
        log.write_text(whole)


def test_steps_that_are_not_skipped_are_noticed(bench, monkeypatch):
    monkeypatch.setattr(faults, "_spoil_losses", lambda steps: None)
    assert "skipped []" in strike(bench, "nan")["wrong"]


def test_a_checkpoint_with_nan_is_noticed(bench, monkeypatch):
    monkeypatch.setattr(faults, "_spoil", lambda trainer, at: None)  # the run goes on as if nothing was
    assert "exit status 0" in strike(bench, "weight")["wrong"]
    assert not faults._finite({name: {"w": torch.tensor([1.0, torch.nan])} for name in faults.MODELS})


def test_pictures_that_are_not_named_are_noticed(bench, monkeypatch):
    assert strike(bench, "pictures")["wrong"] == ""
    for file in (bench.folder / "bad").iterdir():
        file.unlink()
    (bench.folder / "bad").rmdir()
    monkeypatch.setattr(faults, "train", lambda config: print("all is well", file=faults.sys.stderr))
    assert "nothing said of ['cut.png'" in strike(bench, "pictures")["wrong"]


def test_code_that_runs_is_noticed(bench, monkeypatch):
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: real(*a, **{**k, "weights_only": False}))
    assert strike(bench, "hostile")["wrong"] == "the code ran"
    (bench.folder / "ran").rmdir()
