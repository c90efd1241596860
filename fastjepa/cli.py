"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from fastjepa import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastjepa ARGV`; the exit status is 0, 2 for bad input (one line on stderr), 1 for a run that failed, 75 for
    one that a signal asked to stop: it has saved and can go on."""
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

    _add_submit(commands.add_parser("submit", help="train as a job of SLURM, queued again until it is done"))

    data = commands.add_parser("data", help="make shards of pictures", description="Pictures, before a run.")
    _add_pack(data.add_subparsers(dest="task", required=True, metavar="TASK"))

    demo = commands.add_parser("demo", help="pretrain and evaluate a small model here, in minutes")
    demo.add_argument("--data", metavar="FOLDER", type=Path, help="your own folder of pictures")
    demo.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    demo.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")
    demo.set_defaults(run=_demo)

    export = commands.add_parser("export", help="a checkpoint in another layout: official, transformers, ours")
    export.description = "Write a checkpoint in another layout; the weights stay bit for bit."
    _add_checkpoint(export)
    export.add_argument("--to", required=True, metavar="LAYOUT", help="transformers, official or fastjepa")
    export.add_argument("out", metavar="OUT", help="the folder (transformers) or file to write")
    export.add_argument("--json", metavar="FILE", help="write what was done there, - for standard output")
    export.set_defaults(run=_export)

    _add_eval(commands.add_parser("eval", help="probes of a checkpoint's encoder on a folder of labelled pictures"))

    _add_show(commands.add_parser("show", help="pictures of what a checkpoint's encoder sees"))

    doctor = commands.add_parser("doctor", help="what is installed, and which backend each operation uses")
    doctor.add_argument("--json", metavar="FILE", help="write the report there, - for standard output")
    doctor.set_defaults(run=_doctor)
    _add_plan(commands.add_parser("plan", help="hours, money and memory of a run on GPUs that need not be here"))
    return top


def _add_submit(command: argparse.ArgumentParser) -> None:
    """The options of `submit`."""
    command.description = "Submit a run to SLURM (by submitit): it saves before its time is up, and is queued again."
    command.add_argument("config", help="as of train")
    command.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="as of train")
    command.add_argument("--nodes", type=int, default=1, metavar="COUNT", help="default: %(default)s")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="COUNT", help="default: %(default)s")
    command.add_argument("--processes-per-node", type=int, metavar="COUNT", help="default: one a GPU")
    command.add_argument("--cpus-per-process", type=int, default=8, metavar="CORES", help="default: %(default)s")
    command.add_argument("--hours", type=float, default=24.0, help="that it may take each time; default: 24")
    command.add_argument("--requeues", type=int, default=10, metavar="COUNT", help="after them; default: %(default)s")
    for name in ("partition", "account", "qos", "constraint"):
        command.add_argument(f"--{name}", metavar="NAME", help="of SLURM")
    command.add_argument("--folder", default="runs/jobs", help="of the job's logs; default: %(default)s")
    command.add_argument("--cluster", choices=["slurm", "local"], help="default: SLURM where it is, else this machine")
    command.add_argument("--wait", action="store_true", help="until the job is done; then as train")
    command.add_argument("--json", metavar="FILE", help="write the job, or with --wait its result, there")
    command.set_defaults(run=_submit)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    """The options that say which encoder is meant."""
    command.add_argument("checkpoint", help="ours, an official .pth.tar, or a folder of transformers' IJepaModel")
    command.add_argument("--model", default="target_encoder", metavar="NAME", help="%(default)s (default) or encoder")
    command.add_argument("--num-heads", type=int, metavar="COUNT", help="where neither file nor width tells")


def _add_eval(command: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    command.description = "Judge a frozen encoder: linear, nearest-neighbour, low-shot and attentive probes."
    _add_checkpoint(command)
    command.add_argument("--data", required=True, metavar="FOLDER", help="class folders, or train and val with these")
    command.add_argument(
        "--test", metavar="FOLDER", help="judge by this one; default: the data's own, or a fifth of it"
    )
    command.add_argument("--probes", metavar="NAMES", help="some of linear,knn,low-shot,attentive; default: all")
    command.add_argument("--epochs", type=int, metavar="COUNT", help="of the linear probe; default: 28")
    command.add_argument("--attentive-epochs", type=int, metavar="COUNT", help="default: 20")
    command.add_argument("--neighbours", type=int, metavar="COUNT", help="default: 10")
    command.add_argument("--shots", metavar="NUMBERS", help="labels a class, or shares below 1; default: 0.01,5")
    command.add_argument("--seed", type=int, help="of splits, draws and orders; default: 0")
    command.add_argument("--batch-size", type=int, default=128, metavar="PICTURES", help="default: %(default)s")
    command.add_argument("--workers", type=int, default=0, metavar="COUNT", help="that read pictures; default: 0")
    command.add_argument("--device", default="auto", help="default: CUDA where there is one")
    command.add_argument("--confusion", metavar="PNG", type=Path, help="draw what each class is taken for")
    command.add_argument("--csv", metavar="FILE", type=Path, help="write the table there")
    command.add_argument("--json", metavar="FILE", help="write everything there, - for standard output")
    command.set_defaults(run=_eval)


def _add_show(command: argparse.ArgumentParser) -> None:
    """The options of `show`."""
    command.description = "Draw features, similarity, attention and masks as PNGs, and a page that holds them all."
    _add_checkpoint(command)
    command.add_argument("--data", required=True, metavar="PICTURES", help="a picture, or a folder of them")
    command.add_argument("--out", default="runs/show", metavar="FOLDER", help="default: %(default)s")
    command.add_argument("--count", type=int, default=4, metavar="PICTURES", help="default: %(default)s")
    command.add_argument("--scale", type=int, default=1, metavar="TIMES", help="larger pictures than in training")
    command.add_argument("--patch", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="default: some")
    command.add_argument("--seed", type=int, default=0, help="that chooses pictures and masks; default: 0")
    command.add_argument("--json", metavar="FILE", help="write the files' names there, - for standard output")
    command.set_defaults(run=_show)


def _add_pack(tasks: argparse._SubParsersAction) -> None:
    pack = tasks.add_parser(
        "pack",
        help="pictures into WebDataset shards",
        description="Pictures into tar shards with an index beside each, unchanged; called again, it goes on.",
    )
    pack.add_argument("source", help="a folder of pictures, shards or Parquet files, or a data set on disk")
    pack.add_argument("out", metavar="OUT", help="folder of the shards")
    pack.add_argument("--shard-size", type=int, default=5000, metavar="PICTURES", help="default: %(default)s")
    pack.add_argument("--shuffle", type=int, metavar="SEED", help="default: in the order of the source")
    pack.add_argument(
        "--restart-markers",
        action="store_true",
        help="JPEG pictures get them, without loss, and engine turbo reads crops of them faster (docs/input.md)",
    )
    pack.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read and rewrite; default: one for each core with --restart-markers, else 0, this one",
    )
    pack.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")
    pack.set_defaults(run=_pack)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    """The options of `plan`; None where nothing is asked for."""
    plan.description = "Plan a run by a written model, and say of each figure what it rests on."
    plan.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="as of train, all of them in one place"
    )
    plan.add_argument("--config", metavar="YAML", help="a file or a shipped name: all that a run is told")
    plan.add_argument("--model", metavar="NAME", help="default: vit_huge, or the configuration's")
    plan.add_argument("--patch-size", type=int, metavar="PIXELS", help="default: 14 for vit_huge, else 16")
    plan.add_argument("--crop-size", type=int, metavar="PIXELS", help="default: 224")
    plan.add_argument("--pred-depth", type=int, metavar="LAYERS", help="default: 12 from vit_large on, else 6")
    plan.add_argument("--pred-emb-dim", type=int, metavar="WIDTH", help="default: 384")
    plan.add_argument("--batch-size", type=int, metavar="IMAGES", help="on each GPU; default: 128")
    plan.add_argument("--epochs", type=int, help="default: 300")
    plan.add_argument("--images", type=int, help="of the data set; default: ImageNet-1k's 1281167")
    plan.add_argument("--nenc", type=int, help="contexts an image; default: 1")
    plan.add_argument("--npred", type=int, help="targets an image; default: 4")
    for name, default in (("enc-mask-scale", "0.85 1"), ("pred-mask-scale", "0.15 0.2"), ("aspect-ratio", "0.75 1.5")):
        plan.add_argument(f"--{name}", type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"default: {default}")
    plan.add_argument("--min-keep", type=int, metavar="PATCHES", help="default: 10")
    plan.add_argument("--masking", default="both", help="truncated, ragged, or both (default)")
    plan.add_argument("--implementation", default="fastjepa", help="fastjepa (default), compiled or eager")
    plan.add_argument("--gpu", default="a100-80g", metavar="NAME", help="default: %(default)s")
    plan.add_argument("--gpus", type=int, default=1, metavar="COUNT", help="default: %(default)s")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="COUNT", help="default: %(default)s")
    plan.add_argument("--network-gb-per-s", type=float, metavar="GB", help="out of a node; default: as its GPUs come")
    plan.add_argument("--images-per-core", type=float, metavar="RATE", help="that a core reads and crops a second")
    plan.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE")
    plan.add_argument("--price-per-kwh", type=float, metavar="PRICE")
    plan.add_argument("--currency", default="USD", help="default: %(default)s")
    plan.add_argument(
        "--measured", type=Path, metavar="JSON", help="results of the step suite in place of those shipped"
    )
    plan.add_argument("--check", action="store_true", help="predict every measured step from the others, and no run")
    plan.add_argument("--field", action="store_true", help="what other methods are published to reach and to cost")
    plan.add_argument("--json", metavar="FILE", help="write the plan there, - for standard output")
    plan.set_defaults(run=_plan)


def _train(arguments: argparse.Namespace) -> int:
    from fastjepa.config import load_config
    from fastjepa.training import train
    from fastjepa.training.stop import RESUMABLE

    result = train(load_config(arguments.config, arguments.overrides))
    summary = {"steps": result.steps, "loss": result.loss, "checkpoint": str(result.checkpoint)}
    if arguments.json:
        _write_json(summary, arguments.json)
    if arguments.json != "-":
        print(f"{result.steps} steps done, loss {result.loss:.4f}; checkpoint: {result.checkpoint}")
    return RESUMABLE if result.stopped and result.stopped != "SIGINT" else 0


def _submit(arguments: argparse.Namespace) -> int:
    from fastjepa.submit import submit

    ours = ("run", "command", "traceback", "wait", "json")
    job = submit(**{name: value for name, value in vars(arguments).items() if name not in ours})
    told = {"job": job.job_id, "logs": str(job.paths.stderr)}
    if arguments.json != "-":
        print("job {job}: {logs}".format(**told))
    if arguments.wait:
        if (failed := job.exception()) is not None:  # with the whole of a traceback in it
            lines = [line for line in str(failed).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
            print(
                f"fastjepa submit: the job failed: {lines[-1] if lines else ' '.join(str(failed).split())}",
                file=sys.stderr,
            )
            return 1
        told |= job.results()[0]  # each process tells the same
    if arguments.json:
        _write_json(told, arguments.json)
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from fastjepa.data.pack import pack
    from fastjepa.data.sources import open_pictures

    result = pack(
        open_pictures(arguments.source),
        arguments.out,
        arguments.shard_size,
        arguments.shuffle,
        restart_markers=arguments.restart_markers,
        workers=arguments.workers,
    )
    if arguments.json:
        _write_json(asdict(result), arguments.json)
    if arguments.json != "-":
        kept = f" ({result.kept} were there)" if result.kept else ""
        print(
            f"{result.pictures} pictures in {result.shards} shards{kept}, {result.bytes / 1e6:.1f} MB: {result.folder}"
        )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fastjepa.demo import run_demo

    result = run_demo(arguments.data, arguments.out)
    if arguments.json:
        _write_json(result, arguments.json)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fastjepa.export import export

    result = export(arguments.checkpoint, arguments.to, arguments.out, arguments.model, arguments.num_heads)
    if arguments.json:
        _write_json(result, arguments.json)
    if arguments.json != "-":
        print(f"{result['out']}: {result['parameters'] / 1e6:.1f} M parameters of the {arguments.model}")
        for note in result["notes"]:
            print(f"note: {note}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from fastjepa import evaluation

    asked = {name: getattr(arguments, name) for name in ("epochs", "attentive_epochs", "neighbours", "seed")}
    asked |= {
        "probes": arguments.probes and tuple(arguments.probes.split(",")),
        "shots": arguments.shots and _numbers("--shots", arguments.shots),
    }
    result = evaluation.evaluate_checkpoint(
        arguments.checkpoint,
        arguments.data,
        arguments.test,
        model=arguments.model,
        num_heads=arguments.num_heads,
        settings=evaluation.ProbeSettings(**{name: value for name, value in asked.items() if value is not None}),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.csv:
        evaluation.write_csv(result, arguments.csv)
    if arguments.confusion:
        title = f"Confusion of the {result['confusion_of']} probe, % of each class"
        evaluation.plot_confusion(result["confusion"], result["classes"], arguments.confusion, title)
    if arguments.json:
        _write_json(result, arguments.json)
    if arguments.json != "-":
        print(evaluation.render(result))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from fastjepa.evaluation.gallery import show_checkpoint

    files = show_checkpoint(
        arguments.checkpoint,
        arguments.data,
        arguments.out,
        model=arguments.model,
        num_heads=arguments.num_heads,
        count=arguments.count,
        scale=arguments.scale,
        patch=arguments.patch and tuple(arguments.patch),
        seed=arguments.seed,
    )
    if arguments.json:
        _write_json(files, arguments.json)
    if arguments.json != "-":
        print(files["page"])
    return 0


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas between, such as 0.01,5; got {text!r}") from None


def _doctor(arguments: argparse.Namespace) -> int:
    from fastjepa import doctor

    report = doctor.report()
    if arguments.json:
        _write_json(report, arguments.json)
    if arguments.json != "-":
        print(doctor.render(report))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from fastjepa import plan

    if arguments.overrides and (arguments.check or arguments.field):
        raise ValueError(f"--check and --field plan no run: leave out {' '.join(arguments.overrides)}")
    if arguments.check:
        found = plan.check(plan.steps_of(plan.read_runs(arguments.measured or plan.PACKAGED)))
        if arguments.json:
            _write_json(plan.comparison(found), arguments.json)
        if arguments.json != "-":
            print(plan.render_check(found))
        return 0 if all(compared.within() for compared in found) else 1
    if arguments.field:
        if arguments.json:
            _write_json([asdict(published) for published in plan.FIELD], arguments.json)
        if arguments.json != "-":
            print(plan.field_table())
        return 0
    order = plan.Order.of(vars(arguments))
    result = plan.plan(order, arguments.masking, arguments.measured)
    if arguments.json:
        _write_json(result, arguments.json)
    if arguments.json != "-":
        print(plan.render(result))
    return 0


def _write_json(value: object, where: str) -> None:
    text = json.dumps(value, indent=2)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")
