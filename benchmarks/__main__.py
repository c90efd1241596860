"""`python -m benchmarks SUITE`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

# A suite is a module with add_arguments(parser), run(arguments) -> rows, table(rows) -> text, and
# faults(rows, arguments) -> lines, what is not as it has to be.
SUITES = {
    "kernels": "every operation against its peers",
    "step": "whole training steps: eager, compiled and ours in one run",
    "curve": "500 steps of training in bf16: ours within the scatter of eager's seeds",
    "scaling": "a training step against batch, tokens, width and parameters",
    "methods": "a step of MAE and data2vec on the same kernels, beside I-JEPA's",
    "swap": "models of other codebases before and after fastjepa.patch",
    "masks": "what drawing masks costs",
    "input": "what reading pictures costs",
    "codegen": "every kernel compiled for chips that need not be here",
    "emulate": "every operation compiled for a chip that is emulated: whether it is right, and what it moves",
    "launches": "what training launches, each held to what codegen compiles; nothing runs",
    "host": "what launching costs the processor, with no GPU needed",
    "count": "what a whole step launches, moves and allocates, by count; nothing runs",
    "budget": "the least time that each part of a step of ours can take, by count; nothing runs",
    "faults": "bad days of a run, each done to a real one, and what was lost",
    "fuzz": "hostile files for every reader, and whether each is read or refused as documented",
    "roofline": "what each operation costs at least, by count; nothing runs",
    "report": "tables and pictures of results",
}
# Suites whose rows are no machine's.
UNTIMED = ("codegen", "emulate", "launches", "roofline", "count", "budget", "faults", "fuzz", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite and print its table. 1 where something is not as it has to be, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    top = _Parser(prog="python -m benchmarks", description="What fastjepa costs, and what its peers cost.")
    top.add_argument("suite", choices=SUITES, metavar="SUITE", help="; ".join(f"{k}: {v}" for k, v in SUITES.items()))
    name = top.parse_args(argv[:1]).suite
    parser = _Parser(prog=f"python -m benchmarks {name}", description=SUITES[name])
    suite = import_module(f"benchmarks.{name}")
    suite.add_arguments(parser)
    if name != "report":
        parser.add_argument("--json", metavar="FILE", help="write the rows there, - for standard output")
    if name not in UNTIMED:
        parser.add_argument("--threads", type=int, help="of torch on the CPU; one is timed by processor time")
        parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/<device>")
    arguments = parser.parse_args(argv[1:])
    try:
        _set_threads(getattr(arguments, "threads", None))
        rows = suite.run(arguments)
        _put(name, argv, arguments, rows, suite.table(rows))
    except ValueError as error:
        print(f"python -m benchmarks {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    wrong = suite.faults(rows, arguments)
    if wrong:
        print(f"{len(wrong)} lines are not as they have to be:", *wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


def _set_threads(count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    if count is not None:
        torch.set_num_threads(count)


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


def _put(name: str, argv: list[str], arguments: argparse.Namespace, rows: list[dict[str, Any]], text: str) -> None:
    """Print the table or the JSON, and write what is asked for."""
    to = getattr(arguments, "json", None)
    if name in UNTIMED:
        content, head = json.dumps(rows, indent=1) + "\n", ""
    else:
        from benchmarks import results
        from benchmarks.machine import machine, summary

        run = results.run_of(name, shlex.join(["python", "-m", "benchmarks", *_without_outputs(argv)]), machine(), rows)
        content, head = results.document([run]), summary(run["machine"]) + "\n"
        if arguments.save:
            print(f"kept in {results.save(run)}", file=sys.stderr)
    if to == "-":
        print(content, end="")
        return
    print(head + text)
    if to:
        try:
            Path(to).write_text(content, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json: cannot write {to}: {error.strerror}") from error


def _without_outputs(argv: list[str]) -> list[str]:
    """The arguments that bear on the rows; of a path only its name, since the rest is this machine's."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--save" and word != "--json" and not word.startswith("--json="):
            kept.append(Path(word).name if Path(word).is_absolute() else word)
        skip = word == "--json" and not skip
    return kept


if __name__ == "__main__":
    sys.exit(main())
