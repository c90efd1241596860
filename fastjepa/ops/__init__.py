"""The operations of I-JEPA as functions: validated, differentiable, one meaning on every device."""

from fastjepa.ops.attention import ragged_attention
from fastjepa.ops.ema import ema_update_
from fastjepa.ops.gather import assemble_predictor, gather_tokens, scatter_tokens
from fastjepa.ops.loss import jepa_loss

__all__ = ["assemble_predictor", "ema_update_", "gather_tokens", "jepa_loss", "ragged_attention", "scatter_tokens"]
