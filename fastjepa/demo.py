"""The demo: pretrain a small I-JEPA on a CPU in minutes, and show what its encoder has learned.

Without pictures of one's own it uses those inside the scikit-image and scikit-learn packages: grey tiles of them,
evened out in brightness and contrast so that only structure tells them apart. The class of a tile is the picture it is
from; tiles of left halves train, tiles of right halves test. The pictures stay on the machine: none is redistributed.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastjepa.config import Config, load_config
from fastjepa.data import ImageFolder, UnreadableImage
from fastjepa.evaluation import Evaluation, LabelledImages, evaluate, plot_curves, plot_features, whole_picture
from fastjepa.training import TrainResult, build_models, train
from fastjepa.training.engine import Trainer, seed_everything

PHOTOGRAPHS = {  # package -> its folder of pictures, and those of scenes and surfaces among them
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
DRAWN = ("astronaut", "chelsea", "coffee", "flower", "motorcycle_left")  # in features.png
TILE = 64  # pixels a side
TILES = {"train": 200, "val": 40}  # of each picture's left and of its right half
GREY, CONTRAST = 0.45, 0.28  # mean and deviation that every tile gets
STEPS = 1180
LOOKS = 7  # evaluations on the way
THREADS = 4  # more only wait for one another, with so small a model
OWN_PICTURES = 3000  # at most so many of a user's pictures are used, chosen by the seed
OWN_SIDE = 96  # pixels of the shorter side of their copies
FEWEST = 10  # and at least so many are needed
HELD_OUT = 5  # one in so many of a class is held out
MARKER = ".fastjepa-demo"  # in folders that the demo made, and so may make anew


@dataclass(frozen=True)
class Pictures:
    """What the demo trains on and judges by.

    Attributes:
        folder: the training pictures are below its `train`.
        train: labelled pictures to fit probes on; None where there are no classes.
        test: held-out pictures. drawn: larger ones for features.png, uint8 [k, 3, H, W].
        notes: lines that say what was found.
    """

    folder: Path
    train: LabelledImages | None
    test: LabelledImages
    drawn: Tensor
    notes: list[str]


def run_demo(
    data: Path | None = None,
    out: Path = Path("runs/demo"),
    *,
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Pretrain, evaluate before, during and after, and draw curves.png and features.png into `out`.

    Arguments:
        data: a folder of pictures; the probes tell its class folders apart. None: the packages' pictures.
        steps: about so many training steps; whole epochs.
        say: takes each line that is told; None prints to stderr, as training does.

    Returns:
        Marks of the `random` and the `pretrained` encoder (accuracies in percent, RankMe), `steps`, `loss`, `seconds`,
        and the files `checkpoint`, `curves` and `features`.

    Raises:
        ValueError: a folder without enough pictures, a missing package, or an `out` that holds something else.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    began, out = time.perf_counter(), Path(out)
    images, run = _fresh(out / "images", data), _fresh(out / "run", data)
    pictures = packaged_pictures(images) if data is None else own_pictures(Path(data), images, seed)
    for line in pictures.notes:
        say(line)
    with _few_threads():
        config = _config(pictures, run, steps, seed)
        seed_everything(seed)  # as training does, so that this is the encoder it starts from
        untrained = build_models(config).target_encoder
        result, marks = _pretrain(config, pictures, (0, evaluate(untrained, pictures.train, pictures.test, seed)))
        rows = [{"step": step, **mark.to_dict()} for step, mark in marks]
        curves = plot_curves(result.rows, rows, out / "curves.png")
        features = plot_features(result.model.target_encoder, pictures.drawn, out / "features.png", untrained)
    seconds = time.perf_counter() - began
    first, last = marks[0][1], marks[-1][1]
    for line in _story(first, last, result.steps, seconds, curves, features):
        say(line)
    return {
        "random": first.to_dict(),
        "pretrained": last.to_dict(),
        "steps": result.steps,
        "loss": result.loss,
        "seconds": round(seconds, 1),
        "checkpoint": str(result.checkpoint),
        "curves": str(curves),
        "features": str(features),
    }


def demo_data(folder: Path) -> Path:
    """Write the packages' pictures as tiles, train/<picture>/*.png and val/<picture>/*.png; halves to drawn/*.png.

    Raises:
        ValueError: scikit-image and scikit-learn are not installed, or lack most of the pictures.
    """
    for place, file in enumerate(_photographs()):
        rng = np.random.default_rng(place)
        with Image.open(file) as picture:
            grey = np.asarray(picture.convert("L"), dtype=np.float32) / 255
        middle = grey.shape[1] // 2
        for split, half in (("train", grey[:, :middle]), ("val", grey[:, middle:])):
            target = folder / split / file.stem
            target.mkdir(parents=True, exist_ok=True)
            for number in range(TILES[split]):
                top, left = (int(rng.integers(length - TILE + 1)) for length in half.shape)
                _evened(half[top : top + TILE, left : left + TILE]).save(target / f"{number:03d}.png", compress_level=1)
        if file.stem in DRAWN:
            (folder / "drawn").mkdir(exist_ok=True)
            _evened(grey[:, middle:]).save(folder / "drawn" / f"{file.stem}.png", compress_level=1)
    return folder


def packaged_pictures(folder: Path) -> Pictures:
    """The packages' pictures, written to `folder` as `demo_data` does.

    Raises:
        ValueError: as `demo_data`.
    """
    demo_data(folder)
    size = _size()
    found = ImageFolder(folder / "train")
    train = _labelled(found, size, found.classes)
    test = _labelled(ImageFolder(folder / "val"), size, found.classes)
    drawn = ImageFolder(folder / "drawn")
    count = len(found.classes)
    note = (
        f"{len(train.labels)} tiles from the left halves of {count} pictures to train on, {len(test.labels)} from the "
        f"right halves held out ({folder}). To tell: the picture that a tile is from; a guess is right in "
        f"{100 / count:.0f} %."
    )
    return Pictures(folder, train, test, _drawn([drawn.load(i) for i in range(len(drawn))]), [note])


def own_pictures(source: Path, folder: Path, seed: int = 0) -> Pictures:
    """Small copies of a user's pictures in `folder`, some of each class held out. A `train` folder is taken alone.

    Raises:
        ValueError: no such folder, too few pictures in it, or too many that cannot be read.
    """
    found = ImageFolder(source / "train" if (source / "train").is_dir() else source)
    chosen = np.random.default_rng(seed).permutation(len(found))[:OWN_PICTURES].tolist()
    seen: Counter[int] = Counter()
    unreadable: list[str] = []
    drawn: list[Image.Image] = []
    for index in chosen:
        try:
            picture = found.load(index)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        label = found.labels[index]
        seen[label] += 1
        split = "train" if seen[label] % HELD_OUT else "val"
        target = folder / split / (found.classes[label] if label >= 0 else "")
        target.mkdir(parents=True, exist_ok=True)
        scale = OWN_SIDE / min(picture.size)
        small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
        small.save(target / f"{index:07d}.png", compress_level=1)
        if split == "val" and len(drawn) < len(DRAWN):
            drawn.append(picture)
    _enough(source, sum(seen.values()), unreadable)
    classes = [name for label, name in enumerate(found.classes) if seen[label] >= HELD_OUT]
    return _own(folder, classes, drawn, unreadable)


def _enough(source: Path, readable: int, unreadable: Sequence[str]) -> None:
    bad = len(unreadable)
    total = readable + bad
    if bad > max(total // 100, min(10, total // 4)):
        raise ValueError(f"{bad} of {total} pictures in {source} cannot be read; the last: {unreadable[-1]}")
    if readable < FEWEST:
        raise ValueError(f"{source} has {readable} pictures; the demo needs at least {FEWEST}")


def _own(folder: Path, classes: list[str], drawn: list[Image.Image], unreadable: Sequence[str]) -> Pictures:
    """What `own_pictures` has written; `classes` are those with pictures in both parts."""
    size = _size()
    kept, held = ImageFolder(folder / "train"), _held_out(folder)
    notes = [f"{len(kept)} pictures to train on, {len(held)} held out: small copies of yours, in {folder}"]
    if unreadable:
        notes.append(f"skipped {len(unreadable)} that cannot be read, the first: {unreadable[0]}")
    if len(classes) < 2:
        notes.append(
            f"No probes: they need two class folders with {HELD_OUT} pictures each. Loss, rank and pictures follow."
        )
        return Pictures(folder, None, _labelled(held, size, None), _drawn(drawn), notes)
    notes.append(f"To tell: {len(classes)} class folders.")
    return Pictures(folder, _labelled(kept, size, classes), _labelled(held, size, classes), _drawn(drawn), notes)


def _held_out(folder: Path) -> ImageFolder:
    """The held-out pictures; where no class is large enough to spare one, those trained on."""
    return ImageFolder(folder / ("val" if (folder / "val").is_dir() else "train"))


def _labelled(found: ImageFolder, size: int, classes: Sequence[str] | None) -> LabelledImages:
    """Whole pictures of these classes, labelled by their place among them; all pictures, unlabelled, without."""
    number = {name: place for place, name in enumerate(classes or ())}
    names = [found.classes[label] if label >= 0 else "" for label in found.labels]
    chosen = [i for i, name in enumerate(names) if classes is None or name in number]
    images = torch.stack([whole_picture(found.load(i), size) for i in chosen])
    return LabelledImages(images, torch.tensor([number.get(names[i], -1) for i in chosen]))


def _drawn(pictures: Sequence[Image.Image]) -> Tensor:
    """Four times as large as in training: the encoder takes other sizes too."""
    return torch.stack([whole_picture(picture, 4 * _size()) for picture in pictures])


def _photographs() -> list[Path]:
    found = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent / folder
            found += [root / name for name in names.split() if (root / name).is_file()]
    if len(found) < FEWEST:
        raise ValueError("the demo's pictures are in scikit-image and scikit-learn: pip install 'fastjepa[demo]'")
    return found


def _evened(grey: np.ndarray) -> Image.Image:
    """A grey picture [H, W] in 0..1 with the mean and the deviation that all get."""
    evened = (grey - grey.mean()) / (grey.std() + 0.02) * CONTRAST + GREY
    return Image.fromarray((evened.clip(0, 1) * 255).round().astype(np.uint8))


def _size() -> int:
    return load_config("demo").data.crop_size


def _config(pictures: Pictures, run: Path, steps: int, seed: int) -> Config:
    """The shipped configuration, with as many epochs as make about `steps` steps."""
    count = len(ImageFolder(pictures.folder / "train"))
    batch = min(load_config("demo").data.batch_size, count)
    epochs = max(1, round(steps / (count // batch)))
    return load_config(
        "demo",
        [
            f"data.root_path={pictures.folder}",
            f"data.batch_size={batch}",
            f"logging.folder={run}",
            f"optimization.epochs={epochs}",
            f"optimization.warmup={epochs / 10}",
            f"runtime.seed={seed}",
        ],
    )


def _pretrain(
    config: Config, pictures: Pictures, start: tuple[int, Evaluation]
) -> tuple[TrainResult, list[tuple[int, Evaluation]]]:
    """Train, and judge the target encoder on the way: (result, marks by step)."""
    marks = [start]
    batches = len(ImageFolder(pictures.folder / "train")) // config.data.batch_size
    total = batches * config.optimization.epochs
    looks = {round(total * look / LOOKS) for look in range(1, LOOKS)}

    def judge(model: Any, step: int) -> None:
        marks.append((step, evaluate(model.target_encoder, pictures.train, pictures.test, config.runtime.seed)))

    def on_step(trainer: Trainer) -> None:
        if trainer.step in looks:
            judge(trainer.model, trainer.step)

    result = train(config, on_step)
    judge(result.model, result.steps)
    return result, marks


def _story(
    first: Evaluation, last: Evaluation, steps: int, seconds: float, curves: Path, features: Path
) -> Iterator[str]:
    """What the demo says at the end."""
    yield ""
    yield f"{'on held-out pictures':28}{'random encoder':>16}{'pretrained':>13}{'gain':>8}"
    names = {"linear": "linear probe", "knn": "nearest neighbours", "low_shot": "linear, 5 labels a class"}
    before, after = first.to_dict(), last.to_dict()
    for key, name in names.items():
        old, new = before[key], after[key]
        if old is not None and new is not None:
            yield f"{name:28}{old:14.1f} %{new:11.1f} %{new - old:+8.1f}"
    yield f"{'effective rank (RankMe)':28}{first.rankme:16.1f}{last.rankme:13.1f}"
    yield f"{steps} steps and everything else in {seconds:.0f} s"
    yield ""
    probes = "accuracies should rise and stay, and " if first.linear is not None else ""
    yield f"{curves}: {probes}the rank should not fall towards 1, whatever the loss does."
    yield f"{features}: equal colours are equal features. After training they should follow what is in the picture."


def _fresh(folder: Path, data: Path | None) -> Path:
    """`folder`, empty. One that the demo has made before is removed, any other is left alone.

    Raises:
        ValueError: it holds something else, or the user's pictures.
    """
    if data is not None and Path(data).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{data} is where the demo writes; choose another --out")
    if (folder / MARKER).is_file():
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something that the demo did not make; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
