"""The report as Markdown that GitHub reads: all of it, and the short form that stands in the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.devices import SUITES, Device, unmeasured_chips
from benchmarks.report.tables import AXES, NOT_MEASURED, Table, digits, text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = Path(__file__).parents[2] / "README.md"


def report(devices: Sequence[Device], compiled: Table | None = None) -> str:
    """Every device, suite by suite; then what was compiled, and what was run where."""
    parts = ["# What was measured"]
    for device in devices:
        parts.append(f"## {device.name}")
        for suite, name in SUITES.items():
            if found := tables.tables_of(device, suite):
                parts += [f"### {name}", *map(headed, found)]
    if compiled:
        parts += ["## Compiled kernels", headed(compiled)]
    return "\n\n".join([*parts, "## What there is", headed(tables.coverage(devices))]) + "\n"


def readme(devices: Sequence[Device]) -> str:
    """The short form: a table of steps for each device, one of operations, and a line for what else there is."""
    parts: list[str] = []
    for device in devices:
        parts.append(f"**{device.name}**")
        steps = device.of("step")
        parts.append(headed(tables.step(steps)) if steps else f"Training steps: {NOT_MEASURED}.")
    leads = tables.leads(devices)
    if leads.rows:
        parts.append(headed(leads))
    parts += [line for device in devices if (line := small(device))]
    return "\n\n".join([*parts, *_gaps(devices)])


def small(device: Device) -> str:
    """What a device's masks, input and scaling rows come to, in a line; empty where it has none."""
    masks = [row for run in device.of("masks") for row in run["rows"] if row.get("median_ms")]
    read = [row for run in device.of("input") for row in run["rows"] if row.get("images_per_second_per_core")]
    read = [row for row in read if row.get("error") is not None]  # one that only decodes makes no crops
    scaled = [row for run in device.of("scaling") for row in run["rows"] if row.get("images_per_second")]
    said = []
    if masks:
        row = max(masks, key=lambda row: row["median_ms"])
        said.append(
            f"masks of {row['batch']} images at {row['patches']} patches {digits(row['median_ms'])} ms, the slowest"
        )
    if read:
        row = max(read, key=lambda row: row["images_per_second_per_core"])
        said.append(
            f"pictures by {row['engine']} {digits(row['images_per_second_per_core'])} images/s a core, the fastest"
        )
    said += [line for axis in AXES if (line := _ends(axis, [row for row in scaled if row["axis"] == axis]))]
    return f"{device.name}: {'; '.join(said)}." if said else ""


def _ends(axis: str, rows: Sequence[dict]) -> str:
    """Images a second of our truncated steps at the two ends of a scaling axis."""
    rows = sorted((row for row in rows if row["row"] == "fastjepa truncated"), key=lambda row: row["value"])
    if len(rows) < 2:
        return ""
    ends = (rows[0], rows[-1])
    values, rates = [f"{row['value']:g}" for row in ends], [digits(row["images_per_second"]) for row in ends]
    return f"{axis} {values[0]} to {values[1]}: {rates[0]} to {rates[1]} images/s, truncated"


def replaced(page: str, region: str) -> str:
    """A README with what is between the markers replaced.

    Raises:
        ValueError: not one pair of markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{README.name} must have {BEGIN} once, and {END} once after it")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{region.strip()}\n{END}{rest.partition(END)[2]}"


def headed(table: Table) -> str:
    """A table under its caption, with what made it below."""
    made: dict[str, list[str]] = {}
    for machine, command in table.sources:
        made.setdefault(machine, []).append(f"`{command}`")
    sources = [f"{', '.join(commands)} on {machine}" for machine, commands in made.items()]
    return "\n\n".join([table.caption, pipes(table), *(f"{note}." for note in table.notes), *sources])


def pipes(table: Table) -> str:
    """The lines of a table, numbers to the right."""
    places = range(len(table.heads))
    rules = ["--:" if table.numeric(place) else "---" for place in places]
    lines = [[_safe(text(cell)) for cell in row] for row in table.rows]
    lines = [line if len(line) == len(places) else [f"**{line[0]}**", *("" for _ in places[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[_safe(head) for head in table.heads], rules, *lines])


def _gaps(devices: Sequence[Device]) -> list[str]:
    """What there is no measurement of."""
    found = []
    if not devices:
        found.append("No device has been measured yet.")
    for device in devices:
        if device.unmeasured:
            found.append(f"{NOT_MEASURED.capitalize()} on {device.name}: {', '.join(device.unmeasured)}.")
    chips = unmeasured_chips(devices)
    return [*found, f"{NOT_MEASURED.capitalize()} yet, GPUs: {', '.join(chips)}."] if chips else found


def _safe(cell: str) -> str:
    """Without what Markdown would take for its own."""
    for mark in "\\|<*`":
        cell = cell.replace(mark, f"\\{mark}")
    return " ".join(cell.split())
