"""Packed totals rounded up, so that the shapes of matrix products come again from batch to batch."""

from __future__ import annotations

from torch import nn

from fastjepa.nn.stack import Stack


def set_token_multiple(model: nn.Module, multiple: int) -> int:
    """Have every encoder and predictor of one live model pad its packed tokens to a multiple; gives their number.

    The padding is one sequence more, of fewer than `multiple` tokens (`fastjepa.ragged.pad_offsets`). No number changes
    but by the rounding of sums in another order. Shapes repeat that way, for graphs and the allocator; the products
    themselves gain no alignment, since tokens are never the contiguous dimension. Off (1) unless set. Only `Ragged`
    masks need it: the totals of lists are multiples of the batch size.

    Raises:
        ValueError: a multiple below 1; nothing is changed then.

    >>> from fastjepa import vit_tiny
    >>> set_token_multiple(vit_tiny(depth=1), 64)
    1
    """
    if multiple < 1:
        raise ValueError(f"tokens can be padded to multiples of 1 or more, got {multiple}")
    found = [module for module in model.modules() if isinstance(module, Stack)]
    for module in found:
        module.token_multiple = multiple
    return len(found)
