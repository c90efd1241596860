"""libjpeg-turbo through its C API: the pixels of a crop alone, at full size, a half, a quarter or an eighth of it."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastjepa.data.engines import Box, Crop, PillowEngine, as_tensor, tried
from fastjepa.data.pictures import UnreadableImage, picture_size
from fastjepa.data.restarts import cut, with_markers

WIDTH, HEIGHT, PRECISION, COLORSPACE, SUBSAMPLING = 5, 6, 7, 8, 4  # TJPARAM_*
SCAN_LIMIT, SCANS = 13, 500  # TJPARAM_SCANLIMIT; a progressive picture of more would only waste time
WANTED, BAD = (WIDTH, HEIGHT, PRECISION, COLORSPACE, SUBSAMPLING), 5 * (0,)
DECOMPRESS, TRANSFORM, RGB, OPTIMIZE = 1, 2, 0, 256  # TJINIT_DECOMPRESS, TJINIT_TRANSFORM, TJPF_RGB, TJXOPT_OPTIMIZE
COLORS = {0, 1, 2}  # TJCS_RGB, TJCS_YCbCr, TJCS_GRAY; Pillow has its own way with CMYK
MCU_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8}  # of TJSAMP_444, 422, 420, GRAY and 440; the rest is left to Pillow
# A crop is decoded smaller while its sides stay this many times those that it is resized to: measured, docs/input.md.
KEEP = 4
BESIDE = 2  # pixels decoded to the left and right of a crop


class Header(NamedTuple):
    """Of a picture: its size, and the width of a block of its samples, in pixels."""

    width: int
    height: int
    block: int


class Part(NamedTuple):
    """A JPEG picture with a crop in it, at `box`, and how much smaller than it is it may be decoded."""

    data: bytes
    header: Header
    box: Box
    scale: int


class TurboJPEG:
    """The decoder of one library file. It keeps nothing from one picture to the next.

    Raises:
        OSError: no library that can be loaded. AttributeError: it is older than libjpeg-turbo 3.
    """

    def __init__(self, path: str):
        self.path = path
        lib = ctypes.CDLL(path)
        handle, data, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        _declare(lib.tj3Init, handle, ctypes.c_int)
        _declare(lib.tj3Destroy, None, handle)
        _declare(lib.tj3Get, ctypes.c_int, handle, ctypes.c_int)
        _declare(lib.tj3Set, ctypes.c_int, handle, ctypes.c_int, ctypes.c_int)
        _declare(lib.tj3DecompressHeader, ctypes.c_int, handle, data, size)
        _declare(lib.tj3SetScalingFactor, ctypes.c_int, handle, _Fraction)
        _declare(lib.tj3SetCroppingRegion, ctypes.c_int, handle, _Region)
        _declare(lib.tj3Decompress8, ctypes.c_int, handle, data, size, handle, ctypes.c_int, ctypes.c_int)
        _declare(lib.tj3Transform, ctypes.c_int, handle, data, size, ctypes.c_int, handle, handle, handle)
        _declare(lib.tj3Free, None, handle)
        self._lib = lib

    def __reduce__(self) -> tuple:
        return TurboJPEG, (self.path,)

    def header(self, data: bytes) -> Header | str:
        """What a JPEG picture's header says, or why the picture is better left to Pillow."""
        if data[:2] != b"\xff\xd8":
            return "no JPEG"
        handle = self._read(data)
        found = self._header(handle)
        self._lib.tj3Destroy(handle)
        return found

    def _header(self, handle: int | None) -> Header | str:
        width, height, precision, colors, subsampling = map(self._lib.tj3Get, 5 * (handle,), WANTED) if handle else BAD
        if width < 1 or height < 1:  # also where the file ends before it says
            return "JPEG with a faulty header"
        if precision != 8 or colors not in COLORS or subsampling not in MCU_WIDTH:
            return "JPEG, but not 8-bit grey or RGB of a usual kind"
        return Header(width, height, MCU_WIDTH[subsampling])

    def decode(self, data: bytes, header: Header, box: Box, scale: int) -> np.ndarray | None:
        """RGB pixels of `box`, (left, top, width, height) at 1/`scale` of the size; None for a picture with a fault.

        Also None if its header says anything else than `header`, which `box` lies within. `left` has to be where a
        block of samples begins.
        """
        _, _, width, height = box
        if width < 1 or height < 1:  # of which libjpeg-turbo would make all the picture that there is
            return None
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        handle = self._read(data)
        failed = (
            self._header(handle) != header
            or self._lib.tj3SetScalingFactor(handle, _Fraction(1, scale))
            or self._lib.tj3SetCroppingRegion(handle, _Region(*box))
            or self._lib.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 3 * width, RGB)
        )
        self._lib.tj3Destroy(handle)
        return None if failed else pixels

    def coefficients(self, data: bytes) -> tuple[bytes, list[np.ndarray]] | None:
        """A picture in one sequential scan without restart markers, metadata kept; and its quantised coefficients.

        They are int16 [rows of blocks, blocks in a row, 64] for each component, a block's row by row. None for a
        picture with a fault.
        """
        rows: dict[int, list[np.ndarray]] = {}

        def keep(block_row, area, _whole, component, _transform, _of) -> int:
            shape = (area.height // 8, area.width // 8, 64)
            try:
                rows.setdefault(component, []).append(np.ctypeslib.as_array(block_row, shape).copy())
            except MemoryError:
                return -1
            return 0

        wanted = _Transform(options=OPTIMIZE, each_row=_EachRow(keep))
        made, size = ctypes.c_void_p(), ctypes.c_size_t()
        handle = self._lib.tj3Init(TRANSFORM)
        try:
            failed = (
                not handle
                or self._lib.tj3Set(handle, SCAN_LIMIT, SCANS)
                or self._lib.tj3Transform(
                    handle, data, len(data), 1, ctypes.byref(made), ctypes.byref(size), ctypes.byref(wanted)
                )
            )
            if failed or not made:
                return None
            return ctypes.string_at(made, size.value), [np.concatenate(rows[number]) for number in sorted(rows)]
        finally:
            self._lib.tj3Free(made)
            self._lib.tj3Destroy(handle)

    def _read(self, data: bytes) -> int | None:
        """A new handle that has read the header, which costs a microsecond: one that met a fault remembers it.

        None for a header with a fault.
        """
        handle = self._lib.tj3Init(DECOMPRESS)
        if handle and self._lib.tj3DecompressHeader(handle, data, len(data)):
            self._lib.tj3Destroy(handle)
            return None
        return handle


class TurboEngine(PillowEngine):
    """libjpeg-turbo, and Pillow for whatever is no JPEG picture, has faults, or is in CMYK.

    Raises:
        ValueError: no libjpeg-turbo 3 on this machine; says how to get it.
    """

    name = "turbo"

    def __init__(self) -> None:
        self.turbo = find_turbo()

    def size(self, data: bytes) -> tuple[int, int]:
        header = self.turbo.header(data)
        if isinstance(header, str):
            return picture_size(data)
        width, height, _ = header
        if (limit := Image.MAX_IMAGE_PIXELS) and width * height > 2 * limit:  # where Pillow refuses
            raise UnreadableImage(f"{width}x{height} pixels are more than the {2 * limit} that Pillow allows")
        return width, height

    def crop(self, data: bytes, box: Box, size: int) -> Crop:
        return self._crop(self._part(data, box, size), data, box, size)

    def crops(self, datas: Sequence[bytes], boxes: Sequence[Box], size: int) -> list[Crop | UnreadableImage]:
        # All are cut before one is decoded: a twentieth less time than in turns, each of which drives the other's code
        # out of the processor's caches.
        parts = [self._part(data, box, size) for data, box in zip(datas, boxes, strict=True)]
        return [tried(self._crop, *each, size) for each in zip(parts, datas, boxes, strict=True)]

    def _part(self, data: bytes, box: Box, size: int) -> Part | str:
        """What to decode for a crop, or why it is left to Pillow."""
        header = self.turbo.header(data)
        if isinstance(header, str):
            return header
        left, top, width, height = box
        scale = next((s for s in (8, 4, 2) if min(width, height) >= KEEP * size * s), 1)
        # With the next pixel on each side, colours at the crop's edge are interpolated as in the whole.
        part = cut(data, left - scale, top - scale, left + width + scale, top + height + scale)
        if part is None:
            return Part(data, header, box, scale)
        header = header._replace(width=part.width, height=part.height)
        return Part(part.data, header, (left - part.left, top - part.top, width, height), scale)

    def _crop(self, part: Part | str, data: bytes, box: Box, size: int) -> Crop:
        pixels = None if isinstance(part, str) else self._pixels(part, size)
        if pixels is not None:
            return Crop(pixels)
        return super().crop(data, box, size)._replace(aside=part if isinstance(part, str) else "JPEG with faults")

    def _pixels(self, part: Part, size: int) -> Tensor | None:
        data, header, (left, top, width, height), scale = part
        # The pixels of the scaled picture that the crop touches. They are decoded from the start of a block of samples,
        # and some beside them, since colours, stored at half the width, are interpolated.
        x, y, right, bottom = left // scale, top // scale, -(-(left + width) // scale), -(-(top + height) // scale)
        step = header.block // scale
        first, last = max(0, x - BESIDE) // step * step, min(right + BESIDE, -(-header.width // scale))
        pixels = self.turbo.decode(data, header, (first, y, last - first, bottom - y), scale)
        if pixels is None:
            return None
        pixels = np.ascontiguousarray(pixels[:, x - first : right - first])
        if scale == 1:
            return resize(pixels, size)
        within = (left / scale - x, top / scale - y, (left + width) / scale - x, (top + height) / scale - y)
        return as_tensor(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=within))


def find_turbo() -> TurboJPEG:
    """The first libjpeg-turbo 3 that loads: of the `turbojpeg` wheel, else of the system.

    Raises:
        ValueError: none does; says how to get it.
    """
    old = ""
    for path in _libraries():
        try:
            return TurboJPEG(path)
        except AttributeError:
            old = f" ({path} is of an older one)"
        except OSError:
            continue
    raise ValueError(
        f"libjpeg-turbo 3 is not here{old}; pip install 'fastjepa[data]' brings it, engine pillow does without"
    )


def marked(turbo: TurboJPEG, data: bytes) -> bytes:
    """A picture with restart markers, all its coefficients and pixels as they were.

    What is left to Pillow, has more pixels than Pillow reads without a warning, or would not come out the same, is
    given back as it is.
    """
    header = turbo.header(data)
    if isinstance(header, str) or header.width * header.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return data
    if (read := turbo.coefficients(data)) is None or (made := with_markers(*read)) is None:
        return data
    again, whole = turbo.coefficients(made), (0, 0, header.width, header.height)
    if again is None or not all(map(np.array_equal, read[1], again[1])):
        return data
    before, after = (turbo.decode(d, header, whole, 1) for d in (data, made))  # which differ where a scan is not there
    return made if before is not None and after is not None and np.array_equal(before, after) else data


def resize(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, size, size], bilinear and antialiased: what Pillow computes, in its own arithmetic."""
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # torch.channels_last, which its kernel is fastest with
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]


def _libraries() -> Iterator[str]:
    spec = importlib.util.find_spec("turbojpeg")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent
        for pattern in ("turbojpeg.libs/*turbojpeg*", "turbojpeg.dylibs/*turbojpeg*", "turbojpeg-*.dll"):
            yield from map(str, sorted(folder.glob(pattern)))
    if found := ctypes.util.find_library("turbojpeg"):
        yield found


def _declare(function, result, *arguments) -> None:
    function.restype, function.argtypes = result, arguments


class _Fraction(ctypes.Structure):
    _fields_ = (("numerator", ctypes.c_int), ("denominator", ctypes.c_int))


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("width", ctypes.c_int), ("height", ctypes.c_int))


_EachRow = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_int16), _Region, _Region, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)


class _Transform(ctypes.Structure):
    _fields_ = (
        ("region", _Region),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("each_row", _EachRow),
    )
