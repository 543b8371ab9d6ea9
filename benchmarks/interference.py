"""Why a run forgot: how strongly each stage's update answers the inputs of earlier tasks.

    python benchmarks/interference.py runs/vqa_small

For every stage t and every earlier task i, means over the adapted layers of a tower, in percent:

    reached     ||dW_t X_i||^2 / ||dW_t X_t||^2    its answer to these inputs, over that to its own
    protected   ||M_t^T X_i||^2 / ||X_i||^2        energy of these inputs inside what was protected

X_i are a layer's inputs on task i at the model before stage t, sketched from the probe sample. dW_t is what the
stage added, M_t its protected basis. A layer with 0 reached computes on task i's inputs what it did before.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
from measure import energy
from torch import Tensor

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.config import Tower
from mllm_keeplora.continual.learning import read_stage_factors
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.lora_throughout import LoraThroughout
from mllm_keeplora.modeling.adapters import Factors, attach_accumulated, detach
from mllm_keeplora.runs.files import ArtifactError


class Interference(NamedTuple):
    """How a stage treats the inputs of an earlier task; fractions."""

    reached: float
    protected: float


def measure(run: Run, number: int) -> dict[str, dict[Tower, Interference]]:
    """What stage `number` does to the inputs of every earlier task: task -> tower -> means over its modules."""
    stage = run.stage_context(number, run.accumulated(number - 1))
    update = read_stage_factors(run.history.stage(number))
    model = attach_accumulated(run.context.model, stage.accumulated)
    own = stage.sketch_inputs(model, 0)
    found = {}
    for earlier in (run.stage_context(n, {}) for n in range(1, number)):
        found[earlier.task.name] = _over_modules(stage, update, own, earlier.sketch_inputs(model, 0))
    detach(model)
    return found


def _over_modules(
    stage: StageContext, update: Factors, own: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> dict[Tower, Interference]:
    """Means over the modules that the stage changed and that both tasks' inputs pass through.

    Args:
        stage, update: what it learnt.
        own, other: module name -> sketch [q, in] of the inputs of its own task and of the earlier one.
    """
    modules: dict[Tower, list[Interference]] = {}
    for t in stage.targets:
        if t.name in update and t.name in other:
            (a, b), basis = update[t.name], stage.bases.load(t).cpu()
            x, y = other[t.name], own[t.name]
            reached = energy(x @ a.T @ b.T) / energy(y @ a.T @ b.T)
            modules.setdefault(t.tower, []).append(Interference(reached, energy(x @ basis) / energy(x)))
    return {tower: Interference(*map(fmean, zip(*each, strict=True))) for tower, each in modules.items()}


def check_measurable(run: Run) -> None:
    """Makes sure that every stage is there and has added an update of its own.

    Raises:
        ArtifactError: it is not so.
    """
    missing, tasks = run.history.missing_stages, run.stream.tasks
    if missing:
        raise ArtifactError(
            f"{run.directory.path}: {len(missing)} of {len(tasks) + 1} stages are missing; run the same command "
            "again to complete it"
        )
    if isinstance(run.method, LoraThroughout) or not run.method.learns(2):
        raise ArtifactError(
            f"{run.directory.path}: the stages of method {run.config.method} add no updates of their own to those "
            "before"
        )


def main() -> None:
    """Prints one line per stage and earlier task."""
    parser = OptionParser("python benchmarks/interference.py", __doc__)
    parser.add_argument("run", type=Path, help="directory of a complete run")
    path = parser.read(sys.argv[1:]).run
    with Run.open(replace(load_run(path).config, run_dir=str(path))) as run:
        check_measurable(run)
        print(f"{'stage':12s}{'inputs of':12s}{'tower':10s}{'reached %':>12s}{'protected %':>13s}")
        for number, task in enumerate(run.stream.tasks[1:], 2):
            for other, towers in measure(run, number).items():
                for tower, shares in towers.items():
                    percents = f"{100 * shares.reached:12.1f}{100 * shares.protected:13.1f}"
                    print(f"{task.name:12s}{other:12s}{tower:10s}{percents}", flush=True)


if __name__ == "__main__":
    with command():
        main()
