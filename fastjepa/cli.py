"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastjepa import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastjepa ARGV`; the exit status is 0, 2 for bad input (one line on stderr), 1 for a run that failed."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("fastjepa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if arguments.traceback:
            raise
        text = " ".join(str(error).split())
        print(f"fastjepa {arguments.command}: {text or type(error).__name__}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = _Parser(prog="fastjepa", description="I-JEPA pretraining, faster, with the official numbers.")
    top.add_argument("--version", action="version", version=f"fastjepa {__version__}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="pretrain a model", description="Pretrain as a YAML file says.")
    train.add_argument("config", help="YAML file (the official ones work unchanged) or the name of a shipped one")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings put on top of the file's"
    )
    train.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="pretrain and evaluate a small model here, in minutes")
    demo.add_argument("--data", metavar="FOLDER", type=Path, help="your own folder of pictures")
    demo.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    demo.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what is installed, and which backend each operation uses")
    doctor.add_argument("--json", metavar="FILE", help="write the report there, - for standard output")
    doctor.set_defaults(run=_doctor)
    return top


def _train(arguments: argparse.Namespace) -> int:
    from fastjepa.config import load_config
    from fastjepa.training import train

    result = train(load_config(arguments.config, arguments.overrides))
    summary = {"steps": result.steps, "loss": result.loss, "checkpoint": str(result.checkpoint)}
    if arguments.json:
        _write_json(summary, arguments.json)
    if arguments.json != "-":
        print(f"{result.steps} steps done, loss {result.loss:.4f}; checkpoint: {result.checkpoint}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fastjepa.demo import run_demo

    result = run_demo(arguments.data, arguments.out)
    if arguments.json:
        _write_json(result, arguments.json)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fastjepa import doctor

    report = doctor.report()
    if arguments.json:
        _write_json(report, arguments.json)
    if arguments.json != "-":
        print(doctor.render(report))
    return 0


def _write_json(value: object, where: str) -> None:
    text = json.dumps(value, indent=2)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")
