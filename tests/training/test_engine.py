"""Training: exact resume, what is written, what a step costs in waiting, and what ends a run."""

from __future__ import annotations

import copy
import csv
import math
import os

import pytest
import torch

import fastjepa
from fastjepa import read_checkpoint
from fastjepa.config import parse_config
from fastjepa.schedules import Schedules
from fastjepa.training import build_models, engine, parameter_groups, train
from fastjepa.training.log import COLUMNS, OURS
from tests.helpers import make_pictures, tiny_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("changes", [{}, {"mask": {"ragged": True}}, {"meta": {"use_bfloat16": True}}])
@pytest.mark.parametrize("stop", [5, 6])  # in the middle of an epoch and at its end
def test_resume_is_exact(pictures, tmp_path, changes, stop):
    def run(name, **runtime):
        resumes = {"meta": changes.get("meta", {}) | runtime.pop("meta", {})}
        settings = {"progress": False, "save_every": 5, "device": "cpu", **runtime}
        return train(tiny_config(pictures, tmp_path / name, **{**changes, **resumes}, runtime=settings))

    whole = run("whole", stop_after=10)
    run("parts", stop_after=stop)
    torch.rand(7)  # what happens in between must not matter
    parts = run("parts", stop_after=10, meta={"load_checkpoint": True})
    ours, theirs = read_checkpoint(whole.checkpoint), read_checkpoint(parts.checkpoint)
    for state in (ours, theirs):
        state["fastjepa"].pop("config")
    assert equal(ours, theirs)
    assert ours["fastjepa"]["step"] == 10
    logged = [rows_of(tmp_path / name / "jepa_r0.csv") for name in ("whole", "parts")]
    assert [r["loss"] for r in logged[0]] == [r["loss"] for r in logged[1]]
    assert [int(r["step"]) for r in logged[1]] == list(range(10))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 2},
        {"accumulate": 4},
        {"activation_checkpointing": True},
        {"activation_checkpointing": "predictor"},
    ],
)
def test_a_batch_in_parts_or_with_less_kept_is_the_same_run(pictures, tmp_path, ragged, change):
    def run(name, **runtime):
        settings = {"progress": False, "device": "cpu", "stop_after": 4, **runtime}
        return train(tiny_config(pictures, tmp_path / name, mask={"ragged": ragged}, runtime=settings))

    whole, parts = run("whole"), run("parts", **change)
    again = change.get("activation_checkpointing", False)
    assert parts.model.predictor.recompute == bool(again)
    assert parts.model.encoder.recompute == (again is True)
    assert [row["loss"] for row in parts.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-5)
    states = whole.model.state_dict(), parts.model.state_dict()
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)


def test_an_fp8_target_is_near_a_bf16_one(pictures, tmp_path):
    """The loss of the first step, whose weights are the same, within a percent; none of the target's copies is kept."""

    def run(name, **runtime):
        settings = {"progress": False, "device": "cpu", "stop_after": 3, **runtime}
        return train(tiny_config(pictures, tmp_path / name, meta={"use_bfloat16": True}, runtime=settings))

    plain, fp8 = run("plain"), run("fp8", fp8_target=True)
    first, wanted = fp8.rows[0]["loss"], plain.rows[0]["loss"]
    assert first != wanted
    assert first == pytest.approx(wanted, rel=0.01)
    linears = [m for m in fp8.model.target_encoder.modules() if isinstance(m, fastjepa.nn.Linear)]
    assert linears
    assert all(layer.quantised is not None and layer.copies is None for layer in linears)
    with pytest.raises(ValueError, match=r"runtime\.fp8_target needs meta\.use_bfloat16"):
        parse_config(tiny_config(pictures, tmp_path).to_dict() | {"runtime": {"fp8_target": True}})


def test_bf16_weights_are_not_cast_in_a_step(pictures, tmp_path, monkeypatch):
    """The optimizer keeps copies of them; those that it does not are the patch embeddings'."""
    config = tiny_config(pictures, tmp_path, meta={"use_bfloat16": True})
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    trainer.train_step(batches[0])
    shapes = [p.shape for p in trainer.model.parameters() if p.dim() == 2]
    cast = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                cast.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *inputs: within(Casts(), forward, *inputs))
    trainer.train_step(batches[1])
    embed = trainer.model.encoder.patch_embed.proj.weight.flatten(1).shape
    assert [shape for shape in cast if shape in {*shapes, embed}] == [embed, embed]


def within(mode, function, *inputs):
    with mode:
        return function(*inputs)


def test_rows_logged_past_the_checkpoint_are_dropped(pictures, tmp_path):
    settings = {"progress": False, "device": "cpu", "save_every": 4}
    train(tiny_config(pictures, tmp_path, runtime={**settings, "stop_after": 7}))
    (tmp_path / "jepa-latest.pth.tar").unlink()
    meta = {"load_checkpoint": True, "read_checkpoint": "jepa-step00000006.pth.tar"}
    train(tiny_config(pictures, tmp_path, meta=meta, runtime={**settings, "stop_after": 9}))
    rows = rows_of(tmp_path / "jepa_r0.csv")
    assert [int(r["step"]) for r in rows] == list(range(9))


def test_what_is_written(pictures, tmp_path):
    result = train(tiny_config(pictures, tmp_path, optimization={"epochs": 3, "warmup": 1}))
    assert result.steps == 18
    with open(tmp_path / "jepa_r0.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS + OURS
    assert [(r["epoch"], r["itr"]) for r in rows[5:8]] == [("1", "5"), ("2", "0"), ("2", "1")]
    assert all(math.isfinite(float(r["loss"])) and float(r["time (ms)"]) >= 0 for r in rows)
    assert any(r["rankme"] for r in rows)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"jepa-latest.pth.tar", "params-ijepa.yaml", "jepa_r0.csv"} <= names
    assert {n for n in names if "-step" in n} == {"jepa-step00000015.pth.tar", "jepa-step00000018.pth.tar"}
    state = read_checkpoint(tmp_path / "jepa-latest.pth.tar")
    assert (state["epoch"], state["batch_size"], state["world_size"], state["lr"]) == (3, 4, 1, 1e-3)
    assert set(state) >= {"encoder", "predictor", "target_encoder", "opt", "scaler", "epoch", "loss"}
    raw = torch.load(tmp_path / "jepa-latest.pth.tar", weights_only=True)
    assert all(key.startswith("module.") for key in raw["encoder"])  # as the official loader expects


def test_every_fiftieth_epoch_is_kept(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path, data={"batch_size": 24}, optimization={"epochs": 51, "warmup": 1})
    train(config)
    kept = read_checkpoint(tmp_path / "jepa-ep50.pth.tar")
    assert kept["epoch"] == 50


def test_loss_falls(pictures, tmp_path):
    rows = train(tiny_config(pictures, tmp_path, optimization={"epochs": 10, "warmup": 1})).rows
    assert sum(r["loss"] for r in rows[-6:]) < 0.8 * sum(r["loss"] for r in rows[:6])


def test_official_checkpoint_goes_on(pictures, tmp_path):
    run = train(tiny_config(pictures, tmp_path, runtime={"stop_after": 6, "progress": False, "device": "cpu"}))
    state = torch.load(run.checkpoint, weights_only=True)
    del state["fastjepa"]  # what is left is the official layout
    torch.save(state, tmp_path / "official.pth.tar")
    meta = {"load_checkpoint": True, "read_checkpoint": "official.pth.tar"}
    result = train(tiny_config(pictures, tmp_path, meta=meta))
    assert result.steps == 12
    assert result.rows[0]["step"] == 6


@pytest.mark.parametrize("name", ["jepa_r0.csv", "params-ijepa.yaml", ".jepa-latest.pth.tar.part", "tensorboard"])
def test_links_in_the_folder_are_not_followed(pictures, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    with pytest.raises(ValueError, match="is a symbolic link, and a run writes in its own folder alone"):
        train(tiny_config(pictures, tmp_path / "run"))
    assert victim.read_text() == "mine"


def test_refuses_to_write_over_a_run(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path, runtime={"stop_after": 1, "progress": False, "device": "cpu"})
    train(config)
    with pytest.raises(ValueError, match="holds a run already: meta.load_checkpoint=true resumes it"):
        train(config)


def test_resume_refuses_other_runs(pictures, tmp_path):
    train(tiny_config(pictures, tmp_path, runtime={"stop_after": 2, "progress": False, "device": "cpu"}))
    resume = {"load_checkpoint": True}
    with pytest.raises(ValueError, match=r"is of another model: pos_embed is \[1, 64, 48\] there"):
        train(tiny_config(pictures, tmp_path, meta={**resume, "embed_dim": 96}))
    with pytest.raises(ValueError, match="have changed"):
        train(tiny_config(pictures, tmp_path, meta=resume, data={"batch_size": 8}))
    with pytest.raises(ValueError, match="no checkpoint at"):
        train(tiny_config(pictures, tmp_path / "elsewhere", meta=resume))
    (tmp_path / "jepa-latest.pth.tar").unlink()
    (tmp_path / "jepa-latest.pth.tar").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
        train(tiny_config(pictures, tmp_path, meta=resume))


def spoil(monkeypatch, steps, what="loss", value=math.nan, rank="0"):
    """The loss of these steps, or one gradient of them, is `value` in the process of that rank."""
    real = engine.Trainer.train_step

    def spoilt(trainer, batch):
        spoils = trainer.step in steps and os.environ.get("RANK", "0") == rank
        weight = trainer.model.predictor.predictor_proj.weight
        if what == "loss":
            hook = trainer.forward.register_forward_hook(lambda m, i, out: (out[0] + value, out[1]) if spoils else None)
        else:
            hook = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), value) if spoils else grad)
        done = real(trainer, batch)
        hook.remove()
        return done

    monkeypatch.setattr(engine.Trainer, "train_step", spoilt)


@pytest.mark.parametrize("what, value", [("loss", math.nan), ("loss", math.inf), ("gradient", -math.inf)])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(pictures, tmp_path, monkeypatch, capsys, what, value, bf16):
    spoil(monkeypatch, {4, 5, 9}, what, value)
    states = {}
    config = tiny_config(pictures, tmp_path, meta={"use_bfloat16": bf16}, logging={"every": 2})

    def keep(trainer):
        states[trainer.step] = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))

    result = train(config, keep)
    weights = {step: (model, state["state"]) for step, (model, state) in states.items()}
    assert equal(weights[4], weights[6])  # after step 3 and after step 5
    assert equal(weights[9], weights[10])
    assert not equal(
        weights[6][0]["target_encoder.blocks.0.attn.qkv.weight"],
        weights[7][0]["target_encoder.blocks.0.attn.qkv.weight"],
    )
    assert [row["step"] for row in result.rows if row["skipped"]] == [4, 5, 9]
    assert all(math.isfinite(row["grad norm"]) != row["skipped"] for row in result.rows)
    said = capsys.readouterr().err
    assert "step 5 was skipped" in said
    assert "(2 skipped so far, 2 in a row)" in said
    assert "(3 skipped so far, 1 in a row)" in said
    listed = rows_of(tmp_path / "jepa-skipped.csv")
    batches, _ = engine.prepare_data(config)
    for step in (4, 5, 9):
        names = {row["picture"] for row in listed if row["step"] == str(step)}
        assert names == {batches.folder.name(int(i)) for i in batches[step].samples}
    assert any(name in said for name in names)
    assert result.steps == 12
    kept = read_checkpoint(result.checkpoint)
    assert {state["step"].item() for state in kept["opt"]["state"].values()} == {9.0}


def test_a_run_with_skipped_steps_resumes_exactly(pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, {4, 5, 6, 9})

    def run(name, stop, **meta):
        config = tiny_config(
            pictures,
            tmp_path / name,
            meta=meta,
            runtime={"progress": False, "device": "cpu", "stop_after": stop, "save_every": 3},
        )
        return train(config)

    whole = run("whole", 12)
    run("parts", 6)  # in the midst of them
    parts = run("parts", 12, load_checkpoint=True)
    ours, theirs = read_checkpoint(whole.checkpoint), read_checkpoint(parts.checkpoint)
    for state in (ours, theirs):
        state["fastjepa"].pop("config")
    assert equal(ours, theirs)
    for name in ("jepa_r0.csv", "jepa-skipped.csv"):
        logged = [rows_of(tmp_path / run / name) for run in ("whole", "parts")]
        assert [{k: v for k, v in row.items() if k not in ("time (ms)", "images/s")} for row in logged[0]] == [
            {k: v for k, v in row.items() if k not in ("time (ms)", "images/s")} for row in logged[1]
        ]


def test_too_many_skipped_steps_in_a_row_end_the_run(pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 7, 8, 9, 10, 11})
    config = tiny_config(
        pictures, tmp_path, runtime={"progress": False, "device": "cpu", "save_every": 2, "max_skipped": 3}
    )
    with pytest.raises(FloatingPointError) as caught:
        train(config)
    latest = tmp_path / "jepa-latest.pth.tar"
    assert str(caught.value) == (
        "3 steps in a row, the last of them step 9, were skipped because their loss or gradient is not finite "
        f"(runtime.max_skipped); the last good checkpoint is {latest}"
    )
    kept = read_checkpoint(latest)  # neither step 6, which ends an epoch, nor 8 was good
    assert kept["fastjepa"]["step"] == 4
    assert [int(row["step"]) for row in rows_of(tmp_path / "jepa_r0.csv")] == list(range(10))


def test_weights_that_are_not_finite_are_never_saved(pictures, tmp_path, monkeypatch):
    """They overflow in a step whose loss and gradient are finite, right before a checkpoint."""

    runtime = {"progress": False, "device": "cpu", "save_every": 1}
    monkeypatch.setattr(Schedules, "lr", lambda self, step: 1e39 if step == 1 else 1e-4)
    config = tiny_config(pictures, tmp_path, runtime=runtime)
    latest = tmp_path / "jepa-latest.pth.tar"
    with pytest.raises(
        FloatingPointError, match=f"a weight is not finite at step 2; the last good checkpoint is {latest}"
    ):
        train(config)
    kept = read_checkpoint(latest)
    assert kept["fastjepa"]["step"] == 1
    assert all(
        bool(v.isfinite().all()) for name in ("encoder", "predictor", "target_encoder") for v in kept[name].values()
    )


def test_failed_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    from fastjepa.training import resume

    real = resume.write_checkpoint
    calls = []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(resume, "write_checkpoint", full)
    result = train(tiny_config(pictures, tmp_path))  # saves at 5, 6, 10, 12
    assert result.steps == 12
    assert "no checkpoint at step 6: No space left on device" in capsys.readouterr().err

    def always_full(state, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write_checkpoint", always_full)
    before = (tmp_path / "jepa-latest.pth.tar").read_bytes()
    config = tiny_config(pictures, tmp_path, meta={"load_checkpoint": True}, optimization={"epochs": 3, "warmup": 1})
    with pytest.raises(OSError, match="jepa-latest.pth.tar is as it was"):
        train(config)
    assert (tmp_path / "jepa-latest.pth.tar").read_bytes() == before


def test_interrupt_saves(pictures, tmp_path):
    def interrupt(trainer):
        if trainer.step == 4:
            raise KeyboardInterrupt

    result = train(tiny_config(pictures, tmp_path), on_step=interrupt)
    assert result.steps == 4
    assert read_checkpoint(result.checkpoint)["fastjepa"]["step"] == 4


def test_nothing_left_to_do(pictures, tmp_path):
    train(tiny_config(pictures, tmp_path))
    again = train(tiny_config(pictures, tmp_path, meta={"load_checkpoint": True}))
    assert (again.steps, again.rows) == (12, [])


def test_a_step_reads_nothing_back(pictures, tmp_path, monkeypatch):
    """A step must not wait for the device: nothing in it may ask a tensor for its value."""
    config = tiny_config(pictures, tmp_path, mask={"ragged": True})
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    meter = engine.Meter(trainer)
    batch = batches[0]
    trainer.train_step(batch)
    asked = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)

        def spy(self, *args, real=real, name=name):
            # masks lie on the CPU here; on a GPU their checks are left out
            if self.is_floating_point():
                asked.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    # Without kernels the optimizer asks the CPU whether to skip; a GPU decides by itself.
    monkeypatch.setattr(trainer.optimizer, "skip_nonfinite", False)
    monkeypatch.setattr(trainer.optimizer, "max_grad_norm", math.inf)
    loss, features = trainer.train_step(batch)
    meter.add(batch, loss, features)
    assert asked == []
    assert not loss.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("ragged", [False, True])
def test_a_step_on_a_gpu_waits_for_nothing(pictures, tmp_path, ragged):
    config = tiny_config(
        pictures, tmp_path, mask={"ragged": ragged}, meta={"use_bfloat16": True}, runtime={"device": "cuda"}
    )
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    for step in range(2):
        trainer.train_step(batches[step].pin_memory())
    batch = batches[2].pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_losses_that_wait_to_be_read_are_single_numbers(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path, mask={"ragged": True})
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    meter = engine.Meter(trainer)
    loss, features = trainer.train_step(batches[0])
    meter.add(batches[0], loss, features)
    assert [kept.untyped_storage().nbytes() for kept in meter.losses] == [4]


def test_parameter_groups_are_the_official_ones(pictures, tmp_path):
    model = build_models(tiny_config(pictures, tmp_path))
    groups = parameter_groups(model.encoder, model.predictor)
    assert [bool(g.get("WD_exclude")) for g in groups] == [False, False, True, True]
    assert [g.get("weight_decay") for g in groups] == [None, None, 0, 0]
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything})
    assert len(everything) == len(list(model.encoder.parameters())) + len(list(model.predictor.parameters()))
    assert all(p.dim() != 1 for g in groups[:2] for p in g["params"])
    assert any(p is model.predictor.mask_token for p in groups[1]["params"])


def test_initialisation_of_a_run(pictures, tmp_path):
    torch.manual_seed(0)
    model = build_models(tiny_config(pictures, tmp_path, meta={"embed_dim": 96, "depth": 4, "patch_embed_scale": 5}))
    assert model.target_encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.encoder.blocks[3].mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for ours, theirs in zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not theirs.requires_grad


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("meta", {"model_name": "vit_hug"}, "did you mean vit_huge"),
        ("meta", {"embed_dim": 50}, "section meta"),
        ("meta", {"num_heads": 5}, "section meta"),
        ("mask", {"min_keep": 60}, "section mask: no mask is possible"),
        ("data", {"batch_size": 500}, "more than the 24 pictures"),
        ("runtime", {"device": "cuda:99"}, "runtime.device"),
        ("runtime", {"device": "toaster"}, "runtime.device"),
        ("logging", {"folder": "/proc/nowhere"}, "logging.folder: cannot write"),
    ],
)
def test_settings_that_will_not_do(pictures, tmp_path, section, values, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_config(pictures, tmp_path, **{section: values}))


def test_official_models_have_the_official_sizes():
    with torch.device("meta"):
        encoder = fastjepa.vit_huge(patch_size=14)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(631e6, rel=0.005)
