"""The report's page: needs nothing but itself, shows every row, and is read without colours too."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.laps import PARTS
from benchmarks.report import compiled, figures, plans
from benchmarks.report.devices import grouped
from benchmarks.report.page import page
from benchmarks.report.plans import Hours
from benchmarks.step import ROWS
from fastjepa.plan import planning, recipe
from fastjepa.plan.work import draw
from tests.benchmarks.report_rows import every_suite, kernel, machine, point, run, step

pytest.importorskip("matplotlib")
HOURS = [
    Hours("published, at most", 72.0, "published: the paper", predicted=False),
    Hours("predicted (measured), truncated masks", 41.5, "measured: the step on this chip"),
    Hours("predicted (assumed), ragged masks", 52.5, "assumed: an efficiency"),
]


def html_of(*runs: dict) -> str:
    return page(grouped(("here.json", one) for one in runs)[0], HOURS)


@pytest.fixture(autouse=True)
def no_planning(monkeypatch):
    """Drawing masks for a plan takes a while."""
    monkeypatch.setattr(plans, "published_and_predicted", lambda: HOURS)


@pytest.fixture(scope="module")
def whole() -> str:
    return html_of(*every_suite(), run("step", [step("eager")], of=machine("AMD EPYC", None)))


class Seen(HTMLParser):
    """Tags with their attributes in order, and whether each was closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_needs_nothing_but_itself(whole: str):
    assert "http" not in whole
    seen = Seen(whole)
    assert not seen.open
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object", "embed", "image"}
    for tag, attributes in seen.tags:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", whole))
    assert "@import" not in whole
    targets = {a["href"][1:] for tag, a in seen.tags if tag == "a"}
    assert targets <= {a.get("id") for _, a in seen.tags}


def test_the_page_is_the_same_every_time(whole: str):
    again = html_of(*every_suite(), run("step", [step("eager")], of=machine("AMD EPYC", None)))
    assert again == whole


def test_headings_are_in_order_and_pictures_are_told(whole: str):
    seen = Seen(whole)
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = [attributes for tag, attributes in seen.tags if tag == "svg"]
    assert len(pictures) >= 6
    assert all(p["role"] == "img" and len(p["aria-label"]) > 40 for p in pictures)
    boxes = [attributes for tag, attributes in seen.tags if attributes.get("class") == "scroll"]
    assert len(boxes) == sum(tag == "table" for tag, _ in seen.tags)


def test_every_suite_and_row_is_there(whole: str):
    for words in ("fastjepa ragged", "torch foreach", "apex", "off", "images in a batch", "16x16", "Pillow", "GELU"):
        assert words in whole
    for one in every_suite():
        assert f"<code>{one['command']}</code>" in whole
        assert f"{one['suite']}: every row" in whole


def test_what_was_not_measured_is_said():
    text = html_of()
    assert "No device: not measured." in text
    for chip in ("a100-80g", "h200", "4090"):
        assert f"<td>{chip}</td><td>not measured</td>" in text
    text = html_of(run("masks", []))
    assert "Suites not measured on NVIDIA H200: step, kernels, scaling, swap, input, host." in text


def test_predictions_are_open_and_called_so(whole: str):
    svg = figures.hours(HOURS).svg
    assert "published, at most: 72 hours" in svg
    assert "predicted (assumed), ragged masks: 52.5 hours" in svg
    assert svg.count("<pattern") == 2  # no bar of it is filled
    assert all(style["facecolor"] == "#ffffff" for style in (figures.GUESSED, figures.PUBLISHED))
    assert figures.GUESSED["hatch"] not in [part["hatch"] for part in figures.PARTS.values()]
    assert "52.5 hours: assumed: an efficiency." in whole


def test_hours_are_the_planners(monkeypatch):
    """Of a few masks, so that it is quick."""
    monkeypatch.undo()
    monkeypatch.setattr(planning, "largest_batch", lambda *order: 1)
    monkeypatch.setattr(planning, "draw", lambda config, size, ragged, count=None: draw(config, size, ragged, 1))
    published, *predicted = plans.published_and_predicted()
    assert (published.hours, published.predicted) == (72.0, False)
    order = planning.Order(recipe(), planning.find_chip("a100-80g"), 16)
    for line, masks in zip(predicted, planning.MASKINGS, strict=True):
        found = planning.plan(order, masks)
        assert line.hours == found["hours"]
        assert line.basis == found["basis"]["hours"]
        assert line.what.startswith("predicted (")
        assert line.what.endswith(f"{masks} masks")


def test_parts_and_rows_differ_without_colours():
    assert tuple(figures.PARTS) == PARTS
    assert len({part["hatch"] for part in figures.PARTS.values()}) == len(PARTS)
    styles = [figures.WAYS.get(row, figures.OTHER_WAY) for row in ROWS]
    for key in ("marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == len(ROWS)
    assert figures.LEADS["hatch"] != figures.TRAILS["hatch"]
    (figure,) = figures.parts(run("step", [step("eager")]))
    assert figure.svg.count("<pattern") == len(PARTS) - 1  # one is plain


def test_a_row_without_a_right_answer_has_no_bar():
    rows = [
        step("eager"),
        step("compiled", ms=77.77, wrong="its loss is off"),
        step("official", ms=77.77, absent="gone"),
    ]
    text = html_of(run("step", rows), run("kernels", [kernel("x", 77.77, wrong="off"), kernel("fastjepa", 2.0)]))
    assert "77.8" not in text
    assert "77.77" not in text
    assert "compiled: WRONG: its loss is off" in text
    assert "official: absent: gone" in text
    (figure,) = figures.parts(grouped([("x", run("step", rows))])[0][0].runs[0])
    (alone,) = figures.parts(run("step", rows[:1]))
    assert bars(figure.svg) == bars(alone.svg)


def bars(svg: str) -> int:
    """How many shapes have one of the parts' fillings."""
    tree = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    fills = re.compile(r"fill: (url\(|#1f4e79)")
    return sum(bool(fills.search(e.get("style", ""))) for e in tree.iter("path") if e.get("clip-path"))


def test_bars_have_the_lengths_of_the_times():
    """A peer that takes 1.5 times as long, and one that takes 0.75 times, to either side of one."""
    rows = [kernel("slow", 4.0), kernel("fast", 1.0), kernel("fastjepa", 2.0, best_peer_over_ours=0.5)]
    (figure,) = figures.speedups(run("kernels", rows))
    tree = ElementTree.fromstring(figure.svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    drawn = [e for e in tree.iter("path") if e.get("clip-path") and "stroke: #222222" in e.get("style", "")]
    spans = []
    for path in drawn:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d", ""))]
        if max(xs) > min(xs):
            spans.append((min(xs), max(xs)))
    (left, middle), (start, right) = sorted(spans)
    assert middle == pytest.approx(start, abs=0.01)  # one
    assert middle - left == pytest.approx(right - start, abs=0.01)  # a half, and two, on a logarithmic scale


def test_absent_peers_are_named_together():
    rows = [kernel("a", absent="needs CUDA"), kernel("b", absent="needs CUDA"), kernel("c", wrong="off")]
    (figure,) = figures.speedups(run("kernels", [*rows, kernel("d", 3.0), kernel("fastjepa", 2.0)]))
    assert figure.note == "4 M parameters; fastjepa took 2.00 ms; absent: needs CUDA: a / b."
    assert "c: WRONG: off" in figure.svg


def test_peers_keep_their_times_where_ours_has_none():
    rows = [
        kernel("torch", 3.0),
        kernel("fastjepa", wrong="off"),
        kernel("torch", 3.0, "b"),
        kernel("fastjepa", 3.0, "b"),
    ]
    figure, _ = figures.speedups(run("kernels", rows))
    assert "torch: 3.00 ms" in figure.svg
    assert "fastjepa: WRONG: off" in figure.svg


def test_an_operation_without_flops_is_named_beside_the_roofline():
    (figure,) = figures.roofline(every_suite()[1])
    assert "1  EMA: ours 50.0 %, best peer 33.3 % of the roof" in figure.key
    assert "take rows" in figure.note
    assert "by data sheet, not measured: 4,800 GB/s, 989 TFLOP/s" in figure.svg
    assert "by data sheet" not in figures.roofline(every_suite()[1] | {"machine": machine("AMD EPYC", None)})[0].svg


def test_scaling_leaves_out_what_has_no_time():
    rows = [
        point("batch", 8, "eager"),
        point("batch", 16, "eager", absent="no memory"),
        point("width", 8, "x", absent="a"),
    ]
    (figure,) = figures.scaling(grouped([("x", run("scaling", rows))])[0][0].runs[0])
    assert figure.note == "Not on the plot: eager at 16: absent: no memory."


def test_names_are_text_and_nothing_else():
    rows = [kernel("<script>alert(1)</script>", 3.0), kernel("fastjepa", 2.0)]
    assert "<script" not in html_of(run("kernels", rows))


def test_without_matplotlib(tmp_path: Path, monkeypatch, capsys):
    results.write(tmp_path / "runs.json", every_suite())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["report", str(tmp_path / "runs.json"), "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'fastjepa[bench]'" in said
    assert not (tmp_path / "page.html").exists()
    assert command.main(["report", str(tmp_path / "runs.json")]) == 0


def test_the_command_writes_the_page(tmp_path: Path, capsys):
    results.write(tmp_path / "runs.json", every_suite())
    assert command.main(["report", str(tmp_path / "runs.json"), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_compiled_kernels_in_a_line_for_each_chip(tmp_path: Path):
    table = tmp_path / "codegen.txt"
    table.write_text(
        "triton 3.9.0\nkernel config sm regs spill shared load store occup. mma\n"
        "attention_fwd d24 bf16 64x32 w4 s2  80   72     8   8192  128   128   0.44 HMMA:16\n"
        "ema 512/32768 w4                    80   30     0      0  128   128   0.88\n"
        "ema 512/32768 w4                    90   31     0      0  128   128   0.75\n"
    )
    found = compiled.committed(table)
    assert found is not None
    assert found.rows == ((80, 2, 1, 72, 8, 8192, 0.44), (90, 1, 0, 31, 0, 0, 0.75))
    assert compiled.committed(tmp_path / "none.txt") is None
    committed = compiled.committed()
    assert committed is not None
    lines = compiled.TABLE.read_text(encoding="utf-8").splitlines()
    assert sum(int(str(row[1])) for row in committed.rows) == len(lines) - 2


def test_what_codegen_wrote_is_taken(tmp_path: Path, capsys):
    """As `make bench` leaves it beside the results; other lists are no results."""
    row = {"kernel": "ema", "config": "w4", "sm": 120, "registers": 30, "spill_bytes": 0, "shared_bytes": 0,
           "mma_instructions": {}, "load_bits": 128, "store_bits": 128, "occupancy": 0.88}  # fmt: skip
    (tmp_path / "codegen.json").write_text(json.dumps([row]))
    results.write(tmp_path / "runs.json", every_suite())
    files = [str(tmp_path / name) for name in ("codegen.json", "runs.json")]
    assert command.main(["report", *files, "--html", str(tmp_path / "page.html"), "--markdown", "-"]) == 0
    told = capsys.readouterr().out
    assert "| 120 | 1 | 0 | 30 | 0 | 0 | 0.880 |" in told
    assert "torch foreach" in told
    assert "Kernels compiled, by compute capability" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for odd in ([], [{**row, "registers": "many"}], [{"kernel": "ema"}]):
        (tmp_path / "codegen.json").write_text(json.dumps(odd))
        assert command.main(["report", *files]) == 2
        assert "codegen.json is not a results file" in capsys.readouterr().err
