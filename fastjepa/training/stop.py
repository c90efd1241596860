"""Signals that ask a run to stop: it saves, and says so, instead of dying."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

RESUMABLE = 75  # exit status of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")  # SLURM's, torchrun's and submitit's ways to ask, and Ctrl-C


class StopSignals:
    """Within `with`, the first of `SIGNALS` is noted and the second acts as it would have without us.

    Attributes:
        asked: the name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
