"""Checkpoints that are folders: each process writes its part of every tensor (torch.distributed.checkpoint).

A folder holds one file of tensors for each process that wrote, `.metadata`, which says what lies where, and
`run.pth.tar` with everything that is no tensor of model or optimizer. Names of tensors are `encoder.…`, `predictor.…`,
`target_encoder.…` and `opt.N.…`, N the parameter's number in the optimizer. Nothing in them is run as they are read.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

REST = "run.pth.tar"
_CLASSES = {
    kind.__name__: kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
}


def split(state: Mapping[str, Any], models: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run's state, of which `models` are state dicts, as (what is no tensor of theirs or of the optimizer, those)."""
    tensors = {f"{name}.{key.removeprefix('module.')}": t for name in models for key, t in state[name].items()}
    tensors |= {f"opt.{i}.{key}": t for i, held in state["opt"]["state"].items() for key, t in held.items()}
    rest = {key: value for key, value in state.items() if key not in models}
    return rest | {"opt": {"param_groups": state["opt"]["param_groups"]}}, tensors


def join(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `split` has split; names of models' tensors have no prefix."""
    state: dict[str, Any] = {**rest, "opt": {"state": {}, **rest["opt"]}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part == "opt":
            number, _, key = key.partition(".")
            state["opt"]["state"].setdefault(int(number), {})[key] = tensor
        else:
            state.setdefault(part, {})[key] = tensor
    return state


class Saves:
    """Saves of one run, one at a time, the writing behind the training's back."""

    def __init__(self, several: bool, pinned: bool):
        # A group of its own, since it talks from another thread, between the training's own messages.
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.stager = BlockingAsyncStager(cache_staged_state_dict=pinned)
        self.pending: tuple[Any, Path] | None = None
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that there is a single process

    def begin(self, tensors: dict[str, Tensor], folder: Path, done: Callable[[], None]) -> None:
        """Copy the tensors, which every process gives, and have them written to `folder`, which must not be there.

        `done` is called in the first process, in another thread, once every process has written all of its part.

        Raises:
            OSError: what was being written could not be.
        """
        self.wait()
        writing = async_save(
            tensors,
            storage_writer=_Writer(folder, done),
            async_stager=self.stager,
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.pending = writing, folder

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: some process could not write it.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            writing, folder = pending
            with _told(folder):
                writing.result()


@contextmanager
def _told(what: Path) -> Iterator[None]:
    """Whatever keeps torch from writing, as one OSError."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"{what} could not be written: {_line(first)} (process {rank})") from error
    except RuntimeError as error:  # torch's zip writer reports a failed write so
        raise OSError(f"{what} could not be written: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


class _Writer(filesystem.FileSystemWriter):
    def __init__(self, folder: Path, done: Callable[[], None]):
        super().__init__(folder)
        self.done = done

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # without the folder's name, which changes

    def finish(self, metadata: metadata.Metadata, results: list[Any]) -> None:
        super().finish(metadata, results)
        self.done()


def read(path: Path) -> dict[str, Any]:
    """All of a checkpoint on the CPU, as a run's state.

    Raises:
        ValueError: it is damaged, or wants code to be run; names it.
    """
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in kept(path).items()}
    read_into(path, tensors)
    return join(read_rest(path), tensors)


def read_rest(path: Path) -> dict[str, Any]:
    """What is no tensor of models or optimizer; errors as `read`."""
    with _readable(path):
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        if not isinstance(rest, dict) or not isinstance(rest.get("opt"), dict):
            raise ValueError(f"{REST} is no run's state")
    return rest


def kept(path: Path) -> dict[str, metadata.TensorStorageMetadata]:
    """Names, shapes and dtypes of the tensors; errors as `read`."""
    with _readable(path):
        return _Reader(path).read_metadata().state_dict_metadata  # type: ignore[return-value]


def read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors of a checkpoint in place, of sharded ones the part that lies here. Errors as `read`."""
    with _readable(path), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that each process reads for itself
        load(tensors, storage_reader=_Reader(path), no_dist=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever keeps torch from reading, as one ValueError."""
    try:
        yield
    except (CheckpointException, Exception) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(first, pickle.UnpicklingError):
            raise ValueError(
                f"checkpoint {path}: not a PyTorch checkpoint, or one that needs code to be run, which is never done"
            ) from error
        raise ValueError(f"checkpoint {path} is damaged or incomplete ({_line(first)})") from error


class _Unpickler(pickle.Unpickler):
    """Of `.metadata`, which is a pickle: the plain classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get(name)
        if found is not None and found.__module__ == module:
            return found
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Reader(filesystem.FileSystemReader):
    """One that runs nothing: no name but those of descriptions, no value but tensors, no file but the folder's own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("no metadata")
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata):  # torch would unpickle it, and run what it says
                raise pickle.UnpicklingError(f"{name} is no tensor")
            held = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
            if held != torch.Size(entry.size).numel():
                raise ValueError(f"of {name} there are {held} of {torch.Size(entry.size).numel()} values")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"it names the file {info.relative_path}, which is not in the folder")
        return found
