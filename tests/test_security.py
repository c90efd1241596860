"""What SECURITY.md promises of the source itself: nothing unpickles, evaluates or extracts a file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("fastjepa", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
FORBIDDEN = {
    *(
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "np.load",
        "numpy.load",
        "yaml.unsafe_load",
    ),
    *("yaml.full_load", "shutil.unpack_archive", "joblib.load", "marshal.loads"),
}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def faults(source: str) -> list[str]:
    """Calls that could run what a file holds, or write where its names lead."""
    found = []
    for name, call in calls(ast.parse(source)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        given = [ast.unparse(argument) for argument in call.args]
        wrong = (
            name in FORBIDDEN
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name in ("yaml.load", "yaml.load_all") and given[1:] != ["_Loader"])
            or name.endswith((".extractall", ".extract"))
            or (name.startswith("subprocess.") and keywords.get("shell", "False") != "False")
        )
        if wrong:
            found.append(f"line {call.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_run(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "pickle.loads(data)",
        "yaml.load(text, yaml.Loader)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_what_would_run_one_is_found(line):
    assert len(faults(line)) == 1


def test_the_tests_that_the_document_names_are_there():
    words = (ROOT / "SECURITY.md").read_text(encoding="utf-8").replace("`", " ").split()
    named = [word.strip(",;|") for word in words if word.startswith("tests/")]
    assert len(named) >= 7
    assert all((ROOT / name).is_file() for name in named), named
