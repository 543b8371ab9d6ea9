"""A hundred signals at random moments: the run continues each time, and ends in the undisturbed run's bits.

Image and video runs, one and two processes, SIGKILL, SIGTERM, SIGINT and SIGHUP, sent to one process or to all. A run
is disturbed a few times in a row and then left to its end. Each has a cache of its own, so the weight bases are
disturbed as well. The moments are drawn from a seed, which a failure prints; KEEPLORA_KILLS gives a round of other
numbers, KEEPLORA_KILL_SEED one of other moments.
"""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from mllm_keeplora.runs.files import sha256_file
from tests.recipes.conftest import ROOT, Recipe, VideoRecipe
from tests.recipes.test_processes import TORCHRUN

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SEED = int(os.environ.get("KEEPLORA_KILL_SEED", "0"))
IN_A_ROW = 6  # signals to one run before it is left to its end
PATIENCE = 120  # seconds in which a signal has to end a run
RUNS = {"image": (1, 40), "video": (1, 25), "image, 2 processes": (2, 20), "video, 2 processes": (2, 15)}
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

    def start(self) -> subprocess.Popen[bytes]:
        """In a session of its own: what is signalled below is what this test started, nothing else."""
        command = self.recipe.command(*SHORT, "--cache_dir", str(self.recipe.directory / "cache"))
        if self.processes > 1:
            command = [*TORCHRUN, *command[1:]]
        with (self.recipe.directory / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.recipe.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_default_signals,
            )

    def has_begun(self, before: int) -> bool:
        """Whether the process has written a file of the run: imports, half of its time, are over."""
        with suppress(FileNotFoundError):
            return self.config.stat().st_mtime_ns != before
        return False

    @property
    def config(self) -> Path:
        """The first file that a start writes."""
        return self.recipe.run_dir / "config.json"

    def wait_until_begun(self, process: subprocess.Popen[bytes], before: int) -> None:
        """Returns when it has, or has ended."""
        while process.poll() is None and not self.has_begun(before):
            time.sleep(0.01)

    def run(self) -> None:
        """Undisturbed, to the end."""
        before = self.config.stat().st_mtime_ns if self.config.exists() else 0
        process = self.start()
        self.wait_until_begun(process, before)
        start = time.monotonic()
        assert process.wait() == 0, self.log()
        self.seconds = time.monotonic() - start

    def disturb(self, draw: random.Random, typical: float) -> None:
        """One start and one signal, at a moment after the first file; now and then before."""
        before = self.config.stat().st_mtime_ns if self.config.exists() else 0
        process = self.start()
        if draw.random() < 0.95:
            self.wait_until_begun(process, before)
        moment = draw.uniform(0.0, 0.7) * typical
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is None:
            self.sent.append(self.send(process, draw))
        try:
            process.wait(PATIENCE)
        finally:
            self.end(process)

    def send(self, process: subprocess.Popen[bytes], draw: random.Random) -> str:
        """Sends one signal to all processes, or to one of them."""
        number, to_all = draw.choice(SIGNALS), draw.random() < 0.5
        if self.processes == 1 or to_all:
            os.killpg(process.pid, number)
            return f"{number.name} to all"
        members = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        chosen = draw.choice(members)
        with suppress(psutil.NoSuchProcess):
            chosen.send_signal(number)
        return f"{number.name} to {'the launcher' if chosen.pid == process.pid else 'a worker'}"

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Workers outlive a launcher that was killed, until they miss it; here they are ended at once."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while any(os.getpgid(p.pid) == process.pid for p in psutil.process_iter() if _is_there(p)):
            time.sleep(0.05)

    def log(self) -> str:
        """What was sent, and the end of what the run said."""
        text = (self.recipe.directory / "log").read_text(errors="replace")
        return f"seed {SEED}, sent {self.sent}\n{text[-6000:]}"

    def result(self) -> dict[str, str]:
        """Hashes of everything that two equal runs have in common."""
        found = sorted(self.recipe.run_dir.rglob("*.safetensors")) + [self.recipe.run_dir / "retention.json"]
        return {str(path.relative_to(self.recipe.run_dir)): sha256_file(path) for path in found}

    def leftovers(self) -> list[Path]:
        """Temporary files, and checkpoints of stages that are over."""
        names = (".*.tmp", ".*.old", "checkpoint*")
        return [path for name in names for path in self.recipe.directory.rglob(name)]


def _default_signals() -> None:
    """A shell that starts the tests in the background has SIGINT and SIGHUP ignored."""
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


def _is_there(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        os.getpgid(process.pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RUNS)
def test_signals_at_random_moments_change_nothing(
    name: str, data_root: Path, video_data_root: Path, tmp_path: Path
) -> None:
    processes, count = RUNS[name]
    count = int(os.environ.get("KEEPLORA_KILLS", count))
    make, data = (VideoRecipe, video_data_root) if "video" in name else (Recipe, data_root)
    draw = random.Random(f"{SEED} {name}")

    def fresh(folder: str) -> Disturbed:
        (tmp_path / folder).mkdir()
        return Disturbed(make(tmp_path / folder, data), processes)

    undisturbed = fresh("undisturbed")
    undisturbed.run()
    expected, sent, number = undisturbed.result(), 0, 0
    assert not undisturbed.leftovers()
    while sent < count:
        number += 1
        disturbed = fresh(str(number))
        for _ in range(min(IN_A_ROW, count - sent)):
            disturbed.disturb(draw, undisturbed.seconds)
        disturbed.run()
        assert disturbed.result() == expected, disturbed.log()
        assert not disturbed.leftovers(), disturbed.log()
        sent += len(disturbed.sent)
        print(f"{name}: {sent} of {count} signals, run {number} equal after {', '.join(disturbed.sent)}", flush=True)
