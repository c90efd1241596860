"""What a run writes as it goes: the CSV file, the progress bar, messages, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fastjepa.config import Config

COLUMNS = ("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)")  # the official file's
OURS = (
    *("step", "lr", "weight_decay", "momentum", "images/s", "context tokens", "mfu", "rankme", "feature std"),
    *("grad norm", "skipped"),
)
SKIPPED = ("step", "picture")  # of the file of skipped steps
FORMATS = {
    "loss": "%.5f",
    "mask-A": "%.5f",
    "mask-B": "%.5f",
    "time (ms)": "%d",
    "lr": "%.6e",
    "weight_decay": "%.5f",
    "momentum": "%.7f",
    "images/s": "%.1f",
    "mfu": "%.4f",
    "rankme": "%.2f",
    "feature std": "%.5f",
    "grad norm": "%.6e",
}


class Tracker(Protocol):
    """Something that takes the numbers of a step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of step `step`."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class CSVLog:
    """The rows of a run. A resumed run drops the rows that its checkpoint does not know of, and goes on."""

    def __init__(self, path: Path, start: int, columns: Sequence[str] = COLUMNS + OURS):
        rows = []
        if start and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
            rows = [row for row in rows if int(row["step"]) < start]
        self.file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.writer: csv.DictWriter[str] = csv.DictWriter(self.file, columns, extrasaction="ignore", restval="")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def log(self, values: Mapping[str, float | str], step: int) -> None:
        """Append a row."""
        del step  # is among the values
        self.writer.writerow({k: FORMATS[k] % v if k in FORMATS else v for k, v in values.items()})

    def flush(self) -> None:
        """Hand what was logged to the system."""
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoardLog:
    """Scalars for TensorBoard, in the run's folder."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "logging.tensorboard needs the package tensorboard: pip install 'fastjepa[track]'"
            ) from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """Log each number under its name."""
        for name, value in values.items():
            self.writer.add_scalar(name.replace(" ", "_"), value, step)

    def close(self) -> None:
        """Write out what is left."""
        self.writer.close()


class WandbLog:
    """Scalars for Weights & Biases."""

    def __init__(self, project: str, config: Config):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logging.wandb needs the package wandb: pip install 'fastjepa[track]'") from error
        self.run: Any = wandb.init(project=project, config=config.to_dict(), dir=config.logging.folder, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        """Log every number of the step."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class RunLog:
    """Everything a run says: rows to the CSV and the trackers, one line of progress, messages above it."""

    def __init__(self, config: Config, start: int, total: int):
        self.config = config
        folder, tag = Path(config.logging.folder), config.logging.write_tag
        self.csv = CSVLog(folder / f"{tag}_r0.csv", start)
        self.skips = CSVLog(folder / f"{tag}-skipped.csv", start, SKIPPED)
        self.trackers: list[Tracker] = [self.csv]
        if config.logging.tensorboard:
            self.trackers.append(TensorBoardLog(folder))
        if config.logging.wandb:
            self.trackers.append(WandbLog(config.logging.wandb, config))
        shown = config.runtime.progress and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not shown, dynamic_ncols=True, smoothing=0.05)
        self.spoke = time.monotonic()

    def say(self, message: str) -> None:
        """A message that stays on the screen."""
        tqdm.write(message, file=sys.stderr)

    def skipped(self, step: int, why: str, names: list[str]) -> None:
        """Say that a step was skipped, and write the names of all its pictures to a file of their own."""
        for name in names:
            self.skips.log({"step": step, "picture": name}, step)
        self._flush(self.skips)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        self.say(f"warning: step {step} was skipped: {why}; its pictures, in {self.skips.file.name}, are {shown}")

    def rows(self, rows: list[dict[str, float]]) -> None:
        """Log the rows of consecutive steps and move the progress bar.

        A disk that takes no more rows is said aloud; the run goes on.
        """
        for row in rows:
            for tracker in self.trackers:
                tracker.log(row, int(row["step"]))
        self._flush(self.csv)
        shown = {k: v for k, v in progress(rows[-1]).items() if v}
        self.bar.update(len(rows))
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and self.config.runtime.progress and time.monotonic() - self.spoke >= 10:
            self.spoke = time.monotonic()
            step = int(rows[-1]["step"]) + 1
            left = (self.bar.total - step) * rows[-1]["time (ms)"] / 1000
            said = ", ".join(f"{k} {v}" for k, v in shown.items())
            self.say(f"step {step}/{self.bar.total}: {said}, {tqdm.format_interval(left)} left")

    def _flush(self, file: CSVLog) -> None:
        try:
            file.flush()
        except OSError as error:
            self.say(f"warning: {file.file.name}: {error.strerror or error}; rows are missing from it")

    def close(self) -> None:
        """Close every file and tracker."""
        self.bar.close()
        for tracker in (*self.trackers, self.skips):
            tracker.close()


class NoLog:
    """That of a process that does not speak for all."""

    def say(self, message: str) -> None:
        """Nothing is said."""

    def skipped(self, step: int, why: str, names: list[str]) -> None:
        """Nothing is said."""

    def rows(self, rows: list[dict[str, float]]) -> None:
        """Nothing is logged."""

    def close(self) -> None:
        """There is nothing to close."""


def progress(row: dict[str, float]) -> dict[str, str]:
    """The numbers of a step that a person watches."""
    return {
        "loss": f"{row['loss']:.4f}",
        "images/s": f"{row['images/s']:.0f}",
        "MFU": f"{100 * row['mfu']:.1f}%" if "mfu" in row else "",
        "lr": f"{row['lr']:.1e}",
        "momentum": f"{row['momentum']:.5f}",
        "context": f"{row['context tokens']:.0f}",
        "rankme": f"{row['rankme']:.1f}" if "rankme" in row else "",
    }
