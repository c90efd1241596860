"""How long a call takes, and what this machine's memory and processor can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

COLD = 512 << 20  # bytes written between two calls, so that nothing of the last one is left in a GPU's cache
AHEAD = 2_000_000  # GPU cycles of waiting before a call, about a millisecond, in which the host launches all of it


class Timing(NamedTuple):
    """Of one call: median and spread (90th less 10th percentile) in seconds; host: until it has been launched."""

    median: float
    spread: float
    host: float


def measure(call: Callable[[], Any], device: torch.device, repeats: int = 30, warmup: int = 5) -> Timing:
    """Time `call`: with events, its inputs out of the cache, on a GPU; with the host's clock elsewhere."""
    for _ in range(warmup):
        call()
    times, host = [], []
    if device.type != "cuda":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return _summary(times, times)
    scratch = torch.empty(COLD, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for begin, end in events:
        scratch.zero_()
        torch.cuda._sleep(AHEAD)
        start = time.perf_counter()
        begin.record()
        call()
        end.record()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return _summary(times, host)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device, repeats=10, warmup=2).median


@cache
def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, bf16 on a GPU and fp32 elsewhere."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    return 2 * side**3 / measure(lambda: a @ b, device, repeats=10, warmup=2).median


def _summary(times: list[float], host: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return Timing(statistics.median(times), deciles[8] - deciles[0], statistics.median(host))
