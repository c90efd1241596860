"""The budget: every launch in one line of it, floors by hand, and the document's tables those of the code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import budget, count
from benchmarks.counter import Event
from benchmarks.step import Work
from fastjepa.chips import chip

DOCUMENT = Path(__file__).parents[2] / "docs" / "budget.md"
SMALL = Work("vit_tiny", 8, 96, 8, (96, 2), {"depth": 2}, bf16=True, device=torch.device("meta"))


@pytest.fixture(scope="module", params=budget.ROWS)
def rows(request) -> list[dict]:
    return budget.budget(SMALL, request.param)


def test_lines_add_up(rows: list[dict]):
    step = rows[-1]
    assert (step["part"], step["group"]) == ("step", "all")
    for key in ("launches", "flops", "bytes"):
        lines = [row[key] for row in rows if row["group"] != "all"]
        parts = [row[key] for row in rows if row["group"] == "all" and row is not step]
        assert sum(lines) == sum(parts) == step[key] > 0
    for gpu in budget.CHIPS:
        assert sum(row["floors"][gpu] for row in rows if row["group"] != "all") == pytest.approx(step["floors"][gpu])
        assert step["images_per_second"][gpu] == pytest.approx(8 / step["floors"][gpu])


def test_it_is_the_count_suite_s_step(rows: list[dict]):
    counted = count.measure(SMALL, [rows[0]["row"]])[0]
    assert rows[-1]["launches"] == counted["launches"]
    assert rows[-1]["flops"] == counted["gemm_flops"] + counted["attention_flops"]


def test_little_is_unnamed(rows: list[dict]):
    other = sum(row["bytes"] for row in rows if row["group"] == "other")
    assert other < 0.08 * rows[-1]["bytes"]


def test_a_floor_is_flops_or_bytes():
    a100 = chip("a100-80g")
    assert budget.floor(Event("mm", "gemm", 1, 1, 312e12), a100) == pytest.approx(1.0)
    assert budget.floor(Event("add", "rest", 1, 2 * 2039 * 10**9, 0.0), a100) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "name, kind, group",
    [
        ("mm", "gemm", "products"),
        ("_attention_fwd_kernel", "attention", "attention"),
        ("_layer_norm_bwd_kernel", "rest", "residual + LayerNorm"),
        ("_sum_partials_kernel", "rest", "sums over tokens"),
        ("_adamw_ema_kernel", "rest", "AdamW + EMA"),
        ("add", "rest", "other"),
    ],
)
def test_groups(name: str, kind: str, group: str):
    assert budget.group_of(Event(name, kind, 1)) == group


def test_the_document_is_current():
    work = replace(SMALL, name="vit_huge", patch=14, pixels=224, batch=128, predictor=(384, 12), sizes={})
    rows = [row for name in budget.ROWS for row in budget.budget(work, name)]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert budget.markdown(rows) in text, "run python -m benchmarks budget --document docs/budget.md"


def test_a_document_without_markers(tmp_path, capsys):
    from benchmarks.__main__ import main

    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    assert main(["budget", "--document", str(path)]) == 2
    assert "must hold <!-- budget -->" in capsys.readouterr().err
    assert path.read_text() == "nothing\n"
