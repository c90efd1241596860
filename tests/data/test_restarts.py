"""Restart markers: put in without loss, and crops cut out at them as if the whole picture had been decoded."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastjepa.data import UnreadableImage
from fastjepa.data import restarts as module
from fastjepa.data.engines import PillowEngine
from fastjepa.data.restarts import EOI, INDEX, RST, Cut, cut, read_layout, with_markers
from fastjepa.data.turbo import marked
from tests.data.test_turbo import TURBO, jpeg, needs_turbo, picture

pytestmark = needs_turbo


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def markers(data):
    return [data[i + 1] for i in range(len(data) - 1) if data[i] == 0xFF and RST <= data[i + 1] < RST + 8]


@settings(max_examples=40)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["RGB", "L"]),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.sampled_from([30, 90, 100]),
)
@example(1, 1, "RGB", 2, False, 90)
@example(496, 33, "RGB", 2, False, 90)  # 31 MCUs in a row
@example(488, 9, "RGB", 0, False, 90)  # 61 of 8 pixels: too near, so that rows alone have markers
@example(17, 1100, "L", 0, True, 100)
def test_nothing_is_lost(width, height, mode, subsampling, progressive, quality):
    image = picture(width, height).convert(mode)
    data = jpeg(image, subsampling=subsampling, progressive=progressive, quality=quality)
    made = marked(TURBO.turbo, data)
    assert made is not data
    assert np.array_equal(decoded(made), decoded(data))
    found = read_layout(made)
    assert found.columns % found.interval == 0
    count = found.columns // found.interval * found.rows
    assert markers(made) == [RST + i % 8 for i in range(count - 1)]
    before, after = (TURBO.turbo.coefficients(d)[1] for d in (data, made))
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize("columns, mcu, interval", [(32, 16, 1), (63, 8, 3), (61, 8, 61), (62, 8, 2), (1, 16, 1)])
def test_distance_of_markers(columns, mcu, interval):
    image = picture(columns * mcu - 3, 40)
    assert read_layout(marked(TURBO.turbo, jpeg(image, subsampling=2 if mcu == 16 else 0))).interval == interval


@settings(max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([5, 16, 64]),
    st.sampled_from(["RGB", "L"]),
    st.data(),
)
def test_crops_are_those_of_the_whole(width, height, subsampling, size, mode, draw):
    data = jpeg(picture(width, height).convert(mode), subsampling=subsampling)
    made = marked(TURBO.turbo, data)
    for _ in range(4):
        left, top = draw.draw(st.integers(0, width - 1)), draw.draw(st.integers(0, height - 1))
        box = (left, top, draw.draw(st.integers(1, width - left)), draw.draw(st.integers(1, height - top)))
        ours, whole = TURBO.crop(made, box, size), TURBO.crop(data, box, size)
        assert ours.aside is None
        assert torch.equal(ours.pixels, whole.pixels)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_crops_that_are_decoded_smaller(scale):
    data = jpeg(picture(1200, 900))
    made, side = marked(TURBO.turbo, data), 4 * 16 * scale
    for left, top in ((0, 0), (301, 207), (1200 - side, 900 - side), (16, 32)):
        box = (left, top, side, side)
        assert cut(made, left - 8, top - 8, left + side + 8, top + side + 8)
        assert torch.equal(TURBO.crop(made, box, 16).pixels, TURBO.crop(data, box, 16).pixels)


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 4}])
def test_a_cut_is_a_picture(options):
    """With markers of others too."""
    data = jpeg(picture(500, 375), subsampling=2, **options)
    part = cut(data, 130, 50, 300, 200)
    left, right = (128, 320) if "restart_marker_blocks" in options else (0, 500)
    assert part[1:] == (left, 48, right - left, 160)
    assert len(part.data) < len(data) * 1.05 * (right - left) * 160 / 500 / 375
    inner, whole = decoded(part.data), decoded(data)[48:208, left:right]
    assert np.array_equal(inner[2:-2, 2:-2], whole[2:-2, 2:-2])
    assert markers(part.data) == [RST + i % 8 for i in range(len(markers(part.data)))]


def test_where_nothing_can_be_left_out():
    image = picture(320, 200)
    assert cut(jpeg(image), 50, 50, 100, 100) is None
    assert cut(jpeg(image, restart_marker_rows=2), 50, 50, 100, 100) is None
    data = marked(TURBO.turbo, jpeg(image))
    assert cut(data, 0, 0, 320, 200) is None
    assert cut(data, -5, -5, 400, 400) is None
    assert cut(data, 400, 50, 500, 100) is None
    assert cut(data, 50, 50, 100, 100)
    assert cut(b"", 0, 0, 1, 1) is None
    assert cut(data[:-2], 50, 50, 100, 100) is None  # the file ends before the picture
    at = data.index(bytes((0xFF, RST + 5)))
    assert cut(data[: at + 1] + bytes((RST + 2,)) + data[at + 2 :], 50, 50, 100, 100)  # beside it
    at = [i for i in range(at, len(data)) if data[i : i + 2] == data[at : at + 2]][10]  # of 20 in a row
    assert cut(data[: at + 1] + bytes((RST + 2,)) + data[at + 2 :], 50, 50, 100, 100) is None


def test_faults_beside_a_crop_do_not_matter():
    data = jpeg(picture(320, 200), subsampling=2)
    made = bytearray(marked(TURBO.turbo, data))
    start = read_layout(bytes(made)).scan
    assert made[start + 3] != 0xFF
    made[start : start + 3] = b"\x12\x34\x56"
    ours, whole = (TURBO.crop(d, (100, 60, 90, 90), 48).pixels for d in (bytes(made), data))
    assert torch.equal(ours, whole)


def test_metadata_stay():
    exif = Image.Exif()
    exif[0x010E] = "a bird"
    data = jpeg(picture(64, 48), exif=exif, icc_profile=b"profile" * 9, comment=b"seen")
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(marked(TURBO.turbo, data))) as after:
        assert dict(after.getexif()) == dict(before.getexif()) == {0x010E: "a bird"}
        assert after.info["icc_profile"] == before.info["icc_profile"]
        assert after.info["comment"] == before.info["comment"]


def test_twice_is_as_good_as_once():
    once = marked(TURBO.turbo, jpeg(picture(320, 200)))
    assert marked(TURBO.turbo, once) == once


def test_one_component_has_blocks_in_order_whatever_its_factors():
    data = bytearray(jpeg(picture(75, 50).convert("L")))
    at = data.index(b"\xff\xc0")
    assert data[at + 11] == 0x11
    data[at + 11] = 0x22
    made = marked(TURBO.turbo, bytes(data))
    assert made != data
    assert read_layout(made).columns == 10
    assert np.array_equal(decoded(made), decoded(bytes(data)))


def png():
    file = io.BytesIO()
    picture(50, 40).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [png(), jpeg(picture(50, 40).convert("CMYK")), jpeg(picture(50, 40))[:-200], b"", b"\xff\xd8", b"\xff\xd8\xff\xc0"],
    ids=["PNG", "CMYK", "truncated", "empty", "nothing", "header ends"],
)
def test_what_stays_as_it_is(data):
    assert marked(TURBO.turbo, data) is data


def test_pictures_too_large_stay_as_they_are(monkeypatch):
    data = jpeg(picture(100, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7999)
    assert marked(TURBO.turbo, data) is data
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)
    assert marked(TURBO.turbo, data) is not data


@pytest.mark.parametrize("width", [49, 56])
def test_a_header_that_decoders_read_otherwise(width):
    """Behind bytes that fill up it looks like another picture to whoever does not skip them."""
    real = jpeg(picture(500, 375), subsampling=0, quality=30)
    other = marked(TURBO.turbo, jpeg(picture(width, 64), subsampling=2))
    front = b"\xff\xd8\xff\xff\xe1\x00\x10" + b"x" * 14 + real[2:]
    assert len(front) < 4 + 0xE100
    data = front.ljust(4 + 0xE100, b"\0") + other[2:]
    assert TURBO.turbo.header(data)[:2] == (500, 375)
    assert read_layout(data) is None
    with suppress(UnreadableImage):
        TURBO.crop(data, (60, 4, 60, 20), 16)


def test_a_cut_that_is_not_what_it_says_is_not_decoded(monkeypatch):
    data, other = jpeg(picture(320, 200)), jpeg(picture(90, 60))
    for size in ((16, 60), (90, 16), (40, 40)):
        monkeypatch.setattr("fastjepa.data.turbo.cut", lambda *_, size=size: Cut(other, 32, 32, *size))
        crop = TURBO.crop(data, (40, 40, 80, 50), 32)
        assert crop.aside == "JPEG with faults"  # Pillow has made it, of the whole
        assert torch.equal(crop.pixels, PillowEngine().crop(data, (40, 40, 80, 50), 32).pixels)


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (0, 0, 10, 0), (16, 0, -3, 10)])
def test_boxes_without_pixels(box):
    data = jpeg(picture(64, 48))
    assert TURBO.turbo.decode(data, TURBO.turbo.header(data), box, 1) is None


def indexed(data, change):
    """The picture with an index whose lengths are changed."""
    at, found = data.index(INDEX) + len(INDEX), read_layout(data)
    lengths = np.frombuffer(found.index, ">u2").astype(np.int64)
    made = data[:at] + change(lengths).astype(">u2").tobytes() + data[at + len(found.index) :]
    assert len(made) == len(data)
    return made


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 200), st.sampled_from([0, 1, 2]), st.sampled_from([2, 9, 32_000]), st.data())
def test_an_index_says_where_markers_are(width, height, subsampling, most, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST", most)  # lengths in a segment
        data = marked(TURBO.turbo, jpeg(picture(width, height), subsampling=subsampling))
    found = read_layout(data)
    assert data.count(INDEX) == -(-found.rows * (found.columns // found.interval) // most)
    left, top = draw.draw(st.integers(0, width - 1)), draw.draw(st.integers(0, height - 1))
    box = (left, top, draw.draw(st.integers(left + 1, width)), draw.draw(st.integers(top + 1, height)))
    part, looked = cut(data, *box), cut(data.replace(INDEX, INDEX[::-1]), *box)
    assert (part is None) == (looked is None)
    if part:
        assert part.data.replace(INDEX, INDEX[::-1]) == looked.data
        assert part[1:] == looked[1:]


def swapped(lengths):
    lengths[[5, 6]] = lengths[[6, 5]] + (1, -1)
    return lengths


@pytest.mark.parametrize(
    "change",
    [
        lambda lengths: lengths * 0,
        lambda lengths: lengths * 0 + 1,
        lambda lengths: lengths * 0 + 0xFFFF,
        lambda lengths: lengths + 1,
        lambda lengths: lengths[::-1],
        lambda lengths: np.concatenate((lengths[:-1], lengths[-1:] + 1)),
        swapped,
    ],
)
def test_a_wrong_index_is_not_believed(change):
    data = marked(TURBO.turbo, jpeg(picture(320, 200)))
    wrong = indexed(data, change)
    assert cut(data, 50, 5, 130, 100)
    assert cut(wrong, 50, 5, 130, 100) is None
    whole = TURBO.crop(data, (60, 6, 60, 60), 32)
    crop = TURBO.crop(wrong, (60, 6, 60, 60), 32)
    assert crop.aside is None
    assert torch.equal(crop.pixels, whole.pixels)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_an_index_of_another_size_is_not_believed(size):
    data = marked(TURBO.turbo, jpeg(picture(320, 200)))
    segment = INDEX + read_layout(data).index
    short = (INDEX + bytes(size)).ljust(len(segment), b"\xff")[: len(INDEX) + size]
    head = (2 + len(segment)).to_bytes(2, "big")
    made = data.replace(head + segment, (2 + len(short)).to_bytes(2, "big") + short)
    assert made != data
    assert cut(made, 50, 50, 100, 100) is None
    assert torch.equal(TURBO.crop(made, (50, 50, 50, 50), 32).pixels, TURBO.crop(data, (50, 50, 50, 50), 32).pixels)


@pytest.mark.parametrize("size", [(1 << 16) - 3, (1 << 16) - 2])
def test_intervals_too_long_for_an_index(size):
    scan = b"".join((bytes(10), bytes((0xFF, RST)), bytes(size), bytes((0xFF, EOI))))
    segments = list(module._index(scan, 2))
    assert segments == ([(module.APP, INDEX + b"\0\x0c\xff\xff")] if size + 2 < 1 << 16 else [])


def test_a_batch_is_cropped_as_its_pictures_are():
    datas = [jpeg(picture(90, 70)), marked(TURBO.turbo, jpeg(picture(320, 200))), b"", png()]
    boxes = [(3, 4, 50, 60), (100, 50, 60, 60), (0, 0, 1, 1), (1, 2, 30, 20)]
    crops = TURBO.crops(datas, boxes, 24)
    assert isinstance(crops[2], UnreadableImage)
    for i in (0, 1, 3):
        assert torch.equal(crops[i].pixels, TURBO.crop(datas[i], boxes[i], 24).pixels)
    assert crops[3].aside == "no JPEG"


def test_progressive_pictures_that_lack_scans_stay_as_they_are():
    """Decoders smooth them; with the same coefficients in one scan they would not."""
    data = jpeg(picture(200, 150), progressive=True)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    at = next(i for i in range(scans[0] + 14, len(data)) if data[i] == 0xFF and data[i + 1])
    short = data[:at] + b"\xff\xd9"
    assert TURBO.crop(short, (0, 0, 200, 150), 64).aside is None
    assert marked(TURBO.turbo, short) is short
    assert marked(TURBO.turbo, data) is not data


@pytest.mark.parametrize("subsampling, quality", [(0, 90), (2, 90)])
def test_coding_in_bands_gives_the_same_bytes(monkeypatch, subsampling, quality):
    data = jpeg(picture(250, 333), subsampling=subsampling, quality=quality)
    whole = marked(TURBO.turbo, data)
    for blocks in (1, 300, 1000):
        monkeypatch.setattr(module, "BAND", blocks)
        assert marked(TURBO.turbo, data) == whole


def test_coefficients_that_no_such_picture_has():
    head, planes = TURBO.turbo.coefficients(jpeg(picture(64, 48)))
    assert with_markers(head, planes)
    assert with_markers(head, planes[:1]) is None
    assert with_markers(b"", planes) is None
    for place, level in ((0, 2048), (5, 1024)):
        wrong = [plane.copy() for plane in planes]
        wrong[0][1, 1, place] = level
        assert with_markers(head, wrong) is None


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6), st.booleans()
)
def test_faults_crash_nothing(changes, in_header):
    data = bytearray(marked(TURBO.turbo, jpeg(picture(96, 80))))
    end = read_layout(bytes(data)).scan if in_header else len(data)
    for place, value in changes:
        data[int(place * end)] = value
    with suppress(UnreadableImage):
        width, height = TURBO.size(bytes(data))
        if width * height < 1e6:
            box = (width // 4, height // 4, (width + 1) // 2, (height + 1) // 2)
            assert TURBO.crop(bytes(data), box, 32).pixels.shape == (3, 32, 32)
    marked(TURBO.turbo, bytes(data))
