"""The examples of docs/pieces.md, run in order."""

from __future__ import annotations

import re
from pathlib import Path

import fastjepa

PAGE = Path(__file__).parents[2] / "docs" / "pieces.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def test_the_pieces_are_exported():
    for name in ("EMA", "AdamWEMA", "MaskCollator", "RaggedAttention", "TargetRows", "apply_masks"):
        assert name in fastjepa.__all__
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
