"""Gather, scatter, the predictor's input, the loss, residual + LayerNorm, bias + GELU, and their peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import (
    Operation,
    Peer,
    Sizes,
    compiled,
    exactly,
    forward,
    missing,
    offsets_of,
    with_gradients,
)
from fastjepa import Ragged, ops
from fastjepa.kernels import gather, gelu, jepa_loss, layer_norm
from fastjepa.kernels.launch import Cost
from fastjepa.kernels.reference import (
    add_layer_norm_ref,
    assemble_predictor_ref,
    bias_gelu_ref,
    gather_rows_ref,
    jepa_loss_ref,
)


def operations(sizes: Sizes) -> list[Operation]:
    """The operations of one step that move rows."""
    torch.manual_seed(0)
    return [_gather(sizes), _take(sizes), _assemble(sizes), _loss(sizes), _norm(sizes), _gelu(sizes)]


def _both(ahead: Cost, back: Cost) -> Cost:
    return Cost(ahead.bytes + back.bytes, ahead.flops + back.flops, ahead.launches + back.launches)


def _index(sizes: Sizes) -> Ragged:
    """The contexts' patches, none twice in an image."""
    lengths = sizes.lengths(sizes.context, sizes.spread, sizes.images)
    values = torch.cat([torch.randperm(sizes.patches)[:n].sort().values for n in lengths])
    return Ragged(values.int(), offsets_of(lengths, torch.device("cpu"))).to(sizes.device)


def _rows(sizes: Sizes, index: Ragged) -> Tensor:
    image = torch.repeat_interleave(torch.arange(sizes.images, device=sizes.device), index.lengths)
    return image * sizes.patches + index.values


def _gather(sizes: Sizes) -> Operation:
    """Patches of the contexts with their positions, no gradient: as the context encoder takes pixels' embeddings."""
    x, pos = sizes.randn(sizes.images, sizes.patches, sizes.width), sizes.randn(sizes.patches, sizes.width)
    index = _index(sizes)
    rows = _rows(sizes, index)

    def official(x: Tensor, pos: Tensor) -> Tensor:
        flat = (x + pos).view(1, -1, x.shape[2])  # every patch gets its position, then most are dropped
        return flat.gather(1, rows.view(1, -1, 1).repeat(1, 1, x.shape[2]))[0]

    def torchs(x: Tensor, pos: Tensor) -> Tensor:
        return gather_rows_ref(x.flatten(0, 1), rows, pos)

    def ours(x: Tensor, pos: Tensor) -> Tensor:
        return ops.gather_tokens(x, index, pos).values

    cost = gather.gather_rows_cost(len(rows), sizes.width, sizes.dtype, sizes.patches)
    functions = {"torch index_select": torchs, "eager, as published": official, "torch.compile": compiled(torchs)}
    peers = [Peer(name, lambda f=f: forward(f, [x, pos])) for name, f in {**functions, "fastjepa": ours}.items()]
    return Operation("gather + position", f"{len(rows)} of {len(x) * sizes.patches} rows of {sizes.width}", cost,
                     exactly(torchs, [x, pos]), peers)  # fmt: skip


def _take(sizes: Sizes) -> Operation:
    """The target tokens out of the predictor's packed output, with the gradient that goes back."""
    index = _index(sizes)
    total = len(index.values) * 4
    rows = torch.arange(total, device=sizes.device).view(-1, 4)[:, 0].contiguous()
    x, upstream = sizes.randn(total, sizes.predictor_width), [sizes.randn(len(rows), sizes.predictor_width)]
    cost = _both(
        gather.gather_rows_cost(len(rows), sizes.predictor_width, sizes.dtype, index_bytes=8),
        gather.scatter_rows_cost(len(rows), total, sizes.predictor_width, sizes.dtype, unique=True, index_bytes=8),
    )

    def official(x: Tensor) -> Tensor:
        return x.gather(0, rows.view(-1, 1).repeat(1, x.shape[1]))

    def torchs(x: Tensor) -> Tensor:
        return x.index_select(0, rows)

    functions = {"torch index_select": torchs, "eager, as published": official, "torch.compile": compiled(torchs)}
    functions["fastjepa"] = lambda x: ops.take_rows(x, rows)
    peers = [Peer(name, lambda f=f: with_gradients(f, [x], upstream)) for name, f in functions.items()]
    case = f"{len(rows)} of {total} rows of {sizes.predictor_width}"
    return Operation("take rows fwd+bwd", case, cost, exactly(torchs, [x], upstream), peers)


def _assemble(sizes: Sizes) -> Operation:
    """Every (image, target) sequence of the predictor: context and mask tokens, each with its position."""
    index, width = _index(sizes), sizes.predictor_width
    source, patches = [], []
    start = 0
    for part in index.values.cpu().split(index.lengths.tolist()):
        for _ in range(4):
            masked = torch.randint(sizes.patches, (sizes.target,))
            source += [torch.arange(start, start + len(part)), torch.full((sizes.target,), -1)]
            patches += [part.long(), masked]
        start += len(part)
    source, patches = torch.cat(source).to(sizes.device), torch.cat(patches).to(sizes.device)
    tables = [sizes.randn(start, width), sizes.randn(width)]
    pos = sizes.randn(sizes.patches, width)
    upstream = [sizes.randn(len(source), width)]
    cost = _both(
        *(
            gather.assemble_predictor_cost(len(source), start, sizes.patches, width, sizes.dtype, 8, backward)
            for backward in (False, True)
        )
    )

    def torchs(context: Tensor, token: Tensor) -> Tensor:
        return assemble_predictor_ref(context, token, pos.to(context.dtype), source, patches)

    functions = {"torch index_select": torchs, "torch.compile": compiled(torchs)}
    functions["fastjepa"] = lambda context, token: ops.assemble_predictor(context, token, pos, source, patches)
    peers = [Peer(name, lambda f=f: with_gradients(f, tables, upstream)) for name, f in functions.items()]
    case = f"{len(source)} tokens of {width} from {start}"
    return Operation("predictor input fwd+bwd", case, cost, exactly(torchs, tables, upstream), peers,
                     "ours sorts the indices in every backward, which the count of bytes leaves out")  # fmt: skip


def _loss(sizes: Sizes) -> Operation:
    lengths = [sizes.target] * (4 * sizes.images)
    values = torch.cat([torch.randperm(sizes.patches)[:n] for n in lengths]).int()
    masks = Ragged(values, offsets_of(lengths, torch.device("cpu")), per_image=4).to(sizes.device)
    features = sizes.randn(sizes.images, sizes.patches, sizes.width)
    prediction, upstream = sizes.randn(sum(lengths), sizes.width), [torch.ones((), device=sizes.device)]
    image = torch.arange(len(lengths), device=sizes.device).repeat_interleave(sizes.target) // 4
    rows = image * sizes.patches + masks.values

    def torchs(prediction: Tensor) -> Tensor:
        return jepa_loss_ref(prediction, features.to(prediction.dtype).flatten(0, 1), rows)

    def official(prediction: Tensor) -> Tensor:
        """Every patch normalised, then those in a target gathered."""
        whole = F.layer_norm(features.float(), (features.shape[2],)).flatten(0, 1)
        wanted = whole.gather(0, rows.view(-1, 1).repeat(1, whole.shape[1]))
        return F.smooth_l1_loss(prediction.float(), wanted)

    cost = _both(
        *(jepa_loss.jepa_loss_cost(sum(lengths), sizes.width, sizes.dtype, backward=back) for back in (False, True))
    )
    functions = {"torch": torchs, "eager, as published": official, "torch.compile": compiled(torchs)}
    functions["fastjepa"] = lambda prediction: ops.jepa_loss(masks.with_values(prediction), features, masks)
    peers = [Peer(name, lambda f=f: with_gradients(f, [prediction], upstream)) for name, f in functions.items()]
    case = f"{sum(lengths)} tokens of {sizes.width}"
    return Operation("loss fwd+bwd", case, cost, exactly(torchs, [prediction], upstream), peers)


def _norm(sizes: Sizes) -> Operation:
    tokens = sum(sizes.lengths(sizes.context, sizes.spread, sizes.images))
    inputs = [sizes.randn(tokens, sizes.width), sizes.randn(tokens, sizes.width)]
    inputs += [sizes.randn(sizes.width), sizes.randn(sizes.width)]
    upstream = [sizes.randn(tokens, sizes.width) for _ in "ab"]

    def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm_ref(x, residual, weight, bias, 1e-6)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(x, residual, weight, bias, 1e-6)

    cost = _both(
        *(layer_norm.add_layer_norm_cost(tokens, sizes.width, sizes.dtype, backward=back) for back in (False, True))
    )
    functions = {"torch": torchs, "torch.compile": compiled(torchs), "fastjepa": ours}
    peers = [Peer(name, lambda f=f: with_gradients(f, inputs, upstream)) for name, f in functions.items()]
    no_liger = missing("liger_kernel") or (None if sizes.device.type == "cuda" else "needs CUDA")
    peers.insert(2, Peer("Liger LayerNorm", lambda: with_gradients(_liger, inputs, upstream), no_liger))
    case = f"{tokens} rows of {sizes.width}"
    return Operation("residual + LayerNorm fwd+bwd", case, cost, exactly(torchs, inputs, upstream), peers)


def _liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    total = x + residual
    return LigerLayerNormFunction.apply(total, weight, bias, 1e-6), total


def _gelu(sizes: Sizes) -> Operation:
    tokens, width = sum(sizes.lengths(sizes.context, sizes.spread, sizes.images)), 4 * sizes.width
    inputs, upstream = [sizes.randn(tokens, width), sizes.randn(width)], [sizes.randn(tokens, width)]
    cost = _both(*(gelu.bias_gelu_cost(tokens, width, sizes.dtype, backward=back) for back in (False, True)))
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch": bias_gelu_ref,
        "torch.compile": compiled(bias_gelu_ref),
        "fastjepa": ops.bias_gelu,
    }
    peers = [Peer(name, lambda f=f: with_gradients(f, inputs, upstream)) for name, f in functions.items()]
    case = f"{tokens} rows of {width}"
    return Operation("bias + GELU fwd+bwd", case, cost, exactly(bias_gelu_ref, inputs, upstream), peers)
