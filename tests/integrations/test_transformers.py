"""The callback of transformers' Trainer: in the real one where it is installed, and hook by hook where it is not."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from fastjepa.integrations import transformers as ours


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.target_encoder = nn.Linear(3, 2), nn.Linear(3, 2)
        self.judged = []

    def forward(self, x, labels=None):
        if not self.training:
            self.judged.append(self.encoder.weight.detach().clone())
        y = self.encoder(x)
        return {"loss": y.square().mean(), "logits": y}


def test_hook_by_hook(monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "_CALLBACK", object)
    args = types.SimpleNamespace(output_dir=str(tmp_path), should_save=True, resume_from_checkpoint=None)
    state, control = types.SimpleNamespace(global_step=0), types.SimpleNamespace(should_evaluate=False)
    model, callback = Net(), ours.EMACallback(0.5)
    callback.on_train_begin(args, state, control, model=model)
    expected = model.encoder.weight.detach().clone()
    for step in (1, 2):
        with torch.no_grad():
            model.encoder.weight.add_(1.0)
        expected = model.encoder.weight.clone() if step == 1 else 0.5 * expected + 0.5 * model.encoder.weight
        state.global_step, control.should_evaluate = step, step == 2
        callback.on_step_end(args, state, control, model=model)
    torch.testing.assert_close(model.encoder.weight, expected)
    callback.on_evaluate(args, state, control, metrics={})
    torch.testing.assert_close(model.encoder.weight, callback.ema.module.encoder.weight + 0.5)
    (tmp_path / "checkpoint-2").mkdir()
    callback.on_save(args, state, control)

    resumed = ours.EMACallback(0.5)
    resumed.on_train_begin(args, state, control, model=model)
    torch.testing.assert_close(resumed.ema.module.encoder.weight, expected)
    resumed.on_step_end(args, state, control, model=model)  # no optimizer step since
    assert resumed.ema.n_averaged == 2
    resumed.on_evaluate(args, state, control)
    state.global_step = 3
    with pytest.raises(ValueError, match=r"resumes at step 3, but its average, .*checkpoint-3.*ema\.pt, is not there"):
        ours.EMACallback(0.5).on_train_begin(args, state, control, model=model)
    teacher = ours.EMACallback(0.5, "encoder", "target_encoder")
    teacher.on_train_begin(args, state, control, model=model)
    assert teacher.ema.module is model.target_encoder


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ours, "_CALLBACK", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        ours.EMACallback()


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_real_trainer(tmp_path, strategy):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    data = [{"x": torch.randn(3), "labels": 0} for _ in range(8)]

    def train(steps, resume=None):
        torch.manual_seed(0)
        model, callback = Net(), ours.EMACallback(0.75)
        trained = []

        class Record(transformers.TrainerCallback):
            def on_optimizer_step(self, args, state, control, model=None, **rest):
                trained.append(model.encoder.weight.detach().clone())

        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            eval_strategy=strategy,
            eval_steps=2,
            save_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=data, eval_dataset=data, callbacks=[callback, Record()]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, callback, trained

    model, callback, trained = train(4)
    expected, judged = None, []
    for step, weight in enumerate(trained, start=1):
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
        if step % 2 == 0:
            judged.append(expected)
    assert len(trained) == 4
    torch.testing.assert_close(callback.ema.module.encoder.weight, expected)
    torch.testing.assert_close(model.judged[0], judged[0])
    torch.testing.assert_close(model.judged[-1], judged[1])
    assert torch.equal(model.encoder.weight, trained[-1])
    _, whole, _ = train(6)
    _, resumed, _ = train(6, str(tmp_path / "run" / "checkpoint-4"))
    torch.testing.assert_close(resumed.ema.module.encoder.weight, whole.ema.module.encoder.weight)
    assert resumed.ema.n_averaged == 6
