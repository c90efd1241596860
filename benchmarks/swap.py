"""The `swap` suite: models of other codebases before and after `fastjepa.patch`, forward and backward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fastjepa
from benchmarks.machine import here
from benchmarks.tables import columns

PATCH, TUBELET, MASKED = 16, 2, 0.4  # pixels, frames, and the part of the patches that a context keeps


@dataclass(frozen=True)
class Work:
    """Sizes of the models and of what they are given, and where there are checkouts of those that are no package."""

    width: int
    depth: int
    batch: int
    pixels: int
    frames: int
    device: torch.device
    ijepa: Path | None = None
    vjepa2: Path | None = None

    @property
    def heads(self) -> int:
        """64 numbers each."""
        return max(1, self.width // 64)

    def images(self) -> Tensor:
        """[B, 3, H, W]."""
        return torch.randn(self.batch, 3, self.pixels, self.pixels, device=self.device)

    def clips(self) -> Tensor:
        """[B, 3, T, H, W]."""
        return torch.randn(self.batch, 3, self.frames, self.pixels, self.pixels, device=self.device)

    def masks(self, frames: int = 1) -> list[Tensor]:
        """One mask int64 [B, K] of a context."""
        count = frames * (self.pixels // PATCH) ** 2
        kept = [torch.randperm(count)[: int(MASKED * count)].sort().values for _ in range(self.batch)]
        return [torch.stack(kept).to(self.device)]


Made = tuple[nn.Module, tuple[Any, ...]]  # a model, and the arguments of a call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, and checkouts."""
    large = here().type == "cuda"
    parser.add_argument("--width", type=int, default=768 if large else 192)
    parser.add_argument("--depth", type=int, default=12 if large else 2)
    parser.add_argument(
        "--batch", type=int, default=32 if large else 2, help="images; clips a quarter of it, at least 1"
    )
    parser.add_argument("--pixels", type=int, default=224, help="a side of images; clips have half")
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--ijepa", type=Path, metavar="FOLDER", help="a checkout of facebookresearch/ijepa")
    parser.add_argument("--vjepa2", type=Path, metavar="FOLDER", help="a checkout of facebookresearch/vjepa2")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model.

    Raises:
        ValueError: sizes that do not fit together, or a folder that is no such checkout.
    """
    a = arguments
    if min(a.width, a.depth, a.batch, a.frames) < 1 or a.width % 64 or a.frames % TUBELET or a.pixels % (2 * PATCH):
        raise ValueError(
            f"--width must be a multiple of 64, --pixels of {2 * PATCH}, --frames of {TUBELET}, all at least 1; got "
            f"--width {a.width}, --pixels {a.pixels}, --frames {a.frames}, --depth {a.depth}, --batch {a.batch}"
        )
    images = Work(a.width, a.depth, a.batch, a.pixels, a.frames, here(), a.ijepa, a.vjepa2)
    clips = Work(a.width, a.depth, max(1, a.batch // 4), a.pixels // 2, a.frames, here(), a.ijepa, a.vjepa2)
    return [measure(name, make, clips if "clips" in name else images) for name, make in MODELS.items()]


table = columns


def faults(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """Models that could not be patched, or whose numbers moved."""
    return [f"{row['model']} of {row['codebase']}: {row['wrong']}" for row in rows if "wrong" in row]


def measure(name: str, make: Callable[[Work], Made], work: Work) -> dict[str, Any]:
    """The row of a model: what `fastjepa.patch` measured of it, or why nothing could be."""
    codebase, _, model = name.partition(": ")
    row: dict[str, Any] = {"codebase": codebase, "model": model}
    torch.manual_seed(0)
    try:
        made, inputs = make(work)
    except (ImportError, RuntimeError, FileNotFoundError) as error:  # torchvision raises the second where it is unfit
        return row | {"absent": " ".join(str(error).split())[:100]}
    try:
        report = fastjepa.patch(made.to(work.device), probe=inputs)
    except ValueError as error:
        return row | {"wrong": " ".join(str(error).split())}
    found = report.verification
    assert found is not None  # a probe was given
    package = codebase.partition(" ")[0]
    return row | {
        "version": version(package) if "/" not in package else None,
        "places": len(report.patched),
        "before_ms": found.before_ms,
        "after_ms": found.after_ms,
        "speedup": found.speedup,
        "outputs": found.outputs,
        "gradients": found.gradients,
    }


def _ijepa(work: Work) -> Made:
    with _checkout(work.ijepa, "--ijepa", "src.models.vision_transformer") as vit:
        encoder = vit.VisionTransformer([work.pixels], PATCH, 3, work.width, depth=work.depth, num_heads=work.heads)
    return encoder, (work.images(), work.masks())


def _ijepa_predictor(work: Work) -> Made:
    with _checkout(work.ijepa, "--ijepa", "src.models.vision_transformer") as vit:
        patches = (work.pixels // PATCH) ** 2
        predictor = vit.VisionTransformerPredictor(
            patches, work.width, work.width // 2, work.depth, max(1, work.heads // 2)
        )
    context, targets = work.masks(), [m[:, ::2] for m in work.masks() * 4]
    tokens = torch.randn(work.batch, context[0].shape[1], work.width, device=work.device)
    return predictor, (tokens, context, targets)


def _vjepa2(work: Work) -> Made:
    side = (work.pixels, work.pixels)
    with _checkout(work.vjepa2, "--vjepa2", "src.models.vision_transformer") as vit:
        model = vit.VisionTransformer(
            side,
            PATCH,
            work.frames,
            TUBELET,
            embed_dim=work.width,
            depth=work.depth,
            num_heads=work.heads,
            use_rope=True,
        )
    return model, (work.clips(), work.masks(work.frames // TUBELET))


def _transformers(kind: str, attention: str) -> Callable[[Work], Made]:
    def make(work: Work) -> Made:
        found = import_module("transformers")
        config = getattr(found, f"{kind}Config")(
            hidden_size=work.width, num_hidden_layers=work.depth, num_attention_heads=work.heads,
            intermediate_size=4 * work.width, image_size=work.pixels, patch_size=PATCH, attn_implementation=attention,
        )  # fmt: skip
        noise = (torch.rand(work.batch, (work.pixels // PATCH) ** 2, device=work.device),)
        return getattr(found, f"{kind}Model")(config), (work.images(), *(noise if kind == "ViTMAE" else ()))

    return make


def _transformers_clips(work: Work) -> Made:
    found = import_module("transformers")
    config = found.VJEPA2Config(
        crop_size=work.pixels, patch_size=PATCH, frames_per_clip=work.frames, tubelet_size=TUBELET,
        hidden_size=work.width, num_hidden_layers=work.depth, num_attention_heads=work.heads,
        pred_hidden_size=work.width, pred_num_hidden_layers=work.depth, pred_num_attention_heads=work.heads,
    )  # fmt: skip
    return found.VJEPA2Model(config), (work.clips().transpose(1, 2),)


def _timm(work: Work) -> Made:
    sizes = {"img_size": work.pixels, "embed_dim": work.width, "depth": work.depth, "num_heads": work.heads}
    return import_module("timm").create_model("vit_base_patch16_224", **sizes), (work.images(),)


def _lightly(work: Work) -> Made:
    patches = (work.pixels // PATCH) ** 2
    predictor = import_module("lightly.models.modules").IJEPAPredictorTIMM(
        patches, work.depth, work.width, work.width // 2, max(1, work.heads // 2)
    )
    context, targets = work.masks(), [m[:, ::2] for m in work.masks() * 4]
    return predictor, (torch.randn(work.batch, context[0].shape[1], work.width, device=work.device), context, targets)


MODELS: dict[str, Callable[[Work], Made]] = {
    "facebookresearch/ijepa: encoder": _ijepa,
    "facebookresearch/ijepa: predictor": _ijepa_predictor,
    "facebookresearch/vjepa2: encoder of clips, rotary": _vjepa2,
    "transformers: IJepaModel, eager": _transformers("IJepa", "eager"),
    "transformers: IJepaModel, sdpa": _transformers("IJepa", "sdpa"),
    "transformers: ViTMAEModel, sdpa": _transformers("ViTMAE", "sdpa"),
    "transformers: VJEPA2Model of clips": _transformers_clips,
    "timm: VisionTransformer": _timm,
    "lightly: IJEPAPredictorTIMM": _lightly,
}


@contextmanager
def _checkout(folder: Path | None, option: str, name: str) -> Iterator[ModuleType]:
    """A module of a checkout's `src`, which both codebases have, so it is taken out of the tables again."""
    if folder is None:
        raise FileNotFoundError(f"no package: {option} FOLDER names a checkout")
    if not (folder / "src" / "models" / "vision_transformer.py").is_file():
        raise ValueError(f"{option}: {folder} is no checkout of that code (no src/models there)")
    sys.path.insert(0, str(folder))
    try:
        yield import_module(name)
    finally:
        sys.path.remove(str(folder))
        for module in [n for n in sys.modules if n == "src" or n.startswith("src.")]:
            del sys.modules[module]
