"""The `kernels` suite: every operation against its peers, right first and then timed, in one run."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import bench_attention, bench_ema, bench_rows
from benchmarks.machine import here
from benchmarks.operations import Operation, Sizes
from benchmarks.timing import copy_bandwidth, matmul_rate, measure
from fastjepa.chips import chip

FILES = (bench_rows, bench_attention, bench_ema)
CHIPS = tuple(chip(name) for name in ("a100-80g", "h200"))  # that the written floors are for


def operations(device: torch.device) -> Iterator[Operation]:
    """Every operation, its inputs made when it is its turn."""
    sizes = Sizes.of(device)
    for file in FILES:
        yield from file.operations(sizes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeats", type=int, default=30)


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each operation and peer."""
    return measure_all(repeats=arguments.repeats)


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """The answers that are wrong."""
    return [f"{row['peer']} {row['operation']}: {row['wrong']}" for row in rows if "wrong" in row]


def measure_all(device: torch.device | None = None, repeats: int = 30) -> list[dict]:
    """A row for each operation and peer.

    A row has `wrong` and no time where an output or gradient is more than twice as far from the fp64 answer as plain
    PyTorch's; `absent` where the peer is not here. `floor_*` is what the declared bytes and FLOPs cost at least on a
    chip by its data sheet, `roof` the share of this machine's own measured copy and matmul rates that was reached.
    """
    device = device or here()
    rows = []
    for operation in operations(device):
        rows += rows_of(operation, device, repeats)
        gc.collect()
    return rows


def rows_of(operation: Operation, device: torch.device, repeats: int) -> list[dict]:
    """The rows of one operation; ours says how it stands against the best of the others."""
    cost = operation.cost
    floor = max(cost.bytes / copy_bandwidth(device), cost.flops / matmul_rate(device))
    common = {"operation": operation.name, "case": operation.case, "bytes": cost.bytes, "flops": cost.flops}
    common |= {f"floor_{c.name}_us": 1e6 * max(cost.bytes / c.bandwidth, cost.flops / c.flops) for c in CHIPS}
    exact = [x.cpu() for x in operation.exact()]
    rows, allowed = [], None
    for peer in operation.peers:
        row = {**common, "peer": peer.name}
        rows.append(row)
        if peer.absent:
            row["absent"] = peer.absent
            continue
        try:
            call = peer.make()
            errors = distances(call(), exact)
        except Exception as error:  # whatever a peer does, the others have their rows
            row["absent" if rows[1:] and "fastjepa" not in peer.name else "wrong"] = f"fails: {_first_line(error)}"
            continue
        allowed = allowed or [2 * error for error in errors]  # of the first peer, plain PyTorch
        row["error"] = max(errors)
        if wrong := worst(errors, allowed):
            row["wrong"] = wrong
            continue
        timing = measure(call, device, repeats)
        row |= {"ms": 1e3 * timing.median, "spread_ms": 1e3 * timing.spread, "host_us": 1e6 * timing.host}
        row |= {"GB/s": cost.bytes / timing.median / 1e9, "TFLOP/s": cost.flops / timing.median / 1e12}
        row["roof"] = floor / timing.median
        del call
    others = [row["ms"] for row in rows if "ms" in row and not row["peer"].startswith("fastjepa")]
    for row in rows:
        if row["peer"].startswith("fastjepa") and "ms" in row and others:
            row["best_peer_over_ours"] = min(others) / row["ms"]
    return rows


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def distances(got: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """|got - exact| / |exact| in the 2-norm of each tensor; infinite where not finite."""
    assert len(got) == len(exact)
    found = []
    for a, b in zip(got, exact, strict=True):
        distance = (a.detach().cpu().double() - b).norm()
        found.append(float(distance / b.norm().clamp(min=1e-300)) if bool(distance.isfinite()) else float("inf"))
    return found


def worst(errors: Sequence[float], allowed: Sequence[float]) -> str | None:
    """What is wrong with an answer, None where nothing is. Rounding units are allowed where PyTorch had luck."""
    for place, (error, limit) in enumerate(zip(errors, allowed, strict=True)):
        unit = 1e-6 if limit < 1e-5 else 4e-3  # of fp32 and of bf16 sums
        if not error <= max(limit, unit):
            return f"output {place} is {error:.1e} from the fp64 answer, {limit:.1e} allowed"
    return None


def table(rows: Sequence[dict]) -> str:
    """The rows for a person to read."""
    lines, shown = [], None
    for row in rows:
        if shown != (row["operation"], row["case"]):
            shown = row["operation"], row["case"]
            floors = ", ".join(f"{c.name} {row[f'floor_{c.name}_us']:.0f} us" for c in CHIPS)
            lines += ["", f"{row['operation']}: {row['case']} (floors by data sheet: {floors})"]
        if "ms" not in row:
            lines.append(f"  {row['peer']:<40} {row.get('absent') or 'WRONG: ' + row['wrong']}")
            continue
        line = f"  {row['peer']:<40} {row['ms']:9.3f} ms +- {row['spread_ms']:.3f}  host {row['host_us']:7.0f} us"
        line += f"  {row['GB/s']:7.0f} GB/s  {row['TFLOP/s']:7.2f} TFLOP/s  {100 * row['roof']:3.0f} % of the roof"
        if "best_peer_over_ours" in row:
            line += f"  {row['best_peer_over_ours']:.2f}x"
        lines.append(line)
    return "\n".join(lines)
