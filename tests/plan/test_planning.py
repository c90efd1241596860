"""The plan of a run: the contract's figures, arithmetic that can be checked by hand, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.chips import CHIPS, chip
from fastjepa.cli import main
from fastjepa.plan import Order, find_chip, plan, recipe, render
from fastjepa.plan.assumed import LIKE, NEMO, NETWORK, PUBLISHED_HOURS, fraction
from fastjepa.plan.planning import IMAGENET

CONTRACT = ("hours", "gpu_hours", "images_per_second_per_gpu", "mfu", "flops_per_image", "peak_memory_bytes", "basis")
SMALL = recipe(None, {"model": "vit_tiny", "batch_size": 32, "epochs": 10})
ORDER = Order(SMALL, find_chip("a100-80g"), 16)


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """The published run, ours."""
    order = Order(recipe(None, {"model": "vit_huge", "patch_size": 14}), find_chip("a100-80g"), 16)
    return plan(order)


def test_the_contracts_figures(official: dict[str, Any]):
    assert set(CONTRACT) <= set(official)
    for masking in official["maskings"].values():
        assert set(CONTRACT) <= set(masking)
        numbers = {name for name, value in masking.items() if isinstance(value, int | float)} - {
            "fits",
            "watts_per_gpu",
        }
        assert numbers <= set(masking["basis"]), "a figure that rests on nothing"
        assert all(masking["basis"].values())
    assert json.loads(json.dumps(official)) == official


def test_the_published_run(official: dict[str, Any]):
    """Tokens, FLOPs and steps that are known, and figures that follow from one another."""
    cut, whole = official["maskings"]["truncated"], official["maskings"]["ragged"]
    assert official["masking"] == "truncated"
    assert official["steps"] == 300 * (IMAGENET // 2048) == 187_500
    assert cut["context_tokens"] == pytest.approx(69, abs=2)
    assert whole["context_tokens"] == pytest.approx(110, abs=2)
    assert cut["flops_per_image"] == pytest.approx(655e9, rel=0.02)
    assert whole["flops_per_image"] == pytest.approx(840e9, rel=0.02)
    assert official["parameters"] == {"encoder": 630_434_560, "predictor": 22_279_424}
    for found in (cut, whole):
        assert found["seconds_per_step"] == pytest.approx(sum(part["seconds"] for part in found["parts"].values()))
        assert found["hours"] == pytest.approx(found["seconds_per_step"] * 187_500 / 3600)
        assert found["gpu_hours"] == pytest.approx(16 * found["hours"])
        assert found["images_per_second"] == pytest.approx(2048 / found["seconds_per_step"])
        rate = found["images_per_second_per_gpu"]
        assert found["mfu"] == pytest.approx(rate * found["flops_per_image"] / 312e12)
        assert found["floor_hours"] < found["hours"]
        assert found["energy_kwh"] == pytest.approx(0.4 * found["gpu_hours"])
        assert found["input"]["images_per_second_per_node"] == pytest.approx(8 * rate)
    assert official["published"]["images_per_second_per_gpu"] == pytest.approx(93, abs=1)
    assert official["published"]["gpu_hours"] == 1152


def test_small_models_wait_for_their_launches_unless_they_come_from_graphs():
    config = recipe(Path("vitt8_96px_one_gpu"), {})
    order = Order(config, find_chip("a100-80g"), images=9469)
    launched = plan(order, "ragged")
    graphs = plan(replace(order, config=replace(config, runtime=replace(config.runtime, cuda_graphs=True))), "ragged")
    parts = launched["parts"]
    assert 1e-3 * 20 < launched["seconds_per_step"] == pytest.approx((141 + 34 * 12 + 26 * 4) * 45e-6)
    assert parts["launching"]["seconds"] > 0 == graphs["parts"]["launching"]["seconds"]
    assert graphs["seconds_per_step"] == pytest.approx(launched["seconds_per_step"] - parts["launching"]["seconds"])
    more = graphs["memory"]["activations"] - launched["memory"]["activations"]
    assert more == launched["memory"]["activations"]
    assert graphs["peak_memory_bytes"] == launched["peak_memory_bytes"] + more
    several = plan(replace(order, gpus=2, config=replace(config, runtime=replace(config.runtime, cuda_graphs=True))))
    assert several["parts"]["launching"]["seconds"] > 0, "graphs are for one GPU"
    assert "653 launches" in launched["basis"]["parts.launching"]
    assert "one launch" in graphs["basis"]["parts.launching"]


def test_what_a_configuration_sets_is_in_the_plan():
    def planned(*overrides: str) -> dict[str, Any]:
        return plan(Order(recipe(None, {"model": "vit_base"}, overrides), find_chip("h100"), 4), "ragged")

    usual, parts = planned(), planned("runtime.accumulate=4")
    assert usual["settings"] == {"narrow_stream": False, "activation_checkpointing": False, "accumulate": 1}
    assert usual["left_out"] == []
    held = parts["memory"]
    assert held["activations"] == pytest.approx(usual["memory"]["activations"] / 4, rel=1e-6)
    assert held["earlier"] == held["buckets"] == 4 * sum(parts["parameters"].values())
    assert usual["memory"]["earlier"] == 0
    assert parts["largest_batch"] > 2 * usual["largest_batch"]
    thirds = planned("runtime.accumulate=3", "data.batch_size=96")
    assert thirds["largest_batch"] % 3 == 0 < thirds["largest_batch"]
    assert parts["hours"] > usual["hours"]
    hidden = [2 / 3 * found["parts"]["context"]["seconds"] for found in (usual, parts)]
    assert usual["communication"]["hidden_behind"] == pytest.approx(hidden[0])
    assert parts["communication"]["hidden_behind"] == pytest.approx(hidden[1] / 4), "the last part's alone"
    again, narrow = planned("runtime.activation_checkpointing=true"), planned("runtime.narrow_stream=true")
    some = planned("runtime.activation_checkpointing=predictor")
    assert some["settings"]["activation_checkpointing"] == "predictor"
    assert again["peak_memory_bytes"] < some["peak_memory_bytes"] < narrow["peak_memory_bytes"]
    assert narrow["peak_memory_bytes"] < usual["peak_memory_bytes"]
    assert usual["hours"] < some["hours"] < again["hours"]
    assert some["parts"]["context"]["flops"] == usual["parts"]["context"]["flops"]
    assert some["parts"]["predictor"]["flops"] == again["parts"]["predictor"]["flops"]
    assert "fastjepa, predictor checkpointing\n" in render(some)
    assert narrow["hours"] < usual["hours"] < again["hours"]
    assert again["parts"]["context"]["flops"] > 1.2 * usual["parts"]["context"]["flops"]
    assert again["flops_per_image"] == usual["flops_per_image"], "what the masks need"
    sent = planned("runtime.compress_gradients=true")["communication"]
    for name in ("gradient_bytes", "seconds", "exposed_seconds"):
        assert sent[name] == pytest.approx(usual["communication"][name] / 2)
    eager = plan(Order(recipe(None, None, ["runtime.accumulate=4"]), find_chip("h100"), 4, implementation="eager"))
    assert eager["settings"]["accumulate"] == 1, "settings are of ours"
    text = render(parts)
    assert "fastjepa, 4 parts\n" in text
    assert "planned without" not in text


def test_what_the_plan_knows_nothing_of_is_said():
    def left_out(override: str, gpus: int) -> list[str]:
        found = plan(Order(recipe(None, {"model": "vit_tiny"}, [override]), find_chip("h100"), gpus), "truncated")
        assert (f"planned without: {override.split('=')[0]}\n" in render(found)) == bool(found["left_out"])
        return found["left_out"]

    assert left_out("runtime.fp8_target=true", 1) == ["runtime.fp8_target"]
    assert left_out("runtime.attention=sdpa", 1) == ["runtime.attention"]
    for name in ("runtime.shard", "runtime.cuda_graphs"):
        assert left_out(f"{name}=true", 2) == [name]
        assert left_out(f"{name}=true", 1) == [], "it does nothing there, or is in the plan"


def test_what_goes_before_what():
    """An option before an override, an override before what a model brings, a model's before the configuration's."""
    found = recipe(None, {"model": "vit_base", "batch_size": 64}, ["mask.patch_size=8", "data.batch_size=32"])
    assert (found.mask.patch_size, found.meta.pred_depth, found.data.batch_size) == (8, 6, 64)
    assert recipe(None, {"model": "vit_base", "patch_size": 32}, ["mask.patch_size=8"]).mask.patch_size == 32


def test_several_gpus_hold_buckets_of_gradients():
    one, two = (plan(replace(ORDER, gpus=gpus), "truncated") for gpus in (1, 2))
    gradients = 4 * sum(one["parameters"].values())
    assert (one["memory"]["buckets"], one["memory"]["gradients"]) == (0, gradients)
    assert (two["memory"]["buckets"], two["memory"]["gradients"]) == (gradients, 0), "which lie in the buckets"
    eager = plan(replace(ORDER, implementation="eager"))["memory"]
    assert eager["buckets"] == eager["gradients"] == gradients
    assert two["peak_memory_bytes"] == one["peak_memory_bytes"] + gradients


def test_gradients_of_the_published_run(official: dict[str, Any]):
    """652.7 M parameters in fp32; each GPU sends 30/16 of them, which the network of a node passes."""
    sent = official["communication"]
    assert sent["gradient_bytes"] == 4 * (630_434_560 + 22_279_424)
    assert sent["bytes_per_gpu"] == pytest.approx(30 / 16 * sent["gradient_bytes"])
    assert sent["link"] == "the network between nodes"
    assert sent["link_bytes_per_second"] == 0.75 * 200e9
    assert sent["needed_bytes_per_second"] == pytest.approx(sent["bytes_per_gpu"] / sent["hidden_behind"])
    assert sent["hidden_behind"] == pytest.approx(2 / 3 * official["parts"]["context"]["seconds"])
    assert sent["hides"]


def test_a_slow_network_shows():
    quick, slow = plan(ORDER, "truncated"), plan(replace(ORDER, network=1e8), "truncated")
    sent = slow["communication"]
    assert not sent["hides"]
    assert sent["exposed_seconds"] == pytest.approx(sent["seconds"] - sent["hidden_behind"])
    assert slow["hours"] > quick["hours"]
    assert "given: --network-gb-per-s" in slow["basis"]["communication"]
    inside = plan(replace(ORDER, gpus=8, network=1e8), "truncated")["communication"]
    assert inside["link"] == "a100-80g's link within a node"
    alone = plan(replace(ORDER, gpus=1), "truncated")
    assert alone["communication"]["exposed_seconds"] == 0


def test_twice_the_gpus_half_the_hours():
    one, two = (plan(replace(ORDER, gpus=gpus), "ragged") for gpus in (8, 16))
    assert two["hours"] == pytest.approx(one["hours"] / 2, rel=0.02)
    assert two["gpu_hours"] == pytest.approx(one["gpu_hours"], rel=0.02)


def test_prices():
    found = plan(replace(ORDER, price_per_gpu_hour=2.5, price_per_kwh=0.2, currency="EUR"), "truncated")
    assert found["cost"]["gpus"] == pytest.approx(2.5 * found["gpu_hours"])
    assert found["cost"]["energy"] == pytest.approx(0.2 * found["energy_kwh"])
    assert found["cost"]["total"] == pytest.approx(found["cost"]["gpus"] + found["cost"]["energy"])
    assert "cost, EUR" in render(found)
    assert plan(ORDER, "truncated")["cost"] is None


def test_the_text_says_all(official: dict[str, Any]):
    text = render(official)
    assert "vit_huge/14 at 224 px" in text
    for name in ("hours", "MFU", "largest batch a GPU", "it hides", "communication", "for comparison: under 72 hours"):
        assert name in text
    for masking in official["maskings"].values():
        for name in ("hours", "peak_memory_bytes", "parts.target", "communication", "input"):
            assert masking["basis"][name] in text


def test_a_batch_that_does_not_fit_is_said():
    found = plan(Order(recipe(None, {"batch_size": 512}), find_chip("4090")), "ragged")
    assert not found["fits"]
    assert f"does not fit: ragged masks, at most {found['largest_batch']} images a GPU" in render(found)


def test_what_is_published_comes_back():
    """Eager on 16 A100 takes the published hours; NeMo's fractions are of these MFUs on each chip."""
    order = Order(recipe(), find_chip("a100-80g"), 16, implementation="eager")
    found = plan(order)
    assert list(found["maskings"]) == ["truncated"]
    assert found["hours"] == pytest.approx(PUBLISHED_HOURS.value, rel=1e-3)
    assert "published: 72 hours or less of ViT-H/14" in found["basis"]["hours"]
    length = 256
    flops = 3 * 40 * length * (8 * 1408**2 + 4 * 1408 * 6144 + 4 * length * 1408)
    for name, mfu in (("a100-80g", 0.445), ("h100", 0.289)):
        reached = flops * NEMO[name].value / 8 / chip(name).flops
        assert reached == pytest.approx(mfu, abs=0.003)
        assert reached < fraction("compiled", name).value < 1.5 * reached  # bytes are in it too


@pytest.mark.parametrize("name", [c.name for c in CHIPS])
@pytest.mark.parametrize("implementation", ["fastjepa", "compiled", "eager"])
def test_every_chip_has_its_assumptions(name: str, implementation: str):
    found = fraction(implementation, name)
    assert 0 < found.value < 1
    assert NETWORK[name].value > 0
    assert ("carried over" in found.source) == (LIKE[name] != name or (implementation, name) == ("eager", "h100"))


def test_a_configuration_gives_model_masks_batch_and_epochs(tmp_path: Path):
    found = recipe("in1k_vitb16_ep600", {"batch_size": 64})
    assert (found.meta.model_name, found.meta.pred_depth, found.optimization.epochs) == ("vit_base", 6, 600)
    assert found.data.batch_size == 64
    assert plan(Order(recipe("in1k_vith14_ep300_ragged"), find_chip("h100")))["masking"] == "ragged"
    assert recipe(None, {"model": "vit_large"}).mask.patch_size == 16
    assert recipe(None, {"model": "vit_small"}).meta.pred_depth == 6
    assert recipe(None, {"model": "vit_huge", "enc_mask_scale": [0.5, 0.6]}).mask.enc_mask_scale == (0.5, 0.6)


def test_two_contexts_and_other_targets():
    two = plan(Order(recipe(None, {"model": "vit_tiny", "nenc": 2, "npred": 2}), find_chip("h100")), "truncated")
    one = plan(Order(recipe(None, {"model": "vit_tiny", "npred": 2}), find_chip("h100")), "truncated")
    assert two["context_tokens"] == pytest.approx(2 * one["context_tokens"], rel=0.1)
    assert two["parts"]["predictor"]["flops"] == pytest.approx(2 * one["parts"]["predictor"]["flops"], rel=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpu a100", "unknown GPU 'a100'; did you mean a100-80g or a100-40g?"),
        ("--gpu h2000", "did you mean h200?"),
        ("--model vit_hug", "unknown model 'vit_hug'; did you mean vit_huge?"),
        ("--config in1k", "no such configuration file; shipped ones are"),
        ("--patch-size 15", "mask.patch_size=15 does not divide data.crop_size=224; 14 and 16 do"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--gpus-per-node 0", "--gpus-per-node must be at least 1"),
        ("--batch-size -3", "--batch-size must be at least 1, got -3"),
        ("--price-per-gpu-hour -1", "--price-per-gpu-hour must be 0 or more, got -1"),
        ("--price-per-kwh nan", "--price-per-kwh must be 0 or more, got nan"),
        ("--network-gb-per-s 0", "--network-gb-per-s must be above 0"),
        ("--masking cut", "--masking must be one of truncated, ragged and both, got 'cut'"),
        ("--implementation ours", "--implementation must be one of fastjepa, compiled, eager, got 'ours'"),
        ("--implementation eager --masking ragged", "--masking ragged needs --implementation fastjepa"),
        ("--images 100", "fewer than one step takes"),
        ("--min-keep 100", "no mask is possible"),
        ("meta.use_bfloat16=false", "add meta.use_bfloat16=true"),
        ("--check runtime.accumulate=4", "--check and --field plan no run: leave out runtime.accumulate=4"),
        ("runtime.acumulate=2", "unknown key runtime.acumulate; did you mean accumulate?"),
        ("--batch-size 96 runtime.accumulate=5", "runtime.accumulate=5 does not divide data.batch_size=96"),
        ("--pred-emb-dim 100", "num_heads=16 does not divide the width 100"),
        ("--measured {old}", "has version 0, and 1 is read here"),
        ("--measured nothing.json", "nothing.json: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys, words: str, said: str):
    old = tmp_path / "old.json"
    old.write_text('{"format": "fastjepa benchmarks", "version": 0, "runs": []}')
    assert main(["plan", *words.format(old=old).split()]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastjepa plan: ")
    assert said in lines[0]
    assert captured.out == ""


def test_the_command(tmp_path: Path, capsys):
    options = ["plan", "--model", "vit_tiny", "--gpu", "h100", "--gpus", "4", "--masking", "truncated"]
    assert main([*options, "--json", str(tmp_path / "plan.json")]) == 0
    assert "vit_tiny/16" in capsys.readouterr().out
    assert main([*options, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    assert printed["hours"] > 0


def test_the_check_of_the_command(tmp_path: Path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text('{"format": "fastjepa benchmarks", "version": 1, "runs": []}')
    assert main(["plan", "--check", "--measured", str(empty)]) == 0
    assert "no measured step" in capsys.readouterr().out
    assert main(["plan", "--check", "--measured", str(empty), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_it_needs_no_triton():
    """As on a machine that has none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from fastjepa.cli import main\n"
        "assert 'fastjepa.plan' not in sys.modules\n"
        "raise SystemExit(main(['plan', '--model', 'vit_tiny', '--masking', 'truncated']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MFU" in done.stdout
