"""The kernels suite: right before timed, absent said, and every operation of a small model through it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels, timing
from benchmarks.operations import Operation, Peer, Sizes
from fastjepa.kernels.launch import Cost

CPU = torch.device("cpu")
SMALL = Sizes(CPU, torch.float32, 2, 16, 32, 2, 32, 2, 1, context=6, spread=2, target=3)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Ceilings that need no measuring."""
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(kernels, "matmul_rate", lambda device: 1e9)


def doubling(**peers) -> list[dict]:
    x = torch.randn(100)
    found = [Peer("torch", lambda: lambda: [x * 2])]
    found += [Peer(name, lambda f=f: lambda: [f(x)]) for name, f in peers.items()]
    found.append(Peer("elsewhere", lambda: lambda: [x], absent="not installed"))
    operation = Operation("double", "100", Cost(800, 100, 1), lambda: [x.double() * 2], found)
    return kernels.rows_of(operation, CPU, repeats=3)


def test_right_is_timed_and_wrong_is_not():
    torchs, ours, wrong, nans, raises, absent = doubling(
        fastjepa=lambda x: x + x, off=lambda x: x * 2.001, nans=lambda x: x * float("nan"), raises=lambda x: x @ x.T[:3]
    )
    assert torchs["ms"] > 0
    assert ours["best_peer_over_ours"] == torchs["ms"] / ours["ms"]
    assert "best_peer_over_ours" not in torchs
    for row in (wrong, nans):
        assert "ms" not in row
        assert "allowed" in row["wrong"]
    assert raises["absent"].startswith("fails: RuntimeError")
    assert absent["absent"] == "not installed"
    text = kernels.table([torchs, ours, wrong, absent])
    assert "WRONG: output 0" in text
    assert "not installed" in text


@pytest.mark.parametrize("file", kernels.FILES, ids=lambda file: file.__name__.split(".")[-1])
def test_every_operation_is_right(file):
    """Ours against the fp64 answer, as the suite does it; a compiled peer takes long and is left out."""
    for operation in file.operations(SMALL):
        exact = operation.exact()
        yardstick = operation.peers[0].make()()
        allowed = [2 * error for error in kernels.distances(yardstick, exact)]
        assert any(peer.name.startswith("fastjepa") for peer in operation.peers)
        for peer in operation.peers:
            if peer.absent is None and "compile" not in peer.name:
                assert kernels.worst(kernels.distances(peer.make()(), exact), allowed) is None, (operation.name, peer)


def test_timing_on_the_cpu():
    calls = []
    found = timing.measure(lambda: calls.append(1), CPU, repeats=4, warmup=2)
    assert len(calls) == 6
    assert found.median >= 0


@pytest.mark.gpu
def test_timing_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    device = x.device
    found = timing.measure(lambda: x @ x, device, repeats=5)
    assert 1e-5 < found.median < 1e-1
    assert timing.copy_bandwidth(device) > 1e11
