"""What ran a benchmark: device, driver, versions, commit, clocks, and what the machine can do at best."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.timing import copy_bandwidth, matmul_rate
from fastjepa.chips import chip_of
from fastjepa.doctor import report


def here() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The machine as plain values.

    `device`, `kind` (cuda or cpu), `chip` (of `fastjepa.chips`, None where it is not in the table), `threads` of torch,
    `torch`, `triton`, `python`, `cuda`, `driver` (None where there is none), `commit` (with + where the checkout has
    been changed), `clocks` (MHz now and at most, on a GPU with nvidia-ml-py) and the measured `copy_bandwidth` (bytes a
    second, read and written) and `matmul_rate` (FLOP/s: bf16 on a GPU, fp32 elsewhere).
    """
    device = device or here()
    known, chip = report(), chip_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "kind": device.type,
        "chip": chip.name if chip else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": known["triton"]["version"],
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": known["driver"]["version"] if device.type == "cuda" else None,
        "commit": _commit(),
        "clocks": clocks(device),
        "copy_bandwidth": copy_bandwidth(device),
        "matmul_rate": matmul_rate(device),
    }


def summary(found: dict[str, Any]) -> str:
    """One line of it, for the head of a table."""
    threads = f", {found['threads']} threads" if found["kind"] == "cpu" else ""
    versions = [f"{name} {found[name]}" for name in ("torch", "triton", "python", "cuda", "driver") if found[name]]
    rates = f"copy {found['copy_bandwidth'] / 1e9:.0f} GB/s, matmul {found['matmul_rate'] / 1e12:.3g} TFLOP/s"
    return f"{found['device']}{threads}; {', '.join(versions)}; commit {found['commit']}; {rates}"


def clocks(device: torch.device) -> dict[str, int] | None:
    """MHz of multiprocessors (`sm`) and `memory` now, and at most (`sm_max`, `memory_max`); None where nobody tells."""
    with _nvml(device) as found:
        if found is None:
            return None
        nvml, handle = found
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        now = {name: nvml.nvmlDeviceGetClockInfo(handle, kind) for name, kind in kinds.items()}
        return now | {f"{name}_max": nvml.nvmlDeviceGetMaxClockInfo(handle, kind) for name, kind in kinds.items()}


def joules(device: torch.device) -> float | None:
    """Energy that the GPU has taken since its driver was loaded; None where nobody tells."""
    with _nvml(device) as found:
        if found is None:
            return None
        nvml, handle = found
        try:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:  # boards older than Volta
            return None


@contextmanager
def _nvml(device: torch.device) -> Iterator[tuple[ModuleType, Any] | None]:
    """nvidia-ml-py and its handle of the device, found by UUID, since CUDA may number devices otherwise."""
    nvml = _nvml_module() if device.type == "cuda" else None
    if nvml is None:
        yield None
        return
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except nvml.NVMLError:  # a part of a GPU, or a driver that hides it
        handle = None
    yield None if handle is None else (nvml, handle)


@cache
def _nvml_module() -> ModuleType | None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package or no driver: those columns are empty
        return None
    return pynvml


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str:
    """The checkout's, with + where it has been changed; unknown without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
