"""The analysis and the comparison as commands, on a finished run."""

import json
import re
import time
from pathlib import Path

from tests.forked import run
from tests.recipes.conftest import KEEPLORA, TEST, Recipe

ANALYZE = (*KEEPLORA[1:], "analyze")
COMPARE = (*KEEPLORA[1:], "compare")


def test_the_unchanged_model_of_an_analysis_is_that_of_the_run(finished: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    command = [
        *ANALYZE,
        "--run",
        str(finished.run_dir),
        "--out",
        str(out),
        "--energies",
        "[0.6, 1]",
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"picture: {out / 'analysis.png'}" in done.stdout
    cells = json.loads((out / "analysis.json").read_text())["cells"]
    last = finished.retention()["rows"][-1]["scores"]
    for name, score in cells["unchanged"]["scores"].items():  # dequantised weights round differently
        assert score["n"] == TEST and abs(score["value"] - last[name]["value"]) <= 2 / TEST
    assert cells["principal-1-both-all"]["scores"] == cells["unchanged"]["scores"]
    assert cells["residual-0.6-both-all"]["scores"] != cells["unchanged"]["scores"]
    written, start = (out / "analysis.json").stat().st_mtime_ns, time.monotonic()
    assert run(command).returncode == 0
    assert (out / "analysis.json").stat().st_mtime_ns == written and time.monotonic() - start < 120


def test_an_analysis_refuses_bad_input_in_one_line(finished: Recipe) -> None:
    for arguments, expected in (
        (["--energies", "[2]"], "error: --energies: expected a number in (0, 1], found 2"),
        (["--run", "runs/nowhere"], "error: runs/nowhere is no directory of a run"),
    ):
        done = run([*ANALYZE, *arguments])
        assert done.returncode == 2
        assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1


def test_a_run_is_compared_by_the_command(copied: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    command = [*COMPARE, str(copied.run_dir)]
    done = run([*command, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^keeplora +1 ", done.stdout, re.MULTILINE)
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.png"]
    again = run([*command, str(copied.run_dir), "--out", str(out)])
    assert again.returncode == 2 and "two runs are 'keeplora' with seed 0" in again.stderr
