"""What the planner ships with: out of the committed results, predicted by its model, and as its document shows."""

from __future__ import annotations

import json
import re

from benchmarks import measured, results
from fastjepa.plan import check, read_runs, render_check, steps_of
from fastjepa.plan.assumed import ASSUMPTIONS

STEP = {"row": "eager", "model": "vit_tiny/16", "dtype": "fp32", "ms": 1.0, "spread_ms": 0.1, "steps": 8}
RUN = {
    "suite": "step",
    "command": "step",
    "date": "2026-01-01T00:00:00Z",
    "machine": {"device": "a processor", "kind": "cpu", "python": "3.11", "matmul_rate": 1e11},
    "rows": [STEP, {"row": "compiled", "absent": "no compiler"}, STEP | {"row": "another"}],
}


def test_the_shipped_file_is_that_of_the_committed_results():
    """Else run `python -m benchmarks.measured`."""
    assert read_runs(measured.PACKAGED) == measured.shipped(results.committed())


def test_the_document_is_current():
    """Else run `python -m benchmarks.measured`."""
    text = measured.DOCUMENT.read_text(encoding="utf-8")
    assert measured.documented(text) == text
    for assumption in ASSUMPTIONS:
        assert assumption.source in text


def test_every_measured_step_is_predicted():
    """Predicted over measured, each from the others of its machine: within 10 %."""
    found = check(steps_of(read_runs(measured.PACKAGED)))
    assert all(compared.within() for compared in found), render_check(found)


def test_what_is_shipped_is_what_is_read():
    other = {**RUN, "suite": "kernels"}
    (run,) = measured.shipped([RUN, other])
    assert run["machine"] == {"device": "a processor", "kind": "cpu", "matmul_rate": 1e11}
    assert run["rows"] == [{key: STEP[key] for key in ("row", "model", "dtype", "ms")}]
    assert run["date"] == RUN["date"]


def test_rewriting(tmp_path, monkeypatch, capsys):
    """The file, whole, and the document's sections between their markers."""
    stale = re.sub(r"(<!-- chips -->\n).*?(\n<!-- end -->)", r"\1stale\2", measured.DOCUMENT.read_text(), flags=re.S)
    assert "stale" in stale
    (tmp_path / "planner.md").write_text(stale)
    monkeypatch.setattr(measured, "DOCUMENT", tmp_path / "planner.md")
    monkeypatch.setattr(measured, "PACKAGED", tmp_path / "measured.json")
    monkeypatch.setattr(measured.results, "committed", lambda: [RUN])
    monkeypatch.setattr("sys.argv", ["measured"])
    measured.main()
    assert json.loads((tmp_path / "measured.json").read_text())["runs"] == measured.shipped([RUN])
    assert "stale" not in (tmp_path / "planner.md").read_text()
    assert "1 rows of 1 runs" in capsys.readouterr().out
