"""The package's own structure: imports run downward, what is public is documented, nothing is pickled."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mllm_keeplora"

# Lowest first; a package is one unit, and so is a file beside the packages.
LAYERS = (
    "errors",
    "units",
    "resources",
    "regular_files",
    "yaml_files",
    "settings",
    "command_line",
    "linalg",
    "config",
    "distributed",
    "runs",
    "modeling",
    "probes",
    "data",
    "methods",
    "evaluation",
    "continual",
    "planning",
    "reports",
    "recipes",
    "studies",
    "eval",
    "commands",
)
LAYER_OF = {name: layer for layer, name in enumerate(LAYERS)}
MODULES = sorted(PACKAGE.rglob("*.py"))
# What travels inside the package; recipes/vqa.py and recipes/video.py are command lines, above all layers.
BESIDE = [
    path
    for folder in ("recipes/small", "recipes/general", "studies", "eval")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def unit(path: Path) -> str:
    """`data/records.py` belongs to `data`."""
    root = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return path.relative_to(root).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return frozenset(names)


@pytest.mark.parametrize(
    "path", [p for p in [*MODULES, *BESIDE] if unit(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_run_downward(path: Path) -> None:
    for name in imported(path):
        if name.startswith("mllm_keeplora.") and name.split(".")[1] != unit(path):
            used = name.split(".")[1]
            assert LAYER_OF[used] < LAYER_OF[unit(path)], f"{unit(path)} imports {used}, which lies above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_imported_for_types_alone(path: Path) -> None:
    assert "TYPE_CHECKING" not in path.read_text()


STANDARD = {"math", "typing", "collections", "statistics", "contextlib", "dataclasses"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "linalg").glob("*.py")), ids=lambda p: p.name)
def test_the_maths_needs_torch_alone(path: Path) -> None:
    # torch has no part of an eigenproblem
    lapack = {"numpy", "scipy", "threadpoolctl"} if path.name == "decompositions.py" else set()
    assert {module.split(".")[0] for module in imported(path)} <= {"torch", "mllm_keeplora"} | STANDARD | lapack


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    tree = tree_of(path)
    if tree.body:
        assert ast.get_docstring(tree), f"{path} has no module docstring"
    nested = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n is not f}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node not in nested:
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "recipes").rglob("*.py"))], ids=lambda p: p.name)
def test_nothing_is_pickled(path: Path) -> None:
    assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}
    assert "torch.save(" not in path.read_text()
    assert "torch.load(" not in path.read_text()


SHIPPED = [
    p for top in (PACKAGE, *(ROOT / f for f in ("recipes", "eval", "studies", "benchmarks"))) for p in top.rglob("*.py")
]


@pytest.mark.parametrize("path", sorted(SHIPPED), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_wrong_is_raised_and_what_is_cited_is_there(path: Path) -> None:
    """`python -O` drops an assert, and nobody can look a document up that is not in the repository."""
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree_of(path)))
    assert "DESIGN" not in path.read_text()
