"""The package's own structure: imports run downward, what is public is documented, nothing is pickled."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mllm_keeplora"

LAYERS = {
    0: "errors startup platform_guards subspace sketch lora_init layer_scaling folding retention",
    1: "targets linears processes sharding gradients activations adapters past console",
    2: "config streams artifacts models protected data evaluation",
    3: "training workplace methods memory stage stream_runner recipe plan finished chat export judge compare "
    "analysis check_stream fetch_stream",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """`data/records.py` belongs to `data`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize(
    "path", [p for p in MODULES if unit(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_downward(path: Path) -> None:
    layer = LAYER_OF[unit(path)]
    for name in imported(path):
        if name.startswith("mllm_keeplora."):
            used = name.split(".")[1]
            assert LAYER_OF[used] <= layer, (
                f"{path.name} (layer {layer}) imports {used} (layer {LAYER_OF[used]})"
            )


@pytest.mark.parametrize("name", LAYERS[0].split())
def test_the_maths_needs_torch_alone(name: str) -> None:
    allowed = (
        {"torch", "mllm_keeplora", "bitsandbytes", "torchvision"}
        if name == "platform_guards"
        else {"torch", "mllm_keeplora"}
    )
    standard = {
        "math",
        "typing",
        "collections",
        "statistics",
        "importlib",
        "warnings",
        "logging",
        "sys",
        "contextlib",
    }
    assert {module.split(".")[0] for module in imported(PACKAGE / f"{name}.py")} <= allowed | standard


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            nested = any(
                node in ast.walk(f) and node is not f
                for f in ast.walk(tree)
                if isinstance(f, ast.FunctionDef)
            )
            assert nested or ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "recipes").rglob("*.py"))], ids=lambda p: p.name)
def test_nothing_is_pickled(path: Path) -> None:
    assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}
    assert "torch.save(" not in path.read_text()
    assert "torch.load(" not in path.read_text()
