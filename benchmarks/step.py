"""The `step` suite: whole training steps, the naive eager one and ours in turn, in one run."""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import fastjepa
from benchmarks.masks import SETTINGS
from benchmarks.naive import Encoder, NaiveStep, Predictor
from benchmarks.tables import columns
from fastjepa import IJEPA, MaskCollator
from fastjepa.training.models import build_optimizer

MOMENTUM = 0.996


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how often."""
    parser.add_argument(
        "--model", default="vit_small", choices=[f"vit_{s}" for s in ("tiny", "small", "base", "large", "huge")]
    )
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each way to take the step."""
    a = arguments
    return measure(a.model, a.patch_size, a.batch_size, a.steps, a.threads)


table = columns


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The rows whose losses are wrong."""
    return [f"{row['row']}: {row['wrong']}" for row in rows if "wrong" in row]


def measure(model: str = "vit_small", patch: int = 16, batch: int = 16, steps: int = 8, threads: int = 2) -> list[dict]:
    """Seconds a step of the same model on the same images and masks; a row whose loss is wrong has no time.

    Rows: eager (see `benchmarks.naive`), fastjepa truncated, fastjepa ragged (more context tokens, nothing cut).
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side = 224 // patch
    encoder = getattr(fastjepa, model)(patch_size=patch)
    heads = encoder.num_heads
    predictor = fastjepa.vit_predictor(
        num_patches=side * side, embed_dim=encoder.embed_dim, predictor_embed_dim=384, depth=6, num_heads=heads
    )
    ours = IJEPA(encoder, predictor)
    naive_encoder = Encoder(side, patch, encoder.embed_dim, len(encoder.blocks), heads)
    naive_predictor = Predictor(side, encoder.embed_dim, 384, 6, heads)
    naive_encoder.load_state_dict(encoder.state_dict())
    naive_predictor.load_state_dict(predictor.state_dict())
    naive = NaiveStep(naive_encoder, naive_predictor)
    truncated, uncut = FastStep(ours), FastStep(copy.deepcopy(ours))
    cut, whole = (MaskCollator((224, 224), patch, **SETTINGS, ragged=ragged) for ragged in (False, True))
    seconds, wrong, ratios = {"eager": [], "fastjepa truncated": [], "fastjepa ragged": []}, False, []
    for number in range(steps + 1):
        images = torch.randn(batch, 3, 224, 224)
        lists, ragged = cut.sample(batch, [0, number]), whole.sample(batch, [0, number])
        work = ((naive, lists), (truncated, lists), (uncut, ragged))
        timed = [_timed(step, images, masks) for step, masks in work]
        wrong |= abs(timed[1][1] / timed[0][1] - 1) > 5e-4
        if number:  # the first warms up
            for name, (value, _) in zip(seconds, timed, strict=True):
                seconds[name].append(value)
            ratios.append(timed[0][0] / timed[1][0])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {"row": name, "model": f"{model}/{patch}", "batch": batch, "threads": threads, "steps": steps}
        if wrong and name != "eager":
            row["wrong"] = "its losses are not the eager row's, so no time is given"
        else:
            row |= {"seconds": median, "spread": max(values) - min(values), "images_per_second": batch / median}
        if name == "fastjepa truncated" and not wrong:
            row["eager_over_ours"] = statistics.median(ratios)
        rows.append(row)
    return rows


class FastStep:
    """One training step with fastjepa's models and optimizer."""

    def __init__(self, model: IJEPA):
        self.model, self.optimizer = model, build_optimizer(model)

    def step(self, images: torch.Tensor, masks_enc, masks_pred, momentum: float) -> float:
        """Forward, backward, AdamW, EMA."""
        loss = self.model.loss(images, masks_enc, masks_pred)
        loss.backward()
        self.optimizer.momentum = momentum
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def _timed(step: FastStep | NaiveStep, images: torch.Tensor, masks: tuple) -> tuple[float, float]:
    """(seconds, loss) of a step."""
    start = time.perf_counter()
    masks_enc, masks_pred = masks
    loss = step.step(images, masks_enc, masks_pred, MOMENTUM)
    return time.perf_counter() - start, loss
