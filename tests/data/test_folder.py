"""Folders of pictures: what is found, what is read, what is said of the rest."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from fastjepa.data import ImageFolder, UnreadableImage
from tests.helpers import make_pictures


def test_finds_all_sorted_with_classes(tmp_path):
    make_pictures(tmp_path / "a", count=7)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    deep = tmp_path / "a" / "class1" / "below"
    deep.mkdir()
    Image.new("RGB", (8, 8)).save(deep / "x.JPEG")
    folder = ImageFolder(tmp_path / "a")
    assert len(folder) == 8
    assert folder.classes == ["class0", "class1", "class2"]
    assert folder.paths == sorted(folder.paths)
    assert [folder.classes[label] for label in folder.labels] == [
        p.relative_to(folder.root).parts[0] for p in folder.paths
    ]


def test_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    folder = ImageFolder(tmp_path)
    assert (folder.classes, folder.labels) == ([], [-1])


def test_links_and_loops(tmp_path):
    make_pictures(tmp_path / "pictures", count=3, classes=1)
    os.symlink(tmp_path / "pictures", tmp_path / "pictures" / "class0" / "up")
    assert len(ImageFolder(tmp_path / "pictures")) == 3
    os.symlink(tmp_path / "pictures", tmp_path / "link")
    assert len(ImageFolder(tmp_path / "link")) == 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = "x.tiff" if mode in ("CMYK", "I;16") else "x.png"
    Image.new(mode, (6, 5)).save(tmp_path / name)
    assert ImageFolder(tmp_path).load(0).mode == "RGB"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xe0 not a jpeg", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\x00" * 50]
)
def test_unreadable(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"bad\.jpg"):
        ImageFolder(tmp_path).load(0)


def test_truncated(tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match=r"x\.jpg"):
        ImageFolder(tmp_path).load(0)
