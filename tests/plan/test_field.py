"""What is published, and what a step of other methods computes: by count, against torch's own counter."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import MAE, Data2Vec, Random
from benchmarks.step import Work
from fastjepa.cli import main
from fastjepa.flops import Tower
from fastjepa.plan import FIELD, field_table, flops_per_image
from fastjepa.plan.assumed import PUBLISHED_HOURS


def test_every_row_has_a_source():
    for published in FIELD:
        assert "arXiv" in published.source, published
        assert any(value is not None for value in (published.linear, published.low_shot, published.hours)), published
    h14 = next(p for p in FIELD if (p.method, p.model) == ("I-JEPA", "ViT-H/14"))
    assert h14.hours == f"under {16 * PUBLISHED_HOURS.value:,.0f} A100"


def test_the_command(capsys, tmp_path):
    assert main(["plan", "--field"]) == 0
    assert capsys.readouterr().out.strip() == field_table().strip()
    assert main(["plan", "--field", "--json", str(tmp_path / "field.json")]) == 0
    assert len(json.loads((tmp_path / "field.json").read_text())) == len(FIELD)


@pytest.mark.parametrize("kind", [MAE, Data2Vec])
def test_flops_are_those_of_a_step(kind: type[Random]):
    """The count has what nobody needs: the gradient of the pixels, and the end of a decoder's last layer for all."""
    work = Work("vit_tiny", 16, 224, 2, device=torch.device("meta"))
    way = kind(work.model().encoder)
    inputs = way.drawn(work.batch)
    with FlopCounterMode(display=False) as counter:
        way.backward(way.objective(work.images(work.batch), *inputs))
    assert way.flops() == pytest.approx(counter.get_total_flops() / work.batch, rel=0.03)


def test_ibot_is_a_step_of_data2vec_twice_and_small_pictures():
    """Of 14 x 14 patches; a crop of 96 pixels has 36."""
    encoder = Tower(768, 12)
    found = flops_per_image(encoder, 768, 196)
    small = encoder.forward(36, 36**2).total + 2 * 768 * 768 * 36
    whole = encoder.forward(196, 196**2).total + 2 * 768 * 768 * 196
    assert found["iBOT"] == pytest.approx(8 * whole + 30 * small)
