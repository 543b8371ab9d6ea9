"""What general samples add to a stage: the same stage of a recipe with its general samples and without, in turns.

    python benchmarks/general_cost.py                                             the small image and video defaults
    python benchmarks/general_cost.py recipes/configs/vqa/smollm2.yaml --steps 6 --repeats 1

Each round makes the first two stages both ways and tells the second, the first that also rehearses. Its training has
--steps steps; the seconds of all that the recipe has follow from those of a step. Evaluation is left out, and so is
what a base needs once: its replies and the directions of their inputs. Seconds are those of the process's CPU, so that
other work on the machine changes little.
"""

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from measure import ratio

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.config import ConfigError, Count, GeneralConfig, RunConfig, parse_config
from mllm_keeplora.continual import learning, stage
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import measure_start, run_stage

DEFAULTS = ("recipes/configs/vqa/small.yaml", "recipes/configs/video/small.yaml")


class Seconds(NamedTuple):
    """CPU seconds of a stage without its evaluation."""

    step: float
    beside: float  # all but the training

    def of(self, steps: int) -> float:
        """A stage of so many steps."""
        return self.beside + steps * self.step


def seconds_of(config: RunConfig, steps: int) -> Seconds:
    """The second stage of a run in a temporary folder."""
    spent = dict.fromkeys(("train_stage", "evaluate_row"), 0.0)

    def timed(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.process_time() - started

        return patch.object(module, name, call)

    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="keeplora_general_cost_"))
        run = stack.enter_context(Run.open(replace(config, run_dir=folder)))
        measure_start(run, past := run.accumulated(0))
        past = run_stage(run, 1, past)
        stack.enter_context(timed(learning, "train_stage"))
        stack.enter_context(timed(stage, "evaluate_row"))
        started = time.process_time()
        run_stage(run, 2, past)
        total = time.process_time() - started
    return Seconds(spent["train_stage"] / steps, total - sum(spent.values()))


def main() -> None:
    """Prints a row for each recipe."""
    parser = OptionParser("python benchmarks/general_cost.py", __doc__)
    parser.add_argument("recipes", nargs="*", default=DEFAULTS, help="YAML of runs with general samples")
    parser.add_setting("steps", Count, "of a stage that is measured (default: %(default)s)", default=40)
    parser.add_setting("repeats", Count, "rounds (default: %(default)s)", default=3)
    given = parser.read(sys.argv[1:])
    print("| recipe | a step, times as long | beside the steps: with, without | a stage of the recipe's steps, times |")
    print("|---|---|---|---|")
    for path in given.recipes:
        short = ["--train.max_steps", str(given.steps), "--evaluation.limit", "2", "--evaluation.general_limit", "2"]
        asked = parse_config(None, Path(path), ["--report_to", "[]", *short])
        steps = parse_config(None, Path(path), []).train.max_steps
        if not asked.general.share or steps < 1:
            raise ConfigError(f"{path}: expected a recipe with a general.share and train.max_steps")
        bare = replace(asked, general=GeneralConfig())
        rounds = [(seconds_of(asked, given.steps), seconds_of(bare, given.steps)) for _ in range(given.repeats)]
        with_them, without = zip(*rounds, strict=True)
        beside = [f"{statistics.median(s.beside for s in side):.1f} s" for side in (with_them, without)]
        a_step = ratio([s.step for s in with_them], [s.step for s in without])
        a_stage = ratio([s.of(steps) for s in with_them], [s.of(steps) for s in without])
        print(f"| {path} | {a_step} | {', '.join(beside)} | {a_stage} |", flush=True)


if __name__ == "__main__":
    with command():
        main()
