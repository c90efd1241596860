"""Attention over packed sequences: context, predictor and target of a training step, and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import Operation, Peer, Sizes, exactly, forward, missing, offsets_of, with_gradients
from fastjepa import ops
from fastjepa.kernels.attention import attention_cost
from fastjepa.kernels.launch import Cost
from fastjepa.kernels.reference import ragged_attention_ref


def operations(sizes: Sizes) -> list[Operation]:
    """Forward and backward on contexts and on the predictor's sequences; forward on whole images."""
    context = sizes.lengths(sizes.context, sizes.spread, sizes.images)
    pairs = [n + sizes.target for n in context for _ in range(4)]
    found = [
        _operation(sizes, "context", context, sizes.heads, sizes.width, True),
        _operation(sizes, "predictor", pairs, sizes.predictor_heads, sizes.predictor_width, True),
        _operation(sizes, "target", [sizes.patches] * sizes.images, sizes.heads, sizes.width, False),
    ]
    return found


def _operation(sizes: Sizes, what: str, lengths: list[int], heads: int, width: int, backward: bool) -> Operation:
    head_dim, longest = width // heads, max(lengths)
    qkv = sizes.randn(sum(lengths), 3, heads, head_dim)
    offsets = offsets_of(lengths, sizes.device)
    upstream = [sizes.randn(sum(lengths), heads, head_dim)] if backward else []
    cost = attention_cost(lengths, heads, head_dim, qkv.element_size())
    if backward:
        back = attention_cost(lengths, heads, head_dim, qkv.element_size(), backward=True)
        cost = Cost(cost.bytes + back.bytes, cost.flops + back.flops, cost.launches + back.launches)

    def peer(name: str, attend: Callable[[Tensor], Tensor], absent: str | None = None) -> Peer:
        if backward:
            return Peer(name, lambda: with_gradients(attend, [qkv], upstream), absent)
        return Peer(name, lambda: forward(attend, [qkv]), absent)

    def ragged(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.ragged_attention(x, offsets, longest, backend=backend)

    cuda = sizes.device.type == "cuda"
    no_gpu = None if cuda else "needs CUDA"
    peers = [
        peer("torch SDPA, padded", ragged("reference")),
        peer("eager, weights written out", partial(_math, offsets=offsets, longest=longest)),
        peer("torch varlen (flash)", ragged("sdpa"), no_gpu),
        peer("torch nested SDPA", partial(_nested, offsets=offsets, longest=longest, lengths=lengths)),
        peer("torch FlexAttention", _flex(offsets, sum(lengths)) if cuda else ragged("reference"), no_gpu),
        peer("flash-attn", ragged("flash-attn"), no_gpu or missing("flash_attn")),
        peer("xformers", ragged("xformers"), no_gpu or missing("xformers")),
        peer("fastjepa", ragged("auto")),
    ]
    exact = exactly(lambda x: ragged_attention_ref(x, offsets, longest), [qkv], upstream)
    mean = sum(lengths) / len(lengths)
    case = f"{what}: {len(lengths)} sequences of {mean:.0f}, {heads} heads of {head_dim}"
    return Operation("attention fwd+bwd" if backward else "attention fwd", case, cost, exact, peers)


def _math(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Padded to the longest, the weights of the batch written out, as eager code does it."""
    total, _, _, head_dim = qkv.shape
    steps = torch.arange(longest, device=qkv.device)
    valid = steps < offsets.diff().view(-1, 1)  # [S, L]
    places = (offsets[:-1].view(-1, 1) + steps).clamp(max=total - 1)
    q, k, v = qkv[places].permute(2, 0, 3, 1, 4).unbind(0)  # [S, H, L, d]
    scores = (q @ k.transpose(2, 3) * head_dim**-0.5).masked_fill(~valid[:, None, None, :], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)[valid]


def _nested(qkv: Tensor, offsets: Tensor, longest: int, lengths: Sequence[int]) -> Tensor:
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x.contiguous(), offsets.long(), min_seqlen=min(lengths), max_seqlen=longest
        )
        for x in qkv.unbind(1)
    )
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).values()


def _flex(offsets: Tensor, total: int) -> Callable[[Tensor], Tensor]:
    """One sequence of all tokens under a block mask; made at every call, since lengths change at every step."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention)
    make = torch.compile(create_block_mask)
    count = torch.arange(total, device=offsets.device)

    def run(qkv: Tensor) -> Tensor:
        document = torch.searchsorted(offsets, count, right=True)
        mask = make(lambda b, h, q, k: document[q] == document[k], None, None, total, total, device=qkv.device)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))
        return attend(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)

    return run
