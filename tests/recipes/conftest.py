"""Two-task streams cut from the embedded ones, and the recipes run on them as commands, as a user does."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KEEPLORA = [sys.executable, "-m", "mllm_keeplora.commands.main"]  # the command, not depending on PATH
TASKS = ("digits", "charts", "clocks")
VIDEO_TASKS = ("drift", "lamps")
TRAIN, TEST = 64, 20


@pytest.fixture(scope="session")
def built_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded stream's data, built by its own script."""
    root = tmp_path_factory.mktemp("built") / "embedded"
    subprocess.run([sys.executable, "recipes/small/build_vqa_data.py", "--out", str(root)], cwd=ROOT, check=True)
    return root


@pytest.fixture(scope="session")
def data_root(built_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with short files."""
    root = tmp_path_factory.mktemp("short") / "embedded"
    shutil.copytree(built_data, root)
    for path in root.glob("*/*.json"):
        records = json.loads(path.read_text())
        path.write_text(json.dumps(records[: TRAIN if path.name == "train.json" else TEST]))
    return root


@pytest.fixture(scope="session")
def video_data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded video stream's data by its own script, few clips of each task."""
    root = tmp_path_factory.mktemp("short") / "embedded_video"
    build = (
        "from mllm_keeplora.recipes.small import build_video_data as b; "
        f"b.TRAIN_CLIPS, b.TEST_QUESTIONS, b.GENERAL_QUESTIONS = {TRAIN}, {TEST}, {TEST}; b.main()"
    )
    command = [sys.executable, "-c", build, "--out", str(root)]
    subprocess.run(command, cwd=ROOT, check=True)
    return root


@dataclass
class Recipe:
    """recipes/vqa.py on a stream of its own, with settings small enough for a test."""

    script: ClassVar[str] = "recipes/vqa.py"
    general: ClassVar[str] = "scenes"

    directory: Path
    data_root: Path
    tasks: tuple[str, ...] = TASKS[:2]
    seconds: float = 0.0  # how long the uninterrupted run took

    def files(self, task: str) -> dict[str, str]:
        """Where a task's test data lie, as the stream YAML names them."""
        return {"test": f"{task}/test.json", "media_root": task}

    def train_file(self, task: str) -> str:
        """Where its training records lie."""
        return f"{task}/train.json"

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return self.directory / "run"

    def command(self, *arguments: str) -> list[str]:
        """The command line, after writing the stream file it names."""
        entry = {"metric": "exact", "max_new_tokens": 4}
        tasks = [{"name": t, "train": self.train_file(t), **self.files(t), **entry} for t in self.tasks]
        general = [{"name": self.general, **self.files(self.general), **entry}]
        stream = {"name": "short", "data_root": str(self.data_root), "tasks": tasks, "general": general}
        path = self.directory / "stream.yaml"
        path.write_text(yaml.safe_dump(stream))
        settings = {
            "run_dir": self.run_dir,
            "stream": path,
            "cache_dir": self.directory.parent / "weight_cache",
            "train.max_steps": 6,
            "train.per_device_train_batch_size": 8,
            "train.save_steps": 3,
            "train.logging_steps": 1,
            "probe.max_samples": 16,
            "language.rank": 4,
            "vision.rank": 4,
        }
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        return [sys.executable, self.script, *options, *arguments]

    def environment(self) -> dict[str, str]:
        """One thread, offline."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts the command."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def retention(self) -> dict[str, Any]:
        """The run's result."""
        return dict(json.loads((self.run_dir / "retention.json").read_text()))

    def result(self) -> tuple[dict[str, Any], bytes]:
        """What two equal runs have in common: the matrix with its metrics, and the adapter."""
        return self.retention(), (self.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@dataclass
class VideoRecipe(Recipe):
    """recipes/video.py, likewise."""

    script: ClassVar[str] = "recipes/video.py"
    general: ClassVar[str] = "motions"

    tasks: tuple[str, ...] = VIDEO_TASKS

    def files(self, task: str) -> dict[str, str]:
        """In CL-VISTA's layout."""
        rows = f"{task}/json_row"
        answers = f"{rows}/test_answers.json"
        return {
            "test": f"{rows}/test_questions.json",
            "test_answers": answers,
            "media_root": f"{task}/videos",
        }

    def train_file(self, task: str) -> str:
        """Likewise."""
        return f"{task}/json_row/train_data.json"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Recipe:
    """An uninterrupted run. Tests read it and leave it as it is."""
    recipe = Recipe(tmp_path_factory.mktemp("finished"), data_root)
    start = time.monotonic()
    done = recipe.run()
    recipe.seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    return recipe


@pytest.fixture
def copied(finished: Recipe, tmp_path: Path) -> Recipe:
    """The finished run again, to change."""
    subprocess.run(["cp", "-a", f"{finished.directory}/.", str(tmp_path)], check=True)
    return Recipe(tmp_path, finished.data_root)


@pytest.fixture
def fresh(tmp_path: Path, data_root: Path) -> Recipe:
    """A run that has not started."""
    return Recipe(tmp_path, data_root)
