"""A hundred signals at random moments: the run continues each time, and ends in the undisturbed run's bits.

Image and video runs, one and two processes, SIGKILL, SIGTERM, SIGINT and SIGHUP, sent to one process or to both. A run
is disturbed a few times in a row and then left to its end. Each has a cache of its own, so the weight bases are
disturbed as well. The moments are drawn from a seed, which a failure prints; KEEPLORA_KILL_SEED gives other moments.
"""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mllm_keeplora.runs.files import sha256_file
from tests.forked import Forked, ranks
from tests.recipes.conftest import Recipe, VideoRecipe

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SEED = int(os.environ.get("KEEPLORA_KILL_SEED", "0"))
IN_A_ROW = 5  # signals to one run before it is left to its end
PATIENCE = 60  # seconds in which a signal has to end a run
RUNS = {"image": (1, 40), "video": (1, 30), "image, two processes": (2, 15), "video, two processes": (2, 15)}
SHORT = ("--train.max_steps", "4", "--train.save_steps", "1", "--evaluation.limit", "6", "--report_to", "[]")


@dataclass
class Disturbed:
    """One run under fire.

    Attributes:
        recipe: what runs.
        processes: how many.
        seconds: from its first written file to its end, undisturbed.
        sent: signals that met it alive, by name.
    """

    recipe: Recipe
    processes: int
    seconds: float = 0.0
    sent: list[str] = field(default_factory=list)

    def start(self) -> list[Forked]:
        """All processes of the run, started as a launcher would that watches over none."""
        command = self.recipe.command(*SHORT, "--cache_dir", str(self.recipe.directory / "cache"))[1:]
        return [Forked(command, rank, self.recipe.directory / "log") for rank in ranks(self.processes)]

    def run(self) -> None:
        """Undisturbed, to the end."""
        processes = self.start()
        assert [process.wait() for process in processes] == [0] * self.processes, self.log()
        self.seconds = time.time() - (self.recipe.run_dir / "config.json").stat().st_mtime

    def disturb(self, draw: random.Random, typical: float) -> None:
        """One start and one signal at a random moment; several of them in a row take a run through all its phases."""
        processes = self.start()
        try:
            processes[0].wait(draw.uniform(0.0, 0.6) * typical)
            alive = [process for process in processes if process.poll() is None]
            if alive:
                self.sent.append(self.send(alive, draw))
            for process in processes:
                process.wait(PATIENCE)
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def send(self, alive: list[Forked], draw: random.Random) -> str:
        """Sends one signal, to all processes or to one of them; the others have to notice."""
        number = draw.choice(SIGNALS)
        chosen = alive if draw.random() < 0.5 else [draw.choice(alive)]
        for process in chosen:
            process.send_signal(number)
        return f"{number.name} to {len(chosen)}"

    def log(self) -> str:
        """What was sent, and the end of what the run said."""
        text = (self.recipe.directory / "log").read_text(errors="replace")
        return f"seed {SEED}, sent {self.sent}\n{text[-6000:]}"

    def result(self) -> dict[str, str]:
        """Hashes of everything that two equal runs have in common."""
        found = [*self.recipe.run_dir.rglob("*.safetensors"), self.recipe.run_dir / "retention.json"]
        return {str(path.relative_to(self.recipe.run_dir)): sha256_file(path) for path in found}

    def leftovers(self) -> list[Path]:
        """Temporary files, and checkpoints of stages that are over."""
        names = (".*.tmp", ".*.old", "checkpoint*")
        return [path for name in names for path in self.recipe.directory.rglob(name)]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", RUNS)
def test_signals_at_random_moments_change_nothing(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    processes, count = RUNS[name]
    make, data = (VideoRecipe, "video_data_root") if "video" in name else (Recipe, "data_root")
    draw = random.Random(f"{SEED} {name}")

    def fresh(folder: str) -> Disturbed:
        (tmp_path / folder).mkdir()
        return Disturbed(make(tmp_path / folder, request.getfixturevalue(data)), processes)

    undisturbed = fresh("undisturbed")
    undisturbed.run()
    expected, sent, number = undisturbed.result(), 0, 0
    assert not undisturbed.leftovers()
    while sent < count:
        number += 1
        disturbed = fresh(str(number))
        while len(disturbed.sent) < min(IN_A_ROW, count - sent) and not finished(disturbed):
            disturbed.disturb(draw, undisturbed.seconds)
        disturbed.run()
        assert disturbed.result() == expected, disturbed.log()
        assert not disturbed.leftovers(), disturbed.log()
        sent += len(disturbed.sent)
        print(f"{name}: {sent} of {count} signals, run {number} equal after {', '.join(disturbed.sent)}", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_runs_at_once_share_a_cache(data_root: Path, tmp_path: Path) -> None:
    runs = [Disturbed(Recipe(tmp_path / name, data_root), 1) for name in ("first", "second")]
    processes = []
    for run in runs:
        run.recipe.directory.mkdir()
        command = run.recipe.command(*SHORT, "--cache_dir", str(tmp_path / "cache"))[1:]
        processes.append(Forked(command, log=run.recipe.directory / "log"))
    assert [process.wait() for process in processes] == [0, 0], runs[0].log() + runs[1].log()
    assert runs[0].result() == runs[1].result()
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def finished(run: Disturbed) -> bool:
    """Whether there is nothing left to disturb."""
    return (run.recipe.run_dir / "report.html").exists()
