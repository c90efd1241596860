"""Attention over packed sequences: context, predictor and target of a training step, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operations import Operation, Sizes, both, compiled, exactly, offsets_of
from benchmarks.peers import peers
from fastjepa import ops
from fastjepa.kernels.attention import attention_cost
from fastjepa.kernels.reference import ragged_attention_ref

Attend = Callable[[Tensor], Tensor]  # qkv [T, 3, H, d] -> [T, H, d]


def operations(sizes: Sizes) -> list[Operation]:
    """Forward and backward on contexts and on the predictor's sequences; forward on whole images."""
    torch.manual_seed(0)
    context = sizes.lengths(sizes.context, sizes.spread, sizes.images)
    pairs = [n + sizes.target for n in context for _ in range(4)]
    return [
        _operation(sizes, "context", context, sizes.heads, sizes.width, True),
        _operation(sizes, "predictor", pairs, sizes.predictor_heads, sizes.predictor_width, True),
        _operation(sizes, "target", [sizes.patches] * sizes.images, sizes.heads, sizes.width, False),
    ]


def _operation(sizes: Sizes, what: str, lengths: list[int], heads: int, width: int, backward: bool) -> Operation:
    head_dim, packed = width // heads, Packed(lengths, offsets_of(lengths, sizes.device))
    qkv = sizes.randn(packed.total, 3, heads, head_dim)
    upstream = [sizes.randn(packed.total, heads, head_dim)] if backward else []
    directions = (False, True) if backward else (False,)
    cost = both(*(attention_cost(lengths, heads, head_dim, qkv.element_size(), back) for back in directions))
    found = {
        "torch SDPA": lambda: packed.padded,
        "eager, as published": lambda: packed.eager,
        "torch.compile": lambda: compiled(packed.eager),
        "torch SDPA flash, padded": lambda: _forced(packed.padded, SDPBackend.FLASH_ATTENTION),
        "torch SDPA flash, nested": lambda: _forced(packed.nested, SDPBackend.FLASH_ATTENTION),
        "torch SDPA cuDNN, padded": lambda: _forced(packed.padded, SDPBackend.CUDNN_ATTENTION),
        "torch SDPA cuDNN, nested": lambda: _forced(packed.nested, SDPBackend.CUDNN_ATTENTION),
        "torch SDPA efficient, padded": lambda: _forced(packed.padded, SDPBackend.EFFICIENT_ATTENTION),
        "torch SDPA efficient, nested": lambda: _forced(packed.nested, SDPBackend.EFFICIENT_ATTENTION),
        "torch SDPA math, padded": lambda: _forced(packed.padded, SDPBackend.MATH),
        "torch nested tensors": lambda: packed.nested,
        "torch varlen": packed.varlen,
        "torch FlexAttention": lambda: packed.flex(kept=False),
        "torch FlexAttention, mask kept": lambda: packed.flex(kept=True),
        "flash-attn 2": packed.flash2,
        "flash-attn 3": packed.flash3,
        "flash-attn 4": packed.flash4,
        "xformers": packed.xformers,
        "fastjepa": lambda: lambda qkv: ops.ragged_attention(qkv, packed.offsets, packed.longest),
    }
    exact = exactly(packed.padded, [qkv], upstream)
    mean = packed.total / len(lengths)
    case = f"{what}: {len(lengths)} sequences of {mean:.0f}, {heads} heads of {head_dim}"
    name = "attention fwd+bwd" if backward else "attention fwd"
    return Operation(name, case, cost, exact, peers(found, [qkv], upstream))


def _forced(attend: Attend, backend: SDPBackend) -> Attend:
    """With one backend of scaled_dot_product_attention; torch raises where it does not take the inputs."""

    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(qkv)

    return run


@dataclass(frozen=True)
class Packed:
    """Sequences packed back to back, and the ways that others attend within each of them.

    Those that import give the function when they are called; the others are the function.
    """

    lengths: list[int]
    offsets: Tensor

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    def padded(self, qkv: Tensor) -> Tensor:
        """Padded to the longest and masked, or a plain batch where all are equally long; backend as torch likes."""
        return ragged_attention_ref(qkv, self.offsets, self.longest)

    def eager(self, qkv: Tensor) -> Tensor:
        """Padded to the longest, the weights written out, their softmax in fp32, as under autocast."""
        head_dim = qkv.shape[3]
        steps = torch.arange(self.longest, device=qkv.device)
        valid = steps < self.offsets.diff().view(-1, 1)  # [S, L]
        places = (self.offsets[:-1].view(-1, 1) + steps).clamp(max=self.total - 1)
        q, k, v = qkv[places].permute(2, 0, 3, 1, 4).unbind(0)  # [S, H, L, d]
        scores = (q @ k.transpose(2, 3) * head_dim**-0.5).masked_fill(~valid[:, None, None, :], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return (weights @ v).transpose(1, 2)[valid]

    def nested(self, qkv: Tensor) -> Tensor:
        """As nested (jagged) tensors, which take contiguous queries, keys and values."""
        shortest, longest = min(self.lengths), self.longest
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x.contiguous(), self.offsets.long(), min_seqlen=shortest, max_seqlen=longest
            ).transpose(1, 2)
            for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    def varlen(self) -> Attend:
        """torch.nn.attention.varlen."""
        from torch.nn.attention.varlen import varlen_attn

        def run(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unbind(1)
            return _first(varlen_attn(q, k, v, self.offsets, self.offsets, self.longest, self.longest))

        return run

    def flex(self, kept: bool) -> Attend:
        """One sequence of all tokens under a block mask; made once if `kept`, else at every call."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend, make = torch.compile(flex_attention), torch.compile(create_block_mask)
        count = torch.arange(self.total, device=self.offsets.device)

        def mask():
            document = torch.searchsorted(self.offsets, count, right=True)
            total, device = self.total, str(self.offsets.device)
            return make(lambda b, h, q, k: document[q] == document[k], None, None, total, total, device=device)

        once = mask() if kept else None

        def run(qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))
            return _first(attend(q, k, v, block_mask=mask() if once is None else once)).squeeze(0).transpose(0, 1)

        return run

    def flash2(self) -> Attend:
        """FlashAttention-2, on packed queries, keys and values."""
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_varlen_qkvpacked_func,
        )

        return lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, self.offsets, self.longest)

    def flash3(self) -> Attend:
        """FlashAttention-3; some versions give the logsumexp with it."""
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

        return lambda qkv: _first(
            flash_attn_varlen_func(*qkv.unbind(1), self.offsets, self.offsets, self.longest, self.longest)
        )

    def flash4(self) -> Attend:
        """FlashAttention-4, which gives the logsumexp with it."""
        from flash_attn.cute import flash_attn_varlen_func  # type: ignore[import-not-found]

        given = {"cu_seqlens_q": self.offsets, "cu_seqlens_k": self.offsets}
        given |= {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
        return lambda qkv: _first(flash_attn_varlen_func(*qkv.unbind(1), **given))

    def xformers(self) -> Attend:
        """One sequence of all tokens under a mask that knows the lengths."""
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # type: ignore[import-not-found]

        mask = BlockDiagonalMask.from_seqlens(self.lengths, device=self.offsets.device)

        def run(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unsqueeze(0).unbind(2)
            return memory_efficient_attention(q, k, v, attn_bias=mask).squeeze(0)

        return run


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_attention(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
