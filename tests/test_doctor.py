"""`fastjepa doctor` tells what is here, on one screen, whatever is missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastjepa import __version__, doctor
from fastjepa.ops.backends import KERNELS, backends


def fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 40


def distribution(folder: Path, name: str, version: str, *files: str) -> None:
    """An installed distribution as the importer and the metadata see it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise RuntimeError('the doctor must not import this')\n")


def package(name: str) -> dict[str, str | None]:
    return doctor.report()["packages"][name]


class Gpu(types.SimpleNamespace):
    """What torch tells of a device."""


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_report_is_json_and_the_text_fits_a_screen():
    report = doctor.report()
    assert json.loads(json.dumps(report)) == report
    assert report["fastjepa"] == __version__
    assert report["torch"]["version"] == torch.__version__
    assert set(report["operations"]) == set(KERNELS)
    text = doctor.render(report)
    assert fits(text), text
    assert all(name in text for name in (*report["operations"], *report["packages"]))


def test_every_operation_has_a_backend_and_a_reason():
    here = backends()
    assert set(here) == set(KERNELS)
    assert all(choice.name in ("triton", "torch") and choice.reason for choice in here.values())
    if not torch.cuda.is_available():
        assert {choice.name for choice in here.values()} == {"torch"}


def test_operations_with_a_kernel_run_on_it_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KERNELS, "jepa_loss", "jepa_loss")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends()["jepa_loss"].name == "triton"
    assert "fastjepa.kernels" in backends()["jepa_loss"].reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends()["jepa_loss"].name == "torch"
    assert "no CUDA GPU" in backends()["jepa_loss"].reason


def test_gpus_are_told_with_memory_and_capability(monkeypatch: pytest.MonkeyPatch):
    big = Gpu(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000, major=9, minor=0)
    old = Gpu(name="Tesla V100-SXM2-16GB", total_memory=16_900_000_000, major=7, minor=0)
    pretend_gpus(monkeypatch, *[big] * 8, old)
    report = doctor.report()
    assert report["cuda"] == {"available": True, "version": "12.8", "reason": None}
    assert report["gpus"][0] == {"name": big.name, "memory_bytes": big.total_memory, "compute_capability": "9.0"}
    text = doctor.render(report)
    assert "8 x NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0" in text
    assert "older than compute capability 8.0" in text
    assert fits(text), text


def test_driver_is_asked_of_nvml_first(monkeypatch: pytest.MonkeyPatch):
    nvml = types.SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"570.12",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert doctor.report()["driver"] == {"version": "570.12", "source": "nvml"}


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 565.57.01; echo 565.57.01", "565.57.01"), ("echo broken; exit 9", None), ("exit 0", None), (None, None)],
)
def test_driver_is_asked_of_nvidia_smi_where_nvml_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, version: str | None
):
    failure = type("NVMLError", (Exception,), {})

    def init() -> None:
        raise failure("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=failure, nvmlInit=init))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = doctor.report()
    assert report["driver"]["version"] == version
    assert f"driver    {version or 'none'}" in doctor.render(report)


def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch):
    def is_available() -> bool:
        import warnings

        warnings.warn("CUDA initialization: driver too old (found version 11040)\nPlease update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(doctor, "_driver_of_nvml", lambda: "470.82")
    report = doctor.report()
    assert report["cuda"]["reason"].endswith("driver 470.82: CUDA initialization: driver too old (found version 11040)")
    assert "torch cannot use it" in doctor.render(report)
    monkeypatch.setattr(doctor, "_driver_of_nvml", lambda: None)
    monkeypatch.setattr(doctor, "_driver_of_nvidia_smi", lambda: None)
    assert "no NVIDIA driver answers" in doctor.report()["cuda"]["reason"]


def test_nvidia_apex_is_told_from_the_other_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert package("apex (NVIDIA)")["status"] == "missing"
    pyramid, nvidia = tmp_path / "pyramid", tmp_path / "nvidia"
    distribution(pyramid, "apex", "0.9.10.dev0", "apex/__init__.py", "apex/views.py")
    distribution(nvidia, "apex", "0.1", "apex/__init__.py", "apex/optimizers/__init__.py")
    with monkeypatch.context() as path:
        path.syspath_prepend(str(pyramid))
        found = package("apex (NVIDIA)")
        assert found["status"] == "other"
        assert "unrelated" in str(found["note"])
        assert "OTHER" in doctor.render(doctor.report())
    with monkeypatch.context() as path:
        path.syspath_prepend(str(nvidia))
        assert package("apex (NVIDIA)") == {"version": "0.1", "status": "installed", "note": "benchmark peer"}


def test_packages_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert package("xformers")["status"] == "missing"
    distribution(tmp_path, "xformers", "0.0.35", "xformers/__init__.py")
    distribution(tmp_path, "nvidia-dali-cuda120", "1.50.0", "nvidia/dali/__init__.py")
    distribution(tmp_path, "wandb", "0.31.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package("xformers")["version"] == "0.0.35"
    assert package("DALI")["version"] == "1.50.0"
    assert package("wandb")["status"] == "broken"
    text = doctor.render(doctor.report())
    assert fits(text), text


def test_advice_to_install_is_never_cut():
    width = 80 - 2 - 14 - 1 - 12 - 1
    for entry in doctor.PACKAGES:
        assert len(f"{entry.use}: {entry.install}") <= width, entry
        assert len(entry.name) <= 14, entry


@pytest.mark.parametrize("broken", ["torch", "triton"])
def test_broken_installations_are_told(tmp_path: Path, broken: str):
    """The file alone, in a fresh interpreter, beside a package whose library is not to be loaded."""
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("doctor", {doctor.__file__!r})
doctor = importlib.util.module_from_spec(spec)
sys.modules["doctor"] = doctor
spec.loader.exec_module(doctor)
report = doctor.report()
json.dumps(report)
print(doctor.render(report))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{Path(doctor.__file__).parent.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert fits(done.stdout), done.stdout
    row = next(line for line in done.stdout.splitlines() if line.strip().startswith(broken))
    assert "unusable: libcudart.so.12: cannot open shared object file" in row


def test_the_command_prints_it_and_ends_well(tmp_path: Path):
    file = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "fastjepa", "doctor"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert fits(shown.stdout), shown.stdout
    subprocess.run([*command, "--json", str(file)], capture_output=True, timeout=120, check=True)
    assert json.loads(file.read_text())["fastjepa"] == __version__
    piped = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(piped.stdout)["fastjepa"] == __version__
