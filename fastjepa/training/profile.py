"""Profiles a few steps of a run: a trace with the parts of the step, and tables of where its time and memory go."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function, schedule

from fastjepa.data import Batch
from fastjepa.training.trace import MIB, WAIT, StepTrace

if TYPE_CHECKING:
    from fastjepa.training.engine import Trainer

WARMUP, ACTIVE = 5, 3  # steps before the profile and in it
LONGEST = 60  # characters of a name or of shapes in a table


def profiled(
    batches: Iterator[Batch], trainer: Trainer, end: int, say: Callable[[str], None]
) -> Generator[Batch, None, None]:
    """The same batches, up to step `end`; with runtime.profile a few of the steps taken on them are profiled.

    Once they are done, the trace and the tables are written to the run's folder and the tables said. Nothing of the
    profiler is left afterwards. A folder that cannot be written is said, and training goes on. Close it in the end.
    """
    if trainer.config.runtime.profile:
        if trainer.step < end:
            yield from _window(batches, trainer, end - trainer.step, say)
        else:
            say("no profile: no step is left to be taken")
    yield from batches


def _window(
    batches: Iterator[Batch], trainer: Trainer, count: int, say: Callable[[str], None]
) -> Generator[Batch, None, None]:
    """The batches of the warm-up and of the profile."""
    active = max(1, min(ACTIVE, count - 1))
    warm = min(WARMUP, count - active)
    device, marks, done = trainer.device, {}, False
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=max(0, warm - 1), warmup=min(1, warm), active=active, repeat=1)
    profiler = torch.profiler.profile(activities=kinds, schedule=plan, record_shapes=True, profile_memory=True)
    try:
        with profiler:
            for number in range(warm):
                yield next(batches)
                # What a step takes before the profiler gets ready, which it does for the last step of the warm-up.
                if number in (0, warm - 2, warm - 1):
                    _wait_for(device)
                    marks[number] = time.perf_counter()
                profiler.step()
            with Parts(trainer) as parts:
                for number in range(active):
                    parts.begin("data")
                    batch = next(batches)
                    parts.begin("to device")
                    yield batch
                    if number == active - 1 and device.type == "cuda":
                        parts.begin(WAIT)
                        _wait_for(device)
                    parts.end()
                    profiler.step()
        done = True
    finally:
        if not done:
            say("no profile: the run ended before the steps to be profiled were done")
    unprofiled = 1000 * (marks[warm - 2] - marks[0]) / (warm - 2) if warm > 2 else None
    write_profile(profiler, trainer, active, unprofiled, say)
    if active < ACTIVE or warm < WARMUP:
        say(f"the run is short: {warm} steps of warm-up and {active} in the profile instead of {WARMUP} and {ACTIVE}")


class Parts:
    """Named ranges for the parts of a step, from hooks that are there within `with` only.

    Each range begins where the one before ends, so together they are the whole step. The forward pass is taken apart by
    its modules; what lies between two of them goes to the earlier. Optimizer is its step and the zeroing of gradients.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.range: record_function | None = None
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> Parts:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        forward = {"target": model.target_encoder, "context": model.encoder, "predictor": model.predictor}
        for part, module in forward.items():
            self.undo.callback(module.register_forward_pre_hook(self._beginning(part)).remove)
        for module, following in ((model.predictor, "loss"), (model, "backward")):
            self.undo.callback(module.register_forward_hook(self._beginning(following)).remove)
        # torch's own hooks of a step run within the range that torch itself gives it, where no other can end.
        step, zero_grad = optimizer.step, optimizer.zero_grad

        def ranged_step(*args: Any, **kwargs: Any) -> Any:
            self.begin("optimizer")
            return step(*args, **kwargs)

        def ranged_zero_grad(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            self.begin("rest")

        for name, ranged in (("step", ranged_step), ("zero_grad", ranged_zero_grad)):
            setattr(optimizer, name, ranged)  # of this instance
            self.undo.callback(delattr, optimizer, name)
        return self

    def __exit__(self, *error: object) -> None:
        self.undo.close()
        self.end()

    def begin(self, part: str) -> None:
        """End the range that is open, and begin that of `part`."""
        self.end()
        self.range = record_function(part)
        self.range.__enter__()

    def end(self) -> None:
        """End the range that is open."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
        self.range = None

    def _beginning(self, part: str) -> Callable[..., None]:
        return lambda *_: self.begin(part)


def write_profile(
    profiler: torch.profiler.profile,
    trainer: Trainer,
    steps: int,
    unprofiled: float | None,
    say: Callable[[str], None],
) -> None:
    """Write the trace and the tables of the `steps` that were just taken, and say the tables and the files' names.

    Arguments:
        unprofiled: milliseconds of a step without the profiler, where known.
    """
    folder, tag = Path(trainer.config.logging.folder), trainer.config.logging.write_tag
    trace_file, tables_file = folder / f"{tag}-profile.json.gz", folder / f"{tag}-profile.md"
    try:
        trace = StepTrace(_exported(profiler), standing_bytes(trainer), trainer.device.type == "cuda")
    except (OSError, ValueError) as error:  # no room for the export, or it is cut short
        say(f"warning: no profile: the trace cannot be read ({error})")
        return
    text = tables(trace, f"{_about(trainer, steps)} {_cost(trace, unprofiled)}")
    say(text)
    trace.trace["traceEvents"] += trace.additions()
    packed = gzip.compress(json.dumps(trace.trace).encode(), compresslevel=5)
    for file, content in ((trace_file, packed), (tables_file, text.encode())):
        try:
            _write(file, content)
            say(f"profile: {file}")
        except OSError as error:
            say(f"warning: {file} is not written: {error.strerror or error}")


def tables(trace: StepTrace, about: str) -> str:
    """Where the time and the memory of a step go, as Markdown. `about` is what is said of the run."""
    times = trace.times()
    whole = {"part": "a step", "ms": trace.wall / 1000, "share": 1.0}
    kind = "kernels" if trace.on_device else "operators"
    lines = ["# Where a step's time goes", "", about, "", *_table([*times, whole]), ""]
    if trace.cuda and not trace.on_device:
        lines += ["The trace tells nothing of the GPU (CUPTI gave no events): these are the CPU's times.", ""]
    backward = sum(row["ms"] for row in times if row["part"].startswith("backward"))
    lines += [f"Backward is {backward:.4g} ms in all.", ""]
    if not trace.on_device:
        lines[-2] += f" No operator accounts for {100 * trace.unexplained():.1f} % of the step: Python and the loader."
    if trace.cuda:
        lines += ["## Host syncs a step", "", *_table(trace.syncs()), ""]
    lines += [f"## The largest {kind} by their own time", "", *_table(trace.kernels()), ""]
    held = (
        f"At most {trace.peak() / MIB:.4g} MiB are held; {trace.standing / MIB:.4g} MiB of it stay between steps "
        "(parameters, targets, the optimizer's state)."
    )
    if not trace.cuda:
        held += " On the CPU, memory that is neither among these nor made within the profiled steps is not counted."
    lines += ["# Where a step's memory goes", "", held, "", *_table(trace.memory()), ""]
    lines += ["## The operators that allocate most", "", *_table(trace.makers()), ""]
    return "\n".join(lines)


def standing_bytes(trainer: Trainer) -> int:
    """Bytes of the parameters, targets and optimizer state on the device."""
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *(v for v in states if isinstance(v, Tensor))]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == trainer.device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _about(trainer: Trainer, steps: int) -> str:
    config, device = trainer.config, trainer.device
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"the CPU, threads: {torch.get_num_threads()}"
    masks = "ragged" if config.mask.ragged else "cut to the shortest"
    dtype = "bf16" if config.meta.use_bfloat16 else "fp32"
    data = f"{config.data.batch_size} images, {config.data.crop_size} pixels, masks {masks}, {dtype}"
    return (
        f"Steps {trainer.step - steps} to {trainer.step - 1}: {config.meta.model_name}, {data}, "
        f"torch {torch.__version__}, on {where}."
    )


def _cost(trace: StepTrace, unprofiled: float | None) -> str:
    if unprofiled is None:
        return "The profiler makes a step slower; by how much is not known for so short a run."
    return f"A step took {trace.wall / 1000:.4g} ms under the profiler and {unprofiled:.4g} ms just before it."


def _exported(profiler: torch.profiler.profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fastjepa-") as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8", errors="replace"))


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows under their keys as the lines of a Markdown table; numbers to the right."""
    if not rows:
        return ["None."]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {head: all(isinstance(row[head], float) for row in rows if head in row) for head in heads}
    cells = [heads, *([_cell(head, row.get(head)) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width - 1) + ":" if numbers[head] else "-" * width for head, width in zip(heads, widths, strict=True)
    ]
    aligned = [
        [c.rjust(w) if numbers[h] else c.ljust(w) for h, c, w in zip(heads, line, widths, strict=True)]
        for line in cells
    ]
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]


def _cell(head: str, value: Any) -> str:
    if isinstance(value, float):
        if head == "share":
            return f"{100 * value:.1f} %"
        return f"{value:.4g}" if 5e-4 < value < 1000 else f"{value:.0f}"
    text = str(value or "").replace("|", "\\|")
    for noise in ("void ", "at::native::", "(anonymous namespace)::"):  # of kernels' names
        text = text.replace(noise, "")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
