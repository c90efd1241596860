"""LayerNorm, alone or with the residual addition before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastjepa import ops
from fastjepa.ops import library
from fastjepa.ops.rows import linear_dtype, sum_dtype


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, in one pass with the residual addition before it where it has one.

    Shapes: x [..., D] -> y [..., D]; with `residual` [T, D] and x [T, D] -> (y, x + residual).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, for_linear: bool = False) -> Any:
        """Normalise x, or x + residual.

        `for_linear`: y is what a linear map takes next, so that under autocast it comes in autocast's dtype, the value
        that the linear would round it to. Otherwise it has the dtype of what is normalised.
        """
        dtype = sum_dtype(x, residual)
        out_dtype = linear_dtype(x.device, dtype) if for_linear else dtype
        narrow = self.weight is not None and self.weight.dtype != x.dtype  # as FSDP gathers it
        if residual is None and not library.takes_kernels(x) and not narrow:
            y = super().forward(x)
            return y.to(out_dtype) if for_linear else y
        flat = x.flatten(0, -2)
        y, total = ops.add_layer_norm(flat, residual, self.weight, self.bias, self.eps, out_dtype)
        return y.view(x.shape) if residual is None else (y, total)


def add_norm(norm: nn.Module, x: Tensor, branch: Tensor | None, for_linear: bool = False) -> tuple[Tensor, Tensor]:
    """(norm(x + branch), x + branch), in one pass where norm is our `LayerNorm`; without a branch of x alone."""
    if not isinstance(norm, LayerNorm):
        x = x if branch is None else x + branch
        return norm(x), x
    if branch is None:
        return norm(x, for_linear=for_linear), x
    return norm(branch, x, for_linear)
