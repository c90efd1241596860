"""Hours of the published pretraining: as published, and as the planner predicts them."""

from __future__ import annotations

from typing import NamedTuple


class Hours(NamedTuple):
    """Of ViT-H/14 for 300 epochs on 16 A100: `what` in words, and the `basis`, what the figure rests on."""

    what: str
    hours: float
    basis: str
    predicted: bool = True


def published_and_predicted() -> list[Hours]:
    """The published hours, then ours for each form of masks."""
    from fastjepa.plan import Order, find_chip, plan, recipe
    from fastjepa.plan.planning import grounds

    found = plan(Order(recipe(), find_chip("a100-80g"), 16))
    published = Hours("published, at most", found["published"]["hours"], found["published"]["basis"], predicted=False)
    lines = [published]
    for masks, one in found["maskings"].items():
        basis = one["basis"]["hours"]
        lines.append(Hours(f"predicted ({grounds(basis)[0]}), {masks} masks", one["hours"], basis))
    return lines
