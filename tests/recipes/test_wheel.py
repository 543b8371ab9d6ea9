"""The installed wheel in an empty folder, where no checkout can be imported: the small default runs."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.wheel import build_wheel, install


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the environment's commands."""
    root = tmp_path_factory.mktemp("installed")
    return install(build_wheel(root), root / "venv")


def keeplora(commands: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(commands, folder, "keeplora", *arguments)


def run(commands: Path, folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [str(commands / name), *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_checkout_cannot_be_imported(commands: Path, tmp_path: Path) -> None:
    script = "import mllm_keeplora.recipes.small as m; print(m.__file__)"
    done = run(commands, tmp_path, "python", "-c", script)
    assert Path(done.stdout.strip()).is_relative_to(commands.parent)


def test_the_small_default_runs_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    short = ("--train.max_steps", "1", "--probe.max_samples", "4", "--evaluation.limit", "2")
    image = "data/small_vqa/digits/images/test/00000.png"
    script = f"""
import sys, mllm_keeplora.evaluation
assert not any(name.startswith("lmms_eval") for name in sys.modules), "not cheap"
from mllm_keeplora.evaluation.lmms_model import KeepLoRAModel
from lmms_eval.models import get_model
assert get_model("keeplora") is KeepLoRAModel
from mllm_keeplora.recipes.small import build_vqa_data
build_vqa_data.TRAIN_IMAGES = 100  # a task; every command reads them all
from mllm_keeplora.commands.main import main
assert main(["run", *{short}]) == 0
print("---")
main(["chat", "runs/vqa_small", "--image", {image!r}, "Which digit?"])
print("---")
main(["plan", *{short}])
main(["check", "recipes/streams/small_vqa.yaml"])
main(["leaderboard", "runs/vqa_small"])
"""
    done = run(commands, tmp_path, "python", "-c", script)  # one process: imports take longer than the commands
    ran, reply, said = done.stdout.split("---\n")
    assert "report: runs/vqa_small/report.html" in ran, done.stderr
    retention = json.loads((tmp_path / "runs/vqa_small/retention.json").read_text())
    assert retention["tasks"] == ["digits", "charts", "clocks", "grounds"] and len(retention["rows"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "runs"]
    assert reply.strip() and "memory, GB" in said and " 0 stop a run (!)" in said, done.stderr
    assert done.returncode == 2 and "first 2 questions" in done.stderr
    assert keeplora(commands, tmp_path, "--version").stdout.startswith("keeplora ")


@pytest.mark.slow
def test_the_installed_leaderboard_and_export_take_the_installed_run(commands: Path, tmp_path: Path) -> None:
    done = keeplora(commands, tmp_path, "run", "--train.max_steps", "20")
    assert done.returncode == 0, done.stderr
    ranked = keeplora(commands, tmp_path, "leaderboard", "runs/vqa_small")
    assert ranked.returncode == 0, ranked.stderr
    assert "All 5 scores equal" in ranked.stdout
    [row] = json.loads((tmp_path / "leaderboard/leaderboard.json").read_text())["rows"]
    assert (row["run"], row["equal_to_run"]) == ("vqa_small", True)
    exported = keeplora(commands, tmp_path, "export", "runs/vqa_small", "--out", "exported")
    assert exported.returncode == 0, exported.stderr
    assert list((tmp_path / "exported").glob("*.safetensors"))


@pytest.mark.slow
def test_the_small_video_default_runs_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    config = ("--config", "recipes/configs/video/small.yaml")
    short = ("--train.max_steps", "1", "--probe.max_samples", "4", "--evaluation.limit", "4")
    done = keeplora(commands, tmp_path, "run", *config, *short)
    assert done.returncode == 0, done.stderr
    assert "report: runs/video_small/report.html" in done.stdout
