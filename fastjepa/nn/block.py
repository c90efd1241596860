"""The transformer block: attention and MLP, each behind a LayerNorm and a residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa import ops
from fastjepa.nn.linear import Linear, is_plain
from fastjepa.nn.norm import LayerNorm, add_norm
from fastjepa.nn.ragged_attention import RaggedAttention
from fastjepa.ops import library


class MLP(nn.Module):
    """Linear, exact GELU, Linear. Shapes: [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token on its own."""
        fc1, fc2, drop = self.fc1, self.fc2, self.drop
        if library.takes_kernels(x) and is_plain(fc1, Linear) and fc1.bias is not None and is_exact_gelu(self.act):
            return drop(fc2(drop(ops.bias_gelu(fc1.product(x), fc1.bias))))
        return drop(fc2(drop(self.act(fc1(x)))))


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether it is the GELU by erf, which nobody hooks."""
    return is_plain(module, nn.GELU) and module.approximate == "none"


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is dropped for whole sequences, in training only.

    Source: Huang et al. 2016 (arXiv 1603.09382).
    """

    def __init__(self, probability: float = 0.0):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, offsets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Shapes: x [T, D] (or [M, D], the tokens `keep` of T), offsets int32 [S + 1] -> x, zero where dropped."""
        if not self.training or self.probability == 0.0:
            return x
        stays = 1.0 - self.probability
        factor = torch.empty(offsets.shape[0] - 1, 1, dtype=x.dtype, device=x.device).bernoulli_(stays)
        if stays > 0.0:
            factor = factor / stays
        tokens = torch.arange(x.shape[0], device=x.device) if keep is None else keep
        return x * factor.index_select(0, torch.bucketize(tokens, offsets[1:], right=True))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), over packed sequences.

    Shapes: x [T, D], offsets int32 [S + 1], max_length a host int, keep int64 [M] -> [T, D], or with `keep` [M, D]: the
    output of those tokens alone (all tokens are attended to, but only these are projected and go through the MLP).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = RaggedAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_length: int,
        keep: Tensor | None = None,
        branch: Tensor | None = None,
        deferred: bool = False,
        recompute: bool = False,
    ) -> Any:
        """Apply the block to every sequence on its own.

        `branch` [T, D] is added to x first. With `deferred` the result is (x, branch), yet to be added: the LayerNorm
        that comes next does that in its own pass. With `recompute` the block keeps its inputs for the backward pass,
        and is computed again there: as far as the MLP's hidden numbers, or where its parts are called one by one as far
        as the last that is kept.
        """
        inputs, results = (x, branch, offsets, max_length, keep), None
        if library.takes_kernels(x) and not torch.compiler.is_compiling():
            from fastjepa.nn.fused_block import fused_block

            results = fused_block(self, *inputs, recompute)
        if results is None:
            recompute = recompute and torch.is_grad_enabled()
            results = checkpoint(self._parts, *inputs, use_reentrant=False) if recompute else self._parts(*inputs)
        x, out = results
        return (x, out) if deferred else x + out

    def _parts(
        self, x: Tensor, branch: Tensor | None, offsets: Tensor, max_length: int, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(the stream behind attention, the MLP's branch), part by part."""
        y, x = add_norm(self.norm1, x, branch, for_linear=True)
        attended = self.drop_path(self.attn(y, offsets, max_length, keep), offsets, keep)
        if keep is not None:
            x = ops.take_rows(x, keep)
        y, x = add_norm(self.norm2, x, attended, for_linear=True)
        return x, self.drop_path(self.mlp(y), offsets, keep)
