"""WebDataset shards: pictures in tar files, read one by one through an index beside each."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastjepa.data.pictures import EXTENSIONS, Pictures

VERSION = "v1.2"  # of DALI's index files, which these are
MAX_CLASSES = 1_000_000
HEADER = 512  # bytes of a tar member's header, just before its content
CLASSES = "classes.txt"  # beside the shards: a name on each line, for the numbers in their .cls members


class Member(NamedTuple):
    """A file in a shard: its name after the sample's key, where its content lies, and its whole name."""

    extension: str
    offset: int
    size: int
    name: str


class TarShards(Pictures):
    """Pictures of WebDataset shards: files whose names are alike up to the first dot are one sample.

    `NAME.idx` beside `NAME.tar` says where its files lie, in the format of DALI's wds2idx. Where it is missing, the
    shard is read through for it, and it is written if the folder allows. A `cls` file has the number of a class.

    Raises:
        ValueError: a shard that is not there or no plain tar file, or none with a picture.
    """

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[Path] | None = None):
        self.root = Path(root)
        self.paths = sorted(self.root.glob("*.tar")) if paths is None else list(paths)
        pictures, labels, counts = [], [], []
        for path in tqdm(self.paths, "index of shards", unit="shard", leave=False, disable=None):
            before = len(pictures)
            for sample in read_index(path):
                picture = next((m for m in sample if f".{m.extension.rsplit('.')[-1].lower()}" in EXTENSIONS), None)
                if picture is not None:
                    label = next((m for m in sample if m.extension == "cls"), None)
                    pictures.append((picture.offset, picture.size))
                    labels.append((label.offset, label.size) if label else (0, 0))
            counts.append(len(pictures) - before)
        if not pictures:
            raise ValueError(f"no pictures in the tar files of {self.root}")
        self._pictures, self._labels = np.array(pictures, np.int64), np.array(labels, np.int64)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        path = self._shard(index)
        try:
            with open(path, "rb") as file:
                file.seek(self._pictures[index, 0] - HEADER)
                name = file.read(100).split(b"\0")[0].decode(errors="replace")
        except OSError:
            name = f"sample {index}"
        return f"{path}: {name}"

    def fetch(self, index: int) -> bytes:
        offset, size = self._pictures[index].tolist()
        with open(self._shard(index), "rb", buffering=0) as file:
            return _read(file, offset, size)

    @cached_property
    def labels(self) -> list[int]:  # type: ignore[override]
        found, before = [], 0
        for path, end in zip(self.paths, self._ends.tolist(), strict=True):
            with open(path, "rb") as file:
                places = self._labels[before:end].tolist()
                found += [_label(path, file, offset, size) if size else -1 for offset, size in places]
            before = end
        return found

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        try:
            return (self.root / CLASSES).read_text(encoding="utf-8").splitlines()
        except OSError:
            return [str(number) for number in range(max(self.labels) + 1)]

    def _shard(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self._ends, index, side="right"))]


def read_index(path: Path) -> Iterable[list[Member]]:
    """The samples of a shard: from the index beside it where that fits, else from the shard itself.

    Raises:
        ValueError: no tar file that can be read at any place; names it.
    """
    beside = path.with_suffix(".idx")
    try:
        lines = beside.read_text(encoding="utf-8").splitlines()
        samples = [_parse(line) for line in lines[1:]]
        end = path.stat().st_size
        within = all(HEADER <= m.offset <= end - m.size and m.size >= 0 for sample in samples for m in sample)
        if lines[0] == f"{VERSION} {len(samples)}" and within:
            return samples
    except (OSError, ValueError, IndexError):  # none, or not of this shard
        pass
    try:
        samples = list(_scan(path))
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no plain tar file, or a damaged one: {error}") from error
    with suppress(OSError):  # a folder that cannot be written: the next run reads the shard through again
        write_index(beside, samples)
    return samples


def write_index(path: Path, samples: Sequence[Sequence[Member]]) -> None:
    """Write the index of a shard; it appears whole or not at all."""
    lines = [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples]
    write_whole(path, "\n".join([f"{VERSION} {len(samples)}", *lines, ""]).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # never through a link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _parse(line: str) -> list[Member]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(line)  # a name with a space in it
    parts = zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)
    return [Member(extension, int(offset), int(size), name) for extension, offset, size, name in parts]


def _scan(path: Path) -> Iterator[list[Member]]:
    key, sample = None, []
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            folder, _, name = info.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not info.isreg() or not stem or not dot:
                continue
            if key != (folder, stem):
                if sample:
                    yield sample
                key, sample = (folder, stem), []
            sample.append(Member(extension, info.offset_data, info.size, info.name))
    if sample:
        yield sample


def _label(path: Path, file, offset: int, size: int) -> int:
    content = _read(file, offset, min(size, 32)).strip()
    if size > 32 or not content.isdigit() or int(content) >= MAX_CLASSES:
        raise ValueError(f"{path}: the label at byte {offset} is no number below {MAX_CLASSES}: {content!r}")
    return int(content)


def _read(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise ValueError(f"the shard ends within it, at byte {offset + len(content)}")
    return content
