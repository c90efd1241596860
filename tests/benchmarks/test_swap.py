"""The swap suite: rows of what is there, and of what is not."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import swap
from benchmarks.__main__ import main
from tests.patch.ijepa_like import VisionTransformer

WORK = swap.Work(64, 1, 2, 32, 4, torch.device("cpu"))


def test_a_row_has_times_and_differences():
    row = swap.measure("own/like: encoder", lambda work: (VisionTransformer(), (torch.randn(2, 3, 16, 16),)), WORK)
    assert row["places"] == 10
    assert row["speedup"] == pytest.approx(row["before_ms"] / row["after_ms"])
    assert row["outputs"] < 1e-6
    assert row["gradients"] < 1e-6


def test_what_is_absent_or_cannot_be_patched_is_a_row():
    def missing(work):
        raise ModuleNotFoundError("No module named 'jepa'")

    absent = swap.measure("jepa: encoder", missing, WORK)
    assert absent == {"codebase": "jepa", "model": "encoder", "absent": "No module named 'jepa'"}
    wrong = swap.measure("own: head", lambda work: (torch.nn.Linear(2, 2), (torch.randn(1, 2),)), WORK)
    assert wrong["wrong"].startswith("Linear: nothing to patch")
    assert swap.faults([absent, wrong], argparse.Namespace()) == [f"head of own: {wrong['wrong']}"]
    assert "absent" in swap.table([absent])


@pytest.mark.parametrize("name", swap.MODELS)
def test_every_model_is_a_row(name: str):
    row = swap.measure(name, swap.MODELS[name], WORK)
    assert "wrong" not in row
    assert row.get("absent") or row["outputs"] < 1e-5
    if "facebookresearch" in name:
        assert "names a checkout" in row["absent"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for options, words in (
        (["--width", "100"], "--width must be a multiple of 64"),
        (["--ijepa", str(tmp_path)], f"--ijepa: {tmp_path} is no checkout"),
    ):
        assert main(["swap", *options]) == 2
        assert words in capsys.readouterr().err
