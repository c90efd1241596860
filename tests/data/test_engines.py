"""The choice of an engine, and what every engine does."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from PIL import Image

from fastjepa.config import ENGINES
from fastjepa.data import UnreadableImage, choose_engine
from fastjepa.data import turbo as turbo_module
from fastjepa.data.engines import PillowEngine
from fastjepa.training import train
from tests.data.test_turbo import jpeg, picture
from tests.helpers import make_pictures, tiny_config


def available(name):
    try:
        return choose_engine(name)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_here_is_within_a_grey_level_of_pillow(name):
    engine = available(name)
    if engine is None:
        pytest.skip(f"{name} is not installed here")
    image = picture(200, 150)
    grey = io.BytesIO()
    image.convert("L").save(grey, "PNG")
    datas = [jpeg(image), jpeg(image.convert("L")), grey.getvalue(), b"", jpeg(image)[:900]]
    boxes = [(11, 7, 150, 120)] * len(datas)
    crops, expected = engine.crops(datas, boxes, 64), PillowEngine().crops(datas, boxes, 64)
    for ours, theirs in zip(crops, expected, strict=True):
        assert isinstance(ours, UnreadableImage) == isinstance(theirs, UnreadableImage)
        if not isinstance(ours, UnreadableImage):
            assert (ours.pixels.shape, ours.pixels.dtype) == ((3, 64, 64), torch.uint8)
            assert float((ours.pixels.float() - theirs.pixels.float()).abs().mean()) < 1
    assert engine.crops([], [], 64) == []


def test_auto_is_turbo_or_pillow(monkeypatch):
    assert choose_engine("auto").name == ("turbo" if available("turbo") else "pillow")
    monkeypatch.setattr(turbo_module, "_libraries", lambda: iter(()))
    assert choose_engine("auto").name == "pillow"


@pytest.mark.parametrize("name, module", [("dali", "nvidia.dali"), ("torchvision", "torchvision.io")])
def test_absent_is_one_sentence(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^data\.engine={name}: {module} .*; pip install [^\n]*$"):
        choose_engine(name)


def test_turbo_absent_is_one_sentence(monkeypatch):
    monkeypatch.setattr(turbo_module, "_libraries", lambda: iter(()))
    with pytest.raises(ValueError, match=r"^data\.engine=turbo: libjpeg-turbo 3 is not here; pip install [^\n]*$"):
        choose_engine("turbo")


def test_unknown():
    with pytest.raises(ValueError, match=r"data\.engine must be one of auto, turbo, .*, got 'ffcv'"):
        choose_engine("ffcv")


def test_in_the_configuration(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", count=8)
    with pytest.raises(ValueError, match=r"data\.engine must be one of auto, .*, got 'ffcv'"):
        tiny_config(pictures, tmp_path / "run", data={"engine": "ffcv"})
    config = tiny_config(pictures, tmp_path / "run", data={"engine": "pillow"}, runtime={"stop_after": 1})
    assert train(config).steps == 1


def test_colour_of_a_picture_is_kept():
    """Red is red, in every engine."""
    data = jpeg(Image.new("RGB", (64, 64), (250, 20, 10)), subsampling=0)
    for name in ENGINES:
        if engine := available(name):
            assert engine.crop(data, (8, 8, 40, 40), 16).pixels.float().mean((1, 2)).argmax() == 0
