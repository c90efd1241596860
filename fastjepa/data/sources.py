"""Where the pictures of a run are, whatever they are kept in."""

from __future__ import annotations

import os
from pathlib import Path

from fastjepa.data.arrow import ArrowFiles, ParquetFiles
from fastjepa.data.folder import ImageFolder
from fastjepa.data.pictures import EXTENSIONS, Pictures
from fastjepa.data.shards import TarShards


def find_images(root_path: str, image_folder: str = "") -> Pictures:
    """The pictures of a run: root_path/image_folder/train where there is one, else root_path/image_folder.

    Raises:
        ValueError: as `open_pictures`, naming the keys of the configuration.
    """
    folder = Path(root_path).expanduser() / image_folder
    train = folder / "train"
    try:
        return open_pictures(train if train.is_dir() else folder)
    except ValueError as error:
        raise ValueError(f"data.root_path / data.image_folder: {error}") from None


def open_pictures(place: str | os.PathLike[str]) -> Pictures:
    """A folder of pictures, of WebDataset shards, of Parquet files, or that Hugging Face's `save_to_disk` wrote; or one
    shard or Parquet file.

    Of a data set that has splits, `train` is taken.

    Raises:
        ValueError: nothing there, or no pictures in it; says what is looked for.
    """
    place = Path(place)
    if place.is_file() and place.suffix == ".tar":
        return TarShards(place.parent, [place])
    if place.is_file() and place.suffix == ".parquet":
        return ParquetFiles(place.parent, [place])
    if not place.is_dir():
        return ImageFolder(place)  # which says what is wrong
    if (place / "dataset_dict.json").is_file():
        return ArrowFiles(place / "train")
    if (place / "state.json").is_file():
        return ArrowFiles(place)
    for folder in (place, place / "data"):
        if parquet := sorted(folder.glob("*.parquet")):
            train = [path for path in parquet if path.name.startswith("train")]
            return ParquetFiles(folder, train or parquet)
    return TarShards(place) if _holds_shards(place) else ImageFolder(place)


def _holds_shards(folder: Path) -> bool:
    """Tar files, and neither pictures nor folders: the archives that a folder of pictures came in are no shards."""
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in EXTENSIONS or entry.is_dir():
                return False
            found |= suffix == ".tar"
    return found
