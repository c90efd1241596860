"""The `fuzz` suite: hostile files for every reader, and whether each reads or refuses with its one documented error.

Inputs are valid files cut, spliced, overwritten and bit-flipped at random, random bytes, and some made by hand: bombs,
headers that lie, pickles that would run code. Each reader runs in a process of its own with its memory and the time of
each input bounded; an input that ends the process, takes too long, or raises anything else is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import count, results
from benchmarks.children import ended, forked
from benchmarks.tables import columns
from fastjepa.checkpoint import MODELS, read_checkpoint
from fastjepa.config import load_config, shipped_configs
from fastjepa.data import choose_engine
from fastjepa.data.pictures import UnreadableImage
from fastjepa.data.shards import TarShards

MARKERS = "<!-- fuzz -->", "<!-- end of fuzz -->"
INPUTS = 20_000
SECONDS = 10.0  # of processor time for each input, at most
PATIENCE = 600.0  # seconds for each hundred inputs, also for one that takes no processor time
MEMORY = 2 << 30  # bytes that a reader may take beyond what it starts with
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many, of which, and where the table goes."""
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"for each reader; default: {INPUTS}")
    parser.add_argument("--reader", action="append", choices=READERS, metavar="NAME", help=", ".join(READERS))
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; default: 0")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the table between the markers there")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each reader.

    Raises:
        ValueError: a count below one, or a document without its markers.
    """
    if arguments.inputs < 1:
        raise ValueError(f"--inputs must be at least 1, got {arguments.inputs}")
    if arguments.document:
        count.put("", arguments.document, MARKERS, write=False)
    rows = [fuzz(name, arguments.inputs, arguments.seed) for name in arguments.reader or READERS]
    if arguments.document:
        count.put(count.as_markdown(_shown(rows)), arguments.document, MARKERS)
    return rows


def table(rows: list[dict]) -> str:
    """For a person to read."""
    return columns(_shown(rows))


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The errors that were found, a line each."""
    return [f"{row['reader']}: {error}" for row in rows for error in row["found"]]


def _shown(rows: list[dict]) -> list[dict[str, Any]]:
    return [
        {
            "reader": row["reader"],
            "documented error": row["error"],
            "inputs": row["inputs"],
            "read": row["read"],
            "refused": row["refused"],
            "other errors": len(row["found"]),
            "slowest": f"{row['slowest']:.2f} s",
            "memory": f"{row['memory'] / 2**20:.0f} MiB",
        }
        for row in rows
    ]


@dataclass(frozen=True)
class Reader:
    """What reads the bytes of a file, written to `suffix`, how it refuses, and files to start from."""

    read: Callable[[Path], Any]
    error: type[Exception]
    suffix: str
    seeds: Callable[[], list[bytes]]
    by_hand: Callable[[], list[bytes]] = list
    beside: str | None = None  # another file next to it that is spoilt too, sometimes


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with one to four things wrong."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(300))
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(7)
        size = min(rng.choice((1, 2, 4, 8, 16, 64, 512)), len(found) - at)
        if kind == 0:
            found = found[:at]
        elif kind == 1 and found:
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            width, order = rng.choice("BHIQ"), rng.choice("<>")
            number = struct.pack(order + width, rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(width)))
            found[at : at + len(number)] = number
        elif kind == 3:
            found[at : at + size] = rng.randbytes(size)
        elif kind == 4:
            found[at:at] = found[at : at + size] * rng.randint(1, 3)
        elif kind == 5:
            del found[at : at + size]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            found[at:at] = other[start : start + size]
    return bytes(found)


def fuzz(name: str, inputs: int, seed: int = 0) -> dict[str, Any]:
    """A row: how many inputs were read and refused, and a line for each that did otherwise."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = forked(_reads, sender, name, inputs, seed)
    sender.close()
    row = {"reader": name, "error": READERS[name].error.__name__, "inputs": 0, "read": 0, "refused": 0, "found": []}
    row |= {"slowest": 0.0, "memory": 0}
    patience = PATIENCE
    with contextlib.suppress(EOFError):
        while receiver.poll(PATIENCE):
            row |= receiver.recv()
        patience = 0.0  # no word, and no end either
    if status := ended(child, patience):
        row["found"] = [*row["found"], f"the process ended with {status} after {row['inputs']} inputs"]
    return row


class _TooLong(BaseException):
    pass


def _alarm(number: int, frame: Any) -> None:
    raise _TooLong


def _reads(sender: Any, name: str, inputs: int, seed: int) -> None:
    """In a process of its own: every input, and now and then what has come of them."""
    reader, rng = READERS[name], random.Random(f"{name} {seed}")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # decoders warn
    warnings.simplefilter("ignore")
    seeds, by_hand = reader.seeds(), reader.by_hand()
    before = _taken()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _alarm)
    tally: dict[str, Any] = {"read": 0, "refused": 0, "found": [], "slowest": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input{reader.suffix}"
        for number in range(inputs):
            start = rng.choice(seeds)
            data = by_hand[number] if number < len(by_hand) else mutated(start, seeds, rng)
            path.write_bytes(data)
            if reader.beside:
                path.with_suffix(reader.beside).unlink(missing_ok=True)
                if rng.random() < 0.5:
                    index = b"v1.2 2\njpg 512 700 a.jpg cls 2048 1 a.cls\njpg 3072 700 b.jpg cls 4608 1 b.cls\n"
                    path.with_suffix(reader.beside).write_bytes(mutated(index, [index], rng))
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                reader.read(path)
                tally["read"] += 1
            except reader.error as error:
                tally["refused"] += 1
                if "\n" in str(error) or len(str(error)) > 2000:
                    tally["found"].append(f"input {number}: refused in more than a line: {str(error)[:200]!r}")
            except (Exception, _TooLong) as error:
                tally["found"].append(f"input {number} of seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            tally["slowest"] = max(tally["slowest"], time.process_time() - began)
            if number % 100 == 0 or number == inputs - 1:
                sender.send(tally | {"inputs": number + 1, "memory": _taken() - before})
    sender.close()


def _taken() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _pictures(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(file, kind, **options)
    return file.getvalue()


def _jpegs() -> list[bytes]:
    return [
        _pictures("JPEG"),
        _pictures("JPEG", progressive=True),
        _pictures("JPEG", mode="L"),
        _pictures("JPEG", mode="CMYK"),
    ]


def _pngs() -> list[bytes]:
    return [_pictures("PNG"), _pictures("PNG", mode="P"), _pictures("PNG", mode="I;16"), _pictures("PNG", mode="LA")]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_bombs() -> list[bytes]:
    """A gigapixel of nothing, a text that unpacks to a gigabyte, and sizes that no picture has."""
    found = []
    for width, height in ((32768, 32768), (2**31 - 1, 2**31 - 1), (0, 5), (1, 2**31 - 1)):
        head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        found.append(head + _chunk(b"IDAT", zlib.compress(bytes(10**6))) + _chunk(b"IEND", b""))
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    return [*found, head + text + _chunk(b"IDAT", zlib.compress(bytes(52))) + _chunk(b"IEND", b"")]


def _jpeg_bombs() -> list[bytes]:
    """The size in the header of a small picture, as large as it can be said."""
    whole = _jpegs()[0]
    at = whole.index(b"\xff\xc0") + 5
    sizes = ((65535, 65535), (0, 0), (1, 65535), (13000, 13000))
    return [whole[:at] + struct.pack(">HH", *size) + whole[at + 4 :] for size in sizes]


def _checkpoints() -> list[bytes]:
    state: dict[str, Any] = {name: {"module.w": torch.ones(3, 2), "b": torch.zeros(4).bfloat16()} for name in MODELS}
    state |= {"epoch": 1, "opt": {"state": {0: {"step": torch.tensor(1.0)}}}, "config": {"a": [1, "x", None]}}
    found = []
    for new in (True, False):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=new)
        found.append(file.getvalue())
    return found


class _Runs:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], tuple(self.call[1:])


def _hostile_checkpoints() -> list[bytes]:
    """Pickles that would end the process, bare and in a zip; one compressed to a thousandth; a tensor without end."""
    found = []
    for call in ((os._exit, 3), (eval, "__import__('os')._exit(3)"), (bytearray, 2**40)):
        state = {**{name: {} for name in MODELS}, "epoch": 0, "more": _Runs(*call)}
        found.append(pickle.dumps(state))
        for new in (True, False):
            file = io.BytesIO()
            torch.save(state, file, _use_new_zipfile_serialization=new)
            found.append(file.getvalue())
    file = io.BytesIO()
    torch.save({**{name: {"w": torch.zeros(1).expand(2**40)} for name in MODELS}, "epoch": 0}, file)
    found.append(file.getvalue())
    stored = zipfile.ZipFile(io.BytesIO(_checkpoints()[0]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            content = stored.read(entry)
            archive.writestr(entry.filename, bytes(3 << 28) if "/data/" in entry.filename else content)
    return [*found, file.getvalue(), b"\x80\x02" + b"(" * 10**6, b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b"."]


def _configs() -> list[bytes]:
    return [path.read_bytes() for path in shipped_configs().values()]


def _hostile_configs() -> list[bytes]:
    """Aliases of aliases, merges of merges, depth, numbers and dates that are none, tags that make objects."""
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    merges = "m0: &m0 {k: 1}\n" + "".join(
        f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    texts = [laughs, merges, "data: " + "[" * 30000, "data: " + "{a: " * 10000, "data: {crop_size: 2020-13-45}"]
    texts += ["data: {batch_size: " + "9" * 5000 + "}", "optimization: {lr: 1" + "0" * 400 + "}", "data: &a [*a]"]
    texts += ["!!python/object/apply:os._exit [3]", "!!binary |\n  =", "? [1, 2]\n: 3", "data: {1: 2}", "a" * (1 << 17)]
    texts += ["logging: {folder: x, write_tag: ../../etc/x}", "data: {root_path: x, crop_scale: [.nan, .inf]}"]
    return [text.encode() for text in texts] + [b"\xff\xfe\x00", b"data: \xed\xa0\x80"]


def _shards() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, data in (
                ("a.jpg", _jpegs()[0]),
                ("a.cls", b"1"),
                ("ü" * 40 + ".jpg", _jpegs()[1]),
                ("b.cls", b"0"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        found.append(file.getvalue())
    return found


def _hostile_shards() -> list[bytes]:
    """Names that lead out of the folder, links, and sizes that are not there."""
    found = []
    for name, kind in (
        ("../../out.jpg", b"0"),
        ("/etc/out.jpg", b"0"),
        ("a.jpg", tarfile.SYMTYPE),
        ("a.jpg", tarfile.LNKTYPE),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        found.append(file.getvalue())
    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-7777777777\0"):
        data = bytearray(_shards()[0])
        data[124:136] = size
        checksum = sum(data[:148]) + sum(data[156:512]) + 8 * 32
        data[148:156] = b"%06o\0 " % checksum
        found.append(bytes(data))
    return found


def _read_shard(path: Path) -> None:
    shards = TarShards(path.parent, [path])
    for index in range(min(len(shards), 8)):
        try:
            shards.load(index)
        except UnreadableImage:
            shards.name(index)
    _ = shards.labels, shards.classes


def _decode(engine: str) -> Callable[[Path], None]:
    made: list[Any] = []

    def read(path: Path) -> None:
        if not made:
            made.append(choose_engine(engine))
        data = path.read_bytes()
        width, height = made[0].size(data)
        made[0].crop(data, (width // 4, height // 4, max(1, width // 2), max(1, height // 2)), 16)

    return read


def _results() -> list[bytes]:
    machine = {"device": "a chip", "kind": "cpu", "threads": 1}
    return [
        results.document([results.run_of("kernels", "python -m benchmarks kernels", machine, [{"ms": 1.0}])]).encode()
    ]


def _hostile_results() -> list[bytes]:
    return [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 10**5,
        b'{"format": "fastjepa benchmarks", "version": 1, "runs": [[]]}',
    ]


READERS: dict[str, Reader] = {
    "load_config": Reader(lambda path: load_config(path), ValueError, ".yaml", _configs, _hostile_configs),
    "read_checkpoint": Reader(read_checkpoint, ValueError, ".pth.tar", _checkpoints, _hostile_checkpoints),
    "JPEG, turbo": Reader(_decode("turbo"), UnreadableImage, ".jpg", _jpegs, _jpeg_bombs),
    "JPEG, pillow": Reader(_decode("pillow"), UnreadableImage, ".jpg", _jpegs, _jpeg_bombs),
    "PNG": Reader(_decode("pillow"), UnreadableImage, ".png", _pngs, _png_bombs),
    "tar shards": Reader(_read_shard, ValueError, ".tar", _shards, _hostile_shards, ".idx"),
    "results of suites": Reader(results.read, ValueError, ".json", _results, _hostile_results),
}
