"""What watches a run: collapse, spikes, steps that were skipped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastjepa.training import engine
from fastjepa.training.watch import CollapseWatch, SpikeWatch
from tests.helpers import make_pictures, tiny_config


def test_look_at_healthy_and_collapsed_features():
    healthy = torch.randn(16, 20, 32)
    rank, spread = CollapseWatch.look(healthy).tolist()
    assert rank > 28
    assert spread == pytest.approx(1.0, abs=0.1)
    same = torch.randn(1, 20, 32).expand(16, 20, 32)
    assert CollapseWatch.look(same)[1] < 1e-6
    line = torch.randn(16, 20, 1) * torch.randn(32)
    assert CollapseWatch.look(line)[0] < 1.1


def test_warnings_come_once_and_in_words():
    watch = CollapseWatch()
    assert watch.judge(30.0, 0.5) is None
    said = watch.judge(5.0, 0.5)
    assert said is not None
    assert "fallen to 5.0 effective directions, from 30.0" in said
    assert watch.judge(5.0, 0.5) is None
    said = watch.judge(5.0, 0.001)
    assert said is not None
    assert "hardly differ between pictures" in said
    assert watch.judge(28.0, 0.5) is None
    assert watch.judge(4.0, 0.5) is not None


def test_bf16_and_one_picture():
    assert torch.isfinite(CollapseWatch.look(torch.randn(1, 4, 8, dtype=torch.bfloat16))).all()


def test_whole_images_are_encoded_on_watched_steps_alone(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    config = tiny_config(pictures, tmp_path / "run", mask={"ragged": True}, logging={"watch_every": 2})
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    batch, encoded = batches[0], []
    trainer.model.target_encoder.register_forward_hook(lambda module, inputs, out: encoded.append(list(out.shape)))
    given = [trainer.train_step(batch)[1] for _ in range(4)]
    assert encoded == [[4, 64, 48], [len(batch.targets.kept), 48]] * 2
    assert len(batch.targets.kept) < 4 * 64
    assert [None if features is None else list(features.shape) for features in given] == [[4, 64, 48], None] * 2


def test_a_loss_that_leaps_is_said_once():
    watch = SpikeWatch()
    rng = np.random.default_rng(0)
    said = [watch.judge(step, 0.4 - 2e-4 * step + 0.01 * rng.normal()) for step in range(300)]
    assert said == [None] * 300
    spikes = [watch.judge(300 + i, loss) for i, loss in enumerate([0.9, math.nan, 1.1, 0.34, 0.33, 0.8])]
    assert [bool(warning) for warning in spikes] == [True, False, False, False, False, True]
    assert "the loss leapt to 0.9 at step 300" in (spikes[0] or "")


def test_a_loss_that_stays_high_becomes_the_mean():
    watch = SpikeWatch()
    for step in range(200):
        watch.judge(step, 0.3)
    said = [watch.judge(200 + i, 0.6) for i in range(300)]
    assert sum(map(bool, said)) == 1
    assert not watch.above


def test_the_first_steps_are_no_spikes():
    assert not any(SpikeWatch().judge(step, loss) for step, loss in enumerate([1.0, 5.0, 0.1, 9.0]))


def test_features_that_are_not_finite_are_not_judged():
    rank, spread = CollapseWatch.look(torch.full((4, 6, 3), math.nan)).tolist()
    assert CollapseWatch().judge(rank, spread) is None
