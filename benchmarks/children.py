"""Forked processes that are struck: what becomes of one of them is no matter of the others."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

PATIENCE = 600.0  # seconds that one may take


def forked(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A started process that calls `target`."""
    torch.set_num_threads(1)  # threads of this process would not come with the child, which would wait for them
    child = multiprocessing.get_context("fork").Process(target=_run, args=(target, arguments))
    gc.freeze()  # what is garbage here is not the child's: its end may wait for threads that did not come along
    child.start()
    gc.unfreeze()
    return child


def ended(child: multiprocessing.process.BaseProcess, patience: float = PATIENCE) -> int:
    """Its exit status, as it is waited for; one that goes on for `patience` seconds has to say where it is, and end."""
    child.join(patience)
    if child.is_alive():
        os.kill(int(child.pid or 0), signal.SIGABRT)
        child.join()
    return int(child.exitcode or 0)


def _run(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    # tqdm's lock is one of all processes: killed while it holds that one, this one would stop them all.
    tqdm.set_lock(threading.RLock())
    target(*arguments)
