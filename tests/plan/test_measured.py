"""Measured steps: read or refused in one line, chosen in order, and the model held to them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.chips import chip
from fastjepa.config import Config
from fastjepa.plan import ALLOWED, Order, check, find_chip, plan, read_runs, recipe, render_check, steps_of
from fastjepa.plan.cost import PARTS, Step
from fastjepa.plan.layers import AUTOCAST, FP32
from fastjepa.plan.measured import ROWS, Measured, fitted, images_per_core, unlikeness
from fastjepa.plan.predict import fractions_of
from fastjepa.plan.settings import NAMED, Settings
from fastjepa.plan.work import Models, draw

CPU = {"device": "a processor", "kind": "cpu", "chip": None, "threads": 2, "matmul_rate": 1e11, "copy_bandwidth": 1e10}
GPU = {"device": "NVIDIA H200", "kind": "cuda", "chip": "h200"}


@functools.cache
def models_of(config: Config) -> Models:
    return Models.build(config)


def row(name: str, model: str, batch: int, machine: dict[str, Any], fractions: dict[str, float]) -> dict[str, Any]:
    """A row of the step suite on a machine whose parts reach these fractions of the roof by the planner's count."""
    title, patch = model.split("/")
    config = recipe(None, {"model": title, "patch_size": int(patch), "pred_depth": 6, "batch_size": batch})
    drawn = draw(config, batch, ragged=name.startswith("fastjepa ragged"))
    mixed = machine["kind"] == "cuda"
    precision = AUTOCAST if mixed else FP32
    step = Step(models_of(config), drawn.mean, ROWS[name], precision, Settings.of_row(name))
    known = chip(machine["chip"]) if machine["chip"] else None
    roof = (known.flops, known.bandwidth) if known else (machine["matmul_rate"], machine["copy_bandwidth"])
    parts = {part: 1e3 * cost.seconds(*roof) / fractions[part] for part, cost in step.costs().items()}
    return {
        "row": name, "model": model, "pixels": 224, "batch": batch, "dtype": "bf16" if mixed else "fp32",
        "predictor_depth": 6, "predictor_width": 384, "npred": 4, "ms": sum(parts.values()), "parts_ms": parts,
        "context_tokens": drawn.context, "target_tokens": drawn.target,
    }  # fmt: skip


def flat(value: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, value)


def run(machine: dict[str, Any], *rows: dict[str, Any]) -> dict[str, Any]:
    return {"suite": "step", "command": "step", "date": "2026-01-01", "machine": machine, "rows": list(rows)}


def write(path: Path, *runs: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": "fastjepa benchmarks", "version": 1, "runs": list(runs)}))
    return path


@pytest.fixture(scope="module")
def processor() -> list[Measured]:
    """Three models on a processor, their parts at fractions that fall with the width."""
    rows = [
        row(name, model, 4, CPU, {part: value + 0.01 * place for place, part in enumerate(PARTS)})
        for name in ("eager", "fastjepa truncated", "fastjepa ragged")
        for model, value in (("vit_tiny/16", 0.62), ("vit_small/16", 0.6), ("vit_base/16", 0.58))
    ]
    return steps_of([run(CPU, *rows)])


def scaled(measured: Measured, factor: float) -> Measured:
    return replace(measured, parts_ms={part: factor * took for part, took in measured.parts_ms.items()})


@pytest.mark.parametrize("setting", NAMED)
def test_a_row_with_a_setting_is_counted_with_it(setting: str):
    """And a plan with that setting takes most from it."""
    name = f"fastjepa ragged, {setting}"
    (found,) = steps_of([run(GPU, row(name, "vit_small/16", 64, GPU, flat(0.5)))])
    assert found.step.settings == NAMED[setting]
    assert found.step.row(ragged=True) == found.row == name
    assert found.fractions() == pytest.approx(flat(0.5))
    (plain,) = steps_of([run(GPU, row("fastjepa ragged", "vit_small/16", 64, GPU, flat(0.5)))])
    assert unlikeness(found, found.step, "context", name) == 0 < unlikeness(plain, found.step, "context", name)


def test_fractions_come_back(processor: list[Measured]):
    assert len(processor) == 9
    for measured in processor:
        found = measured.fractions()
        assert found["optimizer"] - found["target"] == pytest.approx(0.04, rel=0.01)


def test_every_step_is_predicted_from_the_others(processor: list[Measured]):
    found = check(processor)
    assert [c.measured for c in found] == processor
    assert all(c.within(ALLOWED) and c.ratio != 1 for c in found)
    assert "9 of 9 within 10%" in render_check(found)


def test_a_step_that_does_not_fit_the_model_is_found(processor: list[Measured]):
    slow = scaled(processor[0], 1.3)
    found = check([slow, *processor[1:]])
    assert not found[0].within()
    assert "9 of 9" not in render_check(found)


def test_the_same_work_measured_again_is_no_other_step(processor: list[Measured]):
    again = [processor[0], scaled(processor[0], 2)]
    assert all(c.basis.startswith("its own parts") for c in check(again))
    assert render_check([]) == "no measured step to compare with"


def test_what_a_layer_takes_whatever_its_tokens_are_is_found():
    """Parts at 0.8 of the roof and 100 us a pass through a layer besides: found, and right for batches far away."""
    rows = []
    for batch in (2, 4, 8, 64):
        timed = row("fastjepa ragged", "vit_small/16", batch, CPU, flat(0.8))
        passes = {"target": 12, "context": 36, "predictor": 18, "loss": 1, "optimizer": 1}
        timed["parts_ms"] = {part: took + 0.1 * passes[part] for part, took in timed["parts_ms"].items()}
        rows.append(timed)
    *near, far = steps_of([run(CPU, *rows)])
    assert fitted(near, far.step, "context", far.row) == pytest.approx((1 / 0.8, 1e-4), rel=1e-3)
    fractions = fractions_of(near, far.step, far.row, far.peak, far.bandwidth)
    for part, reached in far.fractions().items():
        assert fractions[part].value == pytest.approx(reached, rel=0.02), part


def test_tokens_are_the_rows_not_the_samplers():
    """A row whose contexts were longer than the average took longer for it, at the same fractions."""
    plain = row("fastjepa truncated", "vit_tiny/16", 4, CPU, flat(0.5))
    longer = plain | {"context_tokens": 1.2 * plain["context_tokens"]}
    first, second = steps_of([run(CPU, plain, longer)])
    assert second.step.batch.tokens.context == pytest.approx(1.2 * first.step.batch.tokens.context)
    grown = second.step.batch.tokens.pairs - first.step.batch.tokens.pairs
    assert grown == pytest.approx(0.2 * 4 * first.step.batch.tokens.context)
    assert second.fractions()["context"] > 1.15 * first.fractions()["context"]


ORDER = Order(recipe(None, {"model": "vit_small"}), find_chip("h200"))


def planned(order: Order, tmp_path: Path, *runs: dict[str, Any]) -> dict[str, Any]:
    return plan(order, "truncated", write(tmp_path / "results.json", *runs))


def test_the_same_chip_comes_before_another_and_a_processor_never(tmp_path: Path):
    here = run(GPU, row("fastjepa truncated", "vit_base/16", 64, GPU, flat(0.7)))
    other = GPU | {"device": "NVIDIA A100-SXM4-80GB", "chip": "a100-80g"}
    there = run(other, row("fastjepa truncated", "vit_small/16", 128, other, flat(0.4)))
    processor = run(CPU, row("fastjepa truncated", "vit_small/16", 128, CPU, flat(0.9)))
    measured = planned(ORDER, tmp_path, processor, there, here)
    efficiencies = [part["efficiency"] for part in measured["parts"].values()]
    assert efficiencies == [*[pytest.approx(0.7)] * 5, None, None]  # launching and communication have none
    assert "measured: fastjepa truncated, vit_base/16, batch 64, bf16 on NVIDIA H200" in measured["basis"]["hours"]
    carried = planned(ORDER, tmp_path, processor, there)
    assert carried["parts"]["target"]["efficiency"] == pytest.approx(0.4)
    assert "carried over to h200" in carried["basis"]["mfu"]
    assumed = planned(ORDER, tmp_path, processor)
    assert assumed == planned(ORDER, tmp_path)
    assert "assumed: ours, none of which was timed on a GPU" in assumed["basis"]["hours"]
    assert "measured: " not in assumed["basis"]["hours"]
    assert "processor" not in json.dumps(assumed)


def test_other_implementations_say_nothing(tmp_path: Path):
    eager = run(GPU, row("eager", "vit_small/16", 128, GPU, flat(0.3)))
    assert planned(ORDER, tmp_path, eager) == planned(ORDER, tmp_path)
    found = planned(replace(ORDER, implementation="eager"), tmp_path, eager)
    assert found["parts"]["context"]["efficiency"] == pytest.approx(0.3)


def test_power_is_what_was_measured(tmp_path: Path):
    """500 W: 1000 images take as many joules as 500 times their seconds."""
    timed = row("fastjepa truncated", "vit_small/16", 128, GPU, flat(0.5))
    timed["joules_per_1000_images"] = 500 * 1000 * timed["ms"] / 1e3 / 128
    found = planned(ORDER, tmp_path, run(GPU, timed))
    assert found["watts_per_gpu"] == pytest.approx(500)
    assert found["basis"]["energy_kwh"].startswith("measured: ")
    assert planned(ORDER, tmp_path)["watts_per_gpu"] == 700


def test_rows_without_a_time_and_fp32_on_gpus_are_left_out():
    good = row("eager", "vit_tiny/16", 4, GPU, flat(0.5))
    left = [{"row": "compiled", "absent": "no compiler"}, good | {"dtype": "fp32"}, good | {"row": "another"}]
    assert len(steps_of([run(GPU, good, *left), run(GPU, good) | {"suite": "scaling"}])) == 1


def test_the_published_code_is_counted_as_eager():
    rows = [row("eager", "vit_tiny/16", 4, CPU, flat(0.5)), row("eager", "vit_tiny/16", 8, CPU, flat(0.5))]
    eager, official = steps_of([run(CPU, rows[0], rows[1] | {"row": "official"})])
    assert official.implementation == "eager"
    assert all(c.basis == "other steps of the machine" and c.within(0.01) for c in check([eager, official]))


def test_reading_of_pictures(tmp_path: Path):
    rows = [{"engine": "fastjepa", "workers": 2, "images_per_second_per_core": rate} for rate in (600.0, 500.0, None)]
    rows += [{"engine": "DALI", "images_per_second_per_core": 9000.0}]
    runs = [run(CPU, *rows) | {"suite": "input"}]
    rate, source = images_per_core(runs)
    assert rate == 600
    assert source == "measured: fastjepa, 2 workers, a processor, 2 threads"
    found = planned(ORDER, tmp_path, *runs)["input"]
    assert found["cores_per_node"] == pytest.approx(found["images_per_second_per_node"] / 600)
    assert images_per_core([]) is None
    pillow = {"engine": "fastjepa, engine pillow", "workers": 1, "images_per_second_per_core": 700.0}
    faster = [run(CPU, *rows, pillow) | {"suite": "input"}]
    assert images_per_core(faster) == (700, "measured: fastjepa, engine pillow, 1 workers, a processor, 2 threads")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ('{"format": "other"}', "no results file"),
        ('{"format": "fastjepa benchmarks", "version": 2, "runs": []}', "has version 2, and 1 is read here"),
        ('{"format": "fastjepa benchmarks", "version": 1, "runs": [1]}', "each of its runs must have"),
        ('{"format": "fastjepa benchmarks", "version": 1, "runs": [{"suite": "step", "machine": {}, "rows": [1]}]}',
         "each of its runs must have"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str | None, said: str):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_runs(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "vit_hug/14"}, "unknown model 'vit_hug'; did you mean vit_huge"),
        ({"model": "vit_tiny/15"}, "patch_size=15 does not divide"),
        ({"model": "vit_tiny"}, "mask.patch_size must be a whole number"),
        ({"parts_ms": {"target": 1.0}}, "no positive time or size of context, predictor, loss, optimizer"),
        ({"batch": "four"}, "batch is 'four', and must be int"),
        ({"context_tokens": None}, "context_tokens is None"),
        ({"ms": -1.0}, "no positive time or size"),
    ],
)
def test_rows_that_say_too_little_are_refused(change: dict[str, Any], said: str):
    good = row("eager", "vit_tiny/16", 4, CPU, flat(0.5))
    with pytest.raises(ValueError, match=f"row 'eager'.*{said}"):
        steps_of([run(CPU, good | change)])


def test_a_machine_without_a_roof_is_refused():
    with pytest.raises(ValueError, match="no matmul_rate"):
        steps_of([run(CPU | {"matmul_rate": None}, row("eager", "vit_tiny/16", 4, CPU, flat(0.5)))])
