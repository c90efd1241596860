"""Modules: the models of I-JEPA and the pieces they are made of."""

from fastjepa.nn.block import MLP, Block
from fastjepa.nn.linear import Linear, keep_copies, set_fp8
from fastjepa.nn.patch_embed import PatchEmbed
from fastjepa.nn.predictor import VisionTransformerPredictor, vit_predictor
from fastjepa.nn.ragged_attention import RaggedAttention, set_attention_backend
from fastjepa.nn.stack import set_activation_checkpointing, set_narrow_stream
from fastjepa.nn.vision_transformer import (
    VisionTransformer,
    vit_base,
    vit_giant,
    vit_huge,
    vit_large,
    vit_small,
    vit_tiny,
)

__all__ = [
    "MLP",
    "Block",
    "Linear",
    "PatchEmbed",
    "RaggedAttention",
    "VisionTransformer",
    "VisionTransformerPredictor",
    "keep_copies",
    "set_activation_checkpointing",
    "set_attention_backend",
    "set_fp8",
    "set_narrow_stream",
    "vit_base",
    "vit_giant",
    "vit_huge",
    "vit_large",
    "vit_predictor",
    "vit_small",
    "vit_tiny",
]
