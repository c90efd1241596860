"""Hours of the published pretraining as the planner predicts them."""

from __future__ import annotations

from typing import Any


def plans() -> dict[str, dict[str, Any]] | None:
    """{"truncated": {"hours", "basis"}, "ragged": ...} for ViT-H/14 on 16 A100; None without a planner."""
    return None
