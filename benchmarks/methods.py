"""The `methods` suite: a training step of the methods that I-JEPA is compared with, all on the same kernels.

Each has the encoder that I-JEPA has. MAE-style: a random quarter of the patches is encoded, 8 layers of width 512 give
the pixels of the others. data2vec-style: 60 % of the patches are hidden from a student that sees all places, and it
predicts there what its EMA teacher's last layer gives for the whole picture.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa
from benchmarks import step
from benchmarks.laps import spread
from benchmarks.machine import here
from benchmarks.step import Work
from benchmarks.tables import columns
from benchmarks.timing import Roofs, clock
from benchmarks.ways import Fast, FastRagged, Way
from fastjepa import AdamWEMA, VisionTransformer
from fastjepa.flops import Tower
from fastjepa.nn import Block, Linear, keep_copies
from fastjepa.plan.field import DECODER, HIDDEN, KEPT, flops_per_image
from fastjepa.training.models import parameter_groups, step_flops

MOMENTUM, WARMUP = 0.996, 2
ALLOWED = {True: 2e-2, False: 1e-5}  # relative distance of a loss from fp64's, under bf16 autocast and in fp32


class Random(Way):
    """A method whose masks are random patches of each image."""

    encoder: VisionTransformer
    hidden: float  # part of the patches

    def __init__(self, models: tuple[VisionTransformer, nn.Module], target_encoder: nn.Module, bf16: bool):
        super().__init__(models, target_encoder, bf16)
        self.encoder = models[0]
        pairs = zip(models[0].parameters(), target_encoder.parameters(), strict=True)
        targets = {} if target_encoder is models[0] else dict(pairs)
        copies = keep_copies(nn.ModuleList([*models, target_encoder])) if bf16 else None
        self.optimizer = AdamWEMA(parameter_groups(*models), target_params=targets, low_precision=copies)
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type == "cpu"

    def drawn(self, images: int) -> tuple[Tensor, Tensor]:
        """(seen, hidden) patches int64 [B, K], each image's in ascending order."""
        count = self.encoder.patch_embed.num_patches
        kept = count - int(self.hidden * count)
        order = torch.rand(images, count).argsort(1).to(self.device)
        return order[:, :kept].sort(1).values, order[:, kept:].sort(1).values

    def flops(self) -> float:
        """Of a step on an image."""
        embed, block = self.encoder.patch_embed, cast(Block, self.encoder.blocks[0])
        width = self.encoder.embed_dim
        tower = Tower(width, len(self.encoder.blocks), block.mlp.fc1.out_features / width)
        found = flops_per_image(tower, embed.proj.weight[0].numel(), embed.num_patches)
        return found[self.name.removesuffix("-style")]

    def update(self, momentum: float) -> None:
        """AdamW, and EMA where there is a teacher."""
        self.optimizer.momentum = momentum
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class MAE(Random):
    """Source: He et al. 2021 (arXiv 2111.06377)."""

    name, hidden = "MAE-style", 1 - KEPT

    def __init__(self, encoder: VisionTransformer, bf16: bool = False):
        decoder = fastjepa.vit_predictor(
            num_patches=encoder.patch_embed.num_patches,
            embed_dim=encoder.embed_dim,
            predictor_embed_dim=DECODER.width,
            depth=DECODER.layers,
            num_heads=16,
        )
        decoder.predictor_proj = Linear(DECODER.width, encoder.patch_embed.proj.weight[0].numel())
        super().__init__((encoder, decoder.to(encoder.pos_embed.device)), encoder, bf16)

    def objective(self, images: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of hidden patches' pixels, each patch's normalised."""
        pixels = self.encoder.patch_embed.patches(images)
        pixels = pixels.gather(1, hidden[..., None].expand(-1, -1, pixels.shape[-1]))
        wanted = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        made = self.predictor(self.encoder(images, [seen]), [seen], [hidden])
        return F.mse_loss(made.to(wanted.dtype), wanted)


class Data2Vec(Random):
    """Source: Baevski et al. 2022 (arXiv 2202.03555), with the teacher's last layer for the mean of several."""

    name, hidden = "data2vec-style", HIDDEN

    def __init__(self, encoder: VisionTransformer, bf16: bool = False):
        head = Head(encoder.embed_dim).to(encoder.pos_embed.device)
        super().__init__((encoder, head), copy.deepcopy(encoder).requires_grad_(False), bf16)

    def objective(self, images: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """Smooth L1 of hidden patches' features, normalised as I-JEPA's are."""
        with torch.no_grad():
            features = self.target_encoder(images)
            width = features.shape[-1]
            place = hidden[..., None].expand(-1, -1, width)
            wanted = F.layer_norm(features.gather(1, place), (width,)).flatten(0, 1)
        x = self.encoder.patch_embed.embed(self.encoder.patch_embed.patches(images))
        x = (
            x.scatter(1, place, cast(Head, self.predictor).mask_token.to(x.dtype).expand_as(place))
            + self.encoder.pos_embed
        )
        batch, count = x.shape[:2]
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * count
        x = self.encoder.run(self.encoder.blocks, self.encoder.norm, x.flatten(0, 1), offsets, count)
        return F.smooth_l1_loss(self.predictor(x.view(batch, count, width).gather(1, place).flatten(0, 1)), wanted)


class Head(nn.Module):
    """data2vec's beside the student: the token of hidden patches, and a linear map of what is made of them."""

    def __init__(self, width: int):
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.linear = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.linear(x)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The encoder and its batch."""
    parser.add_argument("--model", default="vit_small", choices=step.ENCODERS, metavar="NAME", help="the encoder")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--crop-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, help="images; default: 128 on a GPU, 8 elsewhere")
    parser.add_argument("--steps", type=int, default=8, help="timed, after the warm-up")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each method.

    Raises:
        ValueError: sizes that do not go together.
    """
    device = here()
    gpu = device.type == "cuda"
    batch = (128 if gpu else 8) if arguments.batch_size is None else arguments.batch_size
    if min(batch, arguments.steps) < 1:
        raise ValueError("--batch-size and --steps must be at least 1")
    deep = arguments.model in ("vit_large", "vit_huge", "vit_giant")
    predictor = (384, 12 if deep else 6)
    work = Work(arguments.model, arguments.patch_size, arguments.crop_size, batch, predictor, bf16=gpu, device=device)
    return measure(work, arguments.steps)


def measure(work: Work, steps: int) -> list[dict]:
    """Milliseconds of a step of each, taken in turn; `wrong` and no time where a loss is far from fp64's."""
    ways = [FastRagged(work.model(), work.bf16), Fast(work.model(), work.bf16)]
    ways += [MAE(work.model().encoder, work.bf16), Data2Vec(work.model().encoder, work.bf16)]
    times: list[list[float]] = [[] for _ in ways]
    flops = [0.0] * len(ways)
    wrong = [_wrong(way, work) if isinstance(way, Random) else None for way in ways]
    for number in range(steps + WARMUP):
        images = work.images(work.batch)
        Roofs.of(work.device).look()
        for place, way in enumerate(ways):
            inputs, counted = _inputs(way, work, number)
            _wait(work.device)
            began = clock()
            way.backward(way.loss(images, *inputs))
            way.update(MOMENTUM)
            _wait(work.device)
            if number >= WARMUP:
                times[place].append(clock() - began)
                flops[place] += counted / steps / work.batch
    return [_row(work, *found) for found in zip(ways, times, flops, wrong, strict=True)]


def _inputs(way: Way, work: Work, number: int) -> tuple[tuple[Any, ...], float]:
    """What goes into a step beside images, and its FLOPs."""
    if isinstance(way, Random):
        return way.drawn(work.batch), work.batch * way.flops()
    masks = work.masks(work.batch, number, way.ragged)
    return way.inputs(*masks, work.batch), step_flops(way.model)(work.batch, *masks)  # type: ignore[attr-defined]


def _wrong(way: Random, work: Work) -> str | None:
    """How far the loss of a few images is from that of the same models in fp64, if that is too far."""
    images, inputs = work.images(2), way.drawn(2)
    exact = copy.copy(way)
    exact.encoder, exact.predictor = copy.deepcopy(way.encoder).double(), copy.deepcopy(way.predictor).double()
    exact.target_encoder = copy.deepcopy(way.target_encoder).double()
    with torch.no_grad():
        wanted = exact.objective(images.double(), *inputs).item()
        off = abs(way.loss(images, *inputs).item() / wanted - 1)
    return None if off <= ALLOWED[work.bf16] else f"loss {off:.1e} from fp64's"


def _row(work: Work, way: Way, times: Sequence[float], flops: float, wrong: str | None) -> dict:
    names = {"fastjepa ragged": "I-JEPA, ragged", "fastjepa truncated": "I-JEPA, truncated"}
    row = {"method": names.get(way.name, way.name), "model": f"{work.name}/{work.patch}", "batch": work.batch}
    row |= {"dtype": "bf16" if work.bf16 else "fp32", "gflop_per_image": flops / 1e9}
    if wrong:
        return row | {"wrong": wrong}
    median = statistics.median(times)
    rate = flops * work.batch / median / Roofs.of(work.device).matmul
    return row | {
        "ms": 1e3 * median,
        "spread_ms": 1e3 * spread(times),
        "images_per_second": work.batch / median,
        "of_matmul_rate": rate,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


table = columns


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """The methods whose loss is wrong."""
    return [f"{row['method']}: {row['wrong']}" for row in rows if "wrong" in row]
