"""Reading and writing checkpoints: whole or not at all, no code, plain words."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import zipfile

import pytest
import torch

from fastjepa import read_checkpoint, vit_tiny
from fastjepa.checkpoint import load_weights, write_checkpoint

STATE = {"encoder": {"module.a": torch.ones(2)}, "predictor": {}, "target_encoder": {"a": torch.zeros(2)}, "epoch": 3}


def test_round_trip(tmp_path):
    path = tmp_path / "run.pth.tar"
    write_checkpoint(STATE, path)
    state = read_checkpoint(path)
    assert list(state["encoder"]) == list(state["target_encoder"]) == ["a"]
    assert state["epoch"] == 3
    assert os.listdir(tmp_path) == ["run.pth.tar"]


class Runs:
    """Unpickling one runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_is_never_run(tmp_path):
    path, made = tmp_path / "evil.pth.tar", tmp_path / "made"
    torch.save({**STATE, "x": Runs(str(made))}, path)
    with pytest.raises(ValueError, match="needs code to be run, which is never done"):
        read_checkpoint(path)
    with open(path, "wb") as file:
        pickle.dump(Runs(str(made)), file, protocol=2)
    with pytest.raises(ValueError, match="evil"):
        read_checkpoint(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no PyTorch checkpoint"),
        (b"not a checkpoint at all", "not a PyTorch checkpoint"),
        (b"PK\x03\x04" + b"\x00" * 64, "damaged"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "broken.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "run.pth.tar"
    write_checkpoint(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "lacks encoder, predictor, target_encoder, epoch; it has nothing"),
        ({k: v for k, v in STATE.items() if k != "predictor"}, "lacks predictor"),
        ({**STATE, "encoder": 3}, "encoder is not a state dict"),
        ({**STATE, "encoder": {"a": 3}}, "encoder is not a state dict"),
    ],
)
def test_files_that_lack_something(tmp_path, state, message):
    path = tmp_path / "run.pth.tar"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pth.tar")


def test_failed_write_leaves_the_previous_one(tmp_path):
    path = tmp_path / "run.pth.tar"
    write_checkpoint(STATE, path)
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match="."):
            write_checkpoint({**STATE, "big": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pth.tar"]


def test_weights_of_another_model():
    model = vit_tiny(img_size=[32], depth=1)
    narrow = vit_tiny(img_size=[32], depth=1, embed_dim=96).state_dict()
    deep = vit_tiny(img_size=[32], depth=2).state_dict()
    with pytest.raises(ValueError, match=r"checkpoint X is of another model: pos_embed is \[1, 4, 96\] there"):
        load_weights(model, narrow, "checkpoint X")
    with pytest.raises(ValueError, match=r"has blocks\.1\.norm1\.weight and 11 more"):
        load_weights(model, deep, "checkpoint X")
    with pytest.raises(ValueError, match="lacks pos_embed"):
        load_weights(model, {}, "checkpoint X")
    load_weights(model, vit_tiny(img_size=[32], depth=1).state_dict(), "checkpoint X")


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A kilobyte that unpacks to a gigabyte is refused before anything of it is read."""
    path, packed = tmp_path / "run.pth.tar", tmp_path / "packed.pth.tar"
    write_checkpoint(STATE, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    with pytest.raises(ValueError, match="it is compressed, which no checkpoint is"):
        read_checkpoint(packed)


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "run.pth.tar"
    victim.write_text("mine")
    (tmp_path / ".run.pth.tar.part").symlink_to(victim)
    write_checkpoint(STATE, path)
    assert victim.read_text() == "mine"
    assert not path.is_symlink()
