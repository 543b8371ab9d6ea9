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
from mllm_keeplora.continual.run import _History, _open_workplace
from mllm_keeplora.continual.stage import StageError, _train
from mllm_keeplora.continual.trainer import FiniteGradients
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.distributed.processes import from_main, start_processes, wait_for_everyone
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import Stage
from mllm_keeplora.runs.files import load_or_compute, save_tensors

RANK = int(os.environ.get("RANK", "0"))
# Batches of 8: one process reads them all; of two, the second has images, text alone, or nothing.
PROBES = {"three_batches": range(24), "text_on_one": range(24, 40), "one_batch": range(8)}
LIMITS = (7, 1)  # questions that two processes cannot share evenly, or at all


def open_stages(config: RunConfig) -> list[Stage]:
    """The stream's stages as the stream runner opens them, each on the bare base."""
    stream = load_stream(Path(config.stream))
    history = from_main(lambda: _History.read(config, stream, Path(config.run_dir)))
    work = _open_workplace(history, load_method(config))
    return [Stage(work, number, task, {}, []) for number, task in enumerate(stream.tasks, 1)]


def sketches(stage: Stage) -> dict[str, torch.Tensor]:
    """The probe's sketches of several samples, and the protected bases."""
    found = {}
    for probe, indices in PROBES.items():
        stage.__dict__["probe_indices"] = list(indices)
        found |= {f"{probe}/{name}": y for name, y in stage.sketch(stage.work.model, 0).items()}
    return found | {f"basis/{t.name}": stage.bases.load(t) for t in stage.targets}


def train(stage: Stage, lora_a: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains as the stage does; the factors and first gradients, and what this process saw."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {"tokens": [], "without_image": 0}
    collator, check = stage.collator, FiniteGradients.on_pre_optimizer_step

    def collate(samples: Any) -> Any:
        batch = collator(samples)
        if len(samples) > 1:  # not the sample on which the stage checks that attaching changes nothing
            seen["tokens"].append(int((batch["labels"] != -100).sum()))
            seen["without_image"] += "pixel_values" not in batch
        return batch

    def record(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check(self, args, state, control, **kwargs)
        if state.global_step == 0:
            parameters = kwargs["model"].named_parameters()
            found.update({f"gradient/{n}": p.grad.clone() for n, p in parameters if p.grad is not None})

    stage.__dict__["collator"] = collate
    FiniteGradients.on_pre_optimizer_step = record  # type: ignore[method-assign]
    factors, account = _train(stage, stage.work.model, lora_a)
    FiniteGradients.on_pre_optimizer_step = check  # type: ignore[method-assign]
    for name, (a, b) in factors.items():
        found |= {f"A/{name}": a, f"B/{name}": b}
    return found, {**seen, "steps": account["steps"], "repeated": account["repeated_samples"]}


def compare(config: RunConfig, out: Path) -> None:
    """Everything that must agree between one process and several."""
    stage, uneven = open_stages(config)
    found = sketches(stage)
    work = stage.work
    own = load_or_compute(
        stage.directory / "lora_a.safetensors", lambda: work.method.initial_a(stage, work.model)
    )
    shared = load_or_compute(out.parent / "lora_a.safetensors", lambda: own)
    trained, seen = train(stage, shared)
    found |= trained | {f"own_A/{name}": a for name, a in own.items()}
    _, seen["uneven"] = train(uneven, shared)
    tasks = Path(config.run_dir) / "eval_tasks"
    from_main(lambda: write_task_files(work.stream, tasks))
    for limit in LIMITS:
        folder = Path(config.run_dir) / f"limit_{limit}"
        ask = partial(
            evaluate_row, work.model, work.processor, work.stream, tasks, folder, reader=work.reader
        )
        seen[f"row_{limit}"] = ask(batch_size=3, limit=limit)
    save_tensors(out / f"process-{RANK}.safetensors", found)
    (out / f"process-{RANK}.json").write_text(json.dumps(seen))


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
