"""The `input` suite: JPEG files to training batches, ours and others', right first and then timed in turn.

Every engine reads the same files, cuts an area of 0.3 to 1 out of each picture, makes it 224 pixels a side, and hands
batches with their masks to the process that trains. `MaskCollator` draws the masks for all of them, so that pictures
alone make the difference. Workers are processes of one thread, held on as many cores as there are workers; what the
process that receives the batches takes is not counted. The files are in the system's cache, so no disk is in the rates.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from benchmarks.pipelines import (
    CROP,
    ENGINES,
    HEIGHT,
    SEED,
    TIMEOUT,
    WIDTH,
    Engine,
    FastJEPA,
    Published,
    Sample,
    one_line,
)
from benchmarks.tables import columns
from fastjepa.data import Batch

BATCH = 128  # as in the official recipes
REPEATS = 5
NEEDED = (755, 2300)  # images a second: one H200, and a node of eight A100, at the rates aimed at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, by how many, and how long."""
    parser.add_argument("--pictures", type=int, default=128, help="how many JPEG files are made")
    parser.add_argument("--workers", type=int, action="append", help="processes that decode; again for more (1 and 2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each engine and number of workers")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="windows that make up those seconds")
    names = "; ".join(engine.name for engine in ENGINES)
    parser.add_argument("--engine", action="append", metavar="NAME", help=f"only this one; again for more: {names}")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each engine and number of workers."""
    named = {engine.name: engine for engine in ENGINES}
    chosen = arguments.engine or list(named)
    for name in chosen:
        if name not in named:
            raise ValueError(f"--engine: no engine {name!r}; there are {'; '.join(named)}")
    engines = [named[name] for name in dict.fromkeys(chosen)]
    return measure(arguments.pictures, arguments.workers or (1, 2), arguments.seconds, engines, arguments.repeats)


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """The engines whose crops are wrong."""
    return list(dict.fromkeys(f"{row['engine']}: {row['wrong']}" for row in rows if "wrong" in row))


def table(rows: Sequence[dict]) -> str:
    """The rows for a person to read; an engine that is absent or wrong has one line."""
    first = rows[0]
    head = (
        f"{first['pictures']} JPEG files of {WIDTH}x{HEIGHT} and {first['picture_bytes'] / 1e3:.0f} kB, cached by the "
        f"system; batches of {first['batch']}; median of {first['windows']} windows, spread from the slowest to the "
        "fastest"
    )
    lines = [_line(row) for row in rows if "images_per_second" in row]
    others = dict.fromkeys(
        f"{row['engine']}: {row['absent'] if 'absent' in row else 'WRONG: ' + row['wrong']}"
        for row in rows
        if "images_per_second" not in row
    )
    return "\n".join([head, *([columns(lines)] if lines else []), *others])


def _line(row: dict) -> dict[str, Any]:
    shown = {
        "engine": row["engine"],
        "workers": row["workers"],
        "images/s": f"{row['images_per_second']:.0f}",
        "spread": f"{row['spread']:.0f}",
        "a core": f"{row['images_per_second_per_core']:.0f}",
        "x published": f"{row['over_published']:.2f}" if "over_published" in row else None,
        "CPU ms/image": f"{row['cpu_ms']:.2f}" if "cpu_ms" in row else None,
        "x published, CPU": f"{row['cpu_over_published']:.2f}" if "cpu_over_published" in row else None,
        "x one worker": f"{row['over_one_worker']:.2f}" if "over_one_worker" in row else None,
        "error/255": f"{row['error']:.2f}" if "error" in row else None,
    }
    return shown | {f"cores for {rate}/s": row[f"cores_for_{rate}"] for rate in NEEDED}


def measure(
    pictures: int = 128,
    workers: Sequence[int] = (1, 2),
    seconds: float = 3.0,
    engines: Sequence[type[Engine]] = ENGINES,
    repeats: int = REPEATS,
) -> list[dict]:
    """A row for each engine and number of workers: images a second that reach the training process.

    A row has `wrong` and no rate where crops are further from Pillow's than `error_allowed` grey levels in the mean;
    `absent` where the engine is not here. Decoding on the GPU has one row: its only worker is the training process.
    `picture_bytes` is the mean of a file, `spread` the fastest window less the slowest, `cores_for_755` how many cores
    give 755 images a second at the rate of one, `over_published` the rate over the published way's with as many
    workers, `over_one_worker` the rate over that of one worker.

    `cpu_ms` is what an image costs the workers in time of a processor, whoever else uses the machine, where the system
    tells it; `cpu_over_published` is the published way's over it.

    Raises:
        ValueError: no pictures, workers, seconds or repeats.
    """
    counts = (("pictures", pictures), *(("workers", count) for count in workers), ("repeats", repeats))
    for name, value in (*counts, ("seconds", seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} must be more than 0, got {value}")
    with TemporaryDirectory(prefix="fastjepa-input-") as folder:
        size = make_pictures(Path(folder), pictures)
        batch = min(BATCH, pictures)
        common = {"batch": batch, "pictures": pictures, "picture_bytes": size, "windows": repeats}
        rows: list[dict] = []
        timed: list[tuple[dict, Engine, list[Window]]] = []
        for kind in engines:
            row, engine = _checked(kind, Path(folder), batch)
            for count in (1,) if kind.in_process else dict.fromkeys(workers):
                rows.append({"engine": kind.name, "workers": count, **common, **row})
                if engine:
                    timed.append((rows[-1], engine, []))
        for _ in range(repeats):  # engines in turn, so that a slow moment of the machine meets all of them
            for row, engine, rates in timed:
                rates.append(_window(engine, row["workers"], seconds / repeats))
    for row, _, windows in timed:
        rates = [window.rate for window in windows]
        rate = statistics.median(rates)
        each = rate / min(row["workers"], len(_cores()))
        row |= {"images_per_second": rate, "spread": max(rates) - min(rates), "images_per_second_per_core": each}
        row |= {f"cores_for_{needed}": math.ceil(needed / each) for needed in NEEDED}
        if used := [1e3 * window.cpu for window in windows if window.cpu]:
            row["cpu_ms"] = statistics.median(used)
    _compare(timed)
    return rows


def _compare(timed: Sequence[tuple[dict, Engine, Any]]) -> None:
    """Put into the rows how they stand to the published way, and to themselves with one worker."""
    published = {row["workers"]: row for row, engine, _ in timed if isinstance(engine, Published)}
    alone = {row["engine"]: row["images_per_second"] for row, _, _ in timed if row["workers"] == 1}
    for row, _, _ in timed:
        if theirs := published.get(row["workers"]):
            row["over_published"] = row["images_per_second"] / theirs["images_per_second"]
            if "cpu_ms" in row and "cpu_ms" in theirs:
                row["cpu_over_published"] = theirs["cpu_ms"] / row["cpu_ms"]
        if row["workers"] > 1 and row["engine"] in alone:
            row["over_one_worker"] = row["images_per_second"] / alone[row["engine"]]


def make_pictures(root: Path, count: int, seed: int = SEED) -> float:
    """Write `count` JPEG files, each following from (seed, number) alone; the mean of their sizes in bytes.

    Noise whose amplitude falls with the frequency, as in photographs, mostly the same in all colours, with polygons for
    edges and a little grain: as many bytes as a photograph of ImageNet has.
    """
    low, high = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    frequency = np.hypot(low, high)
    frequency[0, 0] = np.inf  # no mean
    colours = np.array([[1, 0.3, 0.1], [1, 0, -0.1], [1, -0.3, 0.1]])
    sizes = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        waves = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
        noise = np.fft.irfft2(waves / frequency, s=(HEIGHT, WIDTH))
        noise /= noise.std(axis=(1, 2), keepdims=True)
        picture = _picture(45 * np.einsum("ck,khw->hwc", colours, noise) + rng.uniform(80, 170, 3))
        draw = ImageDraw.Draw(picture)
        for _ in range(12):
            centre, radius = rng.uniform((0, 0), (WIDTH, HEIGHT)), rng.uniform(10, 70)
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            corners = centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
            draw.polygon([tuple(corner) for corner in corners], fill=tuple(rng.integers(0, 256, 3).tolist()))
        path = root / f"{number:06}.jpg"
        _picture(np.asarray(picture) + rng.normal(scale=6, size=(HEIGHT, WIDTH, 1))).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return statistics.fmean(sizes)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _checked(kind: type[Engine], root: Path, batch: int) -> tuple[dict, Engine | None]:
    """What is known of an engine before it is timed, and the engine itself if its crops and batches are right."""
    if why := kind.absent():
        return {"absent": why}, None
    engine = kind(root, batch)
    if kind.allowed is None:
        return {}, engine
    try:
        error = distance(_made(engine))
        first = next(engine.batches(1))
    except Exception as failure:  # whatever a peer does, the others have their rows
        traceback.clear_frames(failure.__traceback__)  # which hold the workers, in a circle with the failure
        return {"wrong" if issubclass(kind, FastJEPA) else "absent": f"fails: {one_line(failure)}"}, None
    row = {"error": error, "error_allowed": kind.allowed}
    shape = tuple((first.images if isinstance(first, Batch) else first[0]).shape)
    if not error <= kind.allowed:
        return row | {"wrong": f"{error:.1f} grey levels from Pillow's crops, {kind.allowed:g} allowed"}, None
    if shape != (batch, 3, CROP, CROP):
        return row | {"wrong": f"batches have shape {shape}, not {(batch, 3, CROP, CROP)}"}, None
    return row, engine


def distance(samples: Sequence[Sample]) -> float:
    """Mean of |crop - Pillow's crop, resized bilinearly| in grey levels."""
    errors = []
    for path, (left, top, width, height), crop in samples:
        with Image.open(path) as picture:
            right = picture.convert("RGB").crop((left, top, left + width, top + height))
        right = np.array(right.resize((CROP, CROP), Image.Resampling.BILINEAR), dtype=np.float32)
        errors.append(float((crop - torch.from_numpy(right).permute(2, 0, 1)).abs().mean()))
    return statistics.fmean(errors)


class _Samples(Dataset):
    """The samples of an engine, as the item of a worker."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __getitem__(self, _: int) -> list[Sample]:
        return self.engine.samples()


def _made(engine: Engine) -> list[Sample]:
    """The samples of `engine`, made where its batches are: libraries with threads of their own stay out of this one."""
    if engine.in_process:
        return engine.samples()
    return next(iter(DataLoader(_Samples(engine), None, sampler=range(1), num_workers=1, timeout=TIMEOUT)))


class Window(NamedTuple):
    """Images a second, and the seconds of a processor that each took in the workers, where the system tells."""

    rate: float
    cpu: float | None


def _window(engine: Engine, workers: int, seconds: float) -> Window:
    """Whole rounds of a batch from each worker, after a first round in which the workers start."""
    end = time.perf_counter() + seconds
    with _on_cores(workers):  # what is started here stays there
        batches = engine.batches(workers)
        if engine.in_process:
            return _rate(batches, engine.batch, workers, end)
    return _rate(batches, engine.batch, workers, end)


def _rate(batches: Iterator[Any], batch: int, workers: int, end: float) -> Window:
    _take(batches, workers)
    processes = [child.pid for child in multiprocessing.active_children() if child.pid]
    used, start, count = _cpu_time(processes), time.perf_counter(), 0
    while not count or time.perf_counter() < end:
        _take(batches, workers)
        count += workers * batch
    rate = count / (time.perf_counter() - start)
    return Window(rate, (_cpu_time(processes) - used) / count if used else None)


def _cpu_time(processes: Sequence[int]) -> float:
    """Seconds of a processor that processes have taken; 0 where the system does not tell."""
    try:
        spent = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in processes]
    except OSError:
        return 0.0
    return sum(int(user) + int(system) for user, system in spent) / os.sysconf("SC_CLK_TCK")


def _take(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """Processes and threads that are started within it run on `count` cores, where the system can hold them there."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _cores() -> Sequence[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
