"""Every script of benchmarks/run.py runs with --quick and leaves rows that can be read."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.recipes.conftest import Recipe

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def scripts() -> list[str]:
    """Those that run.py names; it imports its neighbour, as a script does."""
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        return list(runpy.run_path(str(BENCHMARKS / "run.py"))["SCRIPTS"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="some measure memory by Linux's /proc")
@pytest.mark.parametrize("name", scripts())
def test_a_benchmark_runs_and_leaves_rows(name: str, tmp_path: Path) -> None:
    script, found = BENCHMARKS / f"{name}.py", tmp_path / "rows.json"
    command = [sys.executable, str(script), "--quick", "--json", str(found)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    pictures = sorted((ROOT / "docs" / "benchmarks").glob("*"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())
    assert rows
    for row in rows:
        assert row["number"] >= 1
        assert row["what"]
        assert row["what"] in done.stdout
        assert re.search(r"\d|refused: \w", row["result"]), row["result"]
        assert not re.search(r"\b(nan|inf)\b", row["result"]), row["result"]
    assert sorted((ROOT / "docs" / "benchmarks").glob("*")) == pictures, "figures of --quick mean nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recompression", "interference"])
def test_what_looks_into_a_finished_run(name: str, finished: Recipe) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), str(finished.run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=finished.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^.*{tower} +.*\d", done.stdout, re.M) for tower in ("vision", "language"))
