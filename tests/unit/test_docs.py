"""The documents keep up with the code: names exist, commands exist, settings exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Shell lines of fenced blocks and inline code."""
    fenced = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
    inline = re.findall(r"`((?:bash|accelerate|python) [^`\n]+)`", text)
    return [
        line.split("#")[0].strip() for block in fenced for line in block.splitlines() if line.strip()
    ] + inline


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text()
    for command in commands(text):
        for name in re.findall(r"(?:scripts|recipes|eval|docs)/[\w./-]+\.\w+", command):
            if "FILE" not in name:
                assert (ROOT / name).exists(), f"{path.name}: {command} names {name}"
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (path.parent / name).exists(), f"{path.name} links to {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_names_in_a_document_exist(path: Path) -> None:
    for name in re.findall(r"`(mllm_keeplora\.[\w.]+)`", path.read_text()):
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), f"{path.name} names {name}"


def test_every_equation_names_tests_that_exist() -> None:
    rows = [
        line for line in (ROOT / "docs" / "equations.md").read_text().splitlines() if line.startswith("| E")
    ]
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert [row.split()[1] for row in rows] == [f"E{i}" for i in range(1, 10)]
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        for name in names:
            assert f"def {name}(" in tests, name


def test_no_document_names_a_place_of_one_machine() -> None:
    for path in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(?:work|root|home|opt)/", path.read_text()), path.name
