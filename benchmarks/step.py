"""The `step` suite: whole training steps of real models in one run, eager as published, compiled, and ours."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastjepa
from benchmarks.laps import PARTS, Laps, peak_bytes, spread, take_step
from benchmarks.machine import clocks, here, joules
from benchmarks.masks import SETTINGS
from benchmarks.tables import columns
from benchmarks.timing import Roofs, matmul_rate
from benchmarks.ways import (
    Compiled,
    Eager,
    Fast,
    FastGraphs,
    FastRagged,
    FastRaggedGraphs,
    Masks,
    Way,
    naive_models,
    official,
    require_checkout,
)
from fastjepa import IJEPA, MaskCollator, Ragged
from fastjepa.chips import chip_of
from fastjepa.nn import set_activation_checkpointing, set_narrow_stream
from fastjepa.plan.settings import NAMED, PLAIN, Settings
from fastjepa.training.models import ENCODERS, step_flops

MOMENTUM = 0.996
FEW = 4  # images at a time in fp64
UNIT = {False: 1e-5, True: 4e-3}  # rounding in fp32 and in bf16, allowed where eager had luck
WARMUP = 3  # steps: torch.compile takes two lengths of contexts to know that they vary
FASTS: dict[str, type[Fast]] = {way.name: way for way in (Fast, FastRagged, FastGraphs, FastRaggedGraphs)}
GRAPHS = ", graphs"  # how the names of rows from graphs end
USUAL = ("eager", "compiled", "fastjepa truncated", "fastjepa ragged")
SET = tuple(f"{row}, {name}" for row in USUAL[2:] for name in NAMED)  # with a setting of `runtime`
ROWS = (*USUAL, *(row + GRAPHS for row in USUAL[2:]), *SET, "official")


@dataclass(frozen=True)
class Work:
    """What a step is taken on.

    Attributes:
        name: of a `fastjepa` encoder. patch, pixels: of its square images. batch: images.
        predictor: its width and depth; heads are the encoder's, as in the published code.
        sizes: keywords of the encoder that replace the name's.
        bf16: autocast, else fp32. settings: of ours. official: a checkout of the published code.
    """

    name: str = "vit_small"
    patch: int = 16
    pixels: int = 224
    batch: int = 16
    predictor: tuple[int, int] = (384, 6)
    sizes: dict[str, int] = field(default_factory=dict)
    bf16: bool = False
    settings: Settings = PLAIN
    device: torch.device = field(default_factory=here)
    official: Path | None = None

    def model(self) -> IJEPA:
        """Encoder and predictor, the same weights at every call.

        Raises:
            ValueError: sizes that do not go together.
        """
        torch.manual_seed(0)
        width, depth = self.predictor
        with self.device:
            encoder = getattr(fastjepa, self.name)(patch_size=self.patch, img_size=[self.pixels], **self.sizes)
            predictor = fastjepa.vit_predictor(
                num_patches=encoder.patch_embed.num_patches,
                embed_dim=encoder.embed_dim,
                predictor_embed_dim=width,
                depth=depth,
                num_heads=encoder.num_heads,
            )
        model = IJEPA(encoder, predictor)
        set_narrow_stream(model, self.settings.narrow_stream)
        set_activation_checkpointing(model, self.settings.activation_checkpointing)
        return model

    def masks(self, count: int, seed: int, ragged: bool) -> tuple[Any, Any]:
        """(masks_enc, masks_pred) of `count` images with the published settings, on the CPU."""
        collator = MaskCollator((self.pixels, self.pixels), self.patch, **SETTINGS, ragged=ragged)
        return collator.sample(count, [0, seed])

    def images(self, count: int) -> Tensor:
        """Normal pixels, on the device."""
        return torch.randn(count, 3, self.pixels, self.pixels, device=self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its batch, and which rows."""
    parser.add_argument("--model", default="vit_small", choices=ENCODERS, metavar="NAME", help=", ".join(ENCODERS))
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--crop-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, help="images; default: 128 on a GPU, 16 elsewhere")
    parser.add_argument("--pred-emb-dim", type=int, default=384)
    parser.add_argument("--pred-depth", type=int, help="default: 12 from vit_large on, 6 below, as published")
    parser.add_argument("--steps", type=int, default=8, help="timed, after the warm-up")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 (autocast) on a GPU, fp32 elsewhere")
    add_rows(parser, ROWS, f"default: {', '.join(USUAL)}, and on a GPU those from graphs; eager is always there")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of the published code, as one row")


def add_rows(parser: argparse.ArgumentParser, rows: Sequence[str], default: str) -> None:
    """Which rows."""
    parser.add_argument(
        "--row", action="append", choices=rows, metavar="ROW", help=f"one of {'; '.join(rows)}; {default}"
    )


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each way to take the step.

    Raises:
        ValueError: sizes that do not go together, or a count below one.
    """
    for name in ("patch_size", "crop_size", "batch_size", "steps", "pred_depth", "pred_emb_dim"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.official:
        require_checkout(arguments.official)
    device = here()
    deep = arguments.model in ("vit_large", "vit_huge", "vit_giant")
    work = Work(
        arguments.model,
        arguments.patch_size,
        arguments.crop_size,
        arguments.batch_size or (128 if device.type == "cuda" else 16),
        (arguments.pred_emb_dim, arguments.pred_depth or (12 if deep else 6)),
        bf16=arguments.dtype == "bf16" or (arguments.dtype is None and device.type == "cuda"),
        device=device,
        official=arguments.official,
    )
    wanted = arguments.row or [row for row in ROWS if row in USUAL or (_is_graphs(row) and device.type == "cuda")]
    if arguments.official:
        wanted = [*wanted, "official"]
    return measure(work, arguments.steps, ["eager", *(row for row in ROWS[1:] if row in wanted)])


def table(rows: list[dict]) -> str:
    """For a person to read; times in milliseconds, memory in GiB."""
    shown = []
    for row in rows:
        line = {key: row[key] for key in ("row", "model", "batch", "dtype")}
        if "ms" not in row:
            line["ms"] = row.get("absent") or f"WRONG: {row['wrong']}"
        else:
            line |= {"ms": f"{row['ms']:.1f} +- {row['spread_ms']:.1f}", "images/s": row["images_per_second"]}
            line["context tokens/s"] = row["context_tokens_per_second"]
            line["MFU"] = row["mfu"]
            line["of matmul rate"] = row["of_matmul_rate"]
            line["peak GiB"] = row["peak_memory_bytes"] and row["peak_memory_bytes"] / 2**30
            line["J/1000 images"] = row["joules_per_1000_images"]
            line |= {f"{part} ms": row["parts_ms"].get(part) for part in PARTS}
            line["eager/this"] = row["eager_over_this"]
        shown.append({key: value for key, value in line.items() if value is not None})
    return columns(shown)


def faults(rows: list[dict], arguments: argparse.Namespace) -> list[str]:
    """The rows whose numbers are wrong."""
    return [f"{row['row']}: {row['wrong']}" for row in rows if "wrong" in row]


def measure(work: Work, steps: int, names: list[str]) -> list[dict]:
    """The rows of these names, eager the first: it is the yardstick of the others' errors.

    On the CPU, where the machine's speed drifts, the ways take their steps in turn; on a GPU one way after another, so
    that each has the memory for itself.
    """
    exact, rows, allowed = exact_gradients(work), [], {}
    together = work.device.type != "cuda"
    for group in [names] if together else [[name] for name in names]:
        timed = []
        for name in group:
            row = _common(work, name, steps)
            rows.append(row)
            way = _checked(work, row, exact, allowed)
            if way is not None:
                timed.append((row, way))
        _time(work, steps, timed)
        del timed, way
        gc.collect()
        if not together:
            torch.cuda.empty_cache()
    laps = {row["row"]: row.pop("laps") for row in rows if "laps" in row}
    for row in rows:
        if row["row"] in laps and "eager" in laps:
            pairs = zip(laps["eager"], laps[row["row"]], strict=True)
            row["eager_over_this"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return rows


def build(work: Work, name: str) -> Way:
    """The way of a row.

    Raises:
        ValueError: no checkout for the row official, or graphs without a GPU.
    """
    if _is_graphs(name) and work.device.type != "cuda":
        raise ValueError(f"the row {name} needs a GPU")
    if name not in FASTS:
        work, name = replace(work, settings=Settings.of_row(name)), name.partition(", ")[0]
    model = work.model()
    if name == "eager":
        return Eager(naive_models(model), work.bf16)
    if name == "compiled":
        return Compiled(naive_models(model, plain=False), work.bf16)
    if name == "official":
        if work.official is None:
            raise ValueError("the row official needs --official FOLDER, a checkout of the published code")
        return official(work.official, work.name, model, work.bf16)
    way = FASTS[name](model, work.bf16)
    way.parts = work.settings.accumulate
    return way


def in_equal_parts(work: Work, name: str) -> bool:
    """Whether the images of a batch can be taken as a row has it."""
    return work.batch % Settings.of_row(name).accumulate == 0


def is_ragged(name: str) -> bool:
    """Whether the way of a row takes `Ragged` masks."""
    return name.startswith("fastjepa ragged")


def _is_graphs(name: str) -> bool:
    return name.endswith(GRAPHS)


def exact_gradients(work: Work) -> tuple[float, list[Tensor]]:
    """(loss, gradients on the CPU) of the eager models in fp64 on the batch that every way is checked on.

    A few images at a time; masks cut to the shortest are all of one length, so that the batch's loss is their mean.
    """
    way = Eager(naive_models(work.model().double()))
    images, masks = _check_batch(work)
    total, count = 0.0, 0
    for start in range(0, work.batch, FEW):
        some = slice(start, start + FEW)
        part = images[some].double()
        inputs = way.inputs([m[some] for m in masks[0]], [m[some] for m in masks[1]], len(part))
        loss = way.loss(part, *inputs) * (len(part) / work.batch)
        way.backward(loss)
        total, count = total + loss.item(), count + len(part)
    assert count == work.batch
    return total, way.gradients()


def errors(work: Work, way: Way, exact: tuple[float, list[Tensor]]) -> dict[str, float]:
    """How far a way's loss and gradients are from the exact ones, relative; its gradients are gone afterwards.

    A ragged row takes the same cut masks in its own form, so that it is held to the same numbers.
    """
    images, masks = _check_batch(work)
    inputs = way.inputs(_form(masks[0], way.ragged), _form(masks[1], way.ragged), work.batch)
    loss = way.take(images, inputs, lambda part: None)
    found, (want, wanted) = way.gradients(), exact
    for model in way.models:
        model.zero_grad()
    if len(found) != len(wanted):
        return {"loss": abs(loss.item() / want - 1), "gradients": float("inf")}
    distance = sum((a.double() - b).square().sum().item() for a, b in zip(found, wanted, strict=True))
    norm = sum(b.square().sum().item() for b in wanted)
    return {"loss": abs(loss.item() / want - 1), "gradients": (distance / norm) ** 0.5}


def replay_error(work: Work, way: FastGraphs) -> float:
    """How far the loss of a way's third step, from a graph, is from that of the same way launched, relative.

    The first step of its shapes is launched and captured; weights are moved by all of them.
    """
    other = FASTS[way.name.removesuffix(GRAPHS)](work.model(), work.bf16)
    losses = []
    for one in (way, other):
        for step in range(3):
            torch.manual_seed(step)
            masks = work.masks(work.batch, 0, way.ragged)
            loss, _ = take_step(one, work.images(work.batch), one.inputs(*masks, work.batch), MOMENTUM)
        losses.append(loss.item())
    return abs(losses[0] / losses[1] - 1)


def _checked(work: Work, row: dict, exact: tuple[float, list[Tensor]], allowed: dict[str, float]) -> Way | None:
    """The way of a row if it can run and its numbers are right; else the row says why there will be no time.

    The first row, eager, sets what is allowed: twice its own distance from fp64. Where that fails, nothing is timed.
    """
    if row["row"] != "eager" and not allowed:
        row["absent"] = "eager fails, whose error is the yardstick of all rows' errors; fewer images may help"
        return None
    if not in_equal_parts(work, row["row"]):
        row["absent"] = f"{work.batch} images cannot be taken in equal parts"
        return None
    try:
        way = build(work, row["row"])
        found = errors(work, way, exact)
        if isinstance(way, FastGraphs):
            found["graphs"] = replay_error(work, way)
    except (ImportError, RuntimeError) as error:  # no compiler, not enough memory: the other rows stand
        row["absent"] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:120]
        return None
    row |= {f"{key}_error": value for key, value in found.items()}
    if row["row"] == "eager":
        allowed |= {key: max(2 * value, UNIT[work.bf16]) for key, value in found.items()}
        allowed["graphs"] = allowed["loss"]
    over = [f"its {key} is {value:.1e} from fp64, {allowed[key]:.1e} allowed"
            for key, value in found.items() if not value <= allowed[key]]  # fmt: skip
    if over:
        row["wrong"] = "; ".join(over)
    return None if over else way


def _check_batch(work: Work) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
    torch.manual_seed(1)
    return work.images(work.batch), work.masks(work.batch, 0, ragged=False)


def _form(masks: list[Tensor], ragged: bool) -> list[Tensor] | Ragged:
    """Lists as they are, or as `Ragged`: image by image, its masks one after another."""
    if not ragged:
        return masks
    stacked = torch.stack(masks, dim=1)  # [B, n, K]
    return Ragged.from_list(list(stacked.flatten(0, 1)), len(masks))


def _common(work: Work, name: str, steps: int) -> dict[str, Any]:
    """What a row says before anything was timed."""
    masks_enc, masks_pred = work.masks(work.batch, 0, is_ragged(name))
    del masks_enc
    return {
        "row": name,
        "model": f"{work.name}/{work.patch}",
        "pixels": work.pixels,
        "batch": work.batch,
        "dtype": "bf16" if work.bf16 else "fp32",
        "predictor_width": work.predictor[0],
        "predictor_depth": work.predictor[1],
        "npred": masks_pred.per_image if isinstance(masks_pred, Ragged) else len(masks_pred),
        "steps": steps,
    }


def _batches(work: Work, steps: int, ragged: bool) -> Iterator[tuple[Masks, Masks]]:
    """Masks of the warm-up's steps and the timed ones, on the CPU."""
    for number in range(steps + WARMUP):
        yield work.masks(work.batch, 1 + number, ragged)


def _time(work: Work, steps: int, timed: list[tuple[dict, Way]]) -> None:
    """Time these ways in turn and put what came of it into their rows."""
    ways = [way for _, way in timed]
    batches = {ragged: list(_batches(work, steps, ragged)) for ragged in {way.ragged for way in ways}}
    laps: list[list[Laps]] = [[] for _ in ways]
    for way in ways:  # a graph is made of the first step of its shapes, and a run takes thousands of them
        for masks in batches[way.ragged] if isinstance(way, FastGraphs) else ():
            take_step(way, work.images(work.batch), way.inputs(*masks, work.batch), MOMENTUM)
    energy: list[float | None] = [None] * len(ways)
    speeds: list[list[int]] = [[] for _ in ways]
    for number in range(steps + WARMUP):
        images = work.images(work.batch)
        Roofs.of(work.device).look()  # a processor's speed drifts, and the steps are compared with its roofs
        for place, way in enumerate(ways):
            inputs = way.inputs(*batches[way.ragged][number], work.batch)
            if number == WARMUP:
                energy[place] = joules(work.device)
            _, lap = take_step(way, images, inputs, MOMENTUM)
            if number >= WARMUP:
                laps[place].append(lap)
                if now := clocks(work.device):
                    speeds[place].append(now["sm"])
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    used = joules(work.device)
    for place, (row, way) in enumerate(timed):
        before = energy[place]
        row["sm_clock_mhz"] = statistics.median(speeds[place]) if speeds[place] else None
        row["joules_per_1000_images"] = (
            None if used is None or before is None else 1000 * (used - before) / (steps * work.batch)
        )
        inputs = way.inputs(*batches[way.ragged][0], work.batch)
        row["peak_memory_bytes"] = peak_bytes(way, work.images(work.batch), inputs, MOMENTUM)
        _fill(work, row, [lap.seconds() for lap in laps[place]], batches[way.ragged][WARMUP:])


def _fill(work: Work, row: dict, laps: list[dict[str, float]], batches: list[tuple[Masks, Masks]]) -> None:
    """Times, rates and shares of a row from its steps: the median step, and each part's mean as tokens are a mean."""
    whole = [sum(seconds.values()) for seconds in laps]
    median = statistics.median(whole)
    flops = step_flops(replace(work, device=torch.device("meta")).model())
    counted = statistics.mean(flops(work.batch, *masks) for masks in batches)
    contexts = statistics.mean(_tokens(masks_enc) for masks_enc, _ in batches)
    targets = statistics.mean(_tokens(masks_pred) for _, masks_pred in batches)
    chip = chip_of(work.device)
    row |= {
        "laps": whole,
        "ms": 1e3 * median,
        "spread_ms": 1e3 * spread(whole),
        "images_per_second": work.batch / median,
        "context_tokens": contexts / work.batch,
        "target_tokens": targets / work.batch / row["npred"],
        "context_tokens_per_second": contexts / median,
        "flops_per_image": counted / work.batch,
        "mfu": counted / median / chip.flops if chip else None,
        "of_matmul_rate": counted / median / matmul_rate(work.device),
        "parts_ms": {} if "step" in laps[0] else {p: 1e3 * statistics.mean(lap[p] for lap in laps) for p in PARTS},
    }


def _tokens(masks: Masks) -> int:
    return len(masks.values) if isinstance(masks, Ragged) else sum(m.numel() for m in masks)
