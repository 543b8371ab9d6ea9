"""Two-task streams cut from the small ones, and the recipes run on them as commands, as a user does."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from filelock import FileLock

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
KEEPLORA = [sys.executable, "-m", "mllm_keeplora.commands.main"]  # the command, not depending on PATH
TASKS = ("digits", "charts", "clocks")
VIDEO_TASKS = ("drift", "lamps")
TRAIN, TEST = 64, 20


Fill = Callable[[Path], None]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Fill], Path]:
    """A folder that the first test to ask for its name fills, for all workers of pytest-xdist. Nobody changes it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, fill: Fill) -> Path:
        filled = root / f"{name}.filled"
        with FileLock(root / f"{name}.lock"):
            if not filled.exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of an attempt that failed
                fill(root / name)
                filled.touch()
        return root / name

    return folder


@pytest.fixture(scope="session")
def built_data(shared: Callable[[str, Fill], Path]) -> Path:
    """The small stream's data, built by its own script."""
    return shared("small_vqa", build_vqa)


@pytest.fixture(scope="session")
def data_root(built_data: Path, shared: Callable[[str, Fill], Path]) -> Path:
    """The same with short files."""

    def shorten(root: Path) -> None:
        shutil.copytree(built_data, root)
        for path in root.glob("*/*.json"):
            records = json.loads(path.read_text())
            path.write_text(json.dumps(records[: TRAIN if path.name == "train.json" else TEST]))

    return shared("short_vqa", shorten)


@pytest.fixture(scope="session")
def video_data_root(shared: Callable[[str, Fill], Path]) -> Path:
    """The small video stream's data by its own script, few clips of each task."""
    return shared("short_video", lambda root: build_video(root, TRAIN, TEST, TEST))


def build_vqa(root: Path) -> None:
    """Builds the small stream by its own script."""
    checked(forked.run(["recipes/small/build_vqa_data.py", "--out", root]))


def build_video(root: Path, train: int, test: int, general: int) -> None:
    """Builds the small video stream by its own script, with so many clips and questions."""
    script = (
        "from mllm_keeplora.recipes.small import build_video_data as b; "
        f"b.TRAIN_CLIPS, b.TEST_QUESTIONS, b.GENERAL_QUESTIONS = {train}, {test}, {general}; "
        f"b.GENERAL_SAMPLES = {general}; b.main()"
    )
    subprocess.run([sys.executable, "-c", script, "--out", str(root)], cwd=ROOT, check=True)


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """A command that has ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_example(card: str, shown: Path, folder: Path) -> tuple[str, str]:
    """What the example on a model card prints, run as written in a folder, and what the card says that it prints.

    Args:
        card: its text.
        shown: the picture or the clip that the first question of the last task is about.
        folder: an empty one; the process is moved there while the example runs.
    """
    [code] = re.findall(r"^```python\n(.*?)^```", card, flags=re.S | re.M)
    [name] = re.findall(r"^`(picture\.png|clip\.mp4)` stands for", card, flags=re.M)
    [said] = re.findall(r"this prints\n`(.*)`", card)
    shutil.copy(shown, folder / name)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue().strip(), said


PAPER = "recipes/configs/methods/paper.yaml"


@dataclass
class Recipe:
    """recipes/vqa.py on a stream of its own, in the paper's form, with settings small enough for a test."""

    script: ClassVar[str] = "recipes/vqa.py"
    config: ClassVar[str] = "recipes/configs/vqa/small.yaml"
    general: ClassVar[str] = "scenes"

    directory: Path
    data_root: Path
    tasks: tuple[str, ...] = TASKS[:2]

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
        configs = ("--config", self.config, "--config", PAPER)
        return [sys.executable, self.script, *configs, *options, *arguments]

    def environment(self) -> dict[str, str]:
        """One thread, offline."""
        return {**os.environ, **forked.ENVIRONMENT}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command to its end."""
        return self.start(*arguments).completed()

    def start(self, *arguments: str) -> forked.Forked:
        """Starts the command."""
        return forked.Forked(self.command(*arguments)[1:])

    def retention(self) -> dict[str, Any]:
        """The run's result."""
        return dict(json.loads((self.run_dir / "retention.json").read_text()))

    @property
    def seconds(self) -> float:
        """How long its stages took."""
        manifests = self.run_dir.glob("stages/*/manifest.json")
        return sum(json.loads(path.read_text())["timings"]["total"] for path in manifests)

    def result(self) -> tuple[dict[str, Any], bytes]:
        """What two equal runs have in common: the matrix with its metrics, and the adapter."""
        return self.retention(), (self.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@dataclass
class VideoRecipe(Recipe):
    """recipes/video.py, likewise."""

    script: ClassVar[str] = "recipes/video.py"
    config: ClassVar[str] = "recipes/configs/video/small.yaml"
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
def finished(shared: Callable[[str, Fill], Path], data_root: Path) -> Recipe:
    """An uninterrupted run. Tests read it and leave it as it is."""

    def run(root: Path) -> None:
        recipe = Recipe(root / "own", data_root)
        recipe.directory.mkdir(parents=True)
        checked(recipe.run())

    return Recipe(shared("finished", run) / "own", data_root)


@pytest.fixture
def copied(finished: Recipe, tmp_path: Path) -> Recipe:
    """The finished run again, to change."""
    subprocess.run(["cp", "-a", f"{finished.directory}/.", str(tmp_path)], check=True)
    return Recipe(tmp_path, finished.data_root)


@pytest.fixture
def fresh(tmp_path: Path, data_root: Path) -> Recipe:
    """A run that has not started."""
    return Recipe(tmp_path, data_root)
