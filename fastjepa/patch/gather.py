"""`apply_masks`, the gather that JEPA codebases share: in one model, or in every namespace of a package."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa import masks as fastjepa_masks
from fastjepa import ops
from fastjepa.ops import library
from fastjepa.patch.report import Change, Finding, PatchReport
from fastjepa.patch.swapping import stock_forward, swapped, with_globals
from fastjepa.ragged import masks_to_ragged

NAME = "apply_masks"


def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor], concat: bool = True) -> Any:
    """The tokens that each mask names: what `apply_masks` of I-JEPA, V-JEPA 2, transformers and lightly gives.

    Shapes: x [B, N, D]; masks one or a list of integer [B, K] -> [len(masks) * B, K, D], mask after mask, or without
    `concat` a list of [B, K, D], whose K may differ.

    >>> x = torch.arange(6.0).view(1, 3, 2)
    >>> apply_masks(x, [torch.tensor([[2, 0]]), torch.tensor([[1]])], concat=False)
    [tensor([[[4., 5.], [0., 1.]]]), tensor([[[2., 3.]]])]
    """
    listed = [masks] if isinstance(masks, Tensor) else [m.to(x.device) for m in masks]
    if not concat:
        return [apply_masks(x, [m]) for m in listed]
    if not library.takes_kernels(x) or not listed:
        return fastjepa_masks.apply_masks(x, listed)
    index = masks_to_ragged(listed, len(x))
    return ops.gather_tokens(x, index).values.view(index.num_sequences, -1, x.shape[-1])


def find_gather(where: str, module: nn.Module, parent: nn.Module | None) -> Finding | None:
    """A module whose forward calls a function `apply_masks` of its namespace; it gets a forward that calls ours."""
    stock = type(module)
    forward = stock_forward(module)
    if not isinstance(forward, types.FunctionType) or NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(NAME)
    if function is None or function is apply_masks:
        return None
    if reason := _unknown(function):
        return Finding("gather", where, stock.__name__, reason=reason)
    ours = with_globals(forward, **{NAME: apply_masks})
    change = Change(module, "__class__", stock, swapped(stock, {"forward": ours}))
    return Finding("gather", where, stock.__name__, (change,))


def patch_gathers(package: str) -> PatchReport:
    """Put our gather in the place of `apply_masks` in every imported module of a package, for the whole process.

    Training loops call `apply_masks` outside of any model, so `patch` cannot reach it there: call this after the
    imports. Modules imported later hold the stock function unless they take it from one of those.

    Args:
        package: as `src` for the I-JEPA and V-JEPA 2 checkouts, or `lightly`.

    Returns:
        A report as that of `patch`, with `undo`, and a context manager.

    Raises:
        ValueError: no module of that package has such a function, or one has another function of that name.
    """
    spaces = [(n, m) for n, m in sys.modules.items() if n == package or n.startswith(f"{package}.")]
    holders = [(n, m) for n, m in spaces if inspect.isfunction(vars(m).get(NAME)) and vars(m)[NAME] is not apply_masks]
    found = []
    for name, space in holders:
        stock = vars(space)[NAME]
        change = Change(space, NAME, stock, apply_masks)
        reason = _unknown(stock)
        found.append(Finding("gather", f"{name}.{NAME}", stock.__module__, () if reason else (change,), reason))
    if not found:
        raise ValueError(f"none of the {len(spaces)} imported modules of {package!r} has a function {NAME}")
    if wrong := [str(f) for f in found if f.reason]:
        raise ValueError("; ".join(wrong))
    report = PatchReport(package, tuple(found))
    report.apply()
    return report


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _unknown(function: Any) -> str:
    """What keeps a function `apply_masks` from being the one that is known, "" where nothing does."""
    try:
        takes = [str(p.replace(annotation=p.empty, default=p.empty)) for p in _parameters(function)]
    except (TypeError, ValueError):
        return f"{NAME} is no function"
    if takes not in (["x", "masks"], ["x", "masks", "concat"], ["tensor", "masks"]):
        return f"its {NAME} takes {', '.join(takes)}, and known is x, masks and concat"
    x, masks = torch.arange(30.0).view(2, 5, 3), [torch.tensor([[0, 4], [1, 1]]), torch.tensor([[2, 3], [3, 0]])]
    try:
        same = torch.equal(function(x, masks), apply_masks(x, masks))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"its {NAME} failed on two masks of two patches: {error}"
    return "" if same else f"its {NAME} gives something else than the tokens that masks name"
