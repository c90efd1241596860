"""The written estimates: from the declared costs, of the real model, and the same in the documentation."""

from __future__ import annotations

from pathlib import Path

import torch

import fastjepa
from benchmarks import roofline
from benchmarks.kernels import operations

DOCUMENT = Path(__file__).parents[2] / "docs" / "roofline.md"


def test_the_documented_table_is_current():
    assert roofline.table(roofline.measure()) in DOCUMENT.read_text(encoding="utf-8")


def test_parameters_are_the_models():
    with torch.device("meta"):
        model = fastjepa.vit_huge(patch_size=14)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == roofline.PARAMETERS


def test_floors_and_estimates_stand_in_order():
    for row in roofline.measure():
        for chip in roofline.CHIPS:
            assert 0 < row[f"{chip.name} floor us"] <= row[f"{chip.name} estimate us"]
        assert row["torch bytes over ours"] is None or row["torch bytes over ours"] >= 1


def test_every_operation_of_the_kernels_suite_has_a_floor():
    timed = {operation.name.split()[0] for operation in operations(torch.device("cpu"))}
    assert timed == {row.name.split()[0].rstrip(",") for row in roofline.rows()} - {"clip"}
