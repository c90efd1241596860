"""The tree keeps its shape: what may import what, how long a file gets, what is documented and tested."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from fastjepa.ops.backends import KERNELS as KERNEL_OF

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
# Through the link, the kernels would be seen twice.
LIBRARY = sorted(p for p in (ROOT / "fastjepa").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EVERYTHING = [ROOT / "setup.py", *KERNELS, *LIBRARY, *BENCHMARKS, *TESTS]

# A module imports from rows above its own, and from within itself. "fastjepa" is the package's own __init__: whoever
# imports a public name from there gets everything that it holds.
LAYERS = (
    (
        "kernels",
        "masks",
        "ragged",
        "pairing",
        "schedules",
        "config",
        "flops",
        "chips",
        "copies",
        "dcp",
        "sharding",
        "layouts",
        "huggingface",
    ),
    ("ops", "checkpoint"),
    ("nn",),
    ("objective", "optim", "ema"),
    ("patch", "data", "integrations", "pretrained"),
    ("fastjepa",),
    ("evaluation",),
    ("training",),
    ("demo", "doctor", "export", "plan", "submit"),
    ("cli",),
    ("__main__", "apart"),
)
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}
LEAVES = set(LAYERS[0]) - {"kernels"}


def test_the_tree_is_seen():
    assert len(KERNELS) >= 3
    assert len(LIBRARY) >= 15
    assert ROOT / "tests" / "test_layers.py" in TESTS


def test_kernels_can_be_lifted_out():
    """kernels/ imports torch, triton, the standard library, and its own files relatively."""
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    wrong = [
        f"{_name(path)}:{line} imports {target}"
        for path in KERNELS
        for line, target in imports(path)
        if target.split(".")[0] not in allowed and not target.startswith("kernels.")
    ]
    assert not wrong, "\n".join(wrong)
    absolute = [
        f"{_name(path)}:{node.lineno}"
        for path in KERNELS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level > len(path.relative_to(ROOT / "kernels").parts)
    ]
    assert not absolute, f"relative imports that leave kernels/: {absolute}"


def test_every_module_of_the_library_has_a_layer():
    unplaced = sorted({own_module(path) for path in LIBRARY} - set(RANK))
    assert not unplaced, f"give {unplaced} a row in LAYERS of tests/test_layers.py"


def test_nothing_imports_upward():
    wrong = [
        f"{_name(path)}:{line} imports {target}: {own_module(path)} lies below {module} in LAYERS, or beside it"
        for path in LIBRARY
        if path != ROOT / "fastjepa" / "__init__.py"
        for line, target in imports(path)
        if (module := module_of(target)) and module != own_module(path)
        if RANK.get(own_module(path), len(LAYERS)) <= RANK.get(module, 0) and not {own_module(path), module} <= LEAVES
    ]
    assert not wrong, "\n".join(wrong)


def test_leaves_import_nothing_of_ours_but_leaves():
    wrong = [
        f"{_name(path)}:{line} imports {target}"
        for path in LIBRARY
        if own_module(path) in LEAVES
        for line, target in imports(path)
        if (module := module_of(target)) and module not in LEAVES
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_imports_neither_benchmarks_nor_tests():
    wrong = [
        f"{_name(path)}:{line} imports {target}"
        for path in (*KERNELS, *LIBRARY)
        for line, target in imports(path)
        if target.split(".")[0] in ("benchmarks", "tests")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_imported_as_fastjepa_kernels():
    """`import kernels` would be another package of that name, where one is installed."""
    wrong = [
        f"{_name(path)}:{node.lineno}"
        for path in EVERYTHING
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "kernels" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kernels")
    ]
    assert not wrong, f"absolute imports of kernels: {wrong}"


def test_every_operation_has_a_test():
    """An operation is a kernel file with `compile_cases`; the others are shared code, tested through it."""
    tested = {path.stem for path in TESTS}
    operations = [p for p in KERNELS if any(node.name == "compile_cases" for node in _public(tree(p)))]
    missing = [_name(path) for path in operations if f"test_{path.stem}" not in tested]
    assert not missing, f"no tests/**/test_<name>.py for {missing}"


def test_backends_tells_which_kernels_are_in_use():
    """What `fastjepa doctor` says of an operation is what the library imports for it."""
    said = {f"fastjepa.kernels.{kernel}" for kernel in KERNEL_OF.values() if kernel}
    used = {
        ".".join(target.split(".")[:3])
        for path in LIBRARY
        for _, target in imports(path)
        if target.startswith("fastjepa.kernels.") and target.split(".")[2] not in ("reference", "launch")
    }
    assert said == used, f"bring KERNELS of fastjepa/ops/backends.py into line with the imports: {sorted(said ^ used)}"


def test_files_are_one_idea():
    lengths = {_name(path): len(path.read_text().splitlines()) for path in EVERYTHING}
    long = {name: lines for name, lines in lengths.items() if lines > 600}
    assert not long, f"over 600 lines, so two ideas: {long}"


def test_modules_and_public_names_are_documented():
    bare = [
        f"{_name(path)} has no docstring"
        for path in (*KERNELS, *LIBRARY, *BENCHMARKS)
        if path.read_text().strip() and not ast.get_docstring(tree(path))
    ]
    bare += [
        f"{_name(path)}:{node.lineno} {node.name}"
        for path in (*KERNELS, *LIBRARY, *BENCHMARKS)
        for node in _public(tree(path))
        if not ast.get_docstring(node)
    ]
    assert not bare, "\n".join(bare)


def test_folders_of_the_library_are_packages():
    """find_packages leaves out a folder without an __init__.py, and the wheel with it."""
    wrong = sorted({_name(p.parent) for p in (*KERNELS, *LIBRARY) if not (p.parent / "__init__.py").is_file()})
    assert not wrong, f"no __init__.py in {wrong}"


@functools.cache
def tree(path: Path) -> ast.Module:
    """The file, parsed."""
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import of a file, those within functions too.

    `from fastjepa import ops` is fastjepa.ops where that is a module, and fastjepa where it is a name in its __init__.
    """
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield node.lineno, f"{base}.{alias.name}" if is_module or node.level else base


def own_module(path: Path) -> str:
    """fastjepa/nn/block.py -> nn, fastjepa/masks.py -> masks, fastjepa/__init__.py -> fastjepa."""
    inner = path.relative_to(ROOT / "fastjepa").with_suffix("").parts
    return "fastjepa" if inner == ("__init__",) else inner[0]


def module_of(target: str) -> str | None:
    """fastjepa.nn.block -> nn, fastjepa -> fastjepa, torch.nn -> None."""
    first, *rest = target.split(".")
    return (rest[0] if rest else "fastjepa") if first == "fastjepa" else None


def _public(module: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    return [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))
