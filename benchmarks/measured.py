"""What of the planner follows from measurements: the file it ships with, and what its document shows.

`python -m benchmarks.measured` rewrites fastjepa/plan/measured.json from every committed results file, then the tables
and the example of docs/planner.md; tests hold both to it. The shipped file is a results file itself, so the planner
reads it and those of the suites alike.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import results
from fastjepa.chips import CHIPS
from fastjepa.cli import parser
from fastjepa.plan import Order, plan, render
from fastjepa.plan.assumed import ASSUMPTIONS, LIKE, NETWORK, Assumption, fraction
from fastjepa.plan.layers import IMPLEMENTATIONS, LAYERS, Values
from fastjepa.plan.measured import PACKAGED, is_used, used_of

DOCUMENT = Path(__file__).parent.parent / "docs" / "planner.md"
EXAMPLE = "fastjepa plan --model vit_huge --patch-size 14 --gpu a100-80g --gpus 16"


def shipped(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs, the oldest first, the rows and entries that the planner uses; runs without any are left out."""
    found = [used_of(run) | {"rows": [used_of(run, row) for row in run["rows"] if is_used(run, row)]} for run in runs]
    return [run for run in found if run["rows"]]


def documented(text: str) -> str:
    """The document with every section between its markers, <!-- name --> and <!-- end -->, made anew."""
    for name, section in sections().items():
        before, rest = text.split(f"<!-- {name} -->")
        text = f"{before}<!-- {name} -->\n{section}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def sections() -> dict[str, str]:
    """Name -> Markdown of what the document takes from the code."""
    layers = [f"{name}:\n\n{_layer(name)}" for name in IMPLEMENTATIONS]
    return {"example": _example(), "layers": "\n\n".join(layers), "assumptions": _assumptions(), "chips": _chips()}


def main() -> None:
    """Rewrite the shipped file and the document."""
    argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__).parse_args()
    runs = shipped(results.committed())
    results.write(PACKAGED, runs)
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PACKAGED}: {sum(len(run['rows']) for run in runs)} rows of {len(runs)} runs; {DOCUMENT}")


def _example() -> str:
    options = vars(parser().parse_args(shlex.split(EXAMPLE)[1:]))
    return f"```\n$ {EXAMPLE}\n{render(plan(Order.of(options)))}\n```"


def _layer(name: str) -> str:
    layer = LAYERS[name]
    rows = []
    for place, operations in (("", layer.attention), ("", layer.tail)):
        for operation in operations:
            mixed = " (only where they differ)" if operation.mixed else ""
            cells = (_values(v) for v in (operation.forward, operation.backward, operation.kept))
            rows.append([f"{place}{operation.name}{mixed}", *cells])
    return _table(["operation", "forward", "backward", "kept"], rows)


def _values(values: Values) -> str:
    """As in the document: s and b times D, h times rD, w and w32 times heads and keys, 1/head, 1."""
    names = ("s", "b", "h", "w", "w32", "/head", "/token")
    return " + ".join(f"{count:g} {name}" for count, name in zip(values, names, strict=True) if count)


def _assumptions() -> str:
    return _table(["value", "of what, and where it is from"], [[_number(a), a.source] for a in ASSUMPTIONS])


def _chips() -> str:
    heads = ["GPU", "TFLOP/s", "GB/s", "GiB", "link GB/s", "network GB/s", "W", "data sheet", "efficiencies like"]
    heads += [f"{name}, assumed" for name in IMPLEMENTATIONS]
    rows = [
        [
            c.name, f"{c.flops / 1e12:g}", f"{c.bandwidth / 1e9:g}", f"{c.memory / 2**30:g}", f"{c.link / 1e9:g}",
            f"{NETWORK[c.name].value / 1e9:g}", f"{c.watts}", c.source, LIKE[c.name],
            *(f"{fraction(name, c.name).value:.1%}" for name in IMPLEMENTATIONS),
        ]
        for c in CHIPS
    ]  # fmt: skip
    return _table(heads, rows)


def _number(assumption: Assumption) -> str:
    value = assumption.value
    return f"{value:.3g}" if value < 1 else f"{value:,.0f}"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
