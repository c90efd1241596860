"""Pictures in columns: Hugging Face datasets on disk (Arrow) and Parquet files, both through pyarrow."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.data.order import WINDOW
from fastjepa.data.pictures import Pictures

NAMES = ("image", "img", "picture", "jpg", "png", "webp")  # of columns with pictures, where there are several
LABELS = ("label", "labels", "cls", "class", "fine_label")


class _Columns(Pictures):
    """Pictures of a column of files that have a schema; a value is bytes, or a struct of bytes and path."""

    _rows: np.ndarray  # pictures in the files up to and including each

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[Path]):
        self.root, self.paths = Path(root), list(paths)
        if not self.paths:
            raise ValueError(f"no data files in {self.root}")
        schema = self._schema(self.paths[0])
        self.column = _picture_column(schema, self.paths[0])
        self._label = next((name for name in LABELS if name in schema.names), None)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        self.classes = list(features.get(self._label, {}).get("names") or [])

    def __len__(self) -> int:
        return int(self._rows[-1])

    def name(self, index: int) -> str:
        file, row = _place(self._rows, index)
        return f"{self.paths[file]}: row {row}"

    def fetch(self, index: int) -> bytes:
        value = self._value(index)
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            value = content if content is not None else path and (self.root / path).read_bytes()
        if not isinstance(value, bytes):
            raise ValueError(f"column {self.column} is empty there")
        return value

    def _schema(self, path: Path) -> Any:
        raise NotImplementedError

    def _value(self, index: int) -> Any:
        raise NotImplementedError


class ArrowFiles(_Columns):
    """A data set that Hugging Face's `save_to_disk` wrote: Arrow files, mapped into memory and read at any row.

    Raises:
        ValueError: pyarrow is not installed, or no column holds pictures.
    """

    def __init__(self, root: str | os.PathLike[str]):
        try:
            state = json.loads((Path(root) / "state.json").read_text(encoding="utf-8"))
            files = [Path(root) / entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{root}: state.json does not say which Arrow files there are: {error}") from error
        super().__init__(root, files)
        self._rows = np.cumsum([len(column) for column in self._columns])

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tables", "_columns")}

    @cached_property
    def labels(self) -> list[int]:  # type: ignore[override]
        if self._label is None:
            return [-1] * len(self)
        return [_number(v) for table in self._tables for v in table[self._label].to_pylist()]

    @cached_property
    def _tables(self) -> list[Any]:
        pa = _pyarrow()
        return [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in self.paths]

    @cached_property
    def _columns(self) -> list[Any]:
        return [table[self.column] for table in self._tables]

    def _schema(self, path: Path) -> Any:
        pa = _pyarrow()
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).schema

    def _value(self, index: int) -> Any:
        file, row = _place(self._rows, index)
        return self._columns[file][row].as_py()


class ParquetFiles(_Columns):
    """Parquet files. A picture alone costs as much to read as its row group: epochs take few of those at a time, and
    the last of them are kept in memory. `fastjepa data pack` makes shards of them, which read at any place.

    Raises:
        ValueError: pyarrow is not installed, a file that is not Parquet, or no column with pictures.
    """

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[Path]):
        super().__init__(root, paths)
        metadata = [_parquet(path).metadata for path in self.paths]
        self._groups = [(file, group) for file, found in enumerate(metadata) for group in range(found.num_row_groups)]
        self.blocks = [metadata[file].row_group(group).num_rows for file, group in self._groups]
        self._rows, self._group_rows = np.cumsum([found.num_rows for found in metadata]), np.cumsum(self.blocks)
        if not len(self):
            raise ValueError(f"no rows in the Parquet files of {self.root}")
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    @cached_property
    def labels(self) -> list[int]:  # type: ignore[override]
        if self._label is None:
            return [-1] * len(self)
        columns = [_parquet(path).read([self._label])[self._label] for path in self.paths]
        return [_number(value) for column in columns for value in column.to_pylist()]

    def _schema(self, path: Path) -> Any:
        return _parquet(path).schema_arrow

    def _value(self, index: int) -> Any:
        group, row = _place(self._group_rows, index)
        if group not in self._open:
            file, number = self._groups[group]
            self._open[group] = _parquet(self.paths[file]).read_row_group(number, [self.column])[self.column]
            if len(self._open) > WINDOW:
                self._open.popitem(last=False)
        self._open.move_to_end(group)
        return self._open[group][row].as_py()


def _place(ends: np.ndarray, index: int) -> tuple[int, int]:
    """The part that holds `index`, of parts that end there, and its place within."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - int(ends[part - 1] if part else 0)


def _picture_column(schema: Any, path: Path) -> str:
    """The column of binary values or of structs of bytes; of several, one whose name says so."""
    pa = _pyarrow()

    def holds_pictures(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_pictures(field.type)]
    named = [name for name in NAMES if name in found]
    if len(found) != 1 and not named:
        what = f"several columns of bytes ({', '.join(found)})" if found else "no column of bytes"
        raise ValueError(f"{path} has {what}; pictures are looked for in one called {', '.join(NAMES)}")
    return named[0] if named else found[0]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _parquet(path: Path) -> Any:
    pa = _pyarrow()
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("Arrow and Parquet files need pyarrow: pip install 'fastjepa[data]'") from None
    return pyarrow
