"""Forked processes that are struck: what becomes of one of them is no matter of the others."""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.process
import threading
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

PATIENCE = 600.0  # seconds after which one that still runs says where, and ends with status 1


def forked(
    target: Callable[..., None], *arguments: Any, patience: float = PATIENCE
) -> multiprocessing.process.BaseProcess:
    """A started process that calls `target`."""
    torch.set_num_threads(1)  # threads of this process would not come with the child, which would wait for them
    child = multiprocessing.get_context("fork").Process(target=_run, args=(patience, target, arguments))
    child.start()
    return child


def _run(patience: float, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(patience, exit=True)
    # tqdm's lock is one of all processes: killed while it holds that one, this one would stop them all.
    tqdm.set_lock(threading.RLock())
    target(*arguments)
