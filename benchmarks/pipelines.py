"""Pipelines of the `input` suite: ways from JPEG files to batches with masks, ours and others'."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from benchmarks.masks import SETTINGS
from fastjepa import MaskCollator
from fastjepa.data import Augment, ImageFolder, Pictures, TrainingBatches, choose_engine, random_resized_crop
from fastjepa.data.pack import pack
from fastjepa.data.shards import TarShards
from fastjepa.evaluation.features import MEAN, STD

WIDTH, HEIGHT = 500, 375  # of a picture
CROP, SCALE, PATCH = 224, (0.3, 1.0), 14
SEED = 0
SAMPLES = 8  # crops of an engine that are compared with Pillow's
ENDLESS = 1 << 40  # steps or pictures: more than any window takes
TIMEOUT = 60  # seconds without a batch, after which an engine has failed


class Sample(NamedTuple):
    """A crop [3, 224, 224] in grey levels 0..255, and the file and (left, top, width, height) that it is of."""

    path: str
    box: tuple[int, int, int, int]
    crop: Tensor


class Engine(Dataset):
    """A way from files to batches; batch number `step` is made by one worker, or on the GPU by the training process.

    Attributes:
        name: in the rows.
        allowed: mean distance from Pillow's crops in grey levels, of 255; None where there are no crops.
        in_process: the training process makes the batches, on the GPU, without workers.
    """

    name: str
    allowed: float | None = 1.0  # for those that antialias with Pillow's own filter
    in_process = False

    def __init__(self, root: Path, batch: int):
        files = ImageFolder(root)
        self.paths = [str(path) for path in files.paths]
        self.folder: Pictures = files
        self.batch = batch
        self.masks = MaskCollator((CROP, CROP), PATCH, **SETTINGS)

    @classmethod
    def absent(cls) -> str | None:
        """Why it cannot run here, in one line; None where it can."""
        return None

    def batches(self, workers: int) -> Iterator[Any]:
        """Batches without end."""
        if self.in_process:
            return (self[step] for step in itertools.count())
        return iter(DataLoader(self, None, sampler=range(ENDLESS), num_workers=workers, timeout=TIMEOUT))

    def samples(self) -> list[Sample]:
        """SAMPLES crops, made by the code that makes the batches."""
        raise NotImplementedError

    def box(self, draw: int) -> tuple[int, int, int, int]:
        """The box of crop number `draw`: the same in every engine but DALI, which draws its own."""
        return random_resized_crop(WIDTH, HEIGHT, SCALE, _stream(draw))


class FastJEPA(Engine):
    """The pipeline of `fastjepa train`, with the engine that data.engine=auto takes."""

    name = "fastjepa"
    decoder = "auto"

    def __init__(self, root: Path, batch: int):
        super().__init__(root, batch)
        augment = Augment(CROP, SCALE, engine=choose_engine(self.decoder))
        self.ours = TrainingBatches(self.folder, augment, self.masks, batch, SEED)

    @classmethod
    def absent(cls) -> str | None:
        try:
            choose_engine(cls.decoder)
        except ValueError as error:
            return str(error)
        return None

    def batches(self, workers: int) -> Iterator[Any]:
        batches = self.ours.loader(0, ENDLESS, workers, pin=False)
        return itertools.chain([next(batches)], batches)  # the workers start with the first, here

    def samples(self) -> list[Sample]:
        found = []
        for draw in range(SAMPLES):
            index = draw % len(self.paths)
            crop = self.ours.augment(self.folder.read(index), _stream(draw))
            if crop.aside:
                raise RuntimeError(f"{self.ours.augment.engine.name} left a picture to Pillow: {crop.aside}")
            found.append(Sample(self.paths[index], self.box(draw), crop.pixels.float()))
        return found


class FastJEPAMarked(FastJEPA):
    """The same from shards that `fastjepa data pack --restart-markers` makes of the files."""

    name = "fastjepa, restart markers"
    decoder = "turbo"

    def __init__(self, root: Path, batch: int):
        super().__init__(root, batch)
        shards = root / "shards"
        pack(self.folder, shards, restart_markers=True, quiet=True)
        self.folder = self.ours.folder = TarShards(shards)


class FastJEPAPillow(FastJEPA):
    """The same with data.engine=pillow: the reference."""

    name = "fastjepa, engine pillow"
    decoder = "pillow"


class FastJEPADALI(FastJEPA):
    """The same with data.engine=dali, in the workers."""

    name = "fastjepa, engine dali"
    decoder = "dali"


class FastJEPATorchvision(FastJEPA):
    """The same with data.engine=torchvision, in the workers."""

    name = "fastjepa, engine torchvision"
    decoder = "torchvision"


class PerPicture(Engine):
    """One whose workers crop picture after picture and collate them with `MaskCollator`."""

    def __getitem__(self, draw: int) -> Tensor:
        return self.crop(self.paths[draw % len(self.paths)], draw)

    def batches(self, workers: int) -> Iterator[Any]:
        draws, masks = range(ENDLESS), self.masks
        return iter(DataLoader(self, self.batch, False, draws, num_workers=workers, collate_fn=masks, timeout=TIMEOUT))

    def samples(self) -> list[Sample]:
        draws = range(SAMPLES)
        return [Sample(self.paths[i % len(self.paths)], self.box(i), self.levels(self[i])) for i in draws]

    def crop(self, path: str, draw: int) -> Tensor:
        """Crop number `draw`, of `path`: [3, 224, 224]."""
        raise NotImplementedError

    def levels(self, crop: Tensor) -> Tensor:
        """A crop in grey levels 0..255."""
        return crop.float()


class Published(PerPicture):
    """As published training code has it: the whole picture decoded, cropped, and normalised, all in the workers."""

    name = "pillow, as published"

    def crop(self, path: str, draw: int) -> Tensor:
        with open(path, "rb") as file:
            picture = Image.open(file).convert("RGB")
        left, top, width, height = random_resized_crop(picture.width, picture.height, SCALE, _stream(draw))
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((CROP, CROP), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return pixels.sub_(_column(MEAN)).div_(_column(STD))

    def levels(self, crop: Tensor) -> Tensor:
        return 255 * (crop * _column(STD) + _column(MEAN))


class DecodeOnly(PerPicture):
    """Pillow decodes, and nothing else is done: a roof for whatever decodes whole pictures with it."""

    name = "pillow, decode only"
    allowed = None

    def crop(self, path: str, draw: int) -> Tensor:
        with open(path, "rb") as file:
            Image.open(file).convert("RGB")
        return torch.empty(0)


class SimpleJPEG(PerPicture):
    """libjpeg-turbo, then OpenCV's area resize, which antialiases with a box where Pillow does with a triangle."""

    name = "simplejpeg + OpenCV"
    allowed = 3.0

    @classmethod
    def absent(cls) -> str | None:
        return _missing("simplejpeg", "cv2")

    def crop(self, path: str, draw: int) -> Tensor:
        import cv2
        import simplejpeg

        cv2.setNumThreads(1)
        with open(path, "rb") as file:
            pixels = simplejpeg.decode_jpeg(file.read())
        left, top, width, height = random_resized_crop(pixels.shape[1], pixels.shape[0], SCALE, _stream(draw))
        pixels = pixels[top : top + height, left : left + width]
        pixels = cv2.resize(pixels, (CROP, CROP), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class Torchvision(PerPicture):
    """torchvision's own decoder, then its crop and antialiased resize of uint8 tensors."""

    name = "torchvision"

    @classmethod
    def absent(cls) -> str | None:
        return _missing("torchvision")

    def crop(self, path: str, draw: int) -> Tensor:
        return _torchvision_crops([path], [draw], "cpu")[0]


class NvJPEG(Engine):
    """torchvision with nvJPEG: a batch is decoded, cropped and resized on the GPU."""

    name = "torchvision nvJPEG"
    in_process = True
    device = "cuda"

    @classmethod
    def absent(cls) -> str | None:
        return _missing("torchvision") or _no_gpu()

    def __getitem__(self, step: int) -> tuple:
        batch = torch.stack(self._crops(range(step * self.batch, (step + 1) * self.batch)))
        return _done(batch), *self.masks.sample(self.batch, [SEED, step])

    def samples(self) -> list[Sample]:
        crops = self._crops(range(SAMPLES))
        return [Sample(self.paths[i % len(self.paths)], self.box(i), c.float().cpu()) for i, c in enumerate(crops)]

    def _crops(self, draws: range) -> list[Tensor]:
        return _torchvision_crops([self.paths[i % len(self.paths)] for i in draws], draws, self.device)


class DALI(Engine):
    """NVIDIA DALI with one thread in each worker; only the pixels of the crop are decoded."""

    name = "DALI"
    device = "cpu"
    pipeline: Any = None  # made by the process that uses it

    @classmethod
    def absent(cls) -> str | None:
        return _missing("nvidia.dali")

    def __getitem__(self, step: int) -> tuple:
        batch = torch.from_dlpack(self._run()[0].as_tensor()).clone()  # DALI will write there again
        return _done(batch), *self.masks.sample(self.batch, [SEED, step])

    def samples(self) -> list[Sample]:
        found = []
        while len(found) < SAMPLES:
            crops, *rest = (out.as_cpu().as_array() for out in self._run())
            for crop, label, (top, left), (height, width) in zip(crops, *rest, strict=True):
                box = int(left), int(top), int(width), int(height)
                found.append(Sample(self.paths[int(label[0])], box, torch.from_numpy(crop.copy()).float()))
        return found[:SAMPLES]

    def _run(self) -> tuple:
        """A batch: crops uint8 [B, 3, 224, 224], indices of files, (top, left) and (height, width) of boxes."""
        if self.pipeline is None:
            self.pipeline = self._pipeline()
            self.pipeline.build()
        return self.pipeline.run()

    def _pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        worker = get_worker_info()
        gpu = self.device == "gpu"
        made = Pipeline(self.batch, 1, 0 if gpu else None, seed=SEED + (worker.id if worker else 0))
        with made:
            files, labels = fn.readers.file(files=self.paths, labels=list(range(len(self.paths))), random_shuffle=True)
            start, size = fn.random_crop_generator(
                fn.peek_image_shape(files), random_area=SCALE, random_aspect_ratio=(3 / 4, 4 / 3)
            )
            crops = fn.decoders.image_slice(
                files, start=start, shape=size, axis_names="HW", output_type=types.RGB, device="mixed" if gpu else "cpu"
            )
            crops = fn.resize(
                crops, size=(CROP, CROP), interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.UINT8
            )
            made.set_outputs(fn.transpose(crops, perm=[2, 0, 1]), labels, start, size)
        return made


class DALIOnGPU(DALI):
    """DALI that decodes, crops and resizes on the GPU."""

    name = "DALI, GPU decode"
    in_process = True
    device = "gpu"

    @classmethod
    def absent(cls) -> str | None:
        return _missing("nvidia.dali") or _no_gpu()


OURS = (FastJEPA, FastJEPAMarked, FastJEPAPillow, FastJEPADALI, FastJEPATorchvision)
ENGINES = (*OURS, Published, DecodeOnly, Torchvision, SimpleJPEG, DALI, NvJPEG, DALIOnGPU)


def _stream(draw: int) -> np.random.Generator:
    return np.random.default_rng([SEED, draw])


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _torchvision_crops(paths: Sequence[str], draws: Sequence[int], device: str) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2.functional import resized_crop

    crops = []
    pictures = decode_jpeg([read_file(path) for path in paths], ImageReadMode.RGB, device=device)
    for picture, draw in zip(pictures, draws, strict=True):
        height, width = picture.shape[-2:]
        left, top, width, height = random_resized_crop(width, height, SCALE, _stream(draw))
        crops.append(resized_crop(picture, top, left, height, width, [CROP, CROP], antialias=True))
    return crops


def _done(images: Tensor) -> Tensor:
    """`images`, once they are there."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images


def _missing(*modules: str) -> str | None:
    """Which of `modules` is not to be had, and why."""
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError:
            return f"{name} is not installed"
        except (ImportError, OSError, RuntimeError) as error:  # a library built for another torch or without its own
            return f"{name} cannot be imported: {one_line(error)}"
    return None


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "decodes on the GPU, and there is none"


def one_line(error: Exception) -> str:
    """What went wrong; of a failure in a worker, the last line of the traceback that the message holds."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[-1 if "in DataLoader worker process" in lines[0] else 0][:100]
