"""Everything that the planner takes for granted where nothing was measured: one table, each line with where it is from.

Efficiencies are no free numbers: each is what a published throughput comes to by the planner's own count of FLOPs and
bytes, as one fraction of the roof for all parts of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fastjepa.chips import chip
from fastjepa.config import parse_config
from fastjepa.flops import Tokens
from fastjepa.plan.cost import Step
from fastjepa.plan.layers import AUTOCAST, BF16
from fastjepa.plan.work import Batch, Models, draw


@dataclass(frozen=True)
class Assumption:
    """A number, and where it is from."""

    value: float
    source: str


PUBLISHED_HOURS = Assumption(
    72.0, "hours or less of ViT-H/14, 300 epochs of ImageNet on 16 A100 (Assran et al. 2023, arXiv 2301.08243)"
)
_GUIDE = "images a second, a ViT-g/14 in NVIDIA NeMo, 64 images a GPU (NeMo Framework User Guide, ViT, Performance)"
NEMO = {"a100-80g": Assumption(693.0, f"eight A100: {_GUIDE}"), "h100": Assumption(1428.0, f"eight H100: {_GUIDE}")}
# Whose published fraction a chip takes: of the same architecture where there is one, else the nearest older.
LIKE = {"a100-80g": "a100-80g", "a100-40g": "a100-80g", "h100": "h100", "h200": "h100", "b200": "h100",
        "l40s": "a100-80g", "4090": "a100-80g"}  # fmt: skip

# Bytes a second that leave a node of eight GPUs, each way.
NETWORK = {
    name: Assumption(value, source)
    for names, value, source in (
        (("a100-80g", "a100-40g"), 200e9, "DGX A100: eight ports of 200 Gbit/s"),
        (("h100", "h200", "b200"), 400e9, "DGX H100 and DGX B200: eight ports of 400 Gbit/s"),
        (("l40s", "4090"), 25e9, "one port of 200 Gbit/s"),
    )
    for name in names
}
LINK_SHARE = Assumption(
    0.75,
    "of a link's bytes a second that an all-reduce reaches: 200 of 300 GB/s among eight A100, 85 of 100 between nodes, "
    "as users report (nccl-tests, issues 149 and 119)",
)
BUCKET = Assumption(25 << 20, "bytes whose all-reduce no backward pass hides: DistributedDataParallel's bucket size")
BACKWARD_SHARE = Assumption(2 / 3, "of the context encoder's time is its backward pass, as of its FLOPs")
LAUNCH = Assumption(
    45e-6,
    "seconds of a core for each launch of a step of ours: `python -m benchmarks host` on an Intel Xeon, "
    "steps of three models over their launches by count",
)
USABLE = Assumption(0.92, "of a GPU's memory: CUDA itself, the allocator's gaps and NCCL's buffers take the rest")
FILE_BYTES = Assumption(
    115_440, "bytes of a picture: the 147.9 GB of ImageNet's training archive over its 1,281,167 files"
)
IMAGES_PER_CORE = Assumption(440.0, "pictures a second that a server core reads, crops and resizes with Pillow")
ASSUMPTIONS = (
    PUBLISHED_HOURS,
    *NEMO.values(),
    LINK_SHARE,
    BUCKET,
    BACKWARD_SHARE,
    LAUNCH,
    USABLE,
    FILE_BYTES,
    IMAGES_PER_CORE,
)


@dataclass(frozen=True)
class Fraction:
    """Of the roof, and the sentence that says what it rests on."""

    value: float
    source: str


def fraction(implementation: str, chip_name: str) -> Fraction:
    """What a whole step reaches of the roof, from what is published of another or an equal one."""
    like = LIKE[chip_name]
    carried = "" if like == chip_name else f"; carried over to {chip_name}"
    nemo = _nemo(like)
    if implementation == "eager":
        ours, source = _official(), f"published: {PUBLISHED_HOURS.value:.0f} {PUBLISHED_HOURS.source}"
        if like != "a100-80g":
            ours *= nemo / _nemo("a100-80g")
            carried = f"; carried over to {chip_name} in the ratio of what NeMo reaches on a100-80g and {like}"
        return Fraction(ours, f"{source}{carried}")
    what = "the compiled step" if implementation == "compiled" else "ours, none of which was timed on a GPU,"
    return Fraction(
        nemo,
        f"assumed: {what} reaches the share of the roof of {NEMO[like].value:.0f} {_GUIDE}, on eight {like}{carried}",
    )


@cache
def _official() -> float:
    """Of an A100's roof, by the published hours."""
    config = parse_config(
        {"data": {"root_path": "."}, "logging": {"folder": "."}, "mask": {"patch_size": 14}, "meta": {}}
    )
    batch_size, gpus, images = config.data.batch_size, 16, 1_281_167
    steps = config.optimization.epochs * (images // (batch_size * gpus))
    step = Step(Models.build(config), draw(config, batch_size, ragged=False).mean, "eager", AUTOCAST)
    a100 = chip("a100-80g")
    roof = sum(cost.seconds(a100.flops, a100.bandwidth) for cost in step.costs().values())
    return roof * steps / (3600 * PUBLISHED_HOURS.value)


@cache
def _nemo(chip_name: str) -> float:
    """Of a chip's roof: an encoder of whole images, forward and backward in bf16, and its AdamW."""
    config = parse_config(
        {
            "data": {"root_path": "."},
            "logging": {"folder": "."},
            "mask": {"patch_size": 14},
            "meta": {"model_name": "vit_giant", "pred_depth": 1},
        }
    )
    models, images = Models.build(config), 64
    length = models.flops.num_patches
    tokens = Tokens(images, images * length, 0, 0, 0, images * length**2, 0)
    cost = Step(models, Batch(tokens, 0), "compiled", BF16).costs()["context"]
    found, adamw = chip(chip_name), 28 * models.encoder_parameters
    roof = cost.seconds(found.flops, found.bandwidth) + adamw / found.bandwidth
    return roof * NEMO[chip_name].value / 8 / images
