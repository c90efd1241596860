"""What every test shares: interpreted kernels where there is no GPU, one thread, fixed seeds, poison, golden data."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

# Read by Triton when a kernel is defined, so it has to stand before anything imports triton.
CHIP = os.environ.get("FASTJEPA_TEST_CHIP")  # 80, 90: there kernels are compiled for it, and it is emulated
if not torch.cuda.is_available() and not CHIP:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could ask for its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

# Small tensors gain nothing from more threads, and parallel test workers lose by them. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

hypothesis.settings.register_profile("fastjepa", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fastjepa")


def pytest_report_header() -> str:
    """Which kernels the run is about."""
    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        triton = "no triton"
    run = f"compiled for sm {CHIP}, which is emulated" if CHIP else "interpreted"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no CUDA GPU, kernels are {run}"
    return f"torch {torch.__version__}, {triton}; {where}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot be run here, naming it."""
    if torch.cuda.is_available():
        lacking = {"interpreted": "kernels are compiled here, not interpreted"}
    elif CHIP:
        lacking = {"gpu": "no CUDA GPU here", "interpreted": "kernels are compiled here, not interpreted"}
    else:
        lacking = {"gpu": "no CUDA GPU here", "compiled": "kernels are interpreted here, not compiled"}
    for item in items:
        for marker, why in lacking.items():
            if item.get_closest_marker(marker):
                name = getattr(item, "originalname", item.name)  # one line of the summary for all its parameters
                item.add_marker(pytest.mark.skip(reason=f"{why}, so not run: {name}"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=CHIP is not None)
def chip() -> Iterator[None]:
    """Kernels run on the chip that was asked for."""
    assert CHIP is not None
    from benchmarks.emulator import emulated

    with emulated(int(CHIP)):
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN (floats) or the largest value (integers), so that a place left unwritten shows."""
    importlib.import_module("torch._dynamo")  # notes as it is imported which functions are torch's own

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def made(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(_poison_of(tensor.dtype))

        return made

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max


@functools.cache
def _load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("ijepa_tiny")` is the arrays of tests/goldens/ijepa_tiny.npz by key."""
    return lambda name: dict(_load(name))
