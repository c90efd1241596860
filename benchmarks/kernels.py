"""The `kernels` suite: every operation against its peers, right first and then timed, in one run."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.machine import here
from benchmarks.operations import Operation, Peer, Run, Sizes
from benchmarks.timing import captured, copy_bandwidth, matmul_rate, measure
from fastjepa.chips import chip

# Of kernels/X.py and bench_X.py.
FILES = ("gather", "jepa_loss", "layer_norm", "gelu", "fp8", "attention", "ema", "adamw_ema")
CHIPS = tuple(chip(name) for name in ("a100-80g", "h200"))  # that the written floors are for

COLUMNS = (
    ("ms", "ms", "{:.3f}"),
    ("spread", "spread_ms", "{:.3f}"),
    ("by graph", "graph_ms", "{:.3f}"),
    ("host us", "host_us", "{:.0f}"),
    ("GB/s", "GB/s", "{:.3g}"),
    ("TFLOP/s", "TFLOP/s", "{:.3g}"),
    ("of roof", "roof", "{:.0%}"),
    ("ours is", "best_peer_over_ours", "{:.2f}x"),
)  # of the table: head, key, form
ON_A_GPU = ("by graph", "host us")


def operations(device: torch.device, files: Sequence[str] = FILES) -> Iterator[Operation]:
    """The operations of these files, their inputs made when it is their turn."""
    sizes = Sizes.of(device)
    for file in files:
        yield from import_module(f"benchmarks.bench_{file}").operations(sizes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which operations, and how often."""
    known = ", ".join(FILES)
    parser.add_argument("--operation", action="append", metavar="NAME", help=f"only this one, again for more: {known}")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each peer (default 30)")


def run(arguments: argparse.Namespace) -> list[dict]:
    """A row for each operation and peer.

    Raises:
        ValueError: an unknown operation, or no repeats.
    """
    files = arguments.operation or FILES
    unknown = [name for name in files if name not in FILES]
    if unknown:
        raise ValueError(f"--operation must be one of {', '.join(FILES)}, got {unknown[0]!r}")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
    return measure_all(repeats=arguments.repeats, files=[name for name in FILES if name in files])


def faults(rows: Sequence[dict], arguments: argparse.Namespace) -> list[str]:
    """The answers that are wrong."""
    return [f"{row['peer']} {row['operation']}: {row['wrong']}" for row in rows if "wrong" in row]


def measure_all(device: torch.device | None = None, repeats: int = 30, files: Sequence[str] = FILES) -> list[dict]:
    """A row for each operation and peer.

    A row has `wrong` and no time where an output or gradient is more than twice as far from the fp64 answer as plain
    PyTorch's; `absent` where the peer is not here or does not take the inputs. `floor_*` is what the declared bytes and
    FLOPs cost at least on a chip by its data sheet, `roof` the share of this machine's own measured copy and matmul
    rates that was reached, `graph_ms` the time of a replay as a CUDA graph.
    """
    device = device or here()
    rows = []
    for operation in operations(device, files):
        rows += rows_of(operation, device, repeats)
        gc.collect()
    return rows


def rows_of(operation: Operation, device: torch.device, repeats: int) -> list[dict]:
    """The rows of one operation; ours says how it stands against the best of the others."""
    cost, judge = operation.cost, Judge(operation)
    floor = max(cost.bytes / copy_bandwidth(device), cost.flops / matmul_rate(device))
    common = {"operation": operation.name, "case": operation.case}
    if operation.note:
        common["note"] = operation.note
    common |= {"bytes": cost.bytes, "flops": cost.flops, "launches": cost.launches}
    common |= {f"floor_{c.name}_us": 1e6 * max(cost.bytes / c.bandwidth, cost.flops / c.flops) for c in CHIPS}

    def times(peer: Peer, call: Run) -> dict:
        timing = measure(call, device, repeats)
        row = {"ms": 1e3 * timing.median, "spread_ms": 1e3 * timing.spread, "host_us": 1e6 * timing.host}
        row |= {"GB/s": cost.bytes / timing.median / 1e9, "TFLOP/s": cost.flops / timing.median / 1e12}
        replay = captured(call, device) if peer.graph else None
        graph = 1e3 * measure(replay, device, repeats).median if replay else None
        return row | {"roof": floor / timing.median, "graph_ms": graph}

    rows: list[dict] = [common | {"peer": peer.name} | judge.row(peer, times) for peer in operation.peers]
    others = [row["ms"] for row in rows if "ms" in row and not ours(row)]
    for row in rows:
        if ours(row) and "ms" in row and others:
            row["best_peer_over_ours"] = min(others) / row["ms"]
    return rows


def ours(row: dict) -> bool:
    """Whether a row is this library's."""
    return row["peer"].startswith("fastjepa")


class Judge:
    """Holds the peers of an operation to its fp64 answer: at most twice as far from it as plain PyTorch, the first."""

    def __init__(self, operation: Operation):
        self.exact = [x.detach().cpu() for x in operation.exact()]
        assert all(x.dtype == torch.float64 for x in self.exact), "the answer is rounded"
        self.allowed = [2 * error for error in distances(operation.peers[0].make()(), self.exact)]

    def row(self, peer: Peer, times: Callable[[Peer, Run], dict]) -> dict:
        """What a peer's row has of its own: `absent`, or `error` and `wrong`, or `error` and what `times` finds.

        Whatever a peer raises is a line of its row, so that the others have theirs; this is the only such place.
        """
        if peer.absent:
            return {"absent": peer.absent}
        try:
            call = peer.make()
            errors = distances(call(), self.exact)
            wrong = worst(errors, self.allowed)
            return {"error": max(errors)} | ({"wrong": wrong} if wrong else times(peer, call))
        except Exception as error:
            said = f"fails: {type(error).__name__}: {error}".splitlines()[0][:100]
            return {"wrong" if peer.name.startswith("fastjepa") else "absent": said}


def distances(got: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """|got - exact| / |exact| in the 2-norm of each tensor; infinite where not finite, or of another shape."""
    found = []
    for a, b in zip(got, exact, strict=True):
        if a.shape != b.shape:
            found.append(float("inf"))
            continue
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
    """The rows for a person to read, at most 120 columns wide; what only a GPU has is left out where nothing has it."""
    columns = COLUMNS if any(row.get("graph_ms") for row in rows) else [c for c in COLUMNS if c[0] not in ON_A_GPU]
    lines, shown = [], None
    for row in rows:
        if shown != (row["operation"], row["case"]):
            shown = row["operation"], row["case"]
            floors = ", ".join(f"{c.name} {row[f'floor_{c.name}_us']:.3g} us" for c in CHIPS)
            counted = f"{row['bytes'] / 1e6:.3g} MB, {row['flops'] / 1e9:.3g} GFLOP"
            lines += ["", f"{row['operation']}: {row['case']}"[:120], f"  {counted}; by data sheet at least {floors}"]
            lines += [f"  {row['note']}"[:120]] if "note" in row else []
            lines.append(f"  {'':<31}" + "".join(f"{head:>10}" for head, _, _ in columns))
        if "ms" in row:
            cells = ("-" if row.get(key) is None else form.format(row[key]) for _, key, form in columns)
            lines.append(f"  {row['peer']:<31}" + "".join(f"{cell:>10}" for cell in cells).removesuffix("-").rstrip())
        else:
            said = f"absent: {row['absent']}" if "absent" in row else f"WRONG: {row['wrong']}"
            lines.append(f"  {row['peer']:<31}{said}"[:120])
    return "\n".join(lines)
