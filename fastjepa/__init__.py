"""fastjepa: I-JEPA pretraining, faster, with the official numbers."""

from fastjepa import ops
from fastjepa.checkpoint import read_checkpoint
from fastjepa.ema import EMA
from fastjepa.masks import MaskCollator, apply_masks
from fastjepa.nn import (
    RaggedAttention,
    VisionTransformer,
    VisionTransformerPredictor,
    vit_base,
    vit_giant,
    vit_huge,
    vit_large,
    vit_predictor,
    vit_small,
    vit_tiny,
)
from fastjepa.objective import IJEPA
from fastjepa.optim import AdamWEMA
from fastjepa.pairing import TargetRows
from fastjepa.patch import PatchReport, patch, patch_gathers, unpatch
from fastjepa.pretrained import load_encoder
from fastjepa.ragged import Ragged

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "IJEPA",
    "AdamWEMA",
    "MaskCollator",
    "PatchReport",
    "Ragged",
    "RaggedAttention",
    "TargetRows",
    "VisionTransformer",
    "VisionTransformerPredictor",
    "apply_masks",
    "load_encoder",
    "ops",
    "patch",
    "patch_gathers",
    "read_checkpoint",
    "unpatch",
    "vit_base",
    "vit_giant",
    "vit_huge",
    "vit_large",
    "vit_predictor",
    "vit_small",
    "vit_tiny",
]
