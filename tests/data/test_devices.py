"""Engines of other libraries: in a stand-in for torchvision, and in DALI where it is."""

from __future__ import annotations

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.data import choose_engine
from fastjepa.data.devices import TorchvisionEngine
from fastjepa.data.engines import PillowEngine
from tests.data.test_turbo import jpeg, picture


@pytest.fixture
def torchvision(monkeypatch):
    """The three names of torchvision that are used, with its own meanings; decoded pictures are counted."""
    decoded = []

    def decode_jpeg(files, mode, device):
        if any(bytes(file.numpy())[:2] != b"\xff\xd8" for file in files):
            raise RuntimeError("Not a JPEG file: starts with 0x89 0x50\nand more")
        decoded.append((len(files), torch.device(device).type))
        images = [Image.open(io.BytesIO(file.numpy().tobytes())).convert(mode) for file in files]
        return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]

    def resized_crop(image, top, left, height, width, size, antialias):
        crop = image[:, top : top + height, left : left + width]
        return torch.nn.functional.interpolate(crop[None], size, mode="bilinear", antialias=antialias)[0]

    read = types.SimpleNamespace(RGB="RGB")
    functional = types.SimpleNamespace(resized_crop=resized_crop)
    for name, module in (
        ("torchvision", types.ModuleType("torchvision")),
        ("torchvision.io", types.SimpleNamespace(ImageReadMode=read, decode_jpeg=decode_jpeg)),
        ("torchvision.transforms", types.ModuleType("transforms")),
        ("torchvision.transforms.v2", types.ModuleType("v2")),
        ("torchvision.transforms.v2.functional", functional),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return decoded


def test_torchvision_decodes_a_batch_at_once(torchvision):
    engine = choose_engine("torchvision", torch.device("cpu"))
    assert not engine.late
    datas = [jpeg(picture(90, 70, seed)) for seed in range(3)]
    boxes = [(0, 0, 90, 70), (5, 6, 40, 30), (50, 10, 40, 60)]
    crops = engine.crops(datas, boxes, 32)
    assert torchvision == [(3, "cpu")]
    for crop, expected in zip(crops, PillowEngine().crops(datas, boxes, 32), strict=True):
        assert crop.aside is None
        assert float((crop.pixels.float() - expected.pixels.float()).abs().mean()) < 1


def test_one_that_torchvision_cannot_read_spoils_no_other(torchvision):
    png = io.BytesIO()
    picture(90, 70).save(png, "PNG")
    datas = [jpeg(picture(90, 70)), png.getvalue()]
    jpeg_crop, png_crop = choose_engine("torchvision").crops(datas, [(1, 2, 30, 40)] * 2, 16)
    assert jpeg_crop.aside is None
    assert png_crop.aside == "torchvision: Not a JPEG file: starts with 0x89 0x50"


def test_a_gpu_makes_it_late(torchvision):
    assert TorchvisionEngine(torch.device("cuda")).late
    assert choose_engine("torchvision", torch.device("cuda")).gpu == torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_on_a_gpu(name):
    try:
        engine = choose_engine(name, torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    datas, boxes = [jpeg(picture(90, 70, seed)) for seed in range(3)], [(5, 6, 60, 50)] * 3
    for crop, expected in zip(engine.crops(datas, boxes, 32), PillowEngine().crops(datas, boxes, 32), strict=True):
        assert crop.aside is None
        assert crop.pixels.is_cuda
        assert float((crop.pixels.cpu().float() - expected.pixels.float()).abs().mean()) < 2  # nvJPEG rounds otherwise


def test_dali_batches_of_any_length():
    try:
        engine = choose_engine("dali")
    except ValueError as error:
        pytest.skip(str(error))
    engine.most = 4
    engine = pickle.loads(pickle.dumps(engine))
    datas = [jpeg(picture(60 + seed, 50, seed)) for seed in range(6)]
    boxes = [(seed, 2, 40, 41) for seed in range(6)]
    for count in (6, 1, 5):
        crops = engine.crops(datas[:count], boxes[:count], 24)
        expected = PillowEngine().crops(datas[:count], boxes[:count], 24)
        assert len(crops) == count
        for crop, theirs in zip(crops, expected, strict=True):
            assert crop.aside is None
            assert float((crop.pixels.float() - theirs.pixels.float()).abs().mean()) < 1
