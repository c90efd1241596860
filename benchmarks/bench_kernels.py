"""The operations under pytest-benchmark, with its JSON, compare and histogram: `pytest benchmarks/bench_kernels.py`.

Every operation and peer of the `kernels` suite is one benchmark, in a group for its operation. A peer whose answer is
wrong fails and has no time; one that is not here is skipped with the reason. On a GPU each round waits for the device,
so small operations are timed with their launch: `python -m benchmarks kernels` takes it out.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.kernels import FILES, distances, worst
from benchmarks.operations import Operation, Sizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Only to learn the names; what is timed is made when it is its turn.
TINY = Sizes(torch.device("cpu"), torch.float32, 1, 16, 32, 2, 32, 2, 1, context=6, spread=1, target=3)
NAMED = [
    pytest.param(file, place, peer.name, id=f"{file.__name__.split('.')[-1]}-{operation.name}-{place}-{peer.name}")
    for file in FILES
    for place, operation in enumerate(file.operations(TINY))
    for peer in operation.peers
]


@lru_cache(maxsize=1)
def _operations(file) -> list[Operation]:
    return file.operations(Sizes.of(DEVICE))


@lru_cache(maxsize=1)
def _exact(file, place: int) -> list[torch.Tensor]:
    return [x.cpu() for x in _operations(file)[place].exact()]


@pytest.mark.parametrize(("file", "place", "name"), NAMED)
def test_operation(benchmark, file, place: int, name: str):
    """One peer of one operation: right, then timed."""
    operation = _operations(file)[place]
    found = {peer.name: peer for peer in operation.peers}
    if name not in found:
        pytest.skip("not on this device")
    if (reason := found[name].absent) is not None:
        pytest.skip(reason)
    exact = _exact(file, place)
    allowed = [2 * error for error in distances(operation.peers[0].make()(), exact)]
    call = found[name].make()
    wrong = worst(distances(call(), exact), allowed)
    assert wrong is None, wrong
    benchmark.group = f"{operation.name}, {operation.case}"
    benchmark.extra_info |= {"bytes": operation.cost.bytes, "flops": operation.cost.flops}

    def round_trip() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(round_trip, rounds=20, warmup_rounds=3)
