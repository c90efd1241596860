"""The emulate suite: every operation right on an emulated chip, and a wrong one said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import emulate, kernels
from benchmarks.operations import Sizes
from fastjepa.kernels import gelu
from tests.kernels.row_checks import SM

SMALL = Sizes(torch.device("cpu"), torch.bfloat16, 1, 16, 64, 2, 32, 2, 1, context=9, spread=2, target=4)
ROW = {"sm": 90, "operation": "bias + GELU", "case": "4 rows", "error": 0.00123456, "kernel": "_k", "read MB": 1.5}


@pytest.mark.interpreted
def test_interpreted_kernels_are_refused():
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        emulate.run(argparse.Namespace())


def test_a_document_without_its_markers_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(emulate, "is_interpreted", lambda: False)
    (tmp_path / "x.md").touch()
    with pytest.raises(ValueError, match="must hold <!-- emulated -->"):
        emulate.run(argparse.Namespace(document=tmp_path / "x.md"))


def test_tables():
    wrong = {"sm": 80, "operation": "EMA", "case": "1 M", "wrong": "output 0 is 1.0e+00 from the fp64 answer"}
    assert emulate.markdown([ROW]).splitlines()[2] == "| bias + GELU | 4 rows | _k | 90 | 0.00123 | 1.5 |  |  |  |  |"
    assert wrong["wrong"] in emulate.table([ROW, wrong])
    assert emulate.faults([ROW, wrong], argparse.Namespace()) == ["sm 80 EMA: output 0 is 1.0e+00 from the fp64 answer"]


@pytest.mark.compiled
def test_every_operation_is_right():
    sm = SM if SM in emulate.CHIPS else emulate.CHIPS[-1]
    rows = list(emulate.measure(sm, kernels.FILES, SMALL))
    assert not emulate.faults(rows, argparse.Namespace())
    assert len({row["operation"] for row in rows}) >= 10
    assert {row["kernel"] for row in rows} > {"_attention_bwd_kernel", "_layer_norm_bwd_kernel", "_adamw_ema_kernel"}
    assert ("_quantise_kernel" in {row["kernel"] for row in rows}) == (sm >= 89)
    assert all(row["banks x"] == 1 for row in rows if row["kernel"].startswith("_attention"))


@pytest.mark.compiled
def test_whole_steps_are_right(monkeypatch: pytest.MonkeyPatch):
    sm = SM if SM in emulate.CHIPS else emulate.CHIPS[-1]
    rows = list(emulate.steps(sm))
    assert [row["operation"] for row in rows] == ["training step, fastjepa truncated", "training step, fastjepa ragged"]
    assert not emulate.faults(rows, argparse.Namespace())
    assert all(1e-4 < row["error"] < 1e-2 for row in rows)
    monkeypatch.setattr(emulate.step, "errors", lambda *of: {"gradients": 1.0})
    idle = emulate.faults(list(emulate.steps(sm)), argparse.Namespace())
    assert [line.partition(": ")[2] for line in idle] == ["launches nothing"] * 2


@pytest.mark.compiled
def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch):
    forward = gelu.gelu_fwd
    monkeypatch.setattr(gelu, "gelu_fwd", lambda x, bias: forward(x, bias + 1))
    rows = list(emulate.measure(80, ["gelu"], SMALL))
    assert emulate.faults(rows, argparse.Namespace())
