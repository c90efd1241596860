"""`python -m benchmarks SUITE`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Run a suite; print its table, write its JSON. 1 where something is not as it has to be."""
    arguments = _parser().parse_args()
    wrong: list[str] = []
    if arguments.suite == "codegen":
        from benchmarks import codegen

        compiled = codegen.compile_all(tuple(arguments.sm or codegen.CHIPS))
        rows, text = codegen.as_json(compiled), codegen.table(compiled)
        wrong = codegen.faults(compiled)
        if arguments.check:
            wrong += codegen.differences(compiled, arguments.check.read_text(encoding="utf-8"))
    elif arguments.suite == "kernels":
        from benchmarks import kernels

        rows = kernels.run(repeats=arguments.repeats)
        text = kernels.table(rows)
        wrong = [f"{row['peer']} {row['operation']}: {row['wrong']}" for row in rows if "wrong" in row]
    elif arguments.suite == "host":
        from benchmarks import host

        rows = host.measure()
        text = _table(rows)
    elif arguments.suite == "roofline":
        from benchmarks import roofline

        rows = roofline.measure()
        text = roofline.table(rows)
    elif arguments.suite == "masks":
        from benchmarks import masks

        rows = masks.measure()
        text = _table(rows)
    else:
        from benchmarks import step

        rows = step.measure(
            arguments.model, arguments.patch_size, arguments.batch_size, arguments.steps, arguments.threads
        )
        text = _table(rows)
    if arguments.json == "-":
        print(json.dumps(rows, indent=1))
    else:
        print(text)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if wrong:
        print(f"{len(wrong)} lines are not as they have to be:", *wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    codegen = suites.add_parser("codegen", help="compile every kernel for chips that need not be here")
    codegen.add_argument(
        "--sm", type=int, action="append", choices=(80, 86, 89, 90, 100, 120), help="default: 80 to 100"
    )
    codegen.add_argument(
        "--check", type=Path, metavar="TABLE", help="fail where this differs from a table printed before"
    )
    kernels = suites.add_parser("kernels", help="every operation against its peers")
    kernels.add_argument("--repeats", type=int, default=30)
    host = suites.add_parser("host", help="what launching costs the processor, with no GPU needed")
    roofline = suites.add_parser("roofline", help="what each operation costs at least, by count; nothing runs")
    masks = suites.add_parser("masks", help="what drawing masks costs")
    step = suites.add_parser("step", help="whole training steps, naive eager and ours, in one run")
    step.add_argument(
        "--model", default="vit_small", choices=[f"vit_{s}" for s in ("tiny", "small", "base", "large", "huge")]
    )
    step.add_argument("--patch-size", type=int, default=16)
    step.add_argument("--batch-size", type=int, default=16)
    step.add_argument("--steps", type=int, default=8)
    step.add_argument("--threads", type=int, default=2)
    for suite in (codegen, kernels, host, roofline, masks, step):
        suite.add_argument("--json", metavar="FILE", help="write the rows there, - for standard output")
    return parser


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in [columns, *cells])


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
