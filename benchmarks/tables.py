"""Rows as plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def columns(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under their keys, in columns."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in [heads, *cells])
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
