"""Checkpoints: written whole or not at all, read without running code, and told plainly when they cannot be."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa import huggingface
from fastjepa.sharding import like

MODELS = ("encoder", "predictor", "target_encoder")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint, ours or an official `.pth.tar`, or a folder of transformers' `IJepaModel`, as a dict on the CPU.

    A run's own folder, to which several processes wrote, is read whole.

    Returns:
        Its entries, among them the state dicts `encoder`, `predictor` and `target_encoder` (no `module.` prefix) and
        `epoch`. Code in the file is never run. A folder's one encoder is both encoders, and its predictor is empty;
        `encoder_config` has its sizes.

    Raises:
        ValueError: a file that is not there, cannot be read, or lacks an entry; names the file and what is wrong.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        from fastjepa import dcp  # the import takes a while, and most checkpoints are files

        return _checked(dcp.read(path), path)
    if path.is_dir():
        encoder, sizes = huggingface.read_encoder(path)
        models = {"encoder": encoder, "predictor": {}, "target_encoder": dict(encoder)}
        return {**models, "epoch": 0, "encoder_config": sizes.to_dict()}
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which no checkpoint is")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path}: not a PyTorch checkpoint, or one that needs code to be run, which is never done"
        ) from error
    except Exception as error:  # whatever a damaged file makes of torch's reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"checkpoint {path} is damaged or no PyTorch checkpoint ({reason[:160]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds a {type(state).__name__}, not a dict with {', '.join(MODELS)}")
    return _checked(state, path)


def _checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    missing = [name for name in (*MODELS, "epoch") if name not in state]
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {', '.join(missing)}; it has {', '.join(map(str, state)) or 'nothing'}"
        )
    for name in MODELS:
        if not isinstance(state[name], dict) or not all(isinstance(v, Tensor) for v in state[name].values()):
            raise ValueError(f"checkpoint {path}: {name} is not a state dict of tensors")
        if not all(isinstance(key, str) for key in state[name]):
            raise ValueError(f"checkpoint {path}: {name} has keys that are no names")
        state[name] = {key.removeprefix("module."): value for key, value in state[name].items()}
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict, all of it; of a sharded model each process takes its part.

    Raises:
        ValueError: keys or shapes of another model; names the first that differ.
    """
    own = model.state_dict()
    check_weights(own, {key: tensor.shape for key, tensor in state.items()}, what)
    model.load_state_dict({key: like(state[key], tensor) for key, tensor in own.items()})


def check_weights(own: Mapping[str, Tensor], found: Mapping[str, torch.Size], what: str) -> None:
    """That a model's tensors are those of a state with these names and shapes; errors as `load_weights`."""
    missing, unknown = [k for k in own if k not in found], [k for k in found if k not in own]
    if missing or unknown:
        differs = [f"{word} {keys[0]}{_more(keys)}" for word, keys in (("lacks", missing), ("has", unknown)) if keys]
        raise ValueError(f"{what} is of another model: beside the one built here it {' and '.join(differs)}")
    for key, tensor in own.items():
        if tensor.shape != found[key]:
            raise ValueError(
                f"{what} is of another model: {key} is {list(found[key])} there and {list(tensor.shape)} here"
            )


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def write_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` atomically: to a file beside it, synced to the disk, then renamed over it.

    Raises:
        OSError: it could not be written (a full disk, say); whatever stood at `path` is as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # never through a link that lies there
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch's zip writer reports a failed write so
            raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
