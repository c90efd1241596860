"""Folders of pictures."""

from __future__ import annotations

import os
from pathlib import Path

from fastjepa.data.pictures import EXTENSIONS, Pictures


class ImageFolder(Pictures):
    """Every picture below `root`, in sorted order; the folder right below `root` is a picture's class.

    Attributes:
        paths: the files.

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

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def fetch(self, index: int) -> bytes:
        with open(self.paths[index], "rb", buffering=0) as file:
            return file.read()


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
