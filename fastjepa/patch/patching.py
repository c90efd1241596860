"""`patch`: find what our operations can take in one live model, replace it, and measure what that changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastjepa.patch.attention import find_qkv_attention
from fastjepa.patch.compare import Distances, Result, distances, exact_copy, in_double, run, times, undisturbed
from fastjepa.patch.gather import find_gather
from fastjepa.patch.probe import described, probe_of
from fastjepa.patch.registry import config_change, find_registry_attention
from fastjepa.patch.report import Finding, PatchReport, Verification
from fastjepa.patch.rotary import find_rotary_attention
from fastjepa.patch.rows import find_layer_norm, find_mlp
from fastjepa.patch.swapping import ALREADY, FallbackWarning, class_change, is_swapped

Finder = Callable[[str, nn.Module, nn.Module | None], Finding | None]

# Operation -> who looks for it; the first that knows a module has it.
FINDERS: dict[str, tuple[Finder, ...]] = {
    "gather": (find_gather,),
    "attention": (find_registry_attention, find_rotary_attention, find_qkv_attention),
    "layer_norm": (find_layer_norm,),
    "gelu": (find_mlp,),
}


def patch(
    model: nn.Module,
    ops: Iterable[str] | None = None,
    strict: bool = True,
    verify: bool = True,
    probe: Sequence[Any] | None = None,
) -> PatchReport:
    """Have one live model of another codebase run on our operations.

    Attention, LayerNorm, GELU-MLPs and `apply_masks` are found by what they are. Each is compared with its stock code
    on a small input first, and skipped where outputs or gradients are more than twice as far from fp64 as the stock
    code's. Classes, other instances, parameters, hooks and state-dict keys are as before. Wrappers of `torch.compile`
    and DDP are seen through, and may come before or after.

    A call that asks for more than ours gives (an attention map, a mask) runs the stock code, with a `FallbackWarning`.

    Args:
        model: any module; it stays the same object.
        ops: of "attention", "layer_norm", "gelu", "gather"; all of them unless given.
        strict: raise where nothing is found, or where something that is found cannot be replaced.
        verify: run the whole model before and after, on `probe` or on a small batch of its own input shape, in eval
            mode; what was measured is in the report. Takes an fp64 copy of the model while it lasts, and runs hooks.
        probe: inputs to verify with, as `model(*probe)` takes them.

    Returns:
        A `PatchReport`: print it; `undo()` it, or leave it as a context manager, to restore the very objects.

    Raises:
        ValueError: nothing or only a part could be patched (with `strict`), the numbers would not stay (with `verify`),
            or an operation that there is not. The model is as it was then.

    >>> block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> with patch(block, probe=[torch.randn(3, 8)]) as report:
    ...     [str(finding) for finding in report.patched]
    ['layer_norm: 1 (LayerNorm)']
    >>> patch(torch.nn.Linear(8, 8))
    Traceback (most recent call last):
        ...
    ValueError: Linear: nothing to patch: ... a Linear alone is one matrix product, which PyTorch's library does as fast
    """
    finders = {name: FINDERS[name] for name in _operations(ops)}
    inner = _unwrapped(model)
    name = type(inner).__name__
    _check_parameters(inner)
    found = _find(inner, finders)
    if strict and all(f.reason for f in found):
        raise ValueError(f"{name}: nothing to patch: {_why(found, finders)}")
    report = PatchReport(name, found)
    if strict and report.skipped:
        reasons = "; ".join(str(f) for f in report.skipped[:5])
        raise ValueError(
            f"{name}: only {len(report.patched)} of {len(found)} places could be patched (strict=False takes those, "
            f"ops leaves operations out): {reasons}{'; ...' if len(report.skipped) > 5 else ''}"
        )
    _count(report, inner)
    if verify and report.patched:
        _verify(report, inner, probe)
    if not report.active:
        report.apply()
    return report


def unpatch(model: nn.Module) -> int:
    """Take back whatever `patch` did to a model, as for a deep copy, of which there is no report; gives how much.

    Raises:
        ValueError: a patched class has been replaced again since; nothing is taken back then.

    >>> import copy
    >>> norm = torch.nn.LayerNorm(8)
    >>> report = patch(norm)
    >>> unpatch(copy.deepcopy(norm)), unpatch(torch.nn.LayerNorm(8))
    (1, 0)
    """
    changes = [c for module in _unwrapped(model).modules() for c in (class_change(module), config_change(module)) if c]
    report = PatchReport(type(model).__name__, (), _changes=changes)
    report.undo()
    return len(changes)


def _operations(ops: Iterable[str] | None) -> list[str]:
    listed = list(FINDERS) if ops is None else [ops] if isinstance(ops, str) else list(ops)
    if not listed or (unknown := [o for o in listed if o not in FINDERS]):
        raise ValueError(f"ops must be of {', '.join(FINDERS)}, got {listed if not listed else unknown}")
    return listed


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module within the wrappers of torch.compile and of (distributed) data parallelism."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def _check_parameters(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has parameters on the meta device, where nothing can be compared")


def _find(model: nn.Module, finders: dict[str, tuple[Finder, ...]]) -> tuple[Finding, ...]:
    """Everything that an operation could take; what differs from its stock code is skipped."""
    modules = dict(model.named_modules())
    found: list[Finding] = []
    faults: dict[Any, str] = {}
    with undisturbed(model), torch.no_grad():
        for where, module in modules.items():
            parent = modules.get(where.rpartition(".")[0]) if where else None
            for operation, each in finders.items():
                finding = _look(operation, each, where, module, parent)
                if finding is None:
                    continue
                if not finding.reason and finding.module is not None:
                    key = _likeness(finding)
                    if key not in faults:
                        faults[key] = _fault(finding)
                    if faults[key]:
                        finding = Finding(operation, where, finding.what, reason=faults[key])
                found.append(finding)
    return tuple(found)


def _look(
    operation: str, finders: Sequence[Finder], where: str, module: nn.Module, parent: nn.Module | None
) -> Finding | None:
    for find in finders:
        finding = find(where, module, parent)
        if finding is None:
            continue
        if is_swapped(module):
            return Finding(operation, where, type(module).__name__, reason=ALREADY)
        if type(module).__module__.startswith("fastjepa."):
            return Finding(operation, where, type(module).__name__, reason="is fastjepa's own already")
        if "forward" in vars(module) and any(c[:2] == (module, "__class__") for c in finding.changes):
            return Finding(operation, where, type(module).__name__, reason="has a forward set on it by other code")
        return finding
    return None


def _likeness(finding: Finding) -> Any:
    """What makes two modules compute the same of the same parameters, so that one of them need be compared."""
    shapes = tuple((n, p.shape, p.dtype, p.device, p.requires_grad) for n, p in finding.module.named_parameters())
    plain = tuple(
        (n, k, v)
        for n, m in finding.module.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, bool | int | float | str)
    )
    kinds = tuple(type(m) for m in finding.module.modules())
    return finding.operation, kinds, repr(finding.module), shapes, plain


def _fault(finding: Finding) -> str:
    """What is wrong with a replacement on its own, "" where its outputs and gradients are those of the stock code."""
    report = PatchReport("", (finding,))
    module, dtype = finding.module, next(finding.module.parameters()).dtype
    try:
        stock = [run(module, call, first=True) for call in finding.calls]  # without a map that may come behind
        double = exact_copy(module)
        exact = [run(double, in_double(call), first=True) for call in finding.calls]
    except Exception as error:  # whatever its code raises for a call that is not meant
        shape = list(finding.calls[0][0].shape)
        return f"could not be compared with its own code on {shape}: {type(error).__name__}: {error}"
    report.apply()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            ours = [run(module, call, first=True) for call in finding.calls]
    except FallbackWarning as reason:
        return str(reason)
    finally:
        report.undo()
    return next(filter(None, (_worst(distances(*each), dtype) for each in zip(ours, stock, exact, strict=True))), "")


def _worst(found: dict[str, Distances], dtype: torch.dtype) -> str:
    return next(filter(None, (d.fault(name, dtype) for name, d in found.items())), "")


def _count(report: PatchReport, model: nn.Module) -> None:
    covered = frozenset().union(*(f.parameters for f in report.patched))
    report.covered = sum(p.numel() for p in model.parameters() if id(p) in covered)
    report.total = sum(p.numel() for p in model.parameters())


def _verify(report: PatchReport, model: nn.Module, probe: Sequence[Any] | None) -> None:
    """Put what was measured of the whole model into the report, or why nothing could be; the model is as before."""
    root = next((f.calls[0] for f in report.patched if f.module is model), None)
    arguments = probe_of(model) or root if probe is None else tuple(probe)
    if arguments is None:
        _unverified(report, "nothing of the model tells its input shape; give probe=(...), what it is called with")
        return
    words = described(arguments)
    with undisturbed(model):
        try:
            stock = run(model, arguments)
            exact = _exact(model, arguments)
        except Exception as error:  # whatever the model raises
            reason = f"it, or its fp64 copy, does not run on {words}: {type(error).__name__}: {error}"
            if probe is not None:
                raise ValueError(f"{report.model} cannot be verified, try verify=False: {reason}") from error
            _unverified(report, f"{reason}; give probe=(...), what it is called with")
            return
        report.apply()
        try:
            found = distances(run(model, arguments), stock, exact)
            if fault := _worst(found, next(model.parameters()).dtype):
                raise ValueError(f"{report.model} was left as it is: patched, on {words}, {fault}")
            before, after = times((report.undo, report.apply), lambda: run(model, arguments), _device(model))
        finally:
            report.undo()
    outputs, gradients = found["outputs"], found.get("gradients")
    report.verification = Verification(
        words,
        outputs.ours,
        gradients.ours if gradients else None,
        outputs.stock,
        gradients.stock if gradients else None,
        before,
        after,
    )


def _exact(model: nn.Module, arguments: Sequence[Any]) -> Result:
    return run(exact_copy(model), in_double(arguments))


def _unverified(report: PatchReport, reason: str) -> None:
    report.unverified = reason
    warnings.warn(f"{report.model} was patched and not compared as a whole: {reason}", UserWarning, stacklevel=4)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _why(found: Sequence[Finding], finders: Iterable[str]) -> str:
    if found:
        return "; ".join(str(f) for f in found[:5])
    wanted = " or ".join(finders)
    return f"it holds no {wanted}; a Linear alone is one matrix product, which PyTorch's library does as fast"
