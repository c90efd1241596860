"""A plan, and a check of the model, as tables for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastjepa.plan.check import ALLOWED, Compared
from fastjepa.plan.planning import grounds
from fastjepa.plan.settings import Settings

GIB = 2**30


def render(plan: dict[str, Any]) -> str:
    """Figures of each masking side by side, with what kind of ground each stands on, and then these grounds in full."""
    maskings = plan["maskings"]
    numbers: list[str] = []  # grounds in the order that they come up

    def ground(name: str) -> str:
        said = dict.fromkeys(m["basis"][name] for m in maskings.values())
        for basis in said:
            if basis not in numbers:
                numbers.append(basis)
        kinds = dict.fromkeys(kind for basis in said for kind in grounds(basis))
        return f"{' + '.join(kinds)} [{', '.join(str(numbers.index(basis) + 1) for basis in said)}]"

    lines = [["", *maskings, "rests on"]]
    lines += [[name, *(cell(m) for m in maskings.values()), ground(basis)] for name, cell, basis in _figures(plan)]
    times = [["ms a step", *maskings, "efficiency", "rests on"]]
    for part in plan["parts"]:
        cells = [f"{1e3 * m['parts'][part]['seconds']:.1f}" for m in maskings.values()]
        reached = [m["parts"][part]["efficiency"] for m in maskings.values()]
        efficiency = "" if None in reached else " / ".join(dict.fromkeys(f"{value:.0%}" for value in reached))
        times.append([part, *cells, efficiency, ground(f"parts.{part}")])
    times.append(["in all", *(f"{1e3 * m['seconds_per_step']:.1f}" for m in maskings.values()), "", ""])
    texts = [_head(plan), _table(lines), _table(times)]
    if plan["published"]:
        texts.append(_published(plan["published"]))
    texts += [f"does not fit: {name} masks, at most {m['largest_batch']} images a GPU"
              for name, m in maskings.items() if not m["fits"]]  # fmt: skip
    if plan["left_out"]:
        texts.append(f"planned without: {', '.join(plan['left_out'])}")
    return "\n\n".join([*texts, "\n".join(f"[{n}] {basis}" for n, basis in enumerate(numbers, start=1))])


def render_check(found: Sequence[Compared]) -> str:
    """Predicted over measured of every measured step."""
    if not found:
        return "no measured step to compare with"
    lines = [["measured step", "ms", "predicted", "ratio", "from"]]
    lines += [
        [str(c.measured), f"{c.measured.ms:.1f}", f"{c.predicted_ms:.1f}", f"{c.ratio:.3f}", c.basis] for c in found
    ]
    return f"{_table(lines)}\n\n{sum(c.within() for c in found)} of {len(found)} within {ALLOWED:.0%}"


def _figures(plan: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, what a masking's cell says, its basis) of each line."""
    figures = [
        ("hours", lambda m: f"{m['hours']:.1f}", "hours"),
        ("GPU-hours", lambda m: f"{m['gpu_hours']:.0f}", "gpu_hours"),
        ("hours at the roof", lambda m: f"{m['floor_hours']:.1f}", "floor_hours"),
        ("images/s a GPU", lambda m: f"{m['images_per_second_per_gpu']:.1f}", "images_per_second_per_gpu"),
        ("images/s", lambda m: f"{m['images_per_second']:.0f}", "images_per_second"),
        ("MFU", lambda m: f"{m['mfu']:.1%}", "mfu"),
        ("GFLOP an image", lambda m: f"{m['flops_per_image'] / 1e9:.1f}", "flops_per_image"),
        ("context tokens an image", lambda m: f"{m['context_tokens']:.1f}", "context_tokens"),
        ("peak memory, GiB", lambda m: f"{m['peak_memory_bytes'] / GIB:.1f}", "peak_memory_bytes"),
        ("largest batch a GPU", lambda m: f"{m['largest_batch']}", "largest_batch"),
        ("energy, kWh", lambda m: f"{m['energy_kwh']:.0f}", "energy_kwh"),
    ]
    if plan["cost"]:
        name = f"cost, {plan['cost']['currency']}"
        figures.append((name, lambda m: f"{m['cost']['total']:.2f}", "cost"))
    return [
        *figures,
        ("all-reduce a step, GB a GPU", lambda m: f"{m['communication']['bytes_per_gpu'] / 1e9:.2f}", "communication"),
        (
            "GB/s it needs to hide",
            lambda m: f"{m['communication']['needed_bytes_per_second'] / 1e9:.1f}",
            "communication",
        ),
        (
            "GB/s there are",
            lambda m: f"{m['communication']['link_bytes_per_second'] / 1e9:.0f}" if plan["gpus"] > 1 else "-",
            "communication",
        ),
        ("it hides", lambda m: "yes" if m["communication"]["hides"] else "no", "communication"),
        ("input a node, images/s", lambda m: f"{m['input']['images_per_second_per_node']:.0f}", "input"),
        ("input a node, MB/s", lambda m: f"{m['input']['megabytes_per_second_per_node']:.0f}", "input"),
        ("input a node, cores", lambda m: f"{m['input']['cores_per_node']:.1f}", "input"),
    ]


def _head(plan: dict[str, Any]) -> str:
    nodes = f" in {plan['nodes']} nodes" if plan["nodes"] > 1 else ""
    how = ", ".join([plan["implementation"], *Settings(**plan["settings"]).words])
    return (
        f"{plan['model']} at {plan['pixels']} px, predictor {plan['predictor']['width']}x{plan['predictor']['depth']}, "
        f"{plan['epochs']} epochs of {plan['images']:,} images, {how}\n"
        f"on {plan['gpus']} {plan['gpu']}{nodes}, {plan['batch_size']} images a GPU: {plan['steps']:,} steps"
    )


def _published(known: dict[str, Any]) -> str:
    return (
        f"for comparison: under {known['hours']:.0f} hours, {known['gpu_hours']:.0f} GPU-hours, "
        f"{known['images_per_second_per_gpu']:.1f} images/s a GPU, MFU {known['mfu']:.1%} on {known['gpu']} "
        f"({known['basis']})"
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
