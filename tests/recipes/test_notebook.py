"""The notebook of the small stream: well formed, without outputs, and its cells run in their order."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.recipes.conftest import ROOT, Recipe

PATH = ROOT / "docs/small_stream.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
SETTINGS = "STEPS, LIMIT = 800, None"  # the line that the notebook names
FEW = "STEPS, LIMIT = 1, 2"


def shown(code: str, names: dict[str, Any]) -> Any:
    """What a cell shows when it has run: the value of its last expression."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        before, last = [*before, last], ast.Expr(ast.Constant(None))
    exec(compile(ast.Module(before, []), PATH.name, "exec"), names)
    return eval(compile(ast.fix_missing_locations(ast.Expression(last.value)), PATH.name, "eval"), names)


def test_the_notebook_is_one_of_nbformat_4_5() -> None:
    """By nbformat's schema of version 4.5, whose package is not in the lock."""
    assert {*NOTEBOOK} == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    of_code = {"execution_count", "outputs"}
    for cell in NOTEBOOK["cells"]:
        extra = of_code if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert {*cell} == {"cell_type", "id", "metadata", "source"} | extra
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        lines = cell["source"]
        assert all(line.endswith("\n") for line in lines[:-1]) and not lines[-1].endswith("\n")
        assert max(map(len, lines)) <= 120
        if extra:
            assert cell["outputs"] == [] and cell["execution_count"] is None
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(ids) == len({*ids})
    assert (
        PATH.read_text() == json.dumps(NOTEBOOK, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )  # as Jupyter writes it


def test_the_notebooks_cells_run_in_their_order(
    data_root: Path, finished: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its own folder, as Jupyter starts it, with fewer steps and questions, on the first two tasks."""
    shutil.copytree(data_root, tmp_path / "data/small_vqa")
    shutil.copytree(finished.directory.parent / "weight_cache", tmp_path / "cache")
    name = "recipes/streams/small_vqa.yaml"  # in the working folder it goes before the package's own
    stream = yaml.safe_load((ROOT / name).read_text())
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(yaml.safe_dump({**stream, "tasks": stream["tasks"][:2]}))
    (tmp_path / "docs").mkdir()
    shutil.copy(PATH, tmp_path / "docs")
    monkeypatch.chdir(tmp_path / "docs")
    names: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            assert (SETTINGS in code) == (cell["id"] == "settings")
            cells[cell["id"]] = shown(code.replace(SETTINGS, FEW), names)
    assert isinstance(cells["matrix"], pd.DataFrame)
    assert list(cells["matrix"].index) == ["base", "digits", "charts"]
    assert list(cells["matrix"].columns) == ["digits", "charts", "scenes"]
    assert isinstance(cells["picture"], Image.Image) and isinstance(cells["shown"], Image.Image)
    assert isinstance(cells["ask"], str) and cells["ask"]
    assert cells["page"] == Path("runs/notebook/report.html") and (tmp_path / cells["page"]).is_file()
