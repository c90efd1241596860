"""The run that is planned: a configuration from a shipped one or a file, with what was asked for on top."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastjepa.config import Config, load_config
from fastjepa.training.models import ENCODERS

DEFAULT = "in1k_vith14_ep300"
# Options of the command, and the settings that they stand for.
SETTINGS = {
    "batch_size": "data.batch_size",
    "crop_size": "data.crop_size",
    "patch_size": "mask.patch_size",
    "nenc": "mask.num_enc_masks",
    "npred": "mask.num_pred_masks",
    "enc_mask_scale": "mask.enc_mask_scale",
    "pred_mask_scale": "mask.pred_mask_scale",
    "aspect_ratio": "mask.aspect_ratio",
    "min_keep": "mask.min_keep",
    "model": "meta.model_name",
    "pred_depth": "meta.pred_depth",
    "pred_emb_dim": "meta.pred_emb_dim",
    "epochs": "optimization.epochs",
}


def recipe(config: str | None = None, asked: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration `config` (a file or a shipped name; the official ViT-H/14 where None) with what is asked for.

    asked: by the names in `SETTINGS`, None where nothing is; it goes before `overrides`, `section.key=value` as
    `load_config` takes them. Without a `config`, a model that is asked for brings its published patch size (14 for
    vit_huge, else 16) and predictor depth (12 from vit_large on, else 6), which both go before.

    Raises:
        ValueError: a model, file or setting that will not do; says what would.
    """
    given = {name: value for name, value in (asked or {}).items() if value is not None}
    model = given.get("model")
    if model is not None and model not in ENCODERS:
        near = difflib.get_close_matches(model, ENCODERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ENCODERS)}"
        raise ValueError(f"--model: unknown model {model!r}; {hint}")
    published = {}
    if config is None and model is not None:
        deep = model in ("vit_large", "vit_huge", "vit_giant")
        published = {"patch_size": 14 if model == "vit_huge" else 16, "pred_depth": 12 if deep else 6}
    for name in ("batch_size", "crop_size", "patch_size", "pred_depth", "pred_emb_dim", "epochs", "nenc", "npred"):
        if given.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {given[name]}")
    first, last = ([f"{SETTINGS[name]}={json.dumps(value)}" for name, value in d.items()] for d in (published, given))
    return load_config(config or DEFAULT, [*first, *overrides, *last])
