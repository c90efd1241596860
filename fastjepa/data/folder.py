"""Folders of pictures."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class UnreadableImage(Exception):
    """A picture that cannot be decoded; its text names the file and says why."""


class ImageFolder:
    """Every picture below `root`, in sorted order; the folder right below `root` is a picture's class.

    Attributes:
        paths: the files. classes: names of the classes, sorted (empty where pictures lie in `root` itself).
        labels: index into `classes` of each path, -1 where it has none.

    Raises:
        ValueError: a root that is not there, is no folder, or has no pictures below it.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        if not self.root.exists():
            raise ValueError(f"no such folder of pictures: {self.root}")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is a file; pictures are looked for in a folder")
        self.paths = _pictures(self.root)
        if not self.paths:
            raise ValueError(f"no pictures ({', '.join(sorted(EXTENSIONS))}) in {self.root} or below it")
        names = [p.relative_to(self.root).parts for p in self.paths]
        self.classes = sorted({parts[0] for parts in names if len(parts) > 1})
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.labels = [numbers[parts[0]] if len(parts) > 1 else -1 for parts in names]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """The picture as RGB.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        # What Pillow's decoders raise on broken files: OSError mostly, the others from header parsers.
        except (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UnreadableImage(f"{path} ({type(error).__name__}: {reason})") from error


def find_images(root_path: str, image_folder: str = "") -> ImageFolder:
    """The pictures of a run: root_path/image_folder/train where there is one, else root_path/image_folder.

    Raises:
        ValueError: as `ImageFolder`, naming the keys of the configuration.
    """
    folder = Path(root_path).expanduser() / image_folder
    train = folder / "train"
    try:
        return ImageFolder(train if train.is_dir() else folder)
    except ValueError as error:
        raise ValueError(f"data.root_path / data.image_folder: {error}") from None


def _pictures(root: Path) -> list[Path]:
    found, seen = [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below.sort()
        found += [Path(folder, name) for name in files if os.path.splitext(name)[1].lower() in EXTENSIONS]
    return sorted(found)
