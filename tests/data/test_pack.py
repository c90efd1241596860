"""Packing: the same bytes however often it is stopped, and read back as they were."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastjepa.cli import main
from fastjepa.data import ImageFolder
from fastjepa.data.pack import pack
from fastjepa.data.shards import TarShards
from tests.data.test_turbo import TURBO, jpeg, needs_turbo, picture
from tests.helpers import make_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return ImageFolder(make_pictures(tmp_path_factory.mktemp("pictures"), count=23))


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("shuffle", [None, 5])
@pytest.mark.parametrize("shard_size", [1, 7, 23, 100])
def test_reads_back_as_it_was(pictures, tmp_path, shard_size, shuffle):
    done = pack(pictures, tmp_path / "out", shard_size, shuffle, quiet=True)
    assert (done.pictures, done.shards, done.kept) == (23, -(-23 // shard_size), 0)
    found = TarShards(tmp_path / "out")
    assert done.bytes == sum(path.stat().st_size for path in found.paths)
    ours = [(found.read(i), found.classes[found.labels[i]]) for i in range(23)]
    theirs = [(pictures.read(i), pictures.classes[pictures.labels[i]]) for i in range(23)]
    assert sorted(ours) == sorted(theirs)
    assert (ours == theirs) == (shuffle is None)


def test_the_index_says_what_the_shard_does(pictures, tmp_path):
    pack(pictures, tmp_path, 10, quiet=True)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.idx")}
    for path in tmp_path.glob("*.idx"):
        path.unlink()
    TarShards(tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("*.idx")}


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(pictures, tmp_path, monkeypatch):
    pack(pictures, tmp_path / "whole", 5, quiet=True)
    for reads in (0, 1, 5, 7, 22):
        out = tmp_path / f"stopped{reads}"
        with monkeypatch.context() as patch:
            left = iter(range(reads))
            read = ImageFolder.read

            def stop(self, index, left=left, read=read):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return read(self, index)

            patch.setattr(ImageFolder, "read", stop)
            with pytest.raises(KeyboardInterrupt):
                pack(pictures, out, 5, quiet=True)
        assert not [p for p in out.glob("*.tar") if not p.with_suffix(".idx").exists()]
        done = pack(pictures, out, 5, quiet=True)
        assert done.kept == reads // 5
        assert contents(out) == contents(tmp_path / "whole")


def test_killed_it_goes_on_to_the_same_bytes(pictures, tmp_path):
    """SIGKILL in the middle of a shard, as a machine that is taken away does it."""
    slow = (
        "import sys, time\n"
        "from fastjepa.data import ImageFolder\n"
        "from fastjepa.data.pack import pack\n"
        "read = ImageFolder.read\n"
        "ImageFolder.read = lambda self, index: (time.sleep(0.05), read(self, index))[1]\n"
        "pack(ImageFolder(sys.argv[1]), sys.argv[2], 5, quiet=True)\n"
    )
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", slow, str(pictures.root), str(out)])
    deadline = time.monotonic() + 60
    while not (out / "000001.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "000001.tar").exists()
    assert not (out / "000004.tar").exists()
    pack(pictures, out, 5, quiet=True)
    pack(pictures, tmp_path / "whole", 5, quiet=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_without_its_index_is_written_again(pictures, tmp_path):
    pack(pictures, tmp_path, 10, quiet=True)
    before = contents(tmp_path)
    (tmp_path / "000001.idx").unlink()
    assert pack(pictures, tmp_path, 10, quiet=True).kept == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changed", [{"shard_size": 6}, {"shuffle": 1}])
def test_another_packing_is_not_touched(pictures, tmp_path, changed):
    pack(pictures, tmp_path, 5, quiet=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a packing of other pictures or with other settings"):
        pack(pictures, tmp_path, **{"shard_size": 5, "quiet": True, **changed})
    assert contents(tmp_path) == before


def test_tar_files_of_another_origin(pictures, tmp_path):
    (tmp_path / "000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="another origin"):
        pack(pictures, tmp_path, 5, quiet=True)


def test_a_picture_that_is_gone(tmp_path):
    pictures = ImageFolder(make_pictures(tmp_path / "in", count=6))
    pictures.paths[4].unlink()
    with pytest.raises(ValueError, match=r"\.png \(No such file"):
        pack(pictures, tmp_path / "out", 3, quiet=True)
    assert (tmp_path / "out" / "000000.tar").exists()


def test_command(pictures, tmp_path, capsys):
    words = ["data", "pack", str(pictures.root), str(tmp_path / "out"), "--shard-size", "10"]
    assert main(words) == 0
    assert "23 pictures in 3 shards, " in capsys.readouterr().out
    assert main([*words, "--json", "-"]) == 0
    assert '"kept": 3' in capsys.readouterr().out


@needs_turbo
def test_restart_markers(tmp_path, capsys):
    words = ["data", "pack", str(photographs(tmp_path)), "--restart-markers", "--shard-size", "4"]
    for workers in ("0", "2"):
        assert main([*words, str(tmp_path / workers), "--workers", workers]) == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    files, shards = ImageFolder(tmp_path / "photographs"), TarShards(tmp_path / "0")
    for index in range(6):
        assert shards.read(index) != files.read(index)
        ours, theirs = (TURBO.crop(found.read(index), (20, 30, 60, 50), 32).pixels for found in (shards, files))
        assert torch.equal(ours, theirs)
    assert shards.read(6) == files.read(6)  # a PNG
    assert main([*words[:-3], str(tmp_path / "0"), "--shard-size", "4"]) == 2
    assert "with other settings" in capsys.readouterr().err


def photographs(root):
    """Six JPEG pictures and one PNG."""
    folder = root / "photographs"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(jpeg(picture(120, 90, number)))
    picture(120, 90).save(folder / "6.png")
    return folder


def test_a_worker_that_dies_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImageFolder, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert main(["data", "pack", str(pictures.root), str(tmp_path / "out"), "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "a worker died" in said[-1]
    assert "--workers 1" in said[-1]
    assert not list((tmp_path / "out").glob("*.tar"))


def test_restart_markers_without_a_decoder(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastjepa.data.turbo._libraries", lambda: iter(()))
    assert main(["data", "pack", str(pictures.root), str(tmp_path / "out"), "--restart-markers"]) == 2
    assert "libjpeg-turbo 3 is not here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["{in}", "{out}", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["{in}", "{out}", "--shard-size", "0"], "--shard-size must be at least 1 picture, got 0"),
        (["{out}/nothing", "{out}"], "no such folder of pictures"),
        (["{in}", "{in}/class0/000.png"], "000.png"),
    ],
)
def test_bad_input_is_one_line(pictures, tmp_path, capsys, words, said):
    places = {"in": pictures.root, "out": tmp_path}
    assert main(["data", "pack", *(word.format(**places) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


if os.name == "nt":  # no SIGKILL
    del test_killed_it_goes_on_to_the_same_bytes, test_a_worker_that_dies_is_one_line
