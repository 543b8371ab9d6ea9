"""One process of a comparison between numbers of processes: the run's own code, its numbers written down.

    torchrun --nproc_per_node 2 tests/recipes/processes_worker.py JOB OUT CONFIG --setting value ..

Next to OUT lies what all compared runs share: the A that all train with, written by the first.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mllm_keeplora.command_line import command
from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.continual.general import recall
from mllm_keeplora.continual.learning import as_factors, learn
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.stage import StageError
from mllm_keeplora.continual.trainer import FiniteGradients
from mllm_keeplora.distributed.processes import from_main, start_processes, wait_for_everyone
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.runs.files import load_tensors, save_tensors

RANK = int(os.environ.get("RANK", "0"))
# Batches of 8: one process reads them all; of two, the second has images, text alone, or nothing.
PROBES = {"three_batches": range(24), "text_on_one": range(24, 40), "one_batch": range(8)}
LIMITS = (7, 1)  # questions that two processes cannot share evenly, or at all


def sketches(stage: StageContext) -> dict[str, torch.Tensor]:
    """The probe's sketches of several samples, and the protected bases."""
    found = {}
    for probe, indices in PROBES.items():
        stage.__dict__["probe_indices"] = list(indices)
        found |= {f"{probe}/{name}": y for name, y in stage.sketch(stage.run.model, 0).items()}
    return found | {f"basis/{t.name}": stage.bases.load(t) for t in stage.targets}


def train(
    stage: StageContext, method: Method, lora_a: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains as the stage does; the factors and first gradients, and what this process saw."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {"tokens": [], "without_image": 0}
    collator, check = stage.collator, FiniteGradients.on_pre_optimizer_step

    def collate(samples: Any) -> Any:
        batch = collator(samples)
        if len(samples) > 1:  # not the sample on which the stage checks that attaching changes nothing
            seen["tokens"].append(int((batch["labels"] != IGNORED_LABEL).sum()))
            seen["without_image"] += "pixel_values" not in batch
        return batch

    def record(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check(self, args, state, control, **kwargs)
        if state.global_step == 0:
            parameters = kwargs["model"].named_parameters()
            found.update({f"gradient/{n}": p.grad.clone() for n, p in parameters if p.grad is not None})

    stage.__dict__["collator"] = collate
    FiniteGradients.on_pre_optimizer_step = record  # type: ignore[method-assign]
    lessons = stage.run.general.learnt if stage.run.general else []
    learnt = learn(stage, method, stage.run.model, lora_a, lessons)
    FiniteGradients.on_pre_optimizer_step = check  # type: ignore[method-assign]
    for name, (a, b) in as_factors(learnt.tensors).items():
        found |= {f"A/{name}": a, f"B/{name}": b}
    return found, {**seen, "steps": learnt.facts["steps"], "repeated": learnt.facts["repeated_samples"]}


def compare(config: RunConfig, out: Path) -> None:
    """Everything that must agree between one process and several."""
    with Run.open(config) as run:
        context, method = run.context, run.method
        stage, uneven = run.stage_context(1, {}), run.stage_context(2, {})
        found = sketches(stage)
        own = of_main(method.initial_a(stage, context.model), Path(config.run_dir) / "own_a.safetensors")
        shared = of_main(own, out.parent / "lora_a.safetensors")
        trained, seen = train(stage, method, shared)
        found |= trained | {f"own_A/{name}": a for name, a in own.items()}
        _, seen["uneven"] = train(uneven, method, shared)
        seen["recalled"] = recall(uneven, context.model).facts
        for limit in LIMITS:
            folder = Path(config.run_dir) / f"limit_{limit}"
            ask = partial(evaluate_row, context.model, context.processor, run.stream, run.directory.task_files)
            seen[f"row_{limit}"] = ask(folder, reader=context.reader, batch_size=3, limit=limit)
        save_tensors(out / f"process-{RANK}.safetensors", found)
        (out / f"process-{RANK}.json").write_text(json.dumps(seen))


def of_main(own: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The main process's tensors, or those that an earlier run left there."""
    from_main(lambda: None if path.exists() else save_tensors(path, own))
    return load_tensors(path)


def fail(config: RunConfig, out: Path) -> None:
    """One process cannot go on while the other waits for it."""
    if RANK == 1:
        raise StageError("process 1 cannot go on")
    wait_for_everyone()


def main() -> None:
    job, out, default, *arguments = sys.argv[1:]
    with command():
        config = parse_config("", Path(default), arguments)
        start_processes(cpu=True)
        {"compare": compare, "fail": fail}[job](config, Path(out))


if __name__ == "__main__":
    main()
