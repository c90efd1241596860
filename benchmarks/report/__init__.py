"""The `report` suite: from results files, Markdown tables, a page with plots, and the README's numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import devices, markdown
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
    found, skipped = devices.read(arguments.files) if arguments.files else devices.committed()
    if skipped:
        print(f"skipped, no suite of {', '.join(SUITES)}: {'; '.join(skipped)}", file=sys.stderr)
    done = []
    if arguments.html:
        from benchmarks.report.page import page
        from benchmarks.report.plans import plans

        _write("--html", arguments.html, page(found, plans()))
        done.append(f"wrote {arguments.html}")
    if arguments.readme:
        old = _read(markdown.README)
        new = markdown.replaced(old, markdown.readme(found))
        _write("--readme", markdown.README, new)
        done.append(f"{markdown.README.name} {'is as it was' if new == old else 'has the committed results'}")
    if arguments.markdown not in (None, "-"):
        _write("--markdown", Path(arguments.markdown), markdown.report(found))
        done.append(f"wrote {arguments.markdown}")
    if done and arguments.markdown != "-":
        return [{"text": line} for line in done]
    print(*done, sep="\n", end="\n" if done else "", file=sys.stderr)
    return [{"text": markdown.report(found).rstrip()}]


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
