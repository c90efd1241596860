"""The operations of I-JEPA as functions: validated, differentiable, one meaning on every device."""

from fastjepa.ops.attention import ATTENTION_BACKENDS, attention_backend, check_backend, ragged_attention
from fastjepa.ops.backends import backends
from fastjepa.ops.ema import ema_update_
from fastjepa.ops.fp8 import quantise_rows, quantised_linear
from fastjepa.ops.gather import assemble_predictor, gather_tokens, scatter_tokens, take_rows
from fastjepa.ops.loss import jepa_loss
from fastjepa.ops.rows import add_layer_norm, bias_gelu

__all__ = [
    "ATTENTION_BACKENDS",
    "add_layer_norm",
    "assemble_predictor",
    "attention_backend",
    "backends",
    "bias_gelu",
    "check_backend",
    "ema_update_",
    "gather_tokens",
    "jepa_loss",
    "quantise_rows",
    "quantised_linear",
    "ragged_attention",
    "scatter_tokens",
    "take_rows",
]
