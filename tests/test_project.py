"""What holds for the project as a whole: the direction of its imports, and its style."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"sparse_lth", "sparse_lth.kernels"}  # an __init__ gathers what its modules define
# the package's face: `load_sparse(path)` then knows the models that the program exports
EXEMPT = {"sparse_lth": {"sparse_lth.program.models"}}
GROUPS = ("kernels", "library", "program", "experiments", "main")  # each imports from those before


def _group(module):
    """Which of GROUPS a module of the project belongs to."""
    part, *rest = module.split(".")
    if part == "sparse_lth" and rest:
        part = rest[0]
    return part if part in GROUPS else "library"


def _modules():
    """Every module of the project by the name that it has once installed, with its file."""
    found = {"main": ROOT / "main.py"}
    for folder, package in ((ROOT / "kernels", "sparse_lth.kernels"), (ROOT / "sparse_lth", "")):
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder if package else ROOT).with_suffix("").parts)
            found[".".join(filter(None, parts)).removesuffix(".__init__")] = path
    return found


def _imports(name, path, modules):
    """The modules of the project that this one imports, wherever in its file."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                member = f"{source}.{alias.name}"
                if member in modules or source in modules:
                    yield member if member in modules else source


@pytest.fixture(scope="module")
def imports():
    modules = _modules()
    return {name: {*_imports(name, path, modules)} for name, path in modules.items()}


def test_kernels_then_library_then_program_then_experiments_then_main(imports):
    assert {_group(name) for name in imports} == set(GROUPS)
    for name, imported in imports.items():
        for other in imported - EXEMPT.get(name, set()):
            assert GROUPS.index(_group(other)) <= GROUPS.index(_group(name)), f"{name}: {other}"


def test_no_module_imports_itself_by_way_of_others(imports):
    graph = {n: i - EXEMPT.get(n, set()) for n, i in imports.items() if n not in PACKAGES}
    TopologicalSorter({n: i - PACKAGES for n, i in graph.items()}).prepare()  # raises CycleError


def test_kernels_import_nothing_of_the_package(imports):
    for name, imported in imports.items():
        if _group(name) == "kernels":
            assert {_group(other) for other in imported} <= {"kernels"}, name


def test_the_library_imports_what_it_needs_and_makes_nothing_else_importable():
    script = (
        "import sys, sparse_lth; from importlib.util import find_spec; "
        "print([m for m in ('matplotlib', 'rich', 'sklearn', 'tensorboard', 'torchvision')"
        " if m in sys.modules], [m for m in ('main', 'tests', 'benchmarks', 'examples')"
        " if find_spec(f'sparse_lth.{m}')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["[]", "[]"]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
