"""Row 8: a retention row inside the run, beside lmms-eval's command line and its own wrapper of LLaVA.

    python benchmarks/evaluation.py --repeats 3        the small image stream: CPU, one core, 3 minutes

A short run over the small image stream (two training steps a task: what it learns does not matter here) is
made first. Then two ways answer all questions of its tasks and its general benchmark, in turns:

    inside        `evaluate_row` on the loaded model with the adapter attached, as every stage calls it
    fresh         what the leaderboard types: a process that imports, loads base and adapter by our model id,
                  and answers; its wall time

with the same batch size, threads and decoding. Scores have to be equal. A third way, the fresh process on the
first question of each task alone, says how much of its time is start-up. What a run pays once (imports and
loading, for all its rows) is not in the figures of `inside`.

Then pictures of VGA size: the small base, not quantised, answers questions about scenes that are drawn larger, in one
process by our wrapper and by lmms-eval's `llava_hf_chat`, which takes one question at a time. Both are loaded before.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from measure import Options, Row, benchmark, in_turns, ratio
from PIL import Image
from small_streams import small_config

from mllm_keeplora.config import ModelConfig, RunConfig
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.data.stream import Stream, TaskSpec, load_stream
from mllm_keeplora.eval.leaderboard import CompleteRun, lmms_eval_arguments, read_results, read_run
from mllm_keeplora.evaluation.score import Score, evaluate_entries, evaluate_row, lmms_wrapper
from mllm_keeplora.evaluation.task_files import scored_tasks, write_task_files
from mllm_keeplora.modeling.loading import load_base

# The first import prepares the environment for lmms-eval's.
LMMS_EVAL = "import mllm_keeplora; from lmms_eval.cli.dispatch import main; main()"
SPEEDUP = 5.0
VGA, VGA_SPEEDUP, VGA_QUESTIONS, VGA_BATCH = (640, 480), 2.0, 200, 32


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
    return [row(run, seconds), vga_row(config, options)]


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


def vga_stream(config: RunConfig, root: Path, questions: int) -> Stream:
    """The questions about scenes, on pictures of VGA size."""
    scenes = load_stream(Path(config.stream)).data_root / "scenes"
    records = json.loads((scenes / "test.json").read_text())[:questions]
    for record in records:
        drawn = root / record["image"]
        drawn.parent.mkdir(parents=True, exist_ok=True)
        Image.open(scenes / record["image"]).convert("RGB").resize(VGA).save(drawn, format="JPEG", quality=90)
    (root / "test.json").write_text(json.dumps(records))
    return Stream("vga", root, (TaskSpec("scenes", "test.json", "test.json", "exact"),))


def vga_row(config: RunConfig, options: Options) -> Row:
    """Our wrapper and lmms-eval's on pictures of VGA size.

    Raises:
        SystemExit: their scores differ.
    """
    from lmms_eval.models.chat.llava_hf import LlavaHf

    base, scores = config.model.base_model, {}
    model, processor = load_base(ModelConfig(base_model=base, quantization="none"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stream = vga_stream(config, root, 8 if options.quick else VGA_QUESTIONS)
        write_task_files(stream, root / "tasks")
        # lmms-eval empties a wrapper after each evaluation, and this one loads the model itself.
        spare = [
            LlavaHf(base, device=options.device.type, device_map=options.device.type)
            for _ in range(options.repeats + 1)
        ]

        def way(name: str, wrapper: Callable[[], Any]) -> Callable[[], None]:
            def answer() -> None:
                scores[name] = evaluate_entries(
                    scored_tasks(stream), wrapper, root / "tasks", root / name, batch_size=1, limit=None
                )

            return answer

        ways = {
            "ours": way("ours", lambda: lmms_wrapper(model, processor, None, VGA_BATCH)),
            "theirs": way("theirs", spare.pop),
        }
        seconds = in_turns(ways, options.repeats, options.device)
    if scores["ours"] != scores["theirs"]:
        raise SystemExit(f"the scores differ:\n{scores}")
    count = scores["ours"]["scenes"]["n"]
    faster = ratio(seconds["theirs"], seconds["ours"])
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    return Row(
        8,
        f"{count} questions about pictures of {VGA[0]}x{VGA[1]}, JPEG, the small base in fp32, batch {VGA_BATCH}; "
        "beside lmms-eval's `llava_hf_chat` in process",
        f"{ours:.1f} s, {count / ours:.0f} questions/s",
        f"{theirs:.1f} s, {count / theirs:.0f} questions/s",
        f"{faster} times as fast, equal scores",
        f">= {VGA_SPEEDUP:g} times as fast, equal scores",
        faster.median >= VGA_SPEEDUP,
        "decoding and scaling the pictures, which both do alike",
    )


if __name__ == "__main__":
    benchmark(__doc__, rows)
