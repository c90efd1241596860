"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.report import figures, tables
from benchmarks.report.devices import SUITES, Device
from benchmarks.report.figures import Figure
from benchmarks.report.plans import Hours
from benchmarks.report.tables import NOT_MEASURED, Cell, Table, spans, text

STYLE = """
:root { color-scheme: light; --ink: #222; --pale: #666; --rule: #ccc; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-top: .5rem; border-top: 3px solid var(--ink); font-size: 1.4rem; }
h3 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
p, dl { max-width: 46rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .4rem; }
nav ul { padding-left: 1.2rem; }
a { color: #0b3c6f; }
code { font-size: .9em; }
.from { color: var(--pale); font-size: .85rem; margin: .3rem 0; max-width: none; }
.over th { background: #eee; border: 0; border-top: 2px solid var(--ink); white-space: normal; }
.figures, .many { margin: 1rem 0 1.5rem; }
.figures { display: grid; gap: 1.5rem 2rem; grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figure h4 { margin: 0 0 .4rem; font-size: 1rem; line-height: 1.35; }
figure svg { display: block; width: 100%; max-width: 33rem; height: auto; stroke-linejoin: round; }
svg text { paint-order: stroke; stroke: #fff; stroke-width: 3px; }
figcaption ul { list-style: none; margin: .4rem 0; padding: 0; }
figcaption li { padding-left: 1rem; text-indent: -1rem; }
.many { columns: 21rem; column-gap: 2rem; }
.many figure { margin-bottom: 1.5rem; }
figcaption { color: var(--pale); font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem .5rem; font-weight: 600; }
th, td { padding: .25rem .5rem; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
th { border-top: 0; border-bottom: 2px solid var(--ink); vertical-align: bottom; }
caption span, .over span { position: sticky; left: .5rem; display: inline-block; max-width: calc(100vw - 4rem); }
td:first-child { min-width: 8rem; }
td { min-width: 4rem; max-width: 22rem; }
.n { text-align: right; }
td.n { white-space: nowrap; }
summary { cursor: pointer; padding: .3rem 0; }
.none { border-left: 4px double var(--ink); padding-left: .6rem; }
@media (min-width: 50rem) {
  body { padding: 1.5rem 2rem; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .wide { grid-column: 1 / -1; display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 2rem; }
  .wide h4 { grid-column: 1 / -1; }
}
@media print {
  nav, #rows { display: none; } /* every row is in the results files */
  h2, h3, h4 { break-after: avoid; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7pt; }
}
"""
_NUMBER = ' class="n"'
WORDS = {
    "measured": "A filled bar or point, a number in a table: what a clock, a counter or an allocator said on the named "
    "device, in the run that is named below it.",
    "predicted": "An open, hatched bar with a dashed edge and the word. Reckoned, with what it rests on beside it.",
    "published": "An open, dotted bar and the word: what the paper says.",
    "by data sheet": "A dashed line: what NVIDIA says of the chip.",
    "wrong": "An output, a loss or a gradient was further from the fp64 answer than allowed, so there is no time.",
    "absent": "The peer is not installed there, or does not run there.",
    NOT_MEASURED: "Nobody has run it. A dash in a table is one value that was not measured.",
}


def page(devices: Sequence[Device], hours: Sequence[Hours], compiled: Table | None = None) -> str:
    """The page.

    Arguments:
        hours: of the published pretraining, published and predicted. compiled: what the kernels became, where known.

    Raises:
        ValueError: matplotlib is not installed.
    """
    parts = [*_head(devices), *_hours(hours)]
    for device in devices:
        parts += _device(device)
    parts += [*_there(devices), *_compiled(compiled), *_every_row(devices)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fastjepa: what was measured</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def html_table(table: Table) -> str:
    """A table in a box that scrolls by itself, with what made it below."""
    kinds = [_NUMBER if table.numeric(place) else "" for place in range(len(table.heads))]
    heads = "".join(f'<th scope="col"{kind}>{escape(head)}</th>' for head, kind in zip(table.heads, kinds, strict=True))
    lines = "\n".join(_line(table, row) for row in table.rows)
    box = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
        f"<caption><span>{escape(table.caption)}</span></caption><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )
    notes = [f'<p class="from">{escape(note)}.</p>' for note in table.notes]
    return "\n".join([box, *notes, *(_from(*source) for source in table.sources)])


def html_figure(figure: Figure) -> str:
    """A figure under its title."""
    key = "".join(f"<li>{escape(line)}</li>" for line in figure.key)
    note = f"<ul>{key}</ul>" * bool(key) + escape(figure.note)
    note = f"<figcaption>{note}</figcaption>" if note else ""
    wide = ' class="wide"' if key else ""
    return f"<figure{wide}><h4>{escape(figure.title)}</h4>{figure.svg}{note}</figure>"


def _head(devices: Sequence[Device]) -> Iterator[str]:
    yield "<header><h1>fastjepa: what was measured</h1>"
    names = ", ".join(device.name for device in devices)
    yield (
        f"<p>Training steps and operations of I-JEPA against their peers, on {escape(names)}.</p>"
        if names
        else (f'<p class="none">No device: {NOT_MEASURED}.</p>')
    )
    links = [("hours", "Hours on 16 A100"), *((device.slug, device.name) for device in devices)]
    links += [("there", "What there is"), ("compiled", "Compiled kernels"), ("rows", "Every row")]
    yield "<nav><ul>" + "".join(f'<li><a href="#{at}">{escape(name)}</a></li>' for at, name in links) + "</ul></nav>"
    yield "<dl>" + "".join(f"<dt>{escape(word)}</dt><dd>{escape(what)}</dd>" for word, what in WORDS.items()) + "</dl>"
    yield "</header>"


def _hours(hours: Sequence[Hours]) -> Iterator[str]:
    yield '<section id="hours"><h2>Hours on 16 A100</h2>'
    yield "<p>Nothing of this was measured here: one figure is published, the others are predicted.</p>"
    yield "<h3>Published, and predicted</h3>"
    yield f'<div class="figures">{html_figure(figures.hours(hours))}</div></section>'


def _device(device: Device) -> Iterator[str]:
    yield f'<section id="{device.slug}"><h2>{escape(device.name)}</h2>'
    for suite, name in SUITES.items():
        found = tables.tables_of(device, suite)
        if found:
            yield f"<h3>{escape(name)}</h3>"
        for drawn in figures.of_suite(device, suite):
            kind = "many" if len(drawn) > 4 else "figures"
            yield f'<div class="{kind}">{"".join(map(html_figure, drawn))}</div>'
        yield from map(html_table, found)
    if device.unmeasured:
        yield f'<p class="none">Suites {NOT_MEASURED} on {escape(device.name)}: {", ".join(device.unmeasured)}.</p>'
    yield "</section>"


def _there(devices: Sequence[Device]) -> Iterator[str]:
    yield f'<section id="there"><h2>What there is</h2>{html_table(tables.coverage(devices))}</section>'


def _compiled(found: Table | None) -> Iterator[str]:
    yield '<section id="compiled"><h2>Compiled kernels</h2>'
    if found is None:
        yield '<p class="none">No table of compiled kernels: <code>python -m benchmarks codegen</code></p>'
    else:
        yield "<p>Every shipped configuration, compiled without a GPU. Counted, not timed.</p>"
        yield html_table(found)
    yield "</section>"


def _every_row(devices: Sequence[Device]) -> Iterator[str]:
    yield '<section id="rows"><h2>Every row</h2>'
    yield "<p>As the results files have them. Columns that begin with floor are by data sheet, not measured.</p>"
    for device in devices:
        for run in device.runs:
            name = f"{device.name}: {run['command']}"
            yield f"<details><summary>{escape(name)}</summary>{html_table(tables.every_row(run))}</details>"
    yield "</section>"


def _line(table: Table, row: Sequence[Cell]) -> str:
    """A line of a table; a heading, and the reason for no numbers, go all the way to the right."""
    width = len(table.heads)
    if len(row) < width:
        return f'<tr class="over"><th colspan="{width}" scope="rowgroup"><span>{escape(text(row[0]))}</span></th></tr>'
    place = spans(row, table.numeric)
    if place is not None:
        cells = "".join(_cell(cell) for cell in row[:place])
        return f'<tr>{cells}<td colspan="{width - place}">{escape(text(row[place]))}</td></tr>'
    return f"<tr>{''.join(_cell(cell, table.numeric(at)) for at, cell in enumerate(row))}</tr>"


def _cell(cell: Cell, numeric: bool = False) -> str:
    return f"<td{_NUMBER if numeric else ''}>{escape(text(cell))}</td>"


def _from(machine: str, command: str) -> str:
    return f'<p class="from"><code>{escape(command)}</code> on {escape(machine)}</p>'
