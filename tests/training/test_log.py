"""What a run says as it goes."""

from __future__ import annotations

import sys

import pytest

from fastjepa.training.log import RunLog, TensorBoardLog, WandbLog, progress
from tests.helpers import tiny_config

ROW = {
    "epoch": 1,
    "itr": 0,
    "step": 0,
    "loss": 0.5,
    "mask-A": 60.0,
    "mask-B": 40.0,
    "time (ms)": 20.0,
    "lr": 1e-3,
    "weight_decay": 0.04,
    "momentum": 0.996,
    "images/s": 200.0,
    "context tokens": 240,
}


def test_progress_shows_what_is_known():
    shown = progress(ROW)
    assert (shown["loss"], shown["MFU"], shown["context"]) == ("0.5000", "", "240")
    assert progress(ROW | {"mfu": 0.412, "rankme": 20.0})["MFU"] == "41.2%"


@pytest.mark.parametrize(("tracker", "package"), [(TensorBoardLog, "tensorboard"), (WandbLog, "wandb")])
def test_missing_trackers_say_what_to_install(tmp_path, monkeypatch, tracker, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    arguments = (tmp_path,) if tracker is TensorBoardLog else ("project", tiny_config(tmp_path, tmp_path))
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'fastjepa\[track\]'"):
        tracker(*arguments)


def test_full_disk_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    log = RunLog(tiny_config(tmp_path, tmp_path), 0, 10)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.csv, "flush", full)
    log.rows([ROW])
    assert "No space left on device; rows are missing" in capsys.readouterr().err
    log.close()


def test_a_line_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, tmp_path, runtime={"progress": True, "device": "cpu"})
    log = RunLog(config, 0, 10)
    log.spoke -= 60
    log.rows([ROW])
    assert "step 1/10: loss 0.5000, images/s 200, lr 1.0e-03" in capsys.readouterr().err
    log.rows([ROW | {"step": 1}])  # not again so soon
    assert "step 2/10" not in capsys.readouterr().err
    log.close()
