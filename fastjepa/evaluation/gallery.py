"""What `fastjepa show` does: pictures of what an encoder sees, as PNGs and one page that holds them all."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.checkpoint import read_checkpoint
from fastjepa.data import ImageFolder, UnreadableImage
from fastjepa.data.sources import open_pictures
from fastjepa.evaluation.features import whole_picture
from fastjepa.evaluation.overlays import plot_attention, plot_masks, plot_similarity
from fastjepa.evaluation.pictures import plot_features
from fastjepa.evaluation.retrieval import plot_predictions
from fastjepa.masks import MaskCollator
from fastjepa.pretrained import load_encoder, load_ijepa

PAPERS_MASKS = {
    "enc_mask_scale": (0.85, 1.0),
    "pred_mask_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "nenc": 1,
    "npred": 4,
    "min_keep": 10,
}
GALLERY = 256  # pictures, at most, whose patches predictions are shown by
CAPTIONS = {
    "features": "Principal components of the patch features of all pictures together, as colours: equal colours are "
    "equal features.",
    "similarity": "How alike the feature of every patch is to that of the patch under the cross (cosine, after the "
    "picture's mean is taken off).",
    "attention": "What the heads of the last block attend to.",
    "predictions": "What the predictor makes of the hidden targets: each target patch is filled with the patch of "
    "another picture whose feature is nearest to the predicted one. Grey is neither context nor target.",
    "masks": "Masks as training draws them: the context encoder sees what is lit and has to predict what is framed.",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}}
h1{{font-size:1.5rem}}h2{{font-size:1.15rem;margin-top:2.5rem}}img{{width:100%;max-width:54rem;height:auto}}
table{{border-collapse:collapse}}td{{padding:.1rem 1rem .1rem 0}}</style></head>
<body><h1>{title}</h1><table>{facts}</table>{sections}</body></html>
"""


def show_checkpoint(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str = "target_encoder",
    num_heads: int | None = None,
    count: int = 4,
    scale: int = 1,
    patch: tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, str]:
    """Draw features.png, similarity.png, attention.png, predictions.png, masks.png, and index.html that holds them all.

    Of a checkpoint without a predictor there are no predictions; nor of a single picture.

    Arguments:
        checkpoint, model, num_heads: as `fastjepa.load_encoder`.
        out: the folder that they are written to.
        data: a picture, or what `open_pictures` takes, a folder say, of whose pictures `count` are chosen by the seed.
        scale: show the encoder pictures so many times as large as in training, for finer maps.
        patch: (row, column) that similarity and attention are of; None: three for similarity, all for attention.

    Returns:
        The files by name.

    Raises:
        ValueError: a checkpoint or pictures that will not do, or matplotlib is not installed.
    """
    for name, value in (("count", count), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    encoder = load_encoder(checkpoint, model, num_heads).to(device)
    high, wide = encoder.patch_embed.img_size
    if high != wide:
        raise ValueError(f"checkpoint {checkpoint}: its pictures are {high}x{wide}; only square ones are shown")
    images, names = _pictures(Path(data), scale * high, count, seed)
    settings = _masks(checkpoint)
    collator = MaskCollator((scale * high, scale * high), scale * encoder.patch_embed.patch_size, **settings)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in CAPTIONS}
    link = next((file for file in (*files.values(), folder / "index.html") if file.is_symlink()), None)
    if link is not None:
        raise ValueError(f"{link} is a symbolic link, and nothing is written outside of {folder}")
    plot_features(encoder, images, files["features"])
    plot_similarity(encoder, images, files["similarity"], [patch] if patch else None)
    plot_attention(encoder, images, files["attention"], patch)
    plot_masks(collator, images, files["masks"], seed)
    gallery = _pictures(Path(data), high, max(count, GALLERY), seed)[0]
    if len(gallery) > 1 and read_checkpoint(checkpoint)["predictor"]:
        one = MaskCollator((high, high), encoder.patch_embed.patch_size, **settings | {"nenc": 1, "ragged": True})
        plot_predictions(load_ijepa(checkpoint, num_heads), one, gallery, files["predictions"], count, seed)
    else:
        del files["predictions"]
    facts = {
        "checkpoint": Path(checkpoint).name,
        "encoder": f"{model}, width {encoder.embed_dim}, {len(encoder.blocks)} layers, {encoder.num_heads} heads",
        "pictures": ", ".join(names),
    }
    files["page"] = folder / "index.html"
    files["page"].write_text(_page(facts, files), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}


def _pictures(data: Path, size: int, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """uint8 [k, 3, size, size] and the pictures' names."""
    if data.is_file() and data.suffix not in (".tar", ".parquet"):
        source = ImageFolder(data.parent)
        if data not in source.paths:
            raise ValueError(f"{data} is no picture")
        order = [source.paths.index(data)]
    else:
        source = open_pictures(data)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    images, names, reason = [], [], ""
    for index in order:
        try:
            images.append(whole_picture(source.load(index), size))
        except UnreadableImage as error:
            reason = f"; the last that cannot be read: {error}"
            continue
        names.append(Path(source.name(index)).name)
        if len(images) == count:
            break
    if not images:
        raise ValueError(f"no picture of {data} can be read{reason}")
    return torch.stack(images), names


def _masks(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of, or the paper's."""
    run = read_checkpoint(checkpoint).get("fastjepa")
    if not run:
        return PAPERS_MASKS
    mask = run["config"]["mask"]
    kept = ("enc_mask_scale", "pred_mask_scale", "aspect_ratio", "min_keep", "allow_overlap", "ragged")
    return {**{name: mask[name] for name in kept}, "nenc": mask["num_enc_masks"], "npred": mask["num_pred_masks"]}


def _page(facts: dict[str, str], files: dict[str, Path]) -> str:
    sections = []
    for name, caption in CAPTIONS.items():
        if name not in files:
            continue
        data = base64.b64encode(files[name].read_bytes()).decode("ascii")
        text = html.escape(caption)
        sections.append(f'<h2>{name}</h2><p>{text}</p><img alt="{text}" src="data:image/png;base64,{data}">')
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    title = html.escape(f"What {facts['checkpoint']} sees")
    return _PAGE.format(title=title, facts=rows, sections="".join(sections))
