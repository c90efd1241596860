"""What `patch` found and changed, what was measured of it, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Change(NamedTuple):
    """One attribute of one object, as it was and as it is while patched."""

    owner: Any
    attribute: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Finding:
    """One place of a model that an operation of ours could take.

    Attributes:
        operation: "attention", "layer_norm", "gelu" or "gather".
        where: dotted name within the model, "" for the model itself.
        what: name of the class or function found there.
        changes: what replaces it; none where it is skipped.
        reason: why it is skipped, "" where it is not.
        parameters: identities of the parameters that it computes with.
        module, calls: what can be run and compared alone, and the arguments of some calls of it.
    """

    operation: str
    where: str
    what: str
    changes: tuple[Change, ...] = ()
    reason: str = ""
    parameters: frozenset[int] = frozenset()
    module: Any = field(default=None, repr=False)
    calls: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        name = f"{self.where or 'the model itself'} ({self.what})"
        return f"{self.operation}: {name}" + (f": {self.reason}" if self.reason else "")


class Verification(NamedTuple):
    """The whole model before and after, on the same inputs, without dropout.

    Attributes:
        probe: the inputs, in words.
        outputs, gradients: norm of the difference over the norm; gradients None where no parameter takes one.
        stock_outputs, stock_gradients: distance of the stock model from its own fp64 copy, likewise: ours may be
            twice as far.
        before_ms, after_ms: forward and backward of the probe, the shortest of alternating runs.
    """

    probe: str
    outputs: float
    gradients: float | None
    stock_outputs: float
    stock_gradients: float | None
    before_ms: float
    after_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast as before, on the probe."""
        return self.before_ms / self.after_ms


@dataclass
class PatchReport:
    """What `patch` did to one model; leaving it as a context manager, or `undo`, restores the very objects.

    Attributes:
        model: name of the model's class.
        found: everything that an operation could take, patched or skipped.
        covered, total: parameters (numbers, not tensors) in what was patched, and in the model.
        verification: what was measured of the whole model, or None; `unverified` says why then.
    """

    model: str
    found: tuple[Finding, ...]
    covered: int = 0
    total: int = 0
    verification: Verification | None = None
    unverified: str = ""
    _changes: list[Change] = field(default_factory=list, repr=False)

    @property
    def patched(self) -> tuple[Finding, ...]:
        """What was replaced."""
        return tuple(f for f in self.found if not f.reason)

    @property
    def skipped(self) -> tuple[Finding, ...]:
        """What was left as it is; each has its reason."""
        return tuple(f for f in self.found if f.reason)

    @property
    def active(self) -> bool:
        """Whether the model is patched now."""
        return bool(self._changes)

    def apply(self) -> None:
        """Put the replacements in, all of them; `patch` does it."""
        self._changes = [change for finding in self.patched for change in finding.changes]
        _set(self._changes, new=True)

    def undo(self) -> None:
        """Restore the very objects that were replaced. A second time does nothing.

        Raises:
            ValueError: one of them has been replaced again since; nothing is restored then.
        """
        for owner, attribute, _, new in self._changes:
            if getattr(owner, attribute) is not new:
                raise ValueError(
                    f"{attribute} of a {type(owner).__name__} was replaced again after patch; take that back first"
                )
        _set(self._changes[::-1], new=False)
        self._changes = []

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.patched)} of {len(self.found)} places patched{self._coverage()}"]
        lines += [f"  {line}" for line in _grouped(self.patched)]
        lines += [f"  skipped {finding}" for finding in self.skipped]
        v = self.verification
        if v is None:
            return "\n".join([*lines, f"  not compared as a whole: {self.unverified}"] if self.unverified else lines)
        lines.append(f"  on {v.probe}: outputs differ by {v.outputs:.1e} (stock from fp64: {v.stock_outputs:.1e})")
        if v.gradients is not None:
            lines[-1] += f", gradients by {v.gradients:.1e} ({v.stock_gradients:.1e})"
        lines.append(f"  forward+backward {v.before_ms:.1f} ms before, {v.after_ms:.1f} ms after: x{v.speedup:.2f}")
        return "\n".join(lines)

    def _coverage(self) -> str:
        return f", {self.covered:,} of {self.total:,} parameters in them" if self.total else ""


def _set(changes: Sequence[Change], new: bool) -> None:
    for change in changes:
        setattr(change.owner, change.attribute, change.new if new else change.old)


def _grouped(findings: Sequence[Finding]) -> list[str]:
    """A line for each operation and class."""
    counts: dict[tuple[str, str], int] = {}
    for finding in findings:
        key = (finding.operation, finding.what)
        counts[key] = counts.get(key, 0) + 1
    return [f"{operation}: {count} x {what}" for (operation, what), count in counts.items()]
