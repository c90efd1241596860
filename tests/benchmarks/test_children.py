"""Forked processes that are killed or hang."""

from __future__ import annotations

import gc
import os
import signal
import time

from tqdm import tqdm

from benchmarks.children import ended, forked


def die_with_the_lock() -> None:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_killed_as_it_writes_stops_no_other():
    shared = tqdm.get_lock()
    assert ended(forked(die_with_the_lock)) == -signal.SIGKILL
    free = [lock.acquire(False) for lock in shared.locks]
    assert len(free) == 2
    assert all(free)
    shared.release()


def test_one_that_hangs_says_where_and_ends(capfd):
    assert ended(forked(time.sleep, 1000), patience=1.0) == -signal.SIGABRT
    assert "in _run" in capfd.readouterr().err


class Left:
    """Something in a cycle, whose end would wait for a thread of the parent's."""

    def __init__(self):
        self.cycle, self.owner = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.owner:
            os._exit(7)


def test_what_the_parent_has_left_is_not_collected_in_a_child():
    gc.collect()
    gc.disable()
    try:
        Left()
        assert ended(forked(gc.collect)) == 0
        assert not gc.get_freeze_count()
        assert gc.collect()
    finally:
        gc.enable()
