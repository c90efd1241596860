"""The methods suite: rows of four methods, right before they are timed, each trained by its own step."""

from __future__ import annotations

import pytest
import torch

from benchmarks import methods
from benchmarks.__main__ import main
from benchmarks.step import Work

SMALL = Work("vit_tiny", 16, 160, 2, (96, 2), {"depth": 2}, device=torch.device("cpu"))


def test_rows():
    rows = methods.measure(SMALL, 2)
    assert [row["method"] for row in rows] == ["I-JEPA, ragged", "I-JEPA, truncated", "MAE-style", "data2vec-style"]
    for row in rows:
        assert "wrong" not in row, row
        assert min(row["ms"], row["images_per_second"], row["gflop_per_image"]) > 0


@pytest.mark.parametrize("kind", [methods.MAE, methods.Data2Vec])
def test_a_step_trains(kind):
    """On one batch the loss falls, and data2vec's teacher moves to its student."""
    torch.manual_seed(0)
    way = kind(SMALL.model().encoder)
    for group in way.optimizer.param_groups:
        group["lr"] = 1e-3
    images, inputs = SMALL.images(2), way.drawn(2)
    teacher = [p.clone() for p in way.target_encoder.parameters()]
    losses = []
    for _ in range(8):
        loss = way.loss(images, *inputs)
        way.backward(loss)
        way.update(0.99)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(teacher, way.target_encoder.parameters(), strict=True))
    seen, hidden = inputs
    assert torch.cat([seen, hidden], 1).sort(1).values.tolist() == [list(range(100))] * 2


def test_a_wrong_loss_shows_no_time(monkeypatch):
    monkeypatch.setitem(methods.ALLOWED, False, -1.0)
    rows = methods.measure(SMALL, 1)
    assert [("wrong" in row, "ms" in row) for row in rows] == [(False, True)] * 2 + [(True, False)] * 2
    assert len(methods.faults(rows, None)) == 2  # type: ignore[arg-type]


def test_bad_sizes_are_one_line(capsys):
    assert main(["methods", "--batch-size", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
