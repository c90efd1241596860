"""The wheel and the source distribution hold everything the library needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastjepa

ROOT = Path(__file__).parent.parent
INSTALLED = ["*.py", "*.typed", "configs/*.yaml"]  # what a user gets of fastjepa/, its link to kernels/ followed
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ of a copy of the checkout: the source distribution, and the wheel built from that alone."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for folder in ("fastjepa", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert (copy / "fastjepa" / "kernels").is_symlink()
    # What setuptools puts in build/ and *.egg-info stays in the copy. Without isolation nothing is downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The one wheel."""
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the wheel in it; its dependencies stay where this interpreter has them."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", target, wheel, cwd=target)
    return target


def expected_files() -> set[str]:
    """The package's files as a wheel names them."""
    folders = [(ROOT / "fastjepa", "fastjepa"), (ROOT / "kernels", "fastjepa/kernels")]
    found = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for folder, name in folders
        for pattern in INSTALLED
        for path in folder.rglob(pattern)
    }
    return {name for name in found if "__pycache__" not in name}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist() if ".dist-info/" not in info.filename}
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
        same = archive.read("fastjepa/kernels/reference.py") == (ROOT / "kernels" / "reference.py").read_bytes()
        metadata = {n.split(".dist-info/")[1]: archive.read(n) for n in archive.namelist() if ".dist-info/" in n}
    assert expected_files() <= names, f"missing: {sorted(expected_files() - names)}"
    assert not [name for name in names if not name.startswith("fastjepa/")]
    assert not [name for name in names if "__pycache__" in name or "test" in Path(name).name]
    assert not links
    assert same
    assert metadata["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert f"Version: {fastjepa.__version__}\n".encode() in metadata["METADATA"]
    assert b"fastjepa = fastjepa.cli:main" in metadata["entry_points.txt"]


def test_source_distribution_builds_the_same(dist: Path):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    inner = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert path.name == f"fastjepa-{fastjepa.__version__}.tar.gz"
    assert (expected_files() | set(SOURCES) - {"MANIFEST.in"}) <= inner
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert not [name for name in inner if name.startswith(("tests/", "benchmarks/"))]


def test_installed_wheel_imports_from_another_folder(site: Path, tmp_path: Path):
    code = """
import importlib.resources
import fastjepa, fastjepa.kernels.reference as reference
print(fastjepa.__version__, fastjepa.__file__, reference.__file__, sep="\\n")
print(*(entry.name for entry in importlib.resources.files("fastjepa").joinpath("configs").iterdir()))
"""
    version, package, kernels, configs = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)
    ).splitlines()
    assert version == fastjepa.__version__
    assert Path(package) == site / "fastjepa" / "__init__.py"
    assert Path(kernels) == site / "fastjepa" / "kernels" / "reference.py"
    shipped = {path.name for path in (ROOT / "fastjepa" / "configs").glob("*.yaml")}
    assert shipped
    assert shipped <= set(configs.split())


def test_installed_command_answers(site: Path, tmp_path: Path):
    """The console script of the wheel, and `python -m fastjepa`, are the same command."""
    asked = run(sys.executable, "-m", "fastjepa", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    script = run(sys.executable, site / "bin" / "fastjepa", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "train" in asked
    assert "doctor" in asked
    assert script == asked
