"""LayerNorm, alone or with the residual addition before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastjepa import ops
from fastjepa.ops import library


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, in one pass with the residual addition before it where it has one.

    Shapes: x [..., D] -> y [..., D]; with `residual` [T, D] and x [T, D] -> (y, x + residual).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise x, or x + residual."""
        if residual is None and not library.takes_kernels(x):
            return super().forward(x)
        flat = x.flatten(0, -2)
        y, total = ops.add_layer_norm(flat, residual, self.weight, self.bias, self.eps)
        return y.view(x.shape) if residual is None else (y, total)
