"""The collapse watch."""

from __future__ import annotations

import pytest
import torch

from fastjepa.training import engine
from fastjepa.training.watch import CollapseWatch
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
    batch = batches[0]
    shapes = [list(trainer.train_step(batch)[1].shape) for _ in range(4)]
    assert shapes == [[4, 64, 48], [len(batch.targets.kept), 48]] * 2
    assert len(batch.targets.kept) < 4 * 64
