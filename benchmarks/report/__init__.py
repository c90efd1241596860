"""The `report` suite: from results files, Markdown tables, a page with plots, and the README's numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import compiled, devices, markdown
from benchmarks.report.devices import SUITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read, and what to make of it."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="default: all of benchmarks/results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there")
    parser.add_argument("--markdown", metavar="FILE", help="write tables there, - for standard output: the default")
    parser.add_argument("--readme", action="store_true", help="write the committed results into README.md")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Make what is asked for. A row holds a `text` for standard output.

    Raises:
        ValueError: a file that is no results file, a missing package, or a place that cannot be written.
    """
    if arguments.readme and arguments.files:
        raise ValueError("--readme is made of the committed results alone; leave the files out")
    listed = {path: compiled.read(path) for path in arguments.files}
    files = [path for path, rows in listed.items() if rows is None]
    found, skipped = devices.read(files) if arguments.files else devices.committed()
    kernels = compiled.summary([row for rows in listed.values() for row in rows or []]) or compiled.committed()
    if skipped:
        print(f"skipped, no suite of {', '.join(SUITES)}: {'; '.join(skipped)}", file=sys.stderr)
    done = []
    if arguments.html:
        if not arguments.html.parent.is_dir():  # known before the planning, which takes a while
            raise ValueError(f"--html: cannot write {arguments.html}: no folder {arguments.html.parent}")
        from benchmarks.report.page import page
        from benchmarks.report.plans import published_and_predicted

        _write("--html", arguments.html, page(found, published_and_predicted(), kernels))
        done.append(f"wrote {arguments.html}")
    if arguments.readme:
        old = _read(markdown.README)
        new = markdown.replaced(old, markdown.readme(found))
        _write("--readme", markdown.README, new)
        done.append(f"{markdown.README.name} {'is as it was' if new == old else 'has the committed results'}")
    if arguments.markdown not in (None, "-"):
        _write("--markdown", Path(arguments.markdown), markdown.report(found, kernels))
        done.append(f"wrote {arguments.markdown}")
    if done and arguments.markdown != "-":
        return [{"text": line} for line in done]
    print(*done, sep="\n", end="\n" if done else "", file=sys.stderr)
    return [{"text": markdown.report(found, kernels).rstrip()}]


def table(rows: list[dict[str, Any]]) -> str:
    """What is told."""
    return "\n".join(row["text"] for row in rows)


def faults(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """None: what is wrong in a file has ended the run."""
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _write(option: str, path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option}: cannot write {path}: {error.strerror}") from error
