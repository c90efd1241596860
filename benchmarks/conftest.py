"""The operations under pytest-benchmark, with its JSON, compare and histogram.

`pytest benchmarks/bench_attention.py` times the peers of one file, `pytest benchmarks` all. Every peer of every case is
one benchmark, in a group for its case. A peer whose answer is wrong fails and has no time; one that is not here is
skipped with the reason. On a GPU each round waits for the device, so small operations are timed with their launch, and
from the cache: `python -m benchmarks kernels` takes both out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from benchmarks.kernels import Judge
from benchmarks.machine import here
from benchmarks.operations import Operation, Peer, Run, Sizes

# Only to learn the names; what is timed is made when it is its turn.
TINY = Sizes(torch.device("cpu"), torch.float32, 1, 16, 32, 2, 32, 2, 1, context=6, spread=1, target=3)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each peer of each case of a file."""
    if "timed" in metafunc.fixturenames and metafunc.module:
        cases = enumerate(metafunc.module.operations(TINY))
        named = [(place, case.name, peer.name) for place, case in cases for peer in case.peers]
        ids = [f"{operation}-{place}-{peer}" for place, operation, peer in named]
        metafunc.parametrize("timed", [(place, peer) for place, _, peer in named], ids=ids, indirect=True)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Callable[[int], tuple[Operation, Judge]]:
    """A case of the file by its place, and what its peers are held to; one is kept."""
    operations = request.module.operations(Sizes.of(here()))
    return lru_cache(maxsize=1)(lambda place: (operations[place], Judge(operations[place])))


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark, case) -> Callable[[], None]:
    """Times one peer of one case, if it is right."""
    place, name = request.param

    def times(peer: Peer, call: Run) -> dict:
        def round_trip() -> None:
            call()
            if here().type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(round_trip, rounds=20, warmup_rounds=3)
        return {}

    def run() -> None:
        operation, judge = case(place)
        benchmark.group = f"{operation.name}, {operation.case}"
        benchmark.extra_info |= {"bytes": operation.cost.bytes, "flops": operation.cost.flops}
        row = judge.row(next(peer for peer in operation.peers if peer.name == name), times)
        if "absent" in row:
            pytest.skip(row["absent"])
        assert "wrong" not in row, row["wrong"]

    return run
