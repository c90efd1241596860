"""The measured steps that `fastjepa plan` ships with: what it reads, out of every committed results file.

`python -m benchmarks.measured` rewrites fastjepa/plan/measured.json after results were added; a test holds the two
together. The file is a results file itself, so the planner reads it and those of the suites alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from benchmarks import results
from fastjepa.plan.measured import PACKAGED, is_used, used_of


def shipped(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs, the oldest first, the rows and entries that the planner uses; runs without any are left out."""
    found = [used_of(run) | {"rows": [used_of(run, row) for row in run["rows"] if is_used(run, row)]} for run in runs]
    return [run for run in found if run["rows"]]


def main() -> None:
    """Rewrite the shipped file from the committed results."""
    argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__).parse_args()
    runs = shipped(results.committed())
    results.write(PACKAGED, runs)
    print(f"{PACKAGED}: {sum(len(run['rows']) for run in runs)} rows of {len(runs)} runs")


if __name__ == "__main__":
    main()
