"""A run as a job of SLURM, by submitit: it saves before the time is up or another job comes, and is queued again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastjepa.config import load_config
from fastjepa.training.stop import RESUMABLE

WARNING = 120  # seconds before a job's end in which it saves


class Job:
    """What each process of a job calls: the run, taken up where the job was last stopped."""

    def __init__(self, config: str, overrides: Sequence[str]):
        self.config, self.overrides = config, [*overrides, "runtime.resume=true"]

    def __call__(self) -> dict[str, Any]:
        """Train; what `fastjepa train --json` tells. A run that is asked to stop ends the process instead."""
        from fastjepa.training import train  # which takes a while to import

        helpers, environment = import_module("submitit.helpers"), import_module("submitit").JobEnvironment()
        if environment.num_tasks > 1:
            helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        result = train(load_config(self.config, self.overrides))
        if result.stopped:
            if result.stopped not in ("SIGTERM", "SIGINT"):  # those are of somebody who wants the job to end
                again = signal.Signals[f"SIG{environment.USR_SIG}"]
                signal.raise_signal(again)  # submitit's handler of it queues the job again, and ends the first process
            sys.exit(RESUMABLE)
        return {"steps": result.steps, "loss": result.loss, "checkpoint": str(result.checkpoint)}

    def checkpoint(self) -> Any:
        """The job as it is queued again (submitit asks)."""
        return import_module("submitit.helpers").DelayedSubmission(self)


def submit(
    config: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    processes_per_node: int | None = None,
    cpus_per_process: int = 8,
    hours: float = 24.0,
    requeues: int = 10,
    folder: str | Path = "runs/jobs",
    cluster: str | None = None,
    **slurm: Any,
) -> Any:
    """Submit a run.

    Arguments:
        config: a YAML file or the name of a shipped one; `overrides`: section.key=value.
        processes_per_node: one a GPU unless given, and one where there are no GPUs.
        hours: that the job may take each time it starts. requeues: how often it is queued again when they are over;
            preemption is not counted.
        folder: of the job's logs, which every node sees. Submitit keeps the job there as a pickle, and runs it.
        cluster: slurm, or local for processes on this machine; None: slurm where it is, else local.
        slurm: what else submitit takes, without its prefix: partition, account, qos, ...

    Returns:
        submitit's job.

    Raises:
        ValueError: settings of the run or the job that will not do, or submitit is missing.
    """
    try:
        submitit = import_module("submitit")
    except ImportError as error:
        raise ValueError("submitit is not installed; pip install 'fastjepa[slurm]'") from error
    processes = (gpus_per_node or 1) if processes_per_node is None else processes_per_node
    for name, value, least in (
        ("nodes", nodes, 1),
        ("gpus-per-node", gpus_per_node, 0),
        ("processes-per-node", processes, 1),
        ("cpus-per-process", cpus_per_process, 1),
        ("requeues", requeues, 0),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not hours * 3600 > 2 * WARNING:
        raise ValueError(
            f"--hours must be more than {2 * WARNING / 3600:.2f}, got {hours:g}: {WARNING} s are for saving"
        )
    file = Path(config)
    config = str(file.resolve()) if file.is_file() else config
    load_config(config, [*overrides, "runtime.resume=true"])  # what is wrong with it is said here, not in a log
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=requeues)
        executor.update_parameters(
            name="fastjepa",
            nodes=nodes,
            tasks_per_node=processes,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_process,
            timeout_min=round(hours * 60),
            slurm_signal_delay_s=WARNING,
            **{f"slurm_{name}": value for name, value in slurm.items() if value is not None},
        )
    except (RuntimeError, ValueError, NameError, AssertionError) as error:  # submitit's own, of what it cannot do
        raise ValueError(f"no job for cluster {cluster or 'auto'}: {' '.join(str(error).split())}") from error
    return executor.submit(Job(config, overrides))
