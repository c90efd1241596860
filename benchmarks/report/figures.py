"""Figures as inline SVG: made for a phone's width, told apart by hatches, markers and dashes before colours.

What was measured is filled. What was predicted, published or is from a data sheet is open or dashed, and says so.
matplotlib is imported only where it is used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

from benchmarks.report.devices import Device, Row, Run, failure, operations, ours, settings, title
from benchmarks.report.plans import Hours
from benchmarks.report.tables import AXES, NOT_MEASURED, digits, missed
from fastjepa.chips import CHIPS

INK, PALE = "#222222", "#b8b8b8"
WIDTH = 5.0  # inches, 360 points: those of a phone
STYLE = {
    "font.size": 11.5,
    "font.family": "DejaVu Sans",  # what widths are reckoned with; the page may show a narrower one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": "#e0e0e0",
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastjepa",
}
# Of the parts of a step, in the order they are stacked. Light and dark take turns, and no two hatches are the same.
PARTS: dict[str, dict[str, str]] = {
    "target": {"facecolor": "#1f4e79", "hatch": ""},
    "context": {"facecolor": "#f2c14e", "hatch": "///"},
    "predictor": {"facecolor": "#5f9e6e", "hatch": "..."},
    "loss": {"facecolor": "#ffffff", "hatch": "xxxx"},
    "optimizer": {"facecolor": "#c9c3d9", "hatch": "\\\\\\"},
}
# Of the ways to take a step.
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"color": "#8a8a8a", "marker": "o", "linestyle": ":"},
    "compiled": {"color": "#c8501e", "marker": "s", "linestyle": "--"},
    "fastjepa truncated": {"color": "#5f9e6e", "marker": "^", "linestyle": "-."},
    "fastjepa ragged": {"color": "#0b3c6f", "marker": "D", "linestyle": "-"},
    "fastjepa truncated, graphs": {"color": "#2f6b3f", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
    "fastjepa ragged, graphs": {"color": "#4f8fc9", "marker": "P", "linestyle": (0, (5, 1))},
    "fastjepa truncated, narrow stream": {"color": "#7fb88b", "marker": "<", "linestyle": (0, (1, 1))},
    "fastjepa truncated, checkpointing": {"color": "#3d7a4b", "marker": "p", "linestyle": (0, (5, 3))},
    "fastjepa truncated, predictor checkpointing": {"color": "#5b8a72", "marker": "d", "linestyle": (0, (9, 2))},
    "fastjepa truncated, 4 parts": {"color": "#8fa37a", "marker": "h", "linestyle": (0, (3, 3))},
    "fastjepa ragged, narrow stream": {"color": "#6f9fd8", "marker": ">", "linestyle": (0, (1, 2))},
    "fastjepa ragged, checkpointing": {"color": "#274f85", "marker": "X", "linestyle": (0, (7, 2))},
    "fastjepa ragged, predictor checkpointing": {"color": "#4a6fa0", "marker": "8", "linestyle": (0, (9, 4))},
    "fastjepa ragged, 4 parts": {"color": "#7a8fb0", "marker": "*", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
}
OTHER_WAY = {"color": "#555555", "marker": "x", "linestyle": (0, (1, 3))}
LEADS = {"facecolor": "#1f4e79", "hatch": ""}  # a peer takes longer than ours
TRAILS = {"facecolor": "#f3d9c8", "hatch": "////"}  # it is faster
PUBLISHED = {"facecolor": "#ffffff", "hatch": "..", "linestyle": "-"}  # by others, not measured here
GUESSED = {"facecolor": "#ffffff", "hatch": "//", "linestyle": "--"}  # predicted


@dataclass(frozen=True)
class Figure:
    """A figure: what it shows in plain words with units, its picture, a note, and a key to numbers in it."""

    title: str
    svg: str
    note: str = ""
    key: tuple[str, ...] = ()


def parts(run: Run) -> list[Figure]:
    """Milliseconds of each part of a step, stacked, a bar for each row."""
    rows = [row for row in run["rows"] if row.get("ms") or failure(row)]
    if not any(row.get("ms") for row in rows):
        return []

    def plot(axes: Any) -> None:
        for place, row in enumerate(rows):
            label = f"{row['row']}: {failure(row) or _took(row)}"
            _label(axes, place, label, bar=bool(row.get("ms")))
            start = 0.0
            if row.get("ms") and not row.get("parts_ms"):
                axes.barh(place, row["ms"], height=0.45, facecolor=PALE, edgecolor=INK)
            for part, took in (row.get("parts_ms") or {}).items():
                axes.barh(place, took, left=start, height=0.45, edgecolor=INK, linewidth=0.7, **PARTS.get(part, {}))
                start += took
        _bars(axes, len(rows), "milliseconds a step")
        axes.set_xlim(left=0)
        axes.figure.legend(
            [_patch(**style) for style in PARTS.values()], PARTS, ncols=3, loc="outside upper left", handlelength=2.2
        )

    shared, _ = settings(rows)
    alt = "; ".join(f"{row['row']} {failure(row) or _took(row)}{_split(row)}" for row in rows)
    heading = f"Where a training step's time goes, in milliseconds: {', '.join(shared[:3])}"
    note = "Context, predictor and loss with their backward passes; optimizer with the EMA and the gradient norms."
    note = ". ".join([", ".join(shared[3:]), note]) if shared[3:] else note
    return [Figure(heading, drawn(0.95 + 0.6 * len(rows), plot, f"{heading}. {alt}"), note)]


def speedups(run: Run) -> list[Figure]:
    """The time of every peer over ours, a figure for each operation, all on one scale."""
    groups = operations(run["rows"])
    fastest = [(rows, _fastest(rows)[0]) for rows in groups]
    ratios = [row["ms"] / mine["ms"] for rows, mine in fastest if mine for row in rows if row.get("ms")]
    if not ratios:
        return []
    low, high = min(0.5, *ratios) / 1.15, max(2.0, *ratios) * 1.15
    return [_speedup(rows, low, high) for rows in groups]


def _speedup(rows: Sequence[Row], low: float, high: float) -> Figure:
    mine = _fastest(rows)[0]
    found = [(row, row["ms"] / mine["ms"] if mine and row.get("ms") else None) for row in rows if row is not mine]
    found = sorted((pair for pair in found if not pair[0].get("absent")), key=lambda pair: pair[1] or high)
    said = [f"{row['peer']}: {_against(row, ratio)}" for row, ratio in found]

    def plot(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        for place, ((_, ratio), words) in enumerate(zip(found, said, strict=True)):
            _label(axes, place, words, bar=bool(ratio))
            if ratio:
                style = LEADS if ratio >= 1 else TRAILS
                axes.barh(place, ratio - 1, left=1, height=0.42, edgecolor=INK, linewidth=0.7, **style)
        _bars(axes, len(found), "its time over ours (over 1: ours is faster)")
        axes.axvline(1, color=INK, linewidth=1.2)
        _plain_log(axes.xaxis)

    heading = f"{title(rows[0])}: peers' time over ours"
    notes = [rows[0]["case"], rows[0].get("note"), mine and f"{mine['peer']} took {digits(mine['ms'])} ms"]
    absent: dict[str, list[str]] = {}
    for row in rows:
        if row.get("absent"):
            absent.setdefault(str(failure(row)), []).append(row["peer"])
    notes += [f"{why}: {' / '.join(peers)}" for why, peers in absent.items()]
    alt = f"{heading}. {'; '.join(said)}"
    svg = drawn(0.75 + 0.5 * len(found), plot, alt) if found else ""
    return Figure(heading, svg, f"{'; '.join(note for note in notes if note)}.")


def _against(row: Row, ratio: float | None) -> str:
    """How a peer stands against ours; its own time where ours has none."""
    if why := failure(row):
        return why
    return f"{digits(ratio)}x" if ratio else f"{digits(row['ms'])} ms" if row.get("ms") else NOT_MEASURED


def roofline(run: Run) -> list[Figure]:
    """Every operation by FLOPs a byte and FLOP/s, ours filled and its best peer open, under the machine's roof."""
    groups = [(rows, *_fastest(rows)) for rows in operations(run["rows"])]
    timed = [
        (rows, mine, peer)
        for rows, mine, peer in groups
        if (mine or peer) and all(rows[0].get(key) for key in ("bytes", "flops"))
    ]
    if not timed:
        return []
    machine = run["machine"]
    known = next((chip for chip in CHIPS if chip.name == machine["chip"]), None)
    roofs = [("measured", machine["copy_bandwidth"], machine["matmul_rate"], "-")]
    roofs += [("by data sheet, not measured", known.bandwidth, known.flops, "--")] if known else []
    unit, name = (1e12, "TFLOP/s") if machine["matmul_rate"] >= 1e12 else (1e9, "GFLOP/s")
    numbers = {id(rows): number for number, (rows, _, _) in enumerate(timed, 1)}

    def plot(axes: Any) -> None:
        points = [_point(row, unit) for _, mine, peer in timed for row in (mine, peer) if row]
        right = 3 * max([rate / copy for _, copy, rate, _ in roofs] + [x for x, _ in points])
        axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved at least", ylabel=f"{name} reached")
        axes.set_xlim(min(x for x, _ in points) / 2, right)
        axes.set_ylim(min(y for _, y in points) / 3, 2.5 * max(rate for _, _, rate, _ in roofs) / unit)
        left = axes.get_xlim()[0]
        for words, copy, rate, dashes in roofs:
            label = f"{words}: {digits(copy / 1e9)} GB/s, {digits(rate / unit)} {name}"
            corner = rate / copy
            axes.plot(
                [left, corner, right], [left * copy / unit, rate / unit, rate / unit], dashes, color=INK, label=label
            )
        for _, mine, peer in timed:
            if mine and peer:
                axes.plot(*zip(_point(mine, unit), _point(peer, unit), strict=True), color=PALE, linewidth=1, zorder=1)
        mines, peers = [mine for _, mine, _ in timed if mine], [peer for _, _, peer in timed if peer]
        for found, label, marker, filling, above in (
            (mines, "fastjepa", "o", INK, 3),
            (peers, "its best peer", "s", "white", 2),
        ):
            xy = [_point(row, unit) for row in found]
            axes.scatter(
                [x for x, _ in xy],
                [y for _, y in xy],
                s=34,
                facecolor=filling,
                marker=marker,
                edgecolor=INK,
                label=label,
                zorder=above,
            )
        at = [(numbers[id(rows)], _point(row, unit)) for rows, mine, peer in timed if (row := mine or peer)]
        _numbered(axes, at, points)
        axes.grid(True)
        for axis in (axes.xaxis, axes.yaxis):
            _plain_log(axis)
        axes.figure.legend(loc="outside upper left", handlelength=2.5)

    key = tuple(f"{numbers[id(rows)]}  {_standing(rows[0], mine, peer)}" for rows, mine, peer in timed)
    rest = [_standing(rows[0], mine, peer) for rows, mine, peer in groups if not any(rows is r for r, _, _ in timed)]
    note = "The number of a point is that of its operation; a line joins ours and its best peer."
    note += f" Not on the plot, without a FLOP or a time: {'; '.join(rest)}." if rest else ""
    note += " What is above the roof may have had its inputs in a cache." if machine["kind"] == "cpu" else ""
    heading = f"Roofline: {name} that each operation reached, against FLOPs per byte"
    return [Figure(heading, drawn(4.4, plot, f"{heading}. {'; '.join(key)}"), note, key)]


def _fastest(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Our fastest row and the fastest of the others, None where there is none."""
    timed = sorted((row for row in rows if row.get("ms")), key=lambda row: row["ms"])
    return next((r for r in timed if ours(r)), None), next((r for r in timed if not ours(r)), None)


def _point(row: Row, unit: float) -> tuple[float, float]:
    return row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e3 / unit


def _standing(row: Row, mine: Row | None, peer: Row | None) -> str:
    said = [f"{who} {digits(100 * found['roof'])} %" for who, found in (("ours", mine), ("best peer", peer))
            if found and found.get("roof") is not None]  # fmt: skip
    return f"{title(row)}: {', '.join(said)} of the roof" if said else f"{title(row)}: not measured"


def _numbered(
    axes: Any, marks: Sequence[tuple[int, tuple[float, float]]], points: Sequence[tuple[float, float]]
) -> None:
    """A number beside each point, at the first place around it that is free."""
    axes.figure.draw_without_rendering()  # the layout has to stand before distances can be told
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    around = [(reach * across, reach * up) for reach in (10, 15, 21) for across, up in sides]  # points away
    scale = 72 / axes.figure.dpi
    taken = [(place * scale).tolist() for place in axes.transData.transform(points)]
    for number, point in marks:
        x, y = (axes.transData.transform(point) * scale).tolist()
        free = (at for at in around if all(abs(x + at[0] - a) > 9 or abs(y + at[1] - b) > 9 for a, b in taken))
        dx, dy = next(free, around[0])
        taken.append((x + dx, y + dy))
        axes.annotate(str(number), point, (dx, dy), textcoords="offset points", ha="center", va="center", zorder=5)


def scaling(run: Run) -> list[Figure]:
    """Images a second along each axis, a line for each row."""
    found = []
    for axis in dict.fromkeys(row["axis"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["axis"] == axis]
        timed = [row for row in rows if row.get("images_per_second") and row["value"]]
        if not timed:
            continue
        heading = f"Images a second against {AXES.get(axis, axis)}: {', '.join(settings(rows)[0][:3])}"
        ways = list(dict.fromkeys(row["row"] for row in timed))
        alt = [f"{w}: " + ", ".join(f"{digits(r['images_per_second'])} at {r['value']}" for r in timed if r["row"] == w)
               for w in ways]  # fmt: skip

        def plot(axes: Any, timed: list[Row] = timed, ways: list[str] = ways, axis: str = axis) -> None:
            for way in ways:
                points = sorted((row["value"], row["images_per_second"]) for row in timed if row["row"] == way)
                axes.plot(
                    *zip(*points, strict=True), label=way, linewidth=2, markersize=6.5, **WAYS.get(way, OTHER_WAY)
                )
            values = sorted({row["value"] for row in timed})
            axes.set(xscale="log", yscale="log", xlabel=f"{AXES.get(axis, axis)} (log)", ylabel="images/s (log)")
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
            _plain_log(axes.yaxis)
            axes.grid(True)
            axes.figure.legend(loc="outside upper left", ncols=2, handlelength=3)

        lost = missed(rows)
        note = f"Not on the plot: {'; '.join(lost)}." if lost else ""
        found.append(Figure(heading, drawn(3.4, plot, f"{heading}. {'; '.join(alt)}"), note))
    return found


def hours(bars: Sequence[Hours]) -> Figure:
    """Hours of the published pretraining: published, and predicted for each form of masks."""
    lines = [(f"{bar.what}: {bar.hours:.3g} hours", bar.hours, GUESSED if bar.predicted else PUBLISHED) for bar in bars]

    def plot(axes: Any) -> None:
        for place, (words, value, style) in enumerate(lines):
            _label(axes, place, words)
            axes.barh(place, value, height=0.45, edgecolor=INK, **style)
        _bars(axes, len(lines), "hours")

    heading = "Hours to pretrain ViT-H/14 for 300 epochs on 16 A100: published, and predicted"
    alt = "; ".join(words for words, _, _ in lines)
    by_basis: dict[str, list[str]] = {}
    for bar in bars:
        by_basis.setdefault(bar.basis, []).append(f"{bar.hours:.3g}")
    key = tuple(f"{' and '.join(numbers)} hours: {basis}." for basis, numbers in by_basis.items())
    return Figure(heading, drawn(0.7 + 0.55 * len(lines), plot, f"{heading}. {alt}"), key=key)


def of_suite(device: Device, suite: str) -> list[list[Figure]]:
    """The figures of a device's runs of a suite, those of a kind together."""
    makers = {"step": [parts], "kernels": [roofline, speedups], "scaling": [scaling]}
    return [[f for run in device.of(suite) for f in make(run)] for make in makers.get(suite, [])]


def drawn(height: float, plot: Callable[[Any], None], alt: str) -> str:
    """What `plot` draws into axes, as SVG to stand in a page: the same text for the same input, on every machine.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'fastjepa[bench]'; Markdown tables do without") from error
    with style.context(["default", STYLE]):
        figure = Canvas((WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(written.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """Without its head, its own fonts, styles and names, which would be those of the whole page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(font: [^"]*?[\d.]+px) [^";]*', r"\1 sans-serif", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{escape(" ".join(alt.split()))}">'
    return re.sub(r"<svg.*?>", lambda _: head, svg, count=1, flags=re.DOTALL).strip()


def _label(axes: Any, place: int, words: str, bar: bool = True) -> None:
    """Words above the bar at this place, or in its stead, cut where a phone's width ends."""
    lines = wrap(words, 50)
    kept = lines[: 1 if bar else 2]
    if len(lines) > len(kept):
        kept[-1] = f"{kept[-1][:48]} …"
    at, side, style = (place - 0.27, "bottom", "normal") if bar else (place - 0.6, "top", "italic")
    across = axes.get_yaxis_transform()
    axes.text(0, at, "\n".join(kept), transform=across, va=side, ha="left", style=style)


def _bars(axes: Any, count: int, unit: str) -> None:
    """Axes of horizontal bars with their words above them."""
    axes.set_ylim(max(1, count) - 0.6, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)
    axes.grid(True, axis="x")


def _plain_log(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, where there are few decades at 2 and 5 too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = (high / low) >= 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _patch(**style: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(edgecolor=INK, linewidth=0.7, **style)


def _took(row: Row) -> str:
    over = row.get("eager_over_this")
    return f"{digits(row['ms'])} ms" + (f", {digits(over)}x eager" if over and row["row"] != "eager" else "")


def _split(row: Row) -> str:
    found = [f"{part} {digits(took)}" for part, took in (row.get("parts_ms") or {}).items()]
    return f" ({', '.join(found)})" if found else ""
