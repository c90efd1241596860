"""Checkpoints that are folders: what a run writes is read whole, and nothing in one is run."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata

from fastjepa import dcp, load_encoder, read_checkpoint
from fastjepa.export import export
from fastjepa.training import train
from tests.helpers import make_pictures, tiny_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=8)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The same five steps, their checkpoints written as folders and as files."""
    kinds = {}
    for kind in ("sharded", "file"):
        folder = tmp_path_factory.mktemp(kind)
        runtime = {"stop_after": 5, "save_every": 2, "checkpoint": kind}
        kinds[kind] = train(tiny_config(pictures, folder, optimization={"epochs": 9}, runtime=runtime)).checkpoint
    return kinds


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A checkpoint to be spoilt."""
    return shutil.copytree(trained["sharded"], tmp_path / "spoilt")


def test_a_folder_is_read_as_the_file(trained):
    ours, theirs = (read_checkpoint(trained[kind]) for kind in ("sharded", "file"))
    assert trained["sharded"].is_dir()
    assert ours.keys() == theirs.keys()
    assert ours["fastjepa"]["step"] == 5
    for name in ("encoder", "predictor", "target_encoder"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert ours["opt"]["param_groups"] == theirs["opt"]["param_groups"]
    torch.testing.assert_close(ours["opt"]["state"], theirs["opt"]["state"], rtol=0, atol=0)


def test_a_folder_is_exported_and_loaded(trained, tmp_path):
    export(trained["sharded"], "official", tmp_path / "official.pth.tar")
    exported, encoder = read_checkpoint(tmp_path / "official.pth.tar"), load_encoder(trained["sharded"])
    torch.testing.assert_close(exported["target_encoder"], dict(encoder.state_dict()), rtol=0, atol=0)


def test_the_newest_are_kept_and_latest_is_the_last(trained):
    names = sorted(p.name for p in trained["sharded"].parent.glob("*step*"))
    assert names == ["jepa-step00000004", "jepa-step00000005"]
    assert trained["sharded"].resolve().name == names[-1]


def test_a_run_of_another_model_is_refused(pictures, trained, tmp_path):
    config = tiny_config(pictures, tmp_path, meta={"depth": 3})
    meta = replace(config.meta, load_checkpoint=True, read_checkpoint=str(trained["sharded"]))
    with pytest.raises(ValueError, match="encoder is of another model: .* lacks blocks.2"):
        train(replace(config, meta=meta))


class _Hostile:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_code_in_the_metadata_is_not_run(folder, tmp_path):
    place = tmp_path / "made"
    (folder / ".metadata").write_bytes(pickle.dumps(_Hostile(place)))
    with pytest.raises(ValueError, match="needs code to be run, which is never done"):
        read_checkpoint(folder)
    assert not place.exists()


def changed(folder: Path, change) -> None:
    """Metadata that `change` has had its way with."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def test_an_entry_that_torch_would_unpickle_is_refused(folder):
    def make_bytes(found) -> None:
        found.state_dict_metadata["encoder.norm.bias"] = metadata.BytesStorageMetadata()

    changed(folder, make_bytes)
    with pytest.raises(ValueError, match="needs code to be run, which is never done"):
        read_checkpoint(folder)


def test_a_file_elsewhere_is_not_read(folder):
    def lead_away(found) -> None:
        next(iter(found.storage_data.values())).relative_path = "../other.distcp"

    changed(folder, lead_away)
    with pytest.raises(ValueError, match="names the file ../other.distcp, which is not in the folder"):
        read_checkpoint(folder)


def test_a_part_that_is_missing_is_said(folder):
    def lose(found) -> None:
        found.state_dict_metadata["encoder.norm.bias"].chunks.clear()

    changed(folder, lose)
    with pytest.raises(ValueError, match="of encoder.norm.bias there are 0 of 48 values"):
        read_checkpoint(folder)


def test_a_file_that_is_missing_or_cut_off_is_said(folder):
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"checkpoint {folder} is damaged or incomplete"):
        read_checkpoint(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"checkpoint {folder} is damaged or incomplete .*No such file"):
        read_checkpoint(folder)


def test_a_full_disk_leaves_the_checkpoint_before(pictures, tmp_path, monkeypatch, capfd):
    """Said as it happens; the last save, for which the run exists, ends it."""
    write, saves = dcp._Writer.write_data, []

    def fail(writer, *rest):
        saves.append(writer)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")
        return write(writer, *rest)

    monkeypatch.setattr(dcp._Writer, "write_data", fail)
    runtime = {"stop_after": 4, "save_every": 1, "checkpoint": "sharded"}
    with pytest.raises(OSError, match="no checkpoint at step 4: .*No space left.*jepa-latest is as it was"):
        train(tiny_config(pictures, tmp_path, optimization={"epochs": 9}, runtime=runtime))
    said = capfd.readouterr().err
    assert f"warning: no checkpoint: {tmp_path}/.jepa-step00000002.part could not be written: " in said
    assert "torch.distributed is disabled" not in said
    assert read_checkpoint(tmp_path / "jepa-latest")["fastjepa"]["step"] == 1
