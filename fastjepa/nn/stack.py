"""What encoder and predictor share: blocks one after the other, and how they are run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa import ops
from fastjepa.nn.block import Block
from fastjepa.nn.norm import add_norm
from fastjepa.ops.rows import linear_dtype
from fastjepa.sharding import is_hooked_by_others


class Stack(nn.Module):
    """A model whose tokens go through blocks and a norm.

    Attributes:
        recompute: see `set_activation_checkpointing`. narrow_stream: see `set_narrow_stream`.
    """

    recompute = False
    narrow_stream = False

    def as_stream(self, x: Tensor, wide: torch.dtype) -> Tensor:
        """x as the residual stream carries it: in the dtype `wide`, or in autocast's."""
        return x.to(linear_dtype(x.device, wide) if self.narrow_stream else wide)

    def run(
        self,
        blocks: Sequence[nn.Module] | nn.ModuleList,
        norm: nn.Module,
        x: Tensor,
        offsets: Tensor,
        max_length: int,
        keep: Tensor | None = None,
        for_linear: bool = False,
    ) -> Tensor:
        """The blocks one after the other, then the norm: [T, D] -> [T, D], or [M, D] of the tokens `keep` of T.

        Residual sums are left to the norm that follows them, also from one block to the next. A block that somebody
        hooks or has replaced, or whose forward is another, gives its own sum instead.
        """
        branch = None
        recompute = self.recompute and torch.is_grad_enabled()
        for depth, block in enumerate(blocks):
            kept = keep if depth == len(blocks) - 1 else None
            if _is_ours(block):
                x, branch = block(x, offsets, max_length, kept, branch, True, recompute)
                continue
            inputs = (x if branch is None else x + branch, offsets, max_length, kept)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            branch = None
        if keep is not None and not len(blocks):
            x = ops.take_rows(x, keep)
        return add_norm(norm, x, branch, for_linear)[0]


def _is_ours(block: nn.Module) -> bool:
    forward = getattr(type(block), "forward", None)
    return forward is Block.forward and "forward" not in vars(block) and not is_hooked_by_others(block)


def set_activation_checkpointing(model: nn.Module, on: bool | str = True) -> int:
    """Have every encoder and predictor of one live model keep only the inputs of its blocks; gives their number.

    What the backward pass needs of a block's inside is computed again there, up to the MLP's last product: two ninths
    more work in what is trained (a third where its parts are called one by one), and the same numbers. The target
    encoder keeps nothing either way. With "predictor" the predictor of an `IJEPA` alone does so: it is narrow, and what
    it keeps is dear for its few FLOPs.

    Raises:
        ValueError: another word, or a model without a predictor; nothing is changed then.

    Source: Chen et al. 2016 (arXiv 1604.06174).
    """
    if isinstance(on, bool):
        return _set(model, "recompute", on)
    predictor = getattr(model, "predictor", None)
    if on != "predictor" or not isinstance(predictor, Stack):
        name = type(model).__name__
        raise ValueError(f'give True, False, or "predictor" for a model that has one; got {on!r} for {name}')
    _set(model, "recompute", False)
    return _set(predictor, "recompute", True)


def set_narrow_stream(model: nn.Module, on: bool = True) -> int:
    """Have every encoder and predictor of one live model carry its residual stream in autocast's dtype.

    Under autocast the stream is fp32 unless this is set, as in the published code. In bf16 the passes beside the matrix
    products move a third less, and every residual sum is rounded to 8 bits of mantissa. Without autocast nothing
    changes. Gives the number of models.
    """
    return _set(model, "narrow_stream", on)


def _set(model: nn.Module, name: str, value: bool) -> int:
    found = [module for module in model.modules() if isinstance(module, Stack)]
    for module in found:
        setattr(module, name, value)
    return len(found)
