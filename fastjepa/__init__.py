"""fastjepa: I-JEPA pretraining, faster, with the official numbers."""

from fastjepa import ops
from fastjepa.checkpoint import read_checkpoint
from fastjepa.masks import MaskCollator, apply_masks
from fastjepa.nn import (
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
from fastjepa.patch import PatchReport, patch, patch_gathers, unpatch
from fastjepa.ragged import Ragged

__version__ = "0.1.0"

__all__ = [
    "IJEPA",
    "MaskCollator",
    "PatchReport",
    "Ragged",
    "VisionTransformer",
    "VisionTransformerPredictor",
    "apply_masks",
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
