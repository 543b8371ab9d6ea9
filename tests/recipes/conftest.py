"""A two-task stream cut from the embedded one, and the recipe run on it as its user runs it: as a command."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("digits", "charts", "clocks")
TRAIN, TEST = 64, 20


@pytest.fixture(scope="session")
def built_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded stream's data, built by its own script."""
    root = tmp_path_factory.mktemp("built") / "embedded"
    subprocess.run(
        [sys.executable, "recipes/embedded/build_data.py", "--out", str(root)], cwd=ROOT, check=True
    )
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


@dataclass
class Recipe:
    """recipes/vqa.py on a stream of its own, with settings small enough for a test."""

    directory: Path
    data_root: Path
    tasks: tuple[str, ...] = TASKS[:2]
    seconds: float = 0.0  # how long the uninterrupted run took

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return self.directory / "run"

    def command(self, *arguments: str) -> list[str]:
        """The command line, after writing the stream file it names."""
        entry = {"metric": "exact", "max_new_tokens": 4}
        tasks = [
            {"name": t, "train": f"{t}/train.json", "test": f"{t}/test.json", "image_root": t, **entry}
            for t in self.tasks
        ]
        general = [{"name": "scenes", "test": "scenes/test.json", "image_root": "scenes", **entry}]
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
        return [sys.executable, "recipes/vqa.py", *options, *arguments]

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
