"""One process of a comparison between numbers of processes: the run's own code, its numbers written down.

    torchrun --nproc_per_node 2 tests/recipes/processes_worker.py JOB OUT CONFIG --setting value ..

Next to OUT lies what all compared runs share: the A that all train with, written by the first.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_keeplora.command_line import command
from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.continual.general import _ask, recall
from mllm_keeplora.continual.learning import as_factors, learn
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import measure_start, run_stage
from mllm_keeplora.continual.stage import StageError
from mllm_keeplora.continual.trainer import FiniteGradients
from mllm_keeplora.distributed.processes import SHARD_FLAG, from_main, start_processes, wait_for_everyone
from mllm_keeplora.distributed.sharding import is_sharded
from mllm_keeplora.evaluation import answer
from mllm_keeplora.evaluation.lmms_model import KeepLoRAModel
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import RunContext, StageContext
from mllm_keeplora.modeling.adapters import Factors
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.runs.files import load_tensors, save_tensors
from mllm_keeplora.runs.record import Outcome, Phase, StageRecord

RANK = int(os.environ.get("RANK", "0"))
# Batches of 8: one process reads them all; of two, the second has images, text alone, or nothing.
PROBES = {"three_batches": range(24), "text_on_one": range(24, 40), "one_batch": range(8)}
LIMITS = (7, 1)  # questions that two processes cannot share evenly, or at all
LENGTHS = (2, 12)  # tokens of a reply


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


class Collectives(TorchDispatchMode):
    """Counts what processes tell each other."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def told_for_replies(run: RunContext) -> list[dict[str, int]]:
    """Runs of the first language layer and collectives, for replies of 2 and of 12 tokens, asked in both ways.

    A second process has nothing to answer.
    """
    counts, layer = [], run.model.get_decoder().layers[0]
    asked = [sample for sample in run.records["charts"][0] if not sample.media][:1]
    never = mock.patch.object(answer, "stop_tokens", lambda model, *_: [model.config.get_text_config().vocab_size - 1])
    for length in LENGTHS:
        runs: list[int] = []
        hook = layer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with never, Collectives() as told:
            _ask(run, run.model, asked, length)
            wrapper = KeepLoRAModel(run.model, run.processor)
            wrapper.task_dict = {"t": {"test": dict.fromkeys(range(2), {})}}
            wrapper.generate_until([Question(number, length) for number in range(1 - RANK)])
        hook.remove()
        counts.append({"runs": len(runs), "collectives": told.count})
    return counts


class Question:
    """What `generate_until` reads of lmms-eval's requests."""

    task_name = "t"

    def __init__(self, doc_id: int, length: int) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is shown?"}]}]
        self.doc_id = doc_id
        self.args = ("question", lambda doc: messages, {"max_new_tokens": length}, doc_id, "t", "test")


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
        seen["recalled"] = recall(uneven, method, context.model).facts
        seen["told"] = told_for_replies(context)
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


def families(out: Path) -> None:
    """All stages of every config in a folder, one after the other; what this process computed in each phase.

    A config's name says whether the base is spread.
    """
    for path in sorted(out.glob("*.yaml")):
        os.environ[SHARD_FLAG] = str(path.stem.endswith("fsdp"))
        found: dict[str, torch.Tensor] = {}
        with mock.patch.object(StageRecord, "phase", recording(found)), Run.open(RunConfig.read(path)) as run:
            past: Factors = {}
            measure_start(run, past)
            for number in range(1, len(run.stream.tasks) + 1):
                past = run_stage(run, number, past)
            bases = run.stage_context(number, past).bases
            found |= {f"M/{t.name}": bases.load(t) for t in run.context.targets}
            sharded = is_sharded(run.context.model)
        save_tensors(out / f"{path.stem}-{RANK}.safetensors", found, {"sharded": str(sharded)})


def recording(found: dict[str, torch.Tensor]) -> Any:
    """`StageRecord.phase`, which gives all processes the main one's outcome, with each one's own written down."""
    phase = StageRecord.phase

    def recorded(self: StageRecord, name: str, compute: Callable[[], Outcome], key: str = "") -> Phase:
        def computed() -> Outcome:
            outcome = compute()
            stage = self.directory.path.name
            found.update({f"{stage}/{name}/{tensor}": t.clone() for tensor, t in (outcome.tensors or {}).items()})
            return outcome

        return phase(self, name, computed, key)

    return recorded


def fail(config: RunConfig, out: Path) -> None:
    """One process cannot go on while the other waits for it."""
    if RANK == 1:
        raise StageError("process 1 cannot go on")
    wait_for_everyone()


def main() -> None:
    job, out, *rest = sys.argv[1:]
    with command():
        if job == "families":
            # The next config needs the group again.
            with mock.patch("mllm_keeplora.continual.run.end_processes", wait_for_everyone):
                families(Path(out))
        else:
            default, *arguments = rest
            config = parse_config("", Path(default), arguments)
            start_processes(cpu=True)
            {"compare": compare, "fail": fail}[job](config, Path(out))


if __name__ == "__main__":
    main()
