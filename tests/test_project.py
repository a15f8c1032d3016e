"""What holds for the project as a whole: the direction of its imports, and its style."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module imports from lines above its own, and from its own line what stands before it
    ["kernels"],
    ["bsr", "data", "files", "models", "masks", "config"],
    ["training", "layers", "sequential"],
    ["lottery", "ticket"],
    ["measure", "progress", "report"],
    ["results", "figures", "claims", "page", "chains", "engine", "paper"],
    ["main"],
]


def _imports(path):
    """The project's modules that a file imports, by their names in LAYERS."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module else [alias.name for alias in node.names]
            if node.level or module.split(".")[0] == "sparse_lth":
                for name in names:
                    parts = name.removeprefix("sparse_lth").strip(".").split(".")
                    yield parts[0] or next(alias.name for alias in node.names)


def test_imports_run_one_way():
    order = [name for layer in LAYERS for name in layer]
    paths = {path.stem: path for path in (ROOT / "sparse_lth").rglob("*.py")}
    paths["main"] = ROOT / "main.py"
    assert paths.keys() - {"__init__", "__main__"} == set(order) - {"kernels"}
    for name in order[1:]:
        for imported in _imports(paths[name]):
            assert order.index(imported) < order.index(name), f"{name} imports {imported}"


def test_kernels_import_nothing_of_the_package():
    siblings = {p.stem for p in (ROOT / "kernels").glob("*.py")} | {"_native"}
    for path in (ROOT / "kernels").glob("*.py"):
        assert set(_imports(path)) <= siblings, path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
