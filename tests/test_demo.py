"""The demo from end to end with a tiny budget, on the packages' pictures and on a user's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import demo
from fastjepa.config import load_config
from fastjepa.data import ImageFolder
from fastjepa.training import build_models
from fastjepa.training.engine import Trainer, seed_everything
from tests.helpers import make_pictures

for package in ("sklearn", "skimage", "matplotlib"):
    pytest.importorskip(package)


@pytest.fixture
def lines():
    return []


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer pictures, tiles and evaluations than the demo has."""
    found = demo._photographs()
    monkeypatch.setattr(demo, "_photographs", lambda: found[::2])
    monkeypatch.setattr(demo, "TILES", {"train": 8, "val": 4})
    monkeypatch.setattr(demo, "LOOKS", 2)


def check(result, out):
    assert json.loads(json.dumps(result)) == result
    for name, path in (("curves", out / "curves.png"), ("features", out / "features.png")):
        assert result[name] == str(path)
        with Image.open(path) as drawn:
            assert drawn.width == 1080
    assert (out / "run" / "demo-latest.pth.tar").is_file()


def test_demo_on_the_packages_pictures(tmp_path, lines, monkeypatch):
    result = demo.run_demo(None, tmp_path / "out", steps=2, say=lines.append)
    check(result, tmp_path / "out")
    assert result["steps"] == 2
    assert all(result[which][mark] is not None for which in ("random", "pretrained") for mark in ("linear", "rankme"))
    said = "\n".join(lines)
    assert "random encoder" in said
    assert "curves.png" in said
    monkeypatch.setattr(demo, "TILES", {"train": 4, "val": 2})
    again = demo.run_demo(None, tmp_path / "out", steps=1, say=lines.append)  # over its own earlier run
    assert again["steps"] == 1
    assert len(ImageFolder(tmp_path / "out" / "images" / "train")) == 4 * len(demo._photographs())


def test_tiles_are_evened_and_halves_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TILES", {"train": 2, "val": 1})
    grey = np.zeros((80, 200), dtype=np.uint8)
    rng = np.random.default_rng(0)
    grey[:, :100] = rng.integers(0, 256, (1, 100))  # the left half has stripes down, the right half across
    grey[:, 100:] = rng.integers(0, 256, (80, 1))
    files = []
    for number in range(2):
        files.append(tmp_path / f"p{number}.png")
        Image.fromarray(grey).save(files[-1])
    monkeypatch.setattr(demo, "_photographs", lambda: files)
    demo.demo_data(tmp_path / "tiles")
    found = ImageFolder(tmp_path / "tiles" / "train")
    assert found.classes == ["p0", "p1"]
    assert len(found) == 4
    for index in range(4):
        tile = np.asarray(found.load(index).convert("L")) / 255
        assert tile.shape == (demo.TILE, demo.TILE)
        assert tile.mean() == pytest.approx(demo.GREY, abs=0.02)
        assert tile.std() == pytest.approx(demo.CONTRAST, abs=0.05)
        assert (tile == tile[0]).all()
    held = ImageFolder(tmp_path / "tiles" / "val")
    assert len(held) == 2
    for index in range(2):
        tile = np.asarray(held.load(index))
        assert (tile == tile[:, :1]).all()


def test_the_random_encoder_is_the_one_that_training_starts_from():
    config = load_config("demo")
    seed_everything(config.runtime.seed)
    untrained = build_models(config).target_encoder.state_dict()
    start = Trainer(config, 10).model.target_encoder.state_dict()
    assert all(torch.equal(untrained[key], start[key]) for key in start)


def test_demo_on_own_pictures_with_classes(tmp_path, lines):
    source = make_pictures(tmp_path / "mine", count=36, classes=3)
    (source / "class0" / "broken.png").write_bytes(b"no picture")
    result = demo.run_demo(source, tmp_path / "out", steps=3, say=lines.append)
    check(result, tmp_path / "out")
    assert result["random"]["linear"] is not None
    assert any("3 class folders" in line for line in lines)
    assert any("cannot be read" in line and "broken.png" in line for line in lines)
    held = {p.name for p in (tmp_path / "out" / "images" / "val").rglob("*.png")}
    kept = {p.name for p in (tmp_path / "out" / "images" / "train").rglob("*.png")}
    assert len(held) == 6
    assert len(kept) == 30
    assert not held & kept
    assert len(list(source.rglob("*.png"))) == 37  # the user's own are left alone


@pytest.mark.parametrize("where", [".", "one"])
def test_demo_on_own_pictures_without_classes(tmp_path, lines, where):
    source = tmp_path / "mine"
    made = make_pictures(tmp_path / "made", count=12, classes=1)
    shutil.move(str(made / "class0"), source / where if where != "." else source)
    result = demo.run_demo(source, tmp_path / "out", steps=2, say=lines.append)
    check(result, tmp_path / "out")
    assert result["pretrained"]["linear"] is None
    assert result["pretrained"]["rankme"] > 0
    assert sum("No probes" in line for line in lines) == 1


def test_classes_too_small_to_hold_one_out_are_not_probed(tmp_path):
    source = make_pictures(tmp_path / "mine", count=30, classes=2)
    make_pictures(source / "rare", count=2, classes=1)
    found = demo.own_pictures(source, tmp_path / "images")
    assert sorted(found.train.labels.unique().tolist()) == sorted(found.test.labels.unique().tolist()) == [0, 1]
    assert len(found.train.labels) == 24
    assert any("2 class folders" in note for note in found.notes)


def test_a_train_folder_is_taken_alone(tmp_path):
    make_pictures(tmp_path / "mine" / "train", count=20, classes=2)
    make_pictures(tmp_path / "mine" / "val", count=20, classes=2)
    found = demo.own_pictures(tmp_path / "mine", tmp_path / "images")
    assert len(found.train.labels) + len(found.test.labels) == 20


def test_bad_folders(tmp_path, lines):
    with pytest.raises(ValueError, match="no such folder"):
        demo.run_demo(tmp_path / "nothing", tmp_path / "out", say=lines.append)
    few = make_pictures(tmp_path / "few", count=4, classes=1)
    with pytest.raises(ValueError, match="at least 10"):
        demo.run_demo(few, tmp_path / "out", say=lines.append)
    for number in range(30):
        (few / f"{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="30 of 34 pictures"):
        demo.run_demo(few, tmp_path / "out", say=lines.append)


def test_nothing_of_the_users_is_removed(tmp_path, lines):
    mine = make_pictures(tmp_path / "out" / "images", count=12)
    with pytest.raises(ValueError, match="did not make"):
        demo.run_demo(None, tmp_path / "out", steps=1, say=lines.append)
    with pytest.raises(ValueError, match="where the demo writes"):
        demo.run_demo(mine / "class0", tmp_path / "out", steps=1, say=lines.append)
    assert len(list(mine.rglob("*.png"))) == 12


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastjepa\[demo\]'"):
        demo._photographs()
