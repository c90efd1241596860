"""Engines of other libraries: NVIDIA DALI, and torchvision with nvJPEG. Both decode on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.engines import Box, Crop, PillowEngine
from fastjepa.data.pictures import UnreadableImage


class DeviceEngine(PillowEngine):
    """One that decodes several pictures at once, on `gpu` or, if that is None, in a worker; Pillow does what it cannot.

    Raises:
        ValueError: the library is not installed, or cannot be used with this torch.
    """

    module: str
    install: str

    def __init__(self, gpu: torch.device | None = None):
        _usable(self.module, self.install)
        self.gpu = gpu
        self.late = gpu is not None

    def crop(self, data: bytes, box: Box, size: int) -> Crop:
        try:
            return Crop(self.decode([data], [box], size)[0])
        except (RuntimeError, ValueError) as error:  # what the decoders raise on any picture they cannot read
            why = str(error).strip().splitlines() or [type(error).__name__]
            return super().crop(data, box, size)._replace(aside=f"{self.name}: {why[0]}")

    def crops(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> list[Crop | UnreadableImage]:
        if not datas:
            return []
        try:
            return [Crop(pixels) for pixels in self.decode(datas, boxes, size)]
        except (RuntimeError, ValueError):  # one of them; which, only one by one tells
            return super().crops(datas, boxes, size)

    def decode(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> Sequence[Tensor]:
        """uint8 [3, size, size] for each picture; fails as a whole."""
        raise NotImplementedError


class TorchvisionEngine(DeviceEngine):
    """torchvision: nvJPEG on a GPU, libjpeg without one; then its antialiased resize of uint8 tensors."""

    name = "torchvision"
    module = "torchvision.io"
    install = "pip install torchvision, of the release that goes with this torch"

    def decode(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> Sequence[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2.functional import resized_crop

        files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in datas]
        pictures = decode_jpeg(files, ImageReadMode.RGB, device=self.gpu or "cpu")
        return [
            resized_crop(picture, top, left, height, width, [size, size], antialias=True)
            for picture, (left, top, width, height) in zip(pictures, boxes, strict=True)
        ]


class DALIEngine(DeviceEngine):
    """NVIDIA DALI: decodes the crop alone, on a GPU or with one thread in each worker."""

    name = "dali"
    module = "nvidia.dali"
    install = "pip install 'fastjepa[dali]'"
    most = 128  # pictures in one call of the pipeline

    def __init__(self, gpu: torch.device | None = None):
        super().__init__(gpu)
        self._pipelines: dict[int, Any] = {}  # by size, each made by the process that uses it

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pipelines": {}}

    def decode(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> Sequence[Tensor]:
        if size not in self._pipelines:
            self._pipelines[size] = self._pipeline(size)
        made: list[Tensor] = []
        for first in range(0, len(datas), self.most):
            some = slice(first, first + self.most)
            try:
                made += self._run(self._pipelines[size], datas[some], np.array(boxes[some], np.int32))
            except RuntimeError:
                self._pipelines.pop(size, None)  # one that failed does not run again
                raise
        return made

    def _run(self, pipeline: Any, datas: Sequence[bytes], boxes: np.ndarray) -> Tensor:
        pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in datas])
        pipeline.feed_input("start", np.ascontiguousarray(boxes[:, [1, 0]]))
        pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, [3, 2]]))
        (crops,) = pipeline.run()
        pixels = torch.from_dlpack(crops.as_tensor()).clone()  # DALI will write there again
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)
        return pixels

    def _pipeline(self, size: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        device = None if self.gpu is None else torch.cuda.current_device() if self.gpu.index is None else self.gpu.index
        made = Pipeline(self.most, 1, device, exec_pipelined=False, exec_async=False)
        with made:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            crops = fn.decoders.image_slice(
                files,
                start=start,
                shape=shape,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,
                device="cpu" if self.gpu is None else "mixed",
            )
            crops = fn.resize(crops, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
            made.set_outputs(fn.transpose(crops, perm=[2, 0, 1]))
        made.build()
        return made


def _usable(module: str, install: str) -> None:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ValueError(f"{module if module.startswith(missing) else missing} is not installed; {install}") from error
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without its own libraries
        raise ValueError(f"{module} cannot be imported ({str(error).splitlines()[0]}); {install}") from error
