"""The report: known rows give known tables, a wrong row never a time, and bad input one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.report import devices, markdown, tables
from benchmarks.report.devices import Device, grouped
from tests.benchmarks.report_rows import every_suite, kernel, kernels, machine, point, run, step


def of(*runs: dict) -> list[Device]:
    return grouped(("here.json", one) for one in runs)[0]


def saved(folder: Path, *runs: dict) -> Path:
    results.write(folder / "runs.json", runs)
    return folder / "runs.json"


def test_a_table_of_steps():
    wrong = {"row": "compiled", "model": "vit_huge/14", "batch": 128, "wrong": "its loss is 1.0e-01 from fp64"}
    rows = [step("eager"), wrong, step("fastjepa ragged", ms=50.04, eager_over_this=2.0)]
    (device,) = of(run("step", rows))
    assert markdown.pipes(tables.step(device.of("step"))).splitlines() == [
        "| step | pixels | dtype | steps | ms | images/s | context tokens/s | % of peak | peak GiB | eager over this |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |",
        "| eager | 224 | bf16 | 20 | 100 | 1,280 | 140,800 | 50.0 | 3.00 | 1.00 |",
        "| compiled | - | - | - | WRONG: its loss is 1.0e-01 from fp64 | - | - | - | - | - |",
        "| fastjepa ragged | 224 | bf16 | 20 | 50.0 | 1,280 | 140,800 | 50.0 | 3.00 | 2.00 |",
    ]
    text = markdown.report([device])
    assert "`python -m benchmarks step` on NVIDIA H200; torch 2.13.0, triton 3.9.0" in text
    assert "commit 0123456789; copy 4000 GB/s, matmul 700 TFLOP/s; 2026-01-02" in text
    assert "Training step: vit_huge/14, batch 128\n" in text


def test_a_table_of_operations():
    (device,) = of(run("kernels", kernels()))
    assert markdown.pipes(tables.kernels(device.of("kernels")[0])).splitlines() == [
        "| by | ms | GB/s | TFLOP/s | % of roof | time over ours | best peer over ours |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        "| **EMA: 4 M parameters** |  |  |  |  |  |  |",
        "| torch foreach | 3.00 | 1,333 | 0.333 | 33.3 | 1.50 |  |",
        "| off | WRONG: output 0 is 1.0e-01 from the fp64 answer, 2.0e-03 allowed | - | - | - | - |  |",
        "| apex | absent: not installed | - | - | - | - |  |",
        "| fastjepa | 2.00 | 2,000 | 0.500 | 50.0 | 1.00 | 1.50 |",
        "| **take rows: 4 M parameters** |  |  |  |  |  |  |",
        "| torch index_select | 4.00 | 1,000 | 0.250 | 25.0 | 0.800 |  |",
        "| fastjepa | 5.00 | 800 | 0.200 | 20.0 | 1.00 | 0.800 |",
    ]
    assert markdown.pipes(tables.leads([device])).splitlines()[2:] == [
        "| EMA | 1.50x torch foreach |",
        "| take rows | 0.800x torch index_select |",
    ]


@pytest.mark.parametrize("why", ["wrong", "absent"])
def test_a_row_without_a_right_answer_never_shows_a_time(why: str):
    """Even where a file says one."""
    rows = [kernel("torch", 7.7777, **{why: "so"}), kernel("fastjepa", 2.0)]
    steps = [step("eager"), step("compiled", ms=7.7777, images_per_second=7777.7, **{why: "so"})]
    grown = [point("batch", 8, "eager", images_per_second=7777.7, ms=7.7777, **{why: "so"})]
    made = of(run("kernels", rows), run("step", steps), run("scaling", grown))
    for text in (markdown.report(made), markdown.readme(made)):
        assert "7.78" not in text
        assert "7,77" not in text
    assert {"ms", "GB/s", "roof", "parts_ms", "images_per_second"}.isdisjoint(made[0].of("kernels")[0]["rows"][0])
    assert "WRONG: so" in markdown.report(made) or "absent: so" in markdown.report(made)


def test_on_a_processor_the_kernels_did_not_run():
    note = "On a processor the operations of fastjepa are PyTorch code: its kernels need a GPU."
    for has, of_machine in ((False, machine()), (True, machine("AMD EPYC", None))):
        made = of(run("kernels", kernels(), of=of_machine))
        assert (note in markdown.report(made), note in markdown.readme(made)) == (has, has)


def test_ours_wrong_has_no_lead():
    rows = [kernel("torch", 1.0), kernel("fastjepa", 1.0, wrong="nan", best_peer_over_ours=3.0)]
    assert tables.lead(of(run("kernels", rows))[0].of("kernels")[0]["rows"]) == "WRONG: nan"


def test_the_newest_run_of_each_command():
    old, new = (
        run("step", [step(name)], date) for name, date in (("eager", "2026-01-01T"), ("compiled", "2026-02-01T"))
    )
    other = run("step", [step("fastjepa ragged")], "2025-01-01T", command="step --batch-size 64")
    elsewhere = run("step", [step("eager")], "2025-01-01T", machine("NVIDIA H100 80GB HBM3", "h100"))
    first, second = of(new, old, other, elsewhere)
    assert (first.name, second.name) == ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    assert [[row["row"] for row in one["rows"]] for one in second.runs] == [["compiled"], ["fastjepa ragged"]]


def test_gpus_come_before_processors():
    names = [device.name for device in of(run("masks", [], of=machine("AMD EPYC", None)), run("masks", []))]
    assert names == ["NVIDIA H200", "AMD EPYC, 2 threads"]


def test_every_suite_and_row_is_in_the_tables():
    text = markdown.report(of(*every_suite()))
    for words in ("fastjepa ragged", "torch foreach", "apex", "images in a batch", "16x16", "Pillow", "DALI", "GELU"):
        assert words in text
    for suite in devices.SUITES:
        assert f"`python -m benchmarks {suite}`" in text


def test_scaling_says_where_memory_ended():
    rows = [point("batch", 8, "eager"), point("batch", 16, "eager", absent="fails: OutOfMemoryError")]
    (table,) = tables.scaling(of(run("scaling", rows))[0].of("scaling")[0])
    assert table.rows == ((8, 80.0, 3.0), (16, "absent", None))
    assert table.notes == ("eager at 16: absent: fails: OutOfMemoryError",)


def test_not_measured_is_said():
    text = markdown.report(of(run("masks", every_suite()[4]["rows"])))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        "| NVIDIA H200 | not measured | not measured | not measured | not measured | 2026-01-02 | not measured | "
        "not measured |" in lines
    )
    assert sum(line.count("not measured") for line in lines if line.startswith("| a100-80g")) == len(devices.SUITES)


def test_a_cell_stays_in_its_column():
    (device,) = of(run("kernels", [kernel("a|b <i>\nc", absent="x | y"), kernel("fastjepa", 1.0)]))
    line = next(line for line in markdown.report([device]).splitlines() if "a\\|b" in line)
    assert line.startswith("| a\\|b \\<i> c | absent: x \\| y | - |")


BAD = {
    "no file": (None, "No such file"),
    "not JSON": ("{", "is not JSON"),
    "other JSON": ('{"rows": []}', "is not a results file"),
    "a list": ("[1]", "is not a results file"),
    "another version": ('{"format": "fastjepa benchmarks", "version": 7, "runs": []}', "has version 7, and 1 is read"),
    "a row's key": ([run("step", [{"row": "eager"}])], "row 0 must have row, model, batch"),
    "a row": ([run("masks", ["x"])], "row 0 must have patches, batch, form"),
    "a time": ([run("step", [step("eager"), step("compiled", ms="fast")])], "row 1 has ms 'fast', no number"),
    "a part": ([run("step", [step("eager", parts_ms={"target": None})])], "parts_ms {'target': None}, no number"),
    "below zero": ([run("kernels", [kernel("torch", -1.0)])], "has ms -1.0, no number"),
    "a machine": ([run("masks", [], of={"device": "x"})], "its machine says no kind, chip, threads"),
    "a rate": ([run("masks", [], of=machine(copy_bandwidth=0))], "its machine says no copy_bandwidth;"),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_bad_files_end_with_one_line(tmp_path: Path, capsys, content, words: str):
    path = tmp_path / "runs.json"
    if isinstance(content, list):
        content = json.dumps({"format": results.FORMAT, "version": results.VERSION, "runs": content})
    if content is not None:
        path.write_text(content)
    assert command.main(["report", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert str(path) in said.err
    assert words in said.err


@pytest.mark.parametrize("option", ["--html", "--markdown"])
def test_a_place_that_cannot_be_written(tmp_path: Path, capsys, option: str):
    assert command.main(["report", str(saved(tmp_path)), option, str(tmp_path / "no" / "page")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks report: {option}: cannot write {tmp_path}/no/page: ")
    assert said.count("\n") == 1


def test_an_unknown_suite_is_skipped_and_named(tmp_path: Path, capsys):
    path = saved(tmp_path, run("masks", every_suite()[4]["rows"]), run("later", [{"x": 1}]))
    assert command.main(["report", str(path)]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"skipped, no suite of step, kernels, scaling, swap, masks, input, host: 'later' in {path}"
    ]
    assert "16x16" in said.out
    assert "later" not in said.out


def test_markdown_to_a_file_and_to_standard_output(tmp_path: Path, capsys):
    path = saved(tmp_path, *every_suite())
    assert command.main(["report", str(path), "--markdown", str(tmp_path / "out.md")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out.md'}\n"
    assert command.main(["report", str(path), "--markdown", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "out.md").read_text()
    assert command.main(["report", str(path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "out.md").read_text()
