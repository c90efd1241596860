"""What is installed here, what each operation will run on, and what is missing: one screen, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

# What a missing, half-installed or mismatched compiled package raises when it is imported or first asked.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, AssertionError, TypeError, ValueError, SyntaxError)


class Package(NamedTuple):
    """An optional package: distributions that provide it, a top-level module, its use, and how to get it."""

    name: str
    distributions: tuple[str, ...]
    module: str
    use: str
    install: str


PACKAGES = (
    Package("flash-attn", ("flash-attn",), "flash_attn", "attention backend", "pip install flash-attn"),
    Package("xformers", ("xformers",), "xformers", "attention backend", "pip install xformers"),
    Package("apex (NVIDIA)", ("apex",), "apex", "benchmark peer", "build from github.com/NVIDIA/apex"),
    Package("timm", ("timm",), "timm", "not used yet", "pip install timm"),
    Package("transformers", ("transformers",), "transformers", "not used yet", "pip install transformers"),
    Package("turbojpeg", ("turbojpeg",), "turbojpeg", "reads pictures", "pip install turbojpeg"),
    Package("pyarrow", ("pyarrow",), "pyarrow", "Arrow, Parquet", "pip install pyarrow"),
    Package(
        "DALI",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
        "nvidia.dali",
        "data.engine",
        "pip install nvidia-dali-cuda130",
    ),
    Package("torchvision", ("torchvision",), "torchvision", "data.engine", "pip install torchvision"),
    Package("simplejpeg", ("simplejpeg",), "simplejpeg", "benchmark peer", "pip install simplejpeg"),
    Package(
        "opencv",
        ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
        "cv2",
        "benchmark peer",
        "pip install opencv-python-headless",
    ),
    Package("scikit-learn", ("scikit-learn",), "sklearn", "demo", "pip install scikit-learn"),
    Package("scikit-image", ("scikit-image",), "skimage", "demo", "pip install scikit-image"),
    Package("matplotlib", ("matplotlib",), "matplotlib", "plots", "pip install matplotlib"),
    Package("tensorboard", ("tensorboard",), "tensorboard", "curves", "pip install tensorboard"),
    Package("wandb", ("wandb",), "wandb", "curves", "pip install wandb"),
    Package("submitit", ("submitit",), "submitit", "jobs of SLURM", "pip install submitit"),
    Package("nvidia-ml-py", ("nvidia-ml-py",), "pynvml", "driver and clocks", "pip install nvidia-ml-py"),
)


def report() -> dict[str, Any]:
    """What this machine has, as JSON-able values; never raises for something missing or broken.

    Returns:
        `fastjepa` (version), `python`, `torch`, `triton`, `cuda`, `gpus` (name, memory_bytes, compute_capability),
        `driver`, `operations` (name -> backend, reason), `pictures` (engine, reason) and `packages` (name -> version or
        None, status, note).
    """
    with warnings.catch_warnings():  # what is worth a warning is in the report
        warnings.simplefilter("ignore")
        return _report()


def render(report: dict[str, Any]) -> str:
    """The report as text, at most 80 columns wide and one screen long."""
    python, torch, triton, cuda = (report[key] for key in ("python", "torch", "triton", "cuda"))
    lines = [
        f"fastjepa {report['fastjepa']}",
        _row("python", f"{python['version']}, {python['platform']}"),
        _row("torch", torch["version"] or f"unusable: {torch['error']}"),
        _row("triton", triton["version"] or f"unusable: {triton['error']}"),
        _row("CUDA", f"{cuda['version']}, usable" if cuda["available"] else f"not usable: {cuda['reason']}"),
        _row("driver", report["driver"]["version"] or "none"),
        *(_row("GPU" if first else "", text) for first, text in _gpu_lines(report["gpus"])),
        "",
        "What each operation runs on here",
    ]
    # Operations of the same backend and reason share a line.
    shared: dict[tuple[str, str], list[str]] = {}
    for name, choice in report["operations"].items():
        shared.setdefault((choice["backend"], choice["reason"]), []).append(name)
    for (backend, reason), names in shared.items():
        lines += [_cut(f"  {backend}: {reason}"), *_wrapped(names)]
    lines += [_cut(f"  {report['pictures']['engine']}: {report['pictures']['reason']}"), "    pictures"]
    lines += ["", "Optional packages"]
    for name, package in report["packages"].items():
        state = {"installed": package["version"], "broken": "BROKEN", "other": "OTHER"}.get(package["status"], "-")
        lines.append(_cut(f"  {name:<14} {state:<12.12} {package['note']}"))
    advice = _advice(report)
    if advice:
        lines += ["", "For more", *(_cut(f"  {line}") for line in advice)]
    return "\n".join(lines)


def _report() -> dict[str, Any]:
    driver, source = _driver()
    return {
        "fastjepa": _own_version(),
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "torch": _torch(),
        "triton": _importable("triton"),
        "cuda": _cuda(driver),
        "gpus": _gpus(),
        "driver": {"version": driver, "source": source},
        "operations": _operations(),
        "pictures": _pictures(),
        "packages": {package.name: _package(package) for package in PACKAGES},
    }


def _torch() -> dict[str, Any]:
    found = _importable("torch")
    if found["error"] is None:
        import torch

        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "threads": torch.get_num_threads()}
    return found


def _importable(module: str) -> dict[str, Any]:
    """{version, error}: error is None where the module imports."""
    try:
        return {"version": str(importlib.import_module(module).__version__), "error": None}
    except BROKEN as error:
        return {"version": None, "error": _first_line(error)}


def _own_version() -> str:
    """From the package where it imports, else (torch missing or broken) from what was installed."""
    try:
        from fastjepa import __version__
    except BROKEN:
        return _version_of("fastjepa") or "unknown"
    return __version__


def _cuda(driver: str | None) -> dict[str, Any]:
    """{available, version, reason}: why torch cannot use CUDA, where it cannot."""
    try:
        import torch

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        version = torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}")
    except BROKEN as error:
        return {"available": False, "version": None, "reason": f"torch is unusable ({_first_line(error)})"}
    if available:
        return {"available": True, "version": version, "reason": None}
    if version is None:
        reason = "this torch is built for the CPU only"
    elif driver is None:
        reason = f"torch is built for CUDA {version}, but no NVIDIA driver answers"
    else:
        why = _first_line(said[-1].message) if said else "no GPU is visible to this process"
        reason = f"torch is built for CUDA {version}, driver {driver}: {why}"
    return {"available": False, "version": version, "reason": reason}


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except BROKEN:  # said under "cuda", which asks first
        return []
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in found
    ]


def _driver() -> tuple[str | None, str | None]:
    """(version, where from): asked of NVML, then of nvidia-smi."""
    for ask, source in ((_driver_of_nvml, "nvml"), (_driver_of_nvidia_smi, "nvidia-smi")):
        if version := ask():
            return version, source
    return None, None


def _driver_of_nvml() -> str | None:
    try:
        import pynvml

        failed = pynvml.NVMLError
    except BROKEN:
        return None
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except (failed, *BROKEN):
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _driver_of_nvidia_smi() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _operations() -> dict[str, dict[str, str]]:
    try:
        from fastjepa.ops.backends import backends

        return {name: {"backend": choice.name, "reason": choice.reason} for name, choice in backends().items()}
    except BROKEN as error:
        return {"all": {"backend": "none", "reason": f"fastjepa.ops does not import: {_first_line(error)}"}}


def _pictures() -> dict[str, str]:
    """What data.engine=auto takes."""
    try:
        from fastjepa.data.turbo import find_turbo
    except BROKEN as error:
        return {"engine": "none", "reason": f"fastjepa.data does not import: {_first_line(error)}"}
    try:
        return {"engine": "turbo", "reason": f"libjpeg-turbo 3, {Path(find_turbo().path).name}"}
    except ValueError as error:
        return {"engine": "pillow", "reason": _first_line(error)}


def _package(package: Package) -> dict[str, str | None]:
    """{version, status, note}; looks at metadata and folders only, since importing some of these takes seconds."""
    version = next((v for v in map(_version_of, package.distributions) if v), None)
    folders = _folders_of(package.module)
    if package.module == "apex" and (version or folders is not None) and not _is_nvidia_apex(folders):
        note = "PyPI's apex, an unrelated package: pip uninstall apex"
        return {"version": version, "status": "other", "note": note}
    if folders is None and version:
        return {"version": version, "status": "broken", "note": f"{version} has no files: {package.install}"}
    if folders is None:
        return {"version": None, "status": "missing", "note": f"{package.use}: {package.install}"}
    return {"version": version or "unknown", "status": "installed", "note": package.use}


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, KeyError, OSError, UnicodeDecodeError):
        return None


def _folders_of(module: str) -> list[Path] | None:
    """Where a module's files are ([] for a single file), None where there is none; imports nothing but a parent."""
    try:
        spec = importlib.util.find_spec(module)
    except BROKEN:
        return None
    return None if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]


def _is_nvidia_apex(folders: list[Path] | None) -> bool:
    """NVIDIA's has apex.optimizers and, once built, amp_C; PyPI's is a toolkit for Pyramid web sites with neither."""
    return any((folder / "optimizers").is_dir() for folder in folders or ()) or _folders_of("amp_C") is not None


def _gpu_lines(gpus: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """(whether it is the first, text) for each kind of GPU."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        text = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['compute_capability']}"
        counts[text] = counts.get(text, 0) + 1
    texts = [f"{count} x {text}" if count > 1 else text for text, count in counts.items()] or ["none"]
    return [(place == 0, text) for place, text in enumerate(texts)]


def _advice(report: dict[str, Any]) -> list[str]:
    """One line for each thing whose repair would make more run."""
    lines = []
    if report["triton"]["error"] and platform.system() == "Linux":
        lines.append("the kernels need Triton: pip install 'triton>=3.6'")
    if report["driver"]["version"] and not report["cuda"]["available"]:
        lines.append("there is an NVIDIA driver, but torch cannot use it: see pytorch.org/get-started")
    if any(float(gpu["compute_capability"]) < 8.0 for gpu in report["gpus"]):
        lines.append("a GPU older than compute capability 8.0 has no bf16 tensor cores")
    return lines


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 74:
            lines.append("")
        lines[-1] += f" {name}"
    return [f"   {line}" for line in lines]


def _row(name: str, text: str) -> str:
    return _cut(f"  {name:<9} {text}")


def _cut(line: str) -> str:
    return line if len(line) <= 80 else f"{line[:77]}..."


def _first_line(error: object) -> str:
    """What an exception or a warning says, in one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
