"""scripts/first_gpu_hour.sh: one table, whatever fails."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str) -> dict[str, Any]:
    """Runs it under that name in this process; it imports its neighbours, as a script does."""
    folder = ROOT / "benchmarks"
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return runpy.run_path(str(folder / "first_gpu_hour.py"), run_name=name)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return run_script("first_gpu_hour")


def ends(error: BaseException | None = None) -> Callable[[Any], str]:
    def part(hour: Any) -> str:
        if error is not None:
            raise error
        return "12 passed"

    return part


def test_a_part_that_fails_is_a_row_and_the_others_go_on(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {"crash": ValueError("no\nkernel"), "exit": SystemExit("killed"), "memory": MemoryError("out of memory")}
    monkeypatch.setitem(script, "PARTS", {"well": ends()} | {name: ends(e) for name, e in failures.items()})
    parts, main = script["PARTS"], script["main"]
    monkeypatch.setattr(sys, "argv", ["first_gpu_hour.py", "--quick", "--out", str(tmp_path)])
    with mock.patch.dict(main.__globals__, {"PARTS": parts}):
        assert main() == 1
    table = (tmp_path / "table.md").read_text()
    assert re.search(r"\| well \| 12 passed \| [\d.]+ \|", table)
    assert "| crash | FAILED: no kernel |" in table and "| exit | FAILED: killed |" in table
    assert "FAILED: out of memory" in table
    assert f"torch {torch.__version__}" in table and "--quick: its figures mean nothing" in table
    assert "ValueError" in (tmp_path / "crash.error.log").read_text()


def test_a_command_that_fails_names_its_log(script: dict[str, Any], tmp_path: Path) -> None:
    hour = script["Hour"](tmp_path, True, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="status 3, see .*part.log"):
        hour.run("part", "-c", "print('why'); raise SystemExit(3)")
    assert hour.log("part").read_text() == "why\n"


def test_tests_are_counted(script: dict[str, Any], tmp_path: Path) -> None:
    """In the report that pytest itself writes."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip\ndef test_c(): pass\n@pytest.fixture\ndef broken(): assert 0\ndef test_d(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), f"--junitxml={report}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert script["counted"](report) == "1 passed, 2 failed, 1 skipped"


def test_qwens_shape_is_the_7b_models(script: dict[str, Any]) -> None:
    config = script["qwen_config"]()
    batch = script["qwen_batch"](config, torch.device("cpu"), torch.float32)
    assert (config.text_config.num_hidden_layers, config.vision_config.depth) == (28, 32)
    assert int((batch["input_ids"] == config.image_token_id).sum()) == 34 * 46 // 4
    assert len(batch["pixel_values"]) * 14 * 14 == script["IMAGE"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["first_gpu_hour.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run_script("__main__")
    assert ended.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
