"""The README's numbers are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as command
from benchmarks.report import devices, markdown
from benchmarks.report.devices import grouped
from tests.benchmarks.report_rows import every_suite, machine, run, step


def test_the_readme_is_made_of_the_committed_results():
    page = markdown.README.read_text(encoding="utf-8")
    made = markdown.replaced(page, markdown.readme(devices.committed()[0]))
    assert page == made, "run python -m benchmarks report --readme"


def test_a_changed_number_shows():
    """What the test above rests on."""
    first, second = (grouped([("x", run("step", [step("eager", ms=ms)]))])[0] for ms in (100.0, 101.0))
    assert markdown.readme(first) != markdown.readme(second)


def test_no_device():
    text = markdown.readme([])
    assert text.startswith("No device has been measured yet.")
    assert "a100-80g" in text
    assert "|" not in text


def test_one_device():
    text = markdown.readme(grouped(("x", one) for one in every_suite())[0])
    assert text.count("| step |") == 1
    assert "| EMA | 1.50x torch foreach |" in text
    assert "masks of 128 images at 16x16 patches 0.400 ms" in text
    assert "pictures by Pillow 400 images/s a core" in text
    assert "batch 8 to 16: 80.0 to 160 images/s, truncated" in text
    assert "h200" not in text.splitlines()[-1]
    assert "a100-80g" in text.splitlines()[-1]


def test_many_devices():
    other = machine("NVIDIA L40S", "l40s")
    found = [*every_suite(), run("step", [step("eager")], of=other)]
    found.append(run("step", [step("eager", batch=64)], command="step --batch-size 64"))
    text = markdown.readme(grouped(("x", one) for one in found)[0])
    assert text.count("| step |") == 2
    assert "| step | batch |" in text  # of two commands on one device
    assert "`python -m benchmarks step`, `python -m benchmarks step --batch-size 64` on NVIDIA H200" in text
    assert "Not measured on NVIDIA L40S: kernels, scaling, swap, masks, input, host." in text


def test_the_region_alone_is_replaced(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    monkeypatch.setattr(markdown, "README", page)
    for says in ("has the committed results", "is as it was"):
        assert command.main(["report", "--readme"]) == 0
        assert says in capsys.readouterr().out
    lines = page.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", markdown.BEGIN, markdown.END, "after")
    assert "old" not in lines


@pytest.mark.parametrize(
    "page", ["nothing", f"{markdown.END} {markdown.BEGIN}", f"{markdown.BEGIN} {markdown.BEGIN} {markdown.END}"]
)
def test_a_readme_without_its_markers(page: str):
    with pytest.raises(ValueError, match="must have <!-- results:begin --> once"):
        markdown.replaced(page, "new")


def test_files_do_not_go_into_the_readme(capsys):
    assert command.main(["report", "some.json", "--readme"]) == 2
    assert "committed results alone" in capsys.readouterr().err
