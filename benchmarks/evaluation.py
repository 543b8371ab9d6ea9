"""Row 8: a retention row inside the run, beside lmms-eval's command line on the saved model.

    python benchmarks/evaluation.py --repeats 3        the small image stream: CPU, one core, 3 minutes

A short run over the small image stream (two training steps a task: what it learns does not matter here) is
made first. Then two ways answer all questions of its tasks and its general benchmark, in turns:

    inside        `evaluate_row` on the loaded model with the adapter attached, as every stage calls it
    fresh         what the leaderboard types: a process that imports, loads base and adapter by our model id,
                  and answers; its wall time

with the same batch size, threads and decoding. Scores have to be equal. A third way, the fresh process on the
first question of each task alone, says how much of its time is start-up. What a run pays once (imports and
loading, for all its rows) is not in the figures of `inside`.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from measure import Options, Row, benchmark, in_turns, ratio
from small_streams import small_config

from mllm_keeplora.config import RunConfig
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.eval.leaderboard import CompleteRun, lmms_eval_arguments, read_results, read_run
from mllm_keeplora.evaluation.score import Score, evaluate_row

# The first import prepares the environment for lmms-eval's.
LMMS_EVAL = "import mllm_keeplora; from lmms_eval.cli.dispatch import main; main()"
SPEEDUP = 5.0


def settings(root: Path) -> RunConfig:
    """The recipe's, with little training and as many threads as the benchmark has."""
    config = small_config("vqa", run_dir=str(root / "run"), cache_dir=str(root / "cache"), report_to=[])
    return replace(
        config,
        model=replace(config.model, cpu_threads=torch.get_num_threads()),
        probe=replace(config.probe, max_samples=16),
        train=replace(config.train, max_steps=2),
    )


class Inside:
    """The run's last row as a stage measures it: model, adapter and libraries are there already."""

    def __init__(self, run: CompleteRun, output: Path) -> None:
        self.run, self.output = run.saved, output
        self.model, self.processor = run.saved.load_model()
        self.scores: dict[str, Score] = {}

    def __call__(self) -> None:
        """One row."""
        self.scores = evaluate_row(
            self.model,
            self.processor,
            self.run.stream(),
            self.run.directory.task_files,
            self.output,
            reader=self.run.reader(),
            batch_size=self.run.config.evaluation.batch_size,
            limit=None,
        )


class Fresh:
    """The same row by lmms-eval's command line, in a process of its own.

    Args:
        run: whose adapter is loaded.
        root: folder for results.
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
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        written = list(output.rglob("*_results.json"))
        if done.returncode != 0 or len(written) != 1:
            raise SystemExit(f"lmms-eval wrote {len(written)} result files:\n{done.stderr}")
        self.scores = read_results(written[0], self.run.entries)


def rows(options: Options) -> list[Row]:
    """Both ways on one run.

    Raises:
        SystemExit: their scores differ, or differ from those that the run itself measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = settings(root)
        run_stream(config)
        run = read_run(Path(config.run_dir))
        inside, fresh = Inside(run, root / "row"), Fresh(run, root, None)
        ways: dict[str, Callable[[], None]] = {"inside": inside, "fresh": fresh}
        if not options.quick:
            ways["start-up"] = Fresh(run, root, 1)
        # The run has warmed this process up, and a fresh one has nothing to warm up.
        seconds = in_turns(ways, options.repeats, options.device, warm_up=False)
    if not inside.scores == fresh.scores == run.scores:
        raise SystemExit(f"the scores differ:\n{inside.scores} inside,\n{fresh.scores} fresh,\n{run.scores} in the run")
    return [row(run, seconds)]


def row(run: CompleteRun, seconds: dict[str, list[float]]) -> Row:
    """The line of the table."""
    questions = sum(score["n"] for score in run.scores.values())

    def side(name: str) -> str:
        middle = statistics.median(seconds[name])
        return f"{middle:.1f} s, {questions / middle:.0f} questions/s"

    start_up = f"; start-up {statistics.median(seconds['start-up']):.1f} s of it" if "start-up" in seconds else ""
    faster = ratio(seconds["fresh"], seconds["inside"])
    return Row(
        8,
        f"a retention row of the embedded default: {questions} questions of {len(run.scores)} tasks, "
        f"batch {run.saved.config.evaluation.batch_size}; beside lmms-eval's command line on the saved model",
        side("inside"),
        side("fresh") + start_up,
        f"{faster} times as fast, equal scores",
        f">= {SPEEDUP:g} times as fast, equal scores",
        faster.median >= SPEEDUP,
        "answering the questions, which both do alike",
    )


if __name__ == "__main__":
    benchmark(__doc__, rows)
