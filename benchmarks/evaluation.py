"""Row 8: a retention row inside the run, beside lmms-eval's command line on the saved model.

    python benchmarks/evaluation.py --repeats 3        the embedded default: CPU, one core, 3 minutes

A short run over the embedded image stream (two training steps a task: what it learns does not matter here)
is made first. Then two ways answer all questions of its tasks and its general benchmark, in turns:

    inside        `evaluate_row` on the loaded model with the adapter attached, as every stage calls it
    fresh         what `keeplora leaderboard` types: a process that imports, loads base and adapter by our
                  model id, and answers; its wall time

with the same batch size, threads and decoding. Scores have to be equal. A third way, the fresh process on the
first question of each task alone, says how much of its time is start-up. What a run pays once (imports and
loading, for all its rows) is not in the figures of `inside`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mllm_keeplora  # noqa: E402, F401  # its guards come before the libraries they guard

# isort: split
import torch  # noqa: E402
from measure import ROOT, Options, Row, benchmark, ratio  # noqa: E402

from mllm_keeplora.data.stream import load_stream  # noqa: E402
from mllm_keeplora.data.video.reader import VideoReader  # noqa: E402
from mllm_keeplora.distributed.processes import end_processes, start_processes  # noqa: E402
from mllm_keeplora.eval.leaderboard import (  # noqa: E402
    CompleteRun,
    lmms_eval_arguments,
    read_results,
    read_run,
)
from mllm_keeplora.evaluation.score import Score, evaluate_row  # noqa: E402

# The first import prepares the environment for lmms-eval's.
LMMS_EVAL = "import mllm_keeplora; from lmms_eval.cli.dispatch import main; main()"
SPEEDUP = 5.0
QUICK_SIZES = (16, 8, 8)


class Inside:
    """The run's last row as a stage measures it: model, adapter and libraries are there already."""

    def __init__(self, run: CompleteRun, root: Path, device: torch.device) -> None:
        self.run, self.root = run, root
        start_processes(cpu=device.type == "cpu")
        self.config = run.saved.config
        self.stream = load_stream(Path(self.config.stream), Path(self.config.data_root or ""))
        self.reader = VideoReader(self.config.video, Path(self.config.cache_dir))
        self.model, self.processor = run.saved.load_model()
        self.scores: dict[str, Score] = {}

    def __call__(self) -> None:
        """One row."""
        self.scores = evaluate_row(
            self.model,
            self.processor,
            self.stream,
            self.run.saved.directory.task_files,
            self.root / "row",
            reader=self.reader,
            batch_size=self.config.evaluation.batch_size,
            limit=None,
        )


class Fresh:
    """The same row by lmms-eval's command line, in a process of its own.

    Args:
        limit: questions a task; None for all.
    """

    def __init__(self, run: CompleteRun, root: Path, limit: int | None) -> None:
        self.run, self.root, self.limit = run, root, limit
        self.scores: dict[str, Score] = {}

    def __call__(self) -> None:
        """One process.

        Raises:
            SystemExit: it left no results; lmms-eval prints why and exits with 0.
        """
        output = Path(tempfile.mkdtemp(dir=self.root))
        arguments = lmms_eval_arguments(self.run, output, self.limit)
        command = [sys.executable, "-c", LMMS_EVAL, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        written = list(output.rglob("*_results.json"))
        if done.returncode != 0 or len(written) != 1:
            raise SystemExit(f"lmms-eval wrote {len(written)} result files:\n{done.stderr}")
        self.scores = read_results(written[0], self.run.entries)


def finished_run(root: Path, quick: bool) -> CompleteRun:
    """Builds the embedded data under `root` and runs the stream on them with two training steps a task."""
    sizes = f"b.TRAIN_IMAGES, b.TEST_QUESTIONS, b.GENERAL_QUESTIONS = {QUICK_SIZES}; " if quick else ""
    script = f"from mllm_keeplora.recipes.small import build_vqa_data as b; {sizes}b.main()"
    build = [sys.executable, "-c", script, "--out", str(root / "data")]
    _complete(build, ROOT)
    settings = {
        "run_dir": root / "run",
        "data_root": root / "data",
        "cache_dir": root / "cache",
        "stream": ROOT / "recipes/streams/small_vqa.yaml",
        "model.base_model": ROOT / "recipes/small/vqa_base",
        "model.cpu_threads": torch.get_num_threads(),
        "train.max_steps": 2,
        "probe.max_samples": 16,
        "report_to": [],
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    _complete([sys.executable, "recipes/vqa.py", *options], ROOT)
    return read_run(root / "run")


def _complete(command: list[str], where: Path) -> None:
    """Runs a command without its output.

    Raises:
        SystemExit: it failed; with what it said.
    """
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def in_rounds(ways: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """`measure.in_turns` without its first round: a fresh process has nothing to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def rows(options: Options) -> list[Row]:
    """Both ways on one run.

    Raises:
        SystemExit: their scores differ, or differ from those that the run itself measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = finished_run(root, options.quick)
        inside, fresh = Inside(run, root, options.device), Fresh(run, root, None)
        inside()  # the first row of a run imports lmms-eval and prepares the tables of questions
        ways: dict[str, Callable[[], None]] = {"inside": inside, "fresh": fresh}
        if not options.quick:
            ways["start-up"] = Fresh(run, root, 1)
        seconds = in_rounds(ways, 1 if options.quick else options.repeats)
        end_processes()
    if not inside.scores == fresh.scores == run.scores:
        raise SystemExit(
            f"the scores differ:\n{inside.scores} inside,\n{fresh.scores} fresh,\n{run.scores} run"
        )
    return [row(run, seconds)]


def row(run: CompleteRun, seconds: dict[str, list[float]]) -> Row:
    """The line of the table."""
    questions = sum(score["n"] for score in run.scores.values())

    def side(name: str) -> str:
        middle = statistics.median(seconds[name])
        return f"{middle:.1f} s, {questions / middle:.0f} questions/s"

    start_up = (
        f"; start-up {statistics.median(seconds['start-up']):.1f} s of it" if "start-up" in seconds else ""
    )
    faster = ratio(seconds["fresh"], seconds["inside"])
    return Row(
        8,
        f"a retention row of the embedded default: {questions} questions of {len(run.scores)} tasks, batch "
        f"{run.saved.config.evaluation.batch_size}; beside lmms-eval's command line on the saved model",
        side("inside"),
        side("fresh") + start_up,
        f"{faster} times as fast, equal scores",
        f">= {SPEEDUP:g} times as fast, equal scores",
        faster.median >= SPEEDUP,
        "answering the questions, which both do alike",
    )


if __name__ == "__main__":
    benchmark(__doc__, rows)
