"""What a path is taken for."""

from __future__ import annotations

import pytest
from PIL import Image

from fastjepa.data import ImageFolder, find_images
from fastjepa.data.pack import pack
from fastjepa.data.shards import TarShards
from fastjepa.data.sources import open_pictures
from tests.helpers import make_pictures


def test_folders_and_shards(tmp_path):
    folder = make_pictures(tmp_path / "in", count=5)
    assert type(open_pictures(folder)) is ImageFolder
    pack(ImageFolder(folder), tmp_path / "out" / "train", 3, quiet=True)
    found = find_images(str(tmp_path), "out")
    assert type(found) is TarShards
    assert len(found) == 5
    one = open_pictures(tmp_path / "out" / "train" / "000001.tar")
    assert len(one) == 2
    assert one.read(0) == found.read(3)


def test_archives_beside_pictures_are_no_shards(tmp_path):
    folder = make_pictures(tmp_path, count=4)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(b"as it came")
    assert type(open_pictures(folder)) is ImageFolder
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "one.png")
    (flat / "one.tar").write_bytes(b"")
    assert type(open_pictures(flat)) is ImageFolder


def test_official_layout(tmp_path):
    make_pictures(tmp_path / "full" / "train", count=4)
    make_pictures(tmp_path / "full" / "val", count=2)
    assert len(find_images(str(tmp_path), "full")) == 4
    assert len(find_images(str(tmp_path / "full" / "val"))) == 2


def test_places_that_will_not_do(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (("nothing", "no such folder"), ("empty", "no pictures"), ("file", "is a file")):
        with pytest.raises(ValueError, match=rf"data\.root_path.*{message}"):
            find_images(str(tmp_path), name)
