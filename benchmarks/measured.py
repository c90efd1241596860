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
from fastjepa.chips import CHIPS, chip
from fastjepa.cli import parser
from fastjepa.plan import Order, field_table, flops_per_image, plan, recipe, render
from fastjepa.plan.assumed import ASSUMPTIONS, LIKE, NETWORK, Assumption, fraction
from fastjepa.plan.layers import IMPLEMENTATIONS, LAYERS, Values
from fastjepa.plan.measured import PACKAGED, is_used, used_of
from fastjepa.plan.planning import IMAGENET
from fastjepa.plan.work import Models, draw

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
    found = {"example": _example(), "layers": "\n\n".join(layers), "assumptions": _assumptions(), "chips": _chips()}
    return found | {"field": field_table(), "costs": _costs(), "methods": _methods()}


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


def _costs() -> str:
    """What a step of each method computes, with one encoder, and what that comes to in 300 epochs."""
    rows = []
    for model, patch in (("vit_base", 16), ("vit_large", 16), ("vit_huge", 14)):
        config = recipe(None, {"model": model, "patch_size": patch, "batch_size": 128})
        models = Models.build(config)
        count = models.flops
        ours = {
            f"I-JEPA, {name}": sum(f.total for f in count.parts(draw(config, 128, ragged).mean.tokens).values()) / 128
            for name, ragged in (("truncated", False), ("ragged", True))
        }
        found = ours | flops_per_image(count.encoder, count.patch_values, count.num_patches)
        for method, flops in found.items():
            hours = flops * IMAGENET * 300 / (chip("a100-80g").flops * 3600)
            rows.append([f"{model}/{patch}", method, f"{flops / 1e9:,.0f}", f"{hours:,.0f}", f"{2 * hours:,.0f}"])
    return _table(["encoder", "method", "GFLOP an image", "A100-hours at the peak", "at half of it"], rows)


def _methods() -> str:
    """The committed rows of the `methods` suite, with their command and machine."""
    sections = []
    for run in results.committed():
        if run["suite"] == "methods":
            rows = [
                [r["method"], r["model"], str(r["batch"]), r["dtype"], f"{r['gflop_per_image']:.1f}", f"{r['ms']:,.0f}",
                 f"{r['images_per_second']:.2f}", f"{r['of_matmul_rate']:.0%}"]
                for r in run["rows"] if r.get("ms")
            ]  # fmt: skip
            heads = ["step of", "encoder", "batch", "dtype", "GFLOP an image", "ms", "images/s", "of matmul rate"]
            machine = run["machine"]
            threads = f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
            sections.append(f"{_table(heads, rows)}\n\n`{run['command']}` on {machine['device']}{threads}; torch "
                            f"{machine['torch']}; commit {machine['commit']}; {run['date'][:10]}")  # fmt: skip
    return "\n\n".join(sections) or "Not measured yet."


def _number(assumption: Assumption) -> str:
    value = assumption.value
    return f"{value:.3g}" if value < 1 else f"{value:,.0f}"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
