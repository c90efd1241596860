"""The Lightning callback: in the real Trainer where Lightning is installed, and hook by hook where it is not."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn

from fastjepa import EMA
from fastjepa.integrations import lightning as ours


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.target_encoder = nn.Linear(3, 2), nn.Linear(3, 2)


def test_hook_by_hook(monkeypatch):
    monkeypatch.setattr(ours, "_CALLBACK", object)
    callback, model = ours.EMACallback(0.5, "encoder", "target_encoder"), Model()
    assert callback.ema is None
    callback.on_fit_start(None, model)
    expected = 0.5 * model.target_encoder.weight + 0.5 * model.encoder.weight
    for step in (1, 1):
        callback.on_train_batch_end(types.SimpleNamespace(global_step=step), model, None, None, 0)
    torch.testing.assert_close(model.target_encoder.weight, expected)
    before = model.encoder.weight.clone()
    callback.on_validation_epoch_start(None, model)
    callback.on_validation_epoch_end(None, model)
    callback.on_exception(None, model, KeyboardInterrupt())
    assert torch.equal(model.encoder.weight, before)
    assert callback.state_dict() == {"steps": 1, "ema": None}


def test_without_lightning_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ours, "_CALLBACK", None)
    with pytest.raises(ValueError, match="pip install lightning"):
        ours.EMACallback()


def test_the_real_trainer(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(3, 2), []

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def on_train_batch_end(self, *args):
            self.seen.append(("trained", self.net.weight.detach().clone()))

        def validation_step(self, batch, index):
            self.seen.append(("judged", self.net.weight.detach().clone()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def fit(epochs, module, callback, checkpoint=None):
        torch.manual_seed(1)
        loader = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=2,
            num_sanity_val_steps=0,
            callbacks=[callback],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            **quiet,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader, loader, ckpt_path=checkpoint)
        return trainer

    torch.manual_seed(0)
    module, callback = Module(), ours.EMACallback(0.75)
    start = EMA(module.net, decay=0.75)
    trainer = fit(2, module, callback)
    trained = [weight for kind, weight in module.seen if kind == "trained"]
    expected, judged = start.module.weight.clone(), []
    for step, weight in enumerate(trained[1::2]):  # two batches a step
        decay = 0.0 if step == 0 else 0.75
        expected = decay * expected + (1 - decay) * weight
        if step % 2:
            judged.append(expected)
    torch.testing.assert_close(callback.ema.module.net.weight, expected)
    assert torch.equal(module.net.weight, trained[-1])
    shown = [weight for kind, weight in module.seen if kind == "judged"]
    assert len(shown) == 8
    for epoch in range(2):
        torch.testing.assert_close(shown[4 * epoch], judged[epoch])

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again, resumed = Module(), ours.EMACallback(0.75)
    fit(3, again, resumed, tmp_path / "run.ckpt")
    fit(3, module, callback, tmp_path / "run.ckpt")
    torch.testing.assert_close(resumed.ema.module.net.weight, callback.ema.module.net.weight)
    assert resumed.ema.n_averaged == 6
