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
COUNTS = DOCUMENT.with_name("counts.md")
SMALL = Work("vit_tiny", 8, 96, 8, (96, 2), {"depth": 2}, bf16=True, device=torch.device("meta"))
HUGE = replace(SMALL, name="vit_huge", patch=14, pixels=224, batch=128, predictor=(384, 12), sizes={})


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
    rows = [row for name in budget.ROWS for row in budget.budget(HUGE, name)]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert budget.markdown(rows) in text, "run python -m benchmarks budget --document docs/budget.md"


def test_what_settings_save_is_what_the_documents_tables_have():
    """The short table against the `count` suite's above it; floors too, but those of parts, which take long."""
    tables = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in COUNTS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    counted = {cells[0]: cells for cells in tables if cells[0] in count.ROWS}
    places = {name: tables[0].index(name) for name in ("launches", "peak GiB", "rest GB")}
    settings = {"as it comes": "", "narrow_stream": ", narrow stream", "accumulate=4": ", 4 parts"}
    settings |= {"activation_checkpointing": ", checkpointing"}
    settings |= {"activation_checkpointing=predictor": ", predictor checkpointing"}
    seen = 0
    for label, peaks, shares, launches, *floors in tables:
        if (setting := settings.get(label.strip("`"))) is None:
            continue
        rows = [counted[f"{row}{setting}"] for row in budget.ROWS]
        held = [float(cells[places["peak GiB"]]) for cells in rows]
        assert peaks == " / ".join(f"{gib:.1f}" for gib in held)
        eager = float(counted["eager"][places["peak GiB"]])
        assert shares == " / ".join(f"{100 * gib / eager:.0f}" for gib in held) + " %"
        assert launches == " / ".join(cells[places["launches"]] for cells in rows)
        if setting and setting != ", 4 parts":
            found = [budget.budget(HUGE, f"{row}{setting}")[-1]["floors"] for row in budget.ROWS]
            assert floors == [" / ".join(f"{1e3 * f[gpu]:.0f}" for f in found) for gpu in budget.CHIPS]
        seen += 1
    assert seen == 5
    readme = DOCUMENT.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    moved = [float(counted[f"fastjepa truncated{name}"][places["rest GB"]]) for name in ("", ", narrow stream")]
    assert f"{1 - moved[1] / moved[0]:.0%} fewer bytes".replace("%", " %") in readme
    usual, parts, again, some = (
        float(counted[f"fastjepa truncated{name}"][places["peak GiB"]])
        for name in ("", ", 4 parts", ", checkpointing", ", predictor checkpointing")
    )
    assert f"by count {1 - parts / usual:.0%} less memory than in one".replace("%", " %") in readme
    assert f"by count {1 - again / usual:.0%} less memory".replace("%", " %") in readme
    assert f"`predictor` has its blocks alone do so: {1 - some / usual:.0%} less".replace("%", " %") in readme


def test_a_document_without_markers(tmp_path, capsys):
    from benchmarks.__main__ import main

    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    assert main(["budget", "--document", str(path)]) == 2
    assert "must hold <!-- budget -->" in capsys.readouterr().err
    assert path.read_text() == "nothing\n"
