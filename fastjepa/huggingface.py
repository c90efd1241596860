"""Folders of transformers' `IJepaModel`: config.json and safetensors, which hold no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastjepa import layouts
from fastjepa.layouts import EncoderSizes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PIXELS = "preprocessor_config.json"

Triple = tuple[float, float, float]


def read_encoder(folder: Path) -> tuple[dict[str, Tensor], EncoderSizes]:
    """The encoder in a folder that `IJepaModel.save_pretrained` wrote: a state dict with the official names, its sizes.

    Raises:
        ValueError: a folder that lacks a file, or holds another model; names the folder and what is wrong.
    """
    config = _json(folder, CONFIG)
    try:
        sizes = EncoderSizes.of_transformers(config)
        return layouts.from_transformers(_tensors(folder), sizes), sizes
    except ValueError as error:
        raise ValueError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error


def write_encoder(
    state: Mapping[str, Tensor], sizes: EncoderSizes, folder: Path, pixels: tuple[Triple, Triple] | None = None
) -> None:
    """Write an encoder as a folder that `IJepaModel.from_pretrained` reads, whole or not at all.

    `pixels`: mean and deviation that images (0..1) are normalised by, for transformers' image processor.

    Raises:
        ValueError: a folder that holds something already, or the safetensors package is not installed.
        OSError: it could not be written.
    """
    save = _safetensors().save_file
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; name a folder that is not")
    tensors = layouts.to_transformers(state)
    config = sizes.to_transformers() | {"torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save(tensors, part / WEIGHTS, metadata={"format": "pt"})  # without it transformers takes the file for another's
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if pixels is not None:
            (part / PIXELS).write_text(json.dumps(_processor(sizes, *pixels), indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _processor(sizes: EncoderSizes, mean: Triple, deviation: Triple) -> dict[str, Any]:
    """As transformers' own conversions of such models have it: resized, not cropped."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": sizes.img_size[0], "width": sizes.img_size[1]},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(deviation),
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    package = _safetensors()
    if (folder / INDEX).is_file():
        places = _json(folder, INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{INDEX} has no weight_map of file names")
        names = sorted(set(places.values()))
    else:
        names = [WEIGHTS]
    found: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{name} is not there")
        try:
            found |= package.load_file(folder / name)
        except Exception as error:  # SafetensorError, of whose kind the package makes no promise
            raise ValueError(
                f"{name} is damaged or no safetensors file ({str(error).splitlines()[0][:120]})"
            ) from error
    return found


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no folder of a transformers model: it has no {name}") from None
    except ValueError as error:
        raise ValueError(f"{folder / name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} holds a {type(value).__name__}, not names and values")
    return value


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("transformers folders need the safetensors package: pip install 'fastjepa[hub]'") from error
    return safetensors.torch
