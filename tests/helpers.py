"""What several test files use: golden models and masks, distances, small folders of pictures and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastjepa
from fastjepa import IJEPA, Ragged
from fastjepa.config import Config, parse_config

GOLDEN_MODELS = ("ijepa_tiny", "ijepa_two_contexts")
# What PyTorch launches, and which of it Inductor fuses, changes from one release to the next; docs/counts.md is of one.
of_counted_torch = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason=f"what PyTorch 2.13 launches; this is {torch.__version__}"
)


def distance(ours: Tensor, theirs: Any) -> float:
    """Norm of the difference over the norm of `theirs`, in fp64."""
    a, b = ours.detach().double(), torch.as_tensor(theirs).detach().double()
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The arrays under `prefix/` as tensors."""
    return {k.removeprefix(f"{prefix}/"): torch.tensor(v) for k, v in arrays.items() if k.startswith(f"{prefix}/")}


def golden_model(arrays: dict[str, np.ndarray]) -> IJEPA:
    """The model of a golden file with its weights."""
    c = {k: v.item() for k, v in part(arrays, "config").items()}
    encoder = fastjepa.VisionTransformer(
        img_size=[c["img_size"]],
        patch_size=c["patch_size"],
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
    )
    predictor = fastjepa.vit_predictor(
        num_patches=encoder.patch_embed.num_patches,
        embed_dim=c["embed_dim"],
        predictor_embed_dim=c["pred_emb_dim"],
        depth=c["pred_depth"],
        num_heads=c["num_heads"],
    )
    model = IJEPA(encoder, predictor)
    for name in ("encoder", "predictor", "target_encoder"):
        getattr(model, name).load_state_dict(part(arrays, name))
    return model


def golden_lists(arrays: dict[str, np.ndarray], suffix: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """The rectangular masks of a golden file, or of one of its training steps."""
    prefix = "train/" if suffix else ""
    return tuple(  # type: ignore[return-value]
        [torch.tensor(m) for m in arrays[f"{prefix}{name}{suffix}"]] for name in ("masks_enc", "masks_pred")
    )


def golden_ragged(arrays: dict[str, np.ndarray]) -> tuple[Ragged, Ragged]:
    """The uncut masks of a golden file."""
    return tuple(  # type: ignore[return-value]
        Ragged(
            torch.tensor(arrays[f"ragged_{name}/indices"]),
            torch.tensor(arrays[f"ragged_{name}/offsets"]),
            int(arrays[f"config/n{name}"]),
        )
        for name in ("enc", "pred")
    )


def make_pictures(folder: Path, count: int = 24, classes: int = 3, size: int = 40) -> Path:
    """A folder of random pictures, `classes` class folders, each picture a different one."""
    rng = np.random.default_rng(7)
    for i in range(count):
        place = folder / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size + 4 * (i % 3))).save(place / f"{i:03d}.png")
    return folder


def tiny_config(pictures: Path, folder: Path, **changes: dict[str, Any]) -> Config:
    """A configuration that trains in seconds; `changes` are whole or part sections."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"root_path": str(pictures), "batch_size": 4, "crop_size": 32, "num_workers": 0},
        "mask": {"patch_size": 4, "min_keep": 4},
        "meta": {
            "model_name": "vit_tiny",
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "pred_depth": 1,
            "pred_emb_dim": 24,
            "use_bfloat16": False,
        },
        "optimization": {"epochs": 2, "warmup": 1},
        "logging": {"folder": str(folder), "every": 3, "watch_every": 4},
        "runtime": {"progress": False, "save_every": 5, "device": "cpu"},
        "evaluation": {},
    }
    for section, values in changes.items():
        tree[section] |= values
    return parse_config(tree)
