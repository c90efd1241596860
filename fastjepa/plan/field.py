"""What other methods are published to reach and to cost, each with its source, and what a step of them computes."""

from __future__ import annotations

from dataclasses import dataclass

from fastjepa.flops import Flops, Tower

KEPT = 0.25  # of the patches, that MAE's encoder sees
DECODER = Tower(512, 8)  # MAE's
HIDDEN = 0.6  # of the patches, whose features data2vec's student predicts
CROPS, CROP = 10, 96  # small crops of DINO and iBOT beside two of 224 pixels, and their side in pixels


@dataclass(frozen=True)
class Published:
    """A pretrained model as its authors publish it.

    Attributes:
        linear: top-1 of a linear probe on ImageNet-1k in percent. low_shot: with 1 % of its labels. hours: GPU hours of
            the pretraining. None where the source does not say. source: of all three.
    """

    method: str
    model: str
    data: str
    epochs: int | None
    linear: float | None
    low_shot: float | None
    hours: str | None
    source: str


_JEPA = "Assran et al. 2023 (arXiv 2301.08243)"
_MAE = "github.com/facebookresearch/mae, FINETUNE.md and PRETRAIN.md (He et al. 2021, arXiv 2111.06377)"
_CAE = "github.com/Atten4Vis/CAE, README (Chen et al. 2022, arXiv 2202.03026)"
_IBOT = "github.com/bytedance/ibot, README (Zhou et al. 2021, arXiv 2111.07832)"
_DINO = "github.com/facebookresearch/dino, README (Caron et al. 2021, arXiv 2104.14294)"
_DINOV2 = "github.com/facebookresearch/dinov2, README and MODEL_CARD.md (Oquab et al. 2023, arXiv 2304.07193)"
_DINOV3 = "github.com/facebookresearch/dinov3, MODEL_CARD.md; the probe: Siméoni et al. 2025 (arXiv 2508.10104)"
IN1K = "ImageNet-1k"

FIELD = (
    Published("I-JEPA", "ViT-B/16", IN1K, 600, 72.9, None, None, _JEPA),
    Published("I-JEPA", "ViT-L/16", IN1K, 600, 77.5, None, None, _JEPA),
    Published("I-JEPA", "ViT-H/14", IN1K, 300, 79.3, 73.3, "under 1,152 A100", _JEPA),
    Published("I-JEPA", "ViT-H/16, 448 px", IN1K, 300, 81.1, 77.3, None, _JEPA),
    Published("MAE", "ViT-B/16", IN1K, 1600, 67.8, None, None, _MAE),
    Published("MAE", "ViT-L/16", IN1K, 1600, 76.0, None, "about 2,688 V100 for 800 epochs", _MAE),
    Published("MAE", "ViT-H/14", IN1K, 1600, 77.2, None, None, _MAE),
    Published("data2vec", "ViT-L/16", IN1K, 1600, 77.3, 73.3, None, f"{_JEPA}, tables 1 and 2"),
    Published("CAE", "ViT-B/16", IN1K, 1600, 70.3, None, None, _CAE),
    Published("CAE", "ViT-L/16", IN1K, 1600, 77.8, None, None, _CAE),
    Published("DINO", "ViT-B/8", IN1K, None, 80.1, None, None, _DINO),
    Published("iBOT", "ViT-B/16", IN1K, None, 79.5, None, None, _IBOT),
    Published("iBOT", "ViT-L/16", IN1K, None, 81.0, None, None, _IBOT),
    Published("DINOv2", "ViT-g/14", "142 M pictures", None, 86.5, None, "22,000 A100", _DINOV2),
    Published("DINOv3", "ViT-7B/16", "1,689 M pictures", None, 88.4, None, "61,440 H100", _DINOV3),
)


def flops_per_image(encoder: Tower, patch_values: int, patches: int) -> dict[str, float]:
    """FLOPs of a training step on one image, other methods with this encoder on the same picture, by method.

    Backward counts twice the forward. MAE: the encoder on a quarter of the patches, a decoder of 8 layers and width 512
    on all, trained both. data2vec: a teacher forward, the student on all patches, and a linear head for 60 % of them.
    iBOT: a teacher on two whole pictures, the student on these and on ten of 96 pixels; without its heads, which come
    on top. A class token is left out of all of them.

    Sources: He et al. 2021 (arXiv 2111.06377); Baevski et al. 2022 (arXiv 2202.03555); Zhou et al. 2021 (2111.07832).
    """

    def encoded(count: float) -> Flops:
        return encoder.forward(count, count**2) + Flops(2.0 * patch_values * encoder.width * count)

    kept = int(KEPT * patches)
    decoded = DECODER.forward(patches, patches**2)
    decoded += Flops(2.0 * DECODER.width * (encoder.width * kept + patch_values * (patches - kept)))
    head = Flops(2.0 * encoder.width**2 * int(HIDDEN * patches))
    small = patches * (CROP / 224) ** 2
    return {
        "MAE": 3.0 * (encoded(kept) + decoded).total,
        "data2vec": (encoded(patches) + (encoded(patches) + head) * 3.0).total,
        "iBOT": (encoded(patches) * 2.0 + (encoded(patches) * 2.0 + encoded(small) * CROPS) * 3.0).total,
    }


def field_table() -> str:
    """The published models in Markdown, a row each, sources below."""
    sources = list(dict.fromkeys(p.source for p in FIELD))
    heads = ["method", "encoder", "pretrained on", "epochs", "linear, %", "1 % of labels, %", "GPU hours", "source"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for p in FIELD:
        cells = (p.epochs, p.linear, p.low_shot, p.hours)
        shown = ["not said" if cell is None else str(cell) for cell in cells]
        row = [p.method, p.model, p.data, *shown, f"[{1 + sources.index(p.source)}]"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"{number}. {source}" for number, source in enumerate(sources, 1))])
