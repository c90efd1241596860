"""libjpeg-turbo's crops: as Pillow's of the whole picture, whatever the picture."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fastjepa.data import UnreadableImage, random_resized_crop
from fastjepa.data import turbo as module
from fastjepa.data.engines import PillowEngine
from fastjepa.data.turbo import TurboEngine

try:
    TURBO = TurboEngine()
except ValueError:
    TURBO = None
needs_turbo = pytest.mark.skipif(TURBO is None, reason="libjpeg-turbo 3 is not installed here")
PILLOW = PillowEngine()


def picture(width, height, seed=0):
    """Noise that is stronger the lower its frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    waves = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    noise = np.fft.irfft2(waves / frequency, s=(height, width))
    noise = 128 + 45 * noise / max(noise.std(), 1e-9)
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def jpeg(image, **options):
    file = io.BytesIO()
    with mock.patch.object(ImageFile, "MAXBLOCK", 1 << 20):  # or Pillow has no room for progressive noise
        image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def distance(data, box, size):
    """Mean of |turbo - Pillow| in grey levels; turbo has not left it to Pillow."""
    ours, theirs = TURBO.crop(data, box, size), PILLOW.crop(data, box, size)
    assert ours.aside is None
    assert ours.pixels.shape == (3, size, size)
    assert ours.pixels.dtype == torch.uint8
    return float((ours.pixels.float() - theirs.pixels.float()).abs().mean())


@needs_turbo
@settings(max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(8, 120),
    st.floats(0.01, 1.0),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example(1, 1, 224, 1.0, 2, False, 0)
@example(17, 1, 30, 0.1, 2, True, 0)
@example(300, 300, 10, 1.0, 2, False, 0)  # decoded at an eighth
@example(299, 281, 11, 1.0, 1, False, 3)
def test_crops_are_pillows(width, height, size, low, subsampling, progressive, seed):
    data = jpeg(picture(width, height, seed), subsampling=subsampling, progressive=progressive)
    assert TURBO.size(data) == (width, height)
    box = random_resized_crop(width, height, (low, 1.0), np.random.default_rng(seed))
    assert distance(data, box, size) < 1


@needs_turbo
@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(0, 79), st.integers(1, 100), st.integers(1, 80))
def test_any_box(left, top, width, height):
    data = jpeg(picture(100, 80), subsampling=2)
    assert distance(data, (left, top, min(width, 100 - left), min(height, 80 - top)), 24) < 1


@needs_turbo
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_large_pictures_are_decoded_smaller(monkeypatch, scale):
    asked = []
    decode = TURBO.turbo.decode
    monkeypatch.setattr(TURBO.turbo, "decode", lambda *given: asked.append(given[-1]) or decode(*given))
    side = module.KEEP * scale * 20
    data = jpeg(picture(side + 37, side + 30), subsampling=2)
    assert distance(data, (13, 11, side, side + 5), 20) < 1
    assert asked == [scale]


@needs_turbo
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour(mode):
    data = jpeg(picture(90, 70).convert(mode))
    assert distance(data, (7, 5, 60, 50), 32) < 1


@needs_turbo
@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_orientation_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(90, 50), exif=exif)
    assert TURBO.size(data) == (90, 50)
    assert distance(data, (3, 2, 60, 40), 32) < 1


@needs_turbo
@pytest.mark.parametrize(
    "save, why",
    [
        (lambda image, file: image.save(file, "PNG"), "no JPEG"),
        (lambda image, file: image.save(file, "WEBP", lossless=True), "no JPEG"),
        (lambda image, file: image.convert("I;16").save(file, "TIFF"), "no JPEG"),
        (lambda image, file: image.convert("CMYK").save(file, "JPEG"), "not 8-bit grey or RGB"),
    ],
)
def test_what_is_left_to_pillow_is_exactly_pillows(save, why):
    file = io.BytesIO()
    save(picture(60, 40), file)
    box = (5, 3, 40, 30)
    ours = TURBO.crop(file.getvalue(), box, 24)
    assert why in ours.aside
    assert torch.equal(ours.pixels, PILLOW.crop(file.getvalue(), box, 24).pixels)
    assert TURBO.size(file.getvalue()) == (60, 40)


@needs_turbo
def test_extraneous_bytes_are_judged_by_pillow():
    """Pillow reads such pictures, and libjpeg-turbo warns of them: a run must not lose them."""
    data = jpeg(picture(64, 64), quality=50)
    faulty = data[:-2] + b"\x00" * 20 + data[-2:]
    crop = TURBO.crop(faulty, (0, 0, 64, 64), 16)
    assert torch.equal(crop.pixels, PILLOW.crop(faulty, (0, 0, 64, 64), 16).pixels) or crop.aside is None


@pytest.mark.parametrize("engine", [pytest.param("turbo", marks=needs_turbo), "pillow"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0 not a jpeg",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 50,
        jpeg(picture(64, 64))[:200],
    ],
)
def test_unreadable(engine, data):
    engine = TURBO if engine == "turbo" else PILLOW
    with pytest.raises(UnreadableImage):
        engine.crop(data, (0, 0, *engine.size(data)), 8)


@pytest.mark.parametrize("engine", [pytest.param("turbo", marks=needs_turbo), "pillow"])
def test_truncated(engine):
    engine = TURBO if engine == "turbo" else PILLOW
    whole = jpeg(picture(200, 200))
    data = whole[: len(whole) // 2]
    assert engine.size(data) == (200, 200)
    with pytest.raises(UnreadableImage, match="truncated"):
        engine.crop(data, (0, 0, 200, 200), 32)


@needs_turbo
def test_image_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = jpeg(picture(50, 50))
    for engine in (TURBO, PILLOW):
        with pytest.raises(UnreadableImage, match=r"2500|50x50"):
            engine.size(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert TURBO.size(data) == (50, 50)


@needs_turbo
def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken():
    data = bytearray(jpeg(picture(16, 16)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # height and width 65500
    with pytest.raises(UnreadableImage, match="pixels"):
        TURBO.size(bytes(data))


@needs_turbo
@settings(max_examples=150)
@given(st.sampled_from([0, 1, 2]), st.booleans(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=9))
def test_faults_crash_nothing(subsampling, progressive, changes):
    """Bytes changed anywhere: a crop of the right shape, or an error that says why."""
    data = bytearray(jpeg(picture(40, 30), subsampling=subsampling, progressive=progressive))
    for place, value in changes:
        data[2 + int(place**2 * (len(data) - 3))] = value  # headers more often than what follows
    with suppress(UnreadableImage):
        width, height = TURBO.size(bytes(data))
        if width * height < 1e6:
            assert TURBO.crop(bytes(data), (0, 0, width, height), 8).pixels.shape == (3, 8, 8)


@needs_turbo
def test_a_fault_is_forgotten():
    """A file that ends within its tables says nothing of its size, and the next is not taken for it."""
    good, cut = jpeg(picture(64, 48)), jpeg(picture(64, 48))[:300]
    for _ in range(2):
        assert TURBO.size(good) == (64, 48)
        assert isinstance(TURBO.turbo.header(cut), str)
        assert distance(good, (3, 4, 50, 40), 16) < 1
        assert TURBO.turbo.decode(cut, TURBO.turbo.header(good), (0, 0, 64, 48), 1) is None


@needs_turbo
def test_travels_to_other_processes():
    again = pickle.loads(pickle.dumps(TURBO))
    data = jpeg(picture(64, 48))
    assert torch.equal(again.crop(data, (1, 2, 30, 30), 16).pixels, TURBO.crop(data, (1, 2, 30, 30), 16).pixels)


def test_no_library(monkeypatch):
    monkeypatch.setattr(module, "_libraries", lambda: iter(["/nowhere/libturbojpeg.so"]))
    with pytest.raises(ValueError, match=r"libjpeg-turbo 3 is not here; pip install 'fastjepa\[data\]'"):
        TurboEngine()


def test_a_library_that_is_too_old(monkeypatch):
    import ctypes.util

    old = ctypes.util.find_library("c")
    if old is None:
        pytest.skip("this system tells no library")
    monkeypatch.setattr(module, "_libraries", lambda: iter([old]))
    with pytest.raises(ValueError, match="is of an older one"):
        TurboEngine()
