"""Tokens by index: out of images into packed sequences, back, and into the predictor's input."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.kernels.reference import assemble_predictor_ref, gather_rows_ref, scatter_rows_ref
from fastjepa.ops import library
from fastjepa.ops.checks import check_offsets, check_range, check_same, check_tensors
from fastjepa.ragged import Ragged, image_rows, sequence_ids


def gather_tokens(x: Tensor, index: Ragged, pos_embed: Tensor | None = None, *, check: bool = False) -> Ragged:
    """The tokens that `index` names, packed; with `pos_embed`, the position of each is added in the same pass.

    Shapes:
        x: [B, N, D] floating.
        index: `Ragged` of patch indices (int32 or int64 [T]) in 0..N-1, B * per_image sequences.
        pos_embed: [N, D].

    Returns:
        `Ragged` of tokens [T, D] in x's dtype with the offsets of `index`.

    Raises:
        ValueError: shapes or dtypes other than these, sequences that do not fit B images, or an index out of range or
            offsets that are none (looked for on the CPU; on CUDA, where it waits for the device, only with `check`).

    >>> x = torch.arange(6.0).view(1, 3, 2)
    >>> gather_tokens(x, Ragged.from_list([torch.tensor([2, 0])])).values.tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, N, D], got {list(x.shape)}")
    _check_index(index, check)
    batch, patches, width = x.shape
    if pos_embed is not None and pos_embed.shape != (patches, width):
        raise ValueError(f"pos_embed must be [N, D] = [{patches}, {width}], got {list(pos_embed.shape)}")
    check_tensors({"x": x, "pos_embed": pos_embed}, {"index": index.values})
    check_range("index", index.values, 0, patches - 1, check)
    rows = image_rows(index, batch, patches)
    return index.with_values(_gather(x.flatten(0, 1), rows, pos_embed))


def scatter_tokens(tokens: Ragged, index: Ragged, num_tokens: int, *, check: bool = False) -> Tensor:
    """Tokens put back at the places that `index` names, zero elsewhere; repeated indices add.

    Shapes:
        tokens: `Ragged` of [T, D]; index: `Ragged` of patch indices [T] in 0..num_tokens-1, the same sequences.

    Returns:
        [S, num_tokens, D].

    Raises:
        ValueError: tokens and index of different totals or (looked for as in `gather_tokens`) sequences, other shapes
            and dtypes, or as `gather_tokens` an index.
    """
    _check_index(index, check)
    if not isinstance(num_tokens, int | torch.SymInt) or num_tokens < 0:
        raise ValueError(f"num_tokens must be a whole number of at least 0, got {num_tokens!r}")
    if tokens.values.dim() != 2 or tokens.values.shape[0] != index.values.shape[0]:
        raise ValueError(
            f"tokens must be [T, D] with the T = {index.values.shape[0]} of index, got {list(tokens.values.shape)}"
        )
    check_tensors({"tokens": tokens.values}, {"index": index.values})
    if len(tokens.offsets) != len(index.offsets):
        raise ValueError(f"tokens are {len(tokens)} sequences and index {len(index)}")
    check_same("offsets of tokens and index", tokens.offsets, index.offsets, check)
    check_range("index", index.values, 0, num_tokens - 1, check)
    rows = sequence_ids(index) * num_tokens + index.values
    num_rows = index.num_sequences * num_tokens
    if library.takes_kernels(tokens.values):
        from fastjepa.kernels.gather import scatter_rows as kernel

        flat = library.call(kernel, tokens.values, rows, num_rows)
    else:
        flat = scatter_rows_ref(tokens.values, rows, num_rows)
    return flat.view(index.num_sequences, num_tokens, tokens.values.shape[1])


def assemble_predictor(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor, source: Tensor, patches: Tensor, *, check: bool = False
) -> Tensor:
    """The predictor's input: context tokens and mask tokens, each with its position, in one pass.

    Shapes:
        context: [Tc, D]; mask_token: [D]; pos_embed: [N, D].
        source: int [T]; the context token that goes to place t, or -1 for the mask token.
        patches: int [T] in 0..N-1; the patch of place t.

    Returns:
        [T, D] in context's dtype.

    Raises:
        ValueError: shapes other than these, or as `gather_tokens` an index.
    """
    width = context.shape[-1] if context.dim() else 0
    if context.dim() != 2 or mask_token.shape != (width,) or pos_embed.dim() != 2 or pos_embed.shape[1] != width:
        raise ValueError(
            f"expected context [Tc, D], mask_token [D] and pos_embed [N, D], got {list(context.shape)}, "
            f"{list(mask_token.shape)} and {list(pos_embed.shape)}"
        )
    if source.dim() != 1 or source.shape != patches.shape:
        raise ValueError(f"source and patches must both be [T], got {list(source.shape)} and {list(patches.shape)}")
    check_tensors(
        {"context": context, "mask_token": mask_token, "pos_embed": pos_embed}, {"source": source, "patches": patches}
    )
    check_range("source", source, -1, context.shape[0] - 1, check)
    check_range("patches", patches, 0, pos_embed.shape[0] - 1, check)
    if library.takes_kernels(context):
        from fastjepa.kernels.gather import assemble_predictor as kernel

        return library.call(kernel, context, mask_token, pos_embed, source, patches)
    return assemble_predictor_ref(context, mask_token, pos_embed, source, patches)


def take_rows(x: Tensor, rows: Tensor, *, check: bool = False) -> Tensor:
    """x[rows], no row named twice, which is not looked for: on CUDA the gradient of such a row would be one of them.

    Shapes: x [R, D]; rows int32 or int64 [T] in 0..R-1 -> [T, D].

    Raises:
        ValueError: shapes other than these, or as `gather_tokens` an index.
    """
    check_rows(x, rows, check)
    return _gather(x, rows, None, unique=True)


def check_rows(x: Tensor, rows: Tensor, check: bool = False) -> None:
    """ValueError unless `take_rows` takes these."""
    if x.dim() != 2 or rows.dim() != 1:
        raise ValueError(f"expected x [R, D] and rows [T], got {list(x.shape)} and {list(rows.shape)}")
    check_tensors({"x": x}, {"rows": rows})
    check_range("rows", rows, 0, x.shape[0] - 1, check)


def _gather(x: Tensor, rows: Tensor, pos_embed: Tensor | None, unique: bool = False) -> Tensor:
    if library.takes_kernels(x):
        from fastjepa.kernels.gather import gather_rows as kernel

        return library.call(kernel, x, rows, pos_embed, unique)
    return gather_rows_ref(x, rows, pos_embed)


def _check_index(index: Ragged, asked: bool) -> None:
    if index.values.dim() != 1 or index.values.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index must hold int32 or int64 patch indices [T], got {index.values.dtype} {list(index.values.shape)}"
        )
    if asked:  # those on the CPU were looked into as `index` was made
        check_offsets(index.offsets, len(index.values), len(index.values), asked)
