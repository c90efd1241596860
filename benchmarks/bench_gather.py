"""Gathering context patches, taking target tokens, and the predictor's input, and their peers."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.operations import Operation, Sizes, both, compiled, exactly, offsets_of
from benchmarks.peers import peers
from fastjepa import Ragged, ops
from fastjepa.kernels.gather import assemble_predictor_cost, gather_rows_cost, scatter_rows_cost
from fastjepa.kernels.reference import assemble_predictor_ref, gather_rows_ref


def operations(sizes: Sizes) -> list[Operation]:
    """Patches into the context encoder, tokens into the predictor, and target tokens out of it."""
    torch.manual_seed(0)
    index = _index(sizes)
    return [_gather(sizes, index), _take(sizes, index), _assemble(sizes, index)]


def _index(sizes: Sizes) -> Ragged:
    """The contexts' patches, none twice in an image."""
    lengths = sizes.lengths(sizes.context, sizes.spread, sizes.images)
    values = torch.cat([torch.randperm(sizes.patches)[:n].sort().values for n in lengths])
    return Ragged(values.int(), offsets_of(lengths, torch.device("cpu"))).to(sizes.device)


def _repeated(rows: Tensor, width: int) -> Tensor:
    """An index as the official code has it: int64 [T, D]."""
    return rows.view(-1, 1).repeat(1, width)


def _gather(sizes: Sizes, index: Ragged) -> Operation:
    """Patches of the contexts with their positions, no gradient: as the context encoder takes pixels' embeddings."""
    x, pos = sizes.randn(sizes.images, sizes.patches, sizes.width), sizes.randn(sizes.patches, sizes.width)
    image = torch.repeat_interleave(torch.arange(sizes.images, device=sizes.device), index.lengths)
    rows = image * sizes.patches + index.values

    def torchs(x: Tensor, pos: Tensor) -> Tensor:
        return gather_rows_ref(x.flatten(0, 1), rows, pos)

    def official(x: Tensor, pos: Tensor) -> Tensor:
        """Every patch gets its position, in fp32, then most are dropped."""
        return (x + pos.float()).flatten(0, 1).gather(0, _repeated(rows, x.shape[2]))

    found = peers(
        {
            "torch": lambda: torchs,
            "eager, as published": lambda: official,
            "torch.compile": lambda: compiled(torchs),
            "fastjepa": lambda: lambda x, pos: ops.gather_tokens(x, index, pos).values,
        },
        [x, pos],
    )
    case = f"{len(rows)} of {len(x) * sizes.patches} rows of {sizes.width}"
    cost = gather_rows_cost(len(rows), sizes.width, sizes.dtype, sizes.patches)
    return Operation("gather + position", case, cost, exactly(torchs, [x, pos]), found)


def _take(sizes: Sizes, index: Ragged) -> Operation:
    """The target tokens out of the predictor's packed output, with the gradient that goes back."""
    kept, width = len(index.values), sizes.predictor_width
    total = 4 * kept
    rows = torch.arange(total, device=sizes.device).view(-1, 4)[:, 0].contiguous()
    x, upstream = sizes.randn(total, width), [sizes.randn(kept, width)]

    def torchs(x: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def official(x: Tensor) -> Tensor:
        return x.gather(0, _repeated(rows, width))

    found = peers(
        {
            "torch": lambda: torchs,
            "eager, as published": lambda: official,
            "torch.compile": lambda: compiled(torchs),
            "fastjepa": lambda: lambda x: ops.take_rows(x, rows),
        },
        [x],
        upstream,
    )
    cost = both(
        gather_rows_cost(kept, width, sizes.dtype, index_bytes=8),
        scatter_rows_cost(kept, total, width, sizes.dtype, unique=True, index_bytes=8),
    )
    case = f"{kept} of {total} rows of {width}"
    return Operation("take rows fwd+bwd", case, cost, exactly(torchs, [x], upstream), found)


def _assemble(sizes: Sizes, index: Ragged) -> Operation:
    """Every (image, target) sequence of the predictor: context and mask tokens, each with its position."""
    width = sizes.predictor_width
    sources, places = [], []
    start = 0
    for part in index.values.cpu().split(index.lengths.tolist()):
        for _ in range(4):
            masked = torch.randint(sizes.patches, (sizes.target,))
            sources += [torch.arange(start, start + len(part)), torch.full((sizes.target,), -1)]
            places += [part.long(), masked]
        start += len(part)
    source, patches = torch.cat(sources).to(sizes.device), torch.cat(places).to(sizes.device)
    tables, pos = [sizes.randn(start, width), sizes.randn(width)], sizes.randn(sizes.patches, width)
    upstream = [sizes.randn(len(source), width)]

    def torchs(context: Tensor, token: Tensor) -> Tensor:
        return assemble_predictor_ref(context, token, pos.to(context.dtype), source, patches)

    def official(context: Tensor, token: Tensor) -> Tensor:
        both_kinds = torch.cat([context, token.view(1, -1)])  # the mask token is row -1
        tokens = both_kinds.gather(0, _repeated(source % len(both_kinds), width))
        return tokens + pos.gather(0, _repeated(patches, width))

    found = peers(
        {
            "torch": lambda: torchs,
            "eager, as published": lambda: official,
            "torch.compile": lambda: compiled(torchs),
            "fastjepa": lambda: lambda context, token: ops.assemble_predictor(context, token, pos, source, patches),
        },
        tables,
        upstream,
    )
    cost = both(
        *(
            assemble_predictor_cost(len(source), start, sizes.patches, width, sizes.dtype, 8, backward)
            for backward in (False, True)
        )
    )
    case = f"{len(source)} tokens of {width} from {start}"
    return Operation("predictor input fwd+bwd", case, cost, exactly(torchs, tables, upstream), found,
                     "ours sorts the indices in every backward, which the count of bytes leaves out")  # fmt: skip


def test_gather(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
