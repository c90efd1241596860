"""Tar shards: read at any place, through an index that is made where it is missing."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import pytest
from PIL import Image

from fastjepa.data import UnreadableImage
from fastjepa.data.shards import TarShards, read_index


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(folder):
    folder.mkdir(exist_ok=True)
    write(folder / "b.tar", [(f"x/{i}.png", png(i)) for i in (3, 4)])
    labelled = [(f"{i}.{e}", d) for i in range(3) for e, d in (("cls", b"%d" % (i % 2)), ("png", png(i)))]
    write(folder / "a.tar", [("README", b"no extension"), (".hidden", b""), *labelled, ("9.json", b"{}")])
    return folder


def test_reads_in_order_of_names(tmp_path):
    found = TarShards(shards(tmp_path))
    assert len(found) == 5
    assert [found.load(i).size for i in range(5)] == [(8 + i, 6) for i in range(5)]
    assert found.labels == [0, 1, 0, -1, -1]
    assert found.classes == ["0", "1"]
    assert found.name(0) == f"{tmp_path / 'a.tar'}: 0.png"
    assert found.name(4) == f"{tmp_path / 'b.tar'}: x/4.png"
    again = pickle.loads(pickle.dumps(found))
    assert again.read(3) == png(3)


def test_the_index_is_written_and_then_used(tmp_path):
    first = TarShards(shards(tmp_path))
    index = tmp_path / "a.idx"
    assert index.read_text().splitlines()[0] == "v1.2 4"
    assert index.read_text().splitlines()[1].split()[0] == "cls"
    with tarfile.open(tmp_path / "a.tar") as archive:
        offsets = {m.name: m.offset_data for m in archive}
    assert [m.offset for m in read_index(tmp_path / "a.tar")[0]] == [offsets["0.cls"], offsets["0.png"]]
    os.truncate(tmp_path / "b.tar", (tmp_path / "b.tar").stat().st_size - 5120)  # its end blocks are not needed
    assert TarShards(tmp_path).read(2) == first.read(2)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("index", ["", "v1.2 99\npng 512 9 0.png\n", "nonsense", "v1.2 1\npng 512 999999999 0.png\n"])
def test_an_index_that_does_not_fit_is_made_anew(tmp_path, index):
    shards(tmp_path)
    (tmp_path / "a.idx").write_text(index)
    assert TarShards(tmp_path).read(1) == png(1)
    assert (tmp_path / "a.idx").read_text().startswith("v1.2 4\n")


def test_names_with_spaces_and_dots(tmp_path):
    files = [("my cat.png", png(0)), ("my cat.txt", b"a cat"), ("d.ir/b.left.png", png(1)), ("d.ir/c.JPEG", png(2))]
    write(tmp_path / "a.tar", files)
    for _ in range(2):
        found = TarShards(tmp_path)
        assert [found.read(i) for i in range(len(found))] == [png(0), png(1), png(2)]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    from fastjepa.data import shards as module

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "write_whole", refuse)
    assert len(TarShards(shards(tmp_path))) == 5
    assert not list(tmp_path.glob("*.idx"))


def test_damaged(tmp_path):
    shards(tmp_path)
    found = TarShards(tmp_path)
    os.truncate(tmp_path / "b.tar", 1600)
    with pytest.raises(UnreadableImage, match=r"b\.tar: .*ends within"):
        found.read(4)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"b\.tar: sample 4 \(No such file"):
        found.read(4)


@pytest.mark.parametrize("content", [b"not a tar file" * 100, b"\x1f\x8b" + b"\0" * 600])
def test_no_tar_file(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is no plain tar file"):
        TarShards(tmp_path)


def test_no_pictures(tmp_path):
    write(tmp_path / "a.tar", [("1.txt", b"words")])
    with pytest.raises(ValueError, match="no pictures in the tar files"):
        TarShards(tmp_path)


@pytest.mark.parametrize(
    "index", ["jpg -5 10 a.jpg", "jpg 512 -1 a.jpg", f"jpg 512 {2**60} a.jpg", f"jpg {2**70} 1 a.jpg"]
)
def test_an_index_that_lies_is_made_anew(tmp_path, index):
    shards(tmp_path)
    (tmp_path / "b.idx").write_text(f"v1.2 1\n{index}\n")
    assert TarShards(tmp_path).read(3) == png(3)
    assert index not in (tmp_path / "b.idx").read_text()


@pytest.mark.parametrize("label", [b"-1", b"one", b"9" * 7, b"9" * 5000])
def test_a_label_that_is_none_is_said(tmp_path, label):
    write(tmp_path / "a.tar", [("a.png", png(0)), ("a.cls", label)])
    found = TarShards(tmp_path)
    with pytest.raises(ValueError, match=r"a\.tar: the label at byte \d+ is no number below 1000000"):
        _ = found.labels


def test_names_in_a_shard_lead_nowhere(tmp_path):
    write(tmp_path / "a.tar", [("../../out.png", png(0)), ("/etc/out.png", png(1))])
    found = TarShards(tmp_path)
    assert [found.read(i) for i in range(2)] == [png(0), png(1)]
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.tar"]
