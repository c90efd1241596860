"""Checkpoints from one layout to another: official, ours, transformers; the weights stay bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastjepa.checkpoint import MODELS, read_checkpoint, write_checkpoint
from fastjepa.evaluation.features import MEAN, STD
from fastjepa.huggingface import write_encoder
from fastjepa.layouts import OFFICIAL_EPS
from fastjepa.pretrained import encoder_sizes

LAYOUTS = ("transformers", "official", "fastjepa")
# What the published code writes, and so may read.
_OFFICIAL = (*MODELS, "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")


def export(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    model: str = "target_encoder",
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Write a checkpoint, of any layout that `read_checkpoint` reads, to `out` in another.

    Arguments:
        to: transformers, a folder with one encoder, for `IJepaModel.from_pretrained`; official, a `.pth.tar` that the
            published code reads; fastjepa, a file with all that the checkpoint holds and the encoder's sizes.
        model: the encoder that a transformers folder gets, target_encoder or encoder.
        num_heads: as in `fastjepa.load_encoder`.

    Returns:
        `out`, `to`, the `encoder`'s sizes, its number of `parameters`, and `notes`: what the layout has no place for.

    Raises:
        ValueError: a checkpoint that cannot be read, or an `out` that is there already.
        OSError: it could not be written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"a checkpoint can be exported to {', '.join(LAYOUTS)}, not to {to!r}")
    out = Path(out)
    checkpoint = read_checkpoint(path)
    sizes = encoder_sizes(checkpoint, path, model, num_heads)
    notes = []
    if to == "transformers":
        write_encoder(checkpoint[model], sizes, out, (MEAN, STD))
    else:
        if out.exists():
            raise ValueError(f"{out} is there already; name a file that is not")
        if not checkpoint["predictor"]:
            notes.append("there is no predictor in a transformers folder: it is empty here, so training starts anew")
        if to == "official" and sizes.layer_norm_eps != OFFICIAL_EPS:
            notes.append(f"layer_norm_eps {sizes.layer_norm_eps:g} becomes {OFFICIAL_EPS:g}, which that code has")
        out.parent.mkdir(parents=True, exist_ok=True)
        described = checkpoint | {"encoder_config": sizes.to_dict()}
        write_checkpoint(_official(checkpoint) if to == "official" else described, out)
    parameters = sum(tensor.numel() for tensor in checkpoint[model].values())
    return {"out": str(out), "to": to, "encoder": sizes.to_dict(), "parameters": parameters, "notes": notes}


def _official(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Of DistributedDataParallel's state dicts, as the published code wraps its models."""
    kept = {name: checkpoint[name] for name in _OFFICIAL if name in checkpoint}
    return kept | {name: {f"module.{key}": value for key, value in checkpoint[name].items()} for name in MODELS}
