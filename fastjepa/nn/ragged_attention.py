"""Multi-head self-attention over packed sequences."""

from __future__ import annotations

from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.linear import Linear


class RaggedAttention(nn.Module):
    """Self-attention within each packed sequence; parameters named and shaped as the official `Attention`.

    `backend` is that of `ops.ragged_attention`; `set_attention_backend` sets it throughout a model.

    Shapes: x [T, D], offsets int32 [S + 1], max_length a host int, keep int64 [M] -> [T, D], or with `keep` [M, D]: the
    output of those tokens alone.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, offsets: Tensor, max_length: int, keep: Tensor | None = None) -> Tensor:
        """Attend within each sequence."""
        qkv = self.qkv(x)
        qkv = qkv.view(qkv.shape[0], 3, self.num_heads, qkv.shape[1] // (3 * self.num_heads))
        dropout = self.attn_drop if self.training else 0.0
        y = ops.ragged_attention(qkv, offsets, max_length, self.scale, dropout, self.backend)
        y = y.flatten(1)
        return self.proj_drop(self.proj(y if keep is None else ops.take_rows(y, keep)))


def set_attention_backend(model: nn.Module, backend: str) -> int:
    """Have every `RaggedAttention` of one live model take `backend`; gives their number.

    Raises:
        ValueError: a backend that is unknown or not installed; nothing is changed then.

    >>> set_attention_backend(RaggedAttention(16, 2), "sdpa")
    1
    """
    ops.check_backend(backend)
    found = [module for module in model.modules() if isinstance(module, RaggedAttention)]
    for module in found:
        module.backend = backend
    return len(found)
