"""Pictures, wherever they lie, into WebDataset shards: whole files only, and a stopped packing goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastjepa.data.batches import is_lost
from fastjepa.data.order import EpochOrder
from fastjepa.data.pictures import EXTENSIONS, Pictures, UnreadableImage
from fastjepa.data.shards import CLASSES, HEADER, Member, write_index, write_whole
from fastjepa.data.turbo import TurboJPEG, find_turbo, marked

MANIFEST = "pack.json"
STARTS = {  # of files, and what they are
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"P6": "ppm",
    b"P5": "pgm",
}


@dataclass(frozen=True)
class Packed:
    """What a packing came to: shards in all and those that were there already, pictures, bytes of the shards."""

    folder: str
    shards: int
    kept: int
    pictures: int
    bytes: int


def pack(
    pictures: Pictures,
    out: str | os.PathLike[str],
    shard_size: int = 5000,
    shuffle: int | None = None,
    quiet: bool = False,
    restart_markers: bool = False,
    workers: int | None = None,
) -> Packed:
    """Write `pictures` to `out` as tar files of `shard_size` pictures each, an index beside each, the bytes unchanged.

    With `restart_markers`, JPEG pictures get them, so that engine turbo need not decode what lies beside a crop; their
    pixels and metadata stay what they are. `workers` processes read and rewrite; by default one for each core
    where there is something to rewrite, and else this one alone.

    The same pictures and settings give the same bytes. A shard that is there with its index is kept, so that a packing
    which was stopped goes on when it is called again. `shuffle` is a seed: other readers take a shard in its own order.

    Raises:
        ValueError: a shard size below 1, a folder that holds another packing, a picture that cannot be read, fewer than
            0 workers, or restart markers without libjpeg-turbo.
        OSError: `out` cannot be written, or one of the workers died.
    """
    if shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1 picture, got {shard_size}")
    turbo = find_turbo() if restart_markers else None
    if workers is None:
        workers = _cores() if restart_markers else 0
    if workers < 0:
        raise ValueError(f"--workers must be at least 0, got {workers}")
    made = _Made(pictures, turbo)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(pictures))
    if shuffle is not None:
        order = EpochOrder(len(pictures), shuffle, pictures.blocks)(0)
    _claim(out, pictures, shard_size, shuffle, restart_markers)
    for left in out.glob(".*.partial"):  # by a packing that was killed
        left.unlink()
    starts = range(0, len(order), shard_size)
    kept = size = 0
    with tqdm(total=len(order), desc="pack", unit="picture", disable=True if quiet else None) as bar:
        for number, start in enumerate(starts):
            path = out / f"{number:06}.tar"
            chosen = order[start : start + shard_size].tolist()
            if path.exists() and path.with_suffix(".idx").exists():
                kept += 1
                bar.update(len(chosen))
            else:
                try:
                    _write_shard(path, made, workers, start, chosen, bar)
                except RuntimeError as error:
                    if not is_lost(error):
                        raise
                    raise OSError(
                        f"a worker died, perhaps for want of memory, and shard {path.name} was not written; the same "
                        f"command goes on there, with fewer than --workers {workers}"
                    ) from error
            size += path.stat().st_size
    return Packed(str(out), len(starts), kept, len(order), size)


def _claim(out: Path, pictures: Pictures, shard_size: int, shuffle: int | None, restart_markers: bool) -> None:
    """Say in the folder what is packed there, or see that it says the same."""
    digest = hashlib.sha256()
    for index in range(len(pictures)):
        name = os.path.relpath(pictures.name(index), pictures.root)
        digest.update(f"{name}\n{pictures.labels[index]}\n".encode())
    manifest = {"pictures": len(pictures), "shard_size": shard_size, "shuffle": shuffle, "names": digest.hexdigest()}
    if restart_markers:
        manifest["restart_markers"] = True
    path = out / MANIFEST
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no manifest of a packing; name another folder") from error
        if found != manifest:
            raise ValueError(f"{out} holds a packing of other pictures or with other settings; name another folder")
        return
    if strangers := sorted(out.glob("*.tar")):
        raise ValueError(f"{out} holds tar files of another origin ({strangers[0].name}); name another folder")
    if pictures.classes:
        write_whole(out / CLASSES, "".join(f"{name}\n" for name in pictures.classes).encode())
    write_whole(path, (json.dumps(manifest, indent=2) + "\n").encode())


class _Made(Dataset):
    """Pictures as they are packed, or why one cannot be."""

    def __init__(self, pictures: Pictures, turbo: TurboJPEG | None):
        self.pictures, self.turbo = pictures, turbo

    def __getitem__(self, index: int) -> bytes | UnreadableImage:
        try:
            data = self.pictures.read(index)
        except UnreadableImage as error:
            return error
        return data if self.turbo is None else marked(self.turbo, data)


def _write_shard(path: Path, made: _Made, workers: int, start: int, chosen: list[int], bar: tqdm) -> None:
    pictures = made.pictures
    partial = path.with_name(f".{path.name}.partial")
    samples: list[list[Member]] = []
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:  # never through a link that lies there
        with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            datas = DataLoader(
                made, None, sampler=chosen, num_workers=workers, collate_fn=_whole, generator=torch.Generator()
            )
            for number, (index, data) in enumerate(zip(chosen, datas, strict=True), start):
                if isinstance(data, UnreadableImage):
                    raise ValueError(f"{data}; nothing was packed after shard {path.name}")
                members = [(_extension(data, pictures.name(index)), data)]
                if pictures.labels[index] >= 0:
                    members.append(("cls", str(pictures.labels[index]).encode()))
                samples.append([_add(archive, f"{number:09}", *member) for member in members])
                bar.update()
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    write_index(path.with_suffix(".idx"), samples)


def _whole(data: Any) -> Any:
    return data


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add(archive: tarfile.TarFile, key: str, extension: str, data: bytes) -> Member:
    info = tarfile.TarInfo(f"{key}.{extension}")
    info.size = len(data)
    offset = archive.offset + HEADER
    archive.addfile(info, io.BytesIO(data))
    return Member(extension, offset, len(data), info.name)


def _extension(data: bytes, name: str) -> str:
    """By what a file starts with, else by its name."""
    for start, extension in STARTS.items():
        if data.startswith(start):
            return extension
    suffix = os.path.splitext(name)[1].lower()
    return suffix[1:] if suffix in EXTENSIONS else "jpg"
