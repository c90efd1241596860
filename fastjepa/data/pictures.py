"""What every source of pictures offers, wherever the pictures lie."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

# What Pillow's decoders raise on broken files: OSError mostly, the others from header parsers.
BROKEN = (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError)


class UnreadableImage(Exception):
    """A picture that cannot be read; its text says why, and names the picture where it has a name."""


class Pictures:
    """Encoded pictures by number. A subclass says where they lie; it travels to worker processes by pickle.

    Attributes:
        root: the folder or file, for messages.
        classes: names of the classes, empty where there are none.
        labels: index into `classes` of each picture, -1 where it has none.
        blocks: lengths of the runs of neighbours that are read together, where reading one alone is as dear; None where
            any order is as good as any other.
    """

    root: Path
    classes: list[str]
    labels: Sequence[int]
    blocks: Sequence[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call picture `index` in messages."""
        raise NotImplementedError

    def fetch(self, index: int) -> bytes:
        """The encoded picture; whatever goes wrong is an OSError or a ValueError."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            UnreadableImage: it is not there or cannot be read; names it.
        """
        try:
            return self.fetch(index)
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.name(index)} ({_reason(error)})") from error

    def load(self, index: int) -> Image.Image:
        """The picture as RGB.

        Raises:
            UnreadableImage: it cannot be read or decoded; names it.
        """
        data = self.read(index)
        try:
            return open_rgb(data)
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.name(index)} ({error})") from error


def open_rgb(data: bytes) -> Image.Image:
    """An encoded picture, whole, as RGB; it is not turned as its EXIF orientation says, as in the published code.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except BROKEN as error:
        raise UnreadableImage(_reason(error) if data else "it is empty") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded picture, from its header.

    Raises:
        UnreadableImage: it has no header that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except BROKEN as error:
        raise UnreadableImage(_reason(error) if data else "it is empty") from error


def _reason(error: Exception) -> str:
    """In one line, without addresses, so that the same picture is named alike each time."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
