"""How long a call takes, and what this machine's memory and processor can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

# Bytes read and written between two calls, so that nothing of the last one is left in the cache.
COLD = {"cuda": 512 << 20, "cpu": 128 << 20}
AHEAD = 2_000_000  # GPU cycles of waiting before a call, about a millisecond, in which the host launches all of it
ENOUGH, SECONDS = 5, 1.0  # calls of a processor that are enough, where more would take longer than this


def clock() -> float:
    """Seconds of the host: of this process alone where torch has one thread, so that what others take is not in it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Timing(NamedTuple):
    """Of one call: median and spread (90th less 10th percentile) in seconds; host: until it has been launched."""

    median: float
    spread: float
    host: float


def measure(
    call: Callable[[], Any], device: torch.device, repeats: int = 30, warmup: int = 5, cold: bool = True
) -> Timing:
    """Time `call`, its inputs out of the cache if `cold`: with events on a GPU, with the host's clock elsewhere.

    On a GPU the host is ahead, so that launching is in `host` and not in the time. On a processor slow calls are timed
    fewer times than `repeats`.
    """
    for _ in range(warmup):
        call()
    scratch = torch.empty(COLD[device.type] if cold else 0, dtype=torch.uint8, device=device)
    times, host = [], []
    if device.type != "cuda":
        while len(times) < repeats and (len(times) < ENOUGH or sum(times) < SECONDS):
            scratch.add_(1)
            start = clock()
            call()
            times.append(clock() - start)
        return _summary(times, times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for begin, end in events:
        scratch.add_(1)
        torch.cuda._sleep(AHEAD)
        start = clock()
        begin.record()
        call()
        end.record()
        host.append(clock() - start)
        torch.cuda.synchronize(device)
    times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return _summary(times, host)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """The replay of `call` as a CUDA graph; None on a processor, and where no graph can be made of it.

    A call that waits for the device is found out before, since a capture that breaks leaves PyTorch's allocator in it.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            call()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # what torch raises for either
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a pass over more than any cache holds: the best seen, being a roof.

    A processor's stores first read what they overwrite, which nobody counts, so there the pass is in place.
    """
    return Roofs.of(device).copy


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, bf16 on a GPU and fp32 elsewhere: the best seen, being a roof."""
    return Roofs.of(device).matmul


class Roofs:
    """What a device can do at best, asked once; or, where its speed drifts, as it was while something was timed.

    Attributes:
        copy: bytes a second. matmul: FLOP/s.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moved = (1 << 30) if device.type == "cuda" else (256 << 20)
        self.side = 8192 if device.type == "cuda" else 1024
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._a, self._b = (torch.randn(self.side, self.side, device=device, dtype=dtype) for _ in "ab")
        self._source = torch.arange(self.moved // 8, device=device)  # int64
        self._target = torch.empty_like(self._source) if device.type == "cuda" else self._source
        self.copy = 2 * self.moved / _best(self._pass, device)
        self.matmul = 2 * self.side**3 / _best(self._product, device)
        self._seen: list[tuple[float, float]] = []

    @staticmethod
    @cache
    def of(device: torch.device) -> Roofs:
        """Those of a device, always the same object."""
        return Roofs(device)

    def look(self) -> None:
        """One more look at a processor; from now on its roofs are the medians of all looks."""
        if self.device.type == "cuda":
            return
        took = [measure(call, self.device, 1, 0, cold=False).median for call in (self._pass, self._product)]
        self._seen.append((2 * self.moved / took[0], 2 * self.side**3 / took[1]))
        self.copy, self.matmul = (statistics.median(values) for values in zip(*self._seen, strict=True))

    def _pass(self) -> None:
        torch.add(self._source, 1, out=self._target)

    def _product(self) -> None:
        self._a @ self._b


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a second of calls: what else a machine does makes it slower, never faster."""
    call()
    found, end = [], clock() + 1.0
    while not found or clock() < end:
        found.append(measure(call, device, repeats=1, warmup=0, cold=False).median)
    return min(found)


def _summary(times: list[float], host: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return Timing(statistics.median(times), deciles[8] - deciles[0], statistics.median(host))
