"""How a stage learns: A from the probe (E2-E4), then the factors that training leaves (E5, E6)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from mllm_keeplora.continual.general import Distillation
from mllm_keeplora.continual.stage import StageError
from mllm_keeplora.continual.trainer import train_stage
from mllm_keeplora.data.collator import SampleDataset
from mllm_keeplora.distributed.processes import gather
from mllm_keeplora.methods.base import Method, Start
from mllm_keeplora.methods.context import Lesson, StageContext
from mllm_keeplora.modeling.adapters import (
    STAGE,
    Factors,
    Model,
    activate,
    active_adapters,
    attach,
    attach_accumulated,
    detach,
    read_factors,
)
from mllm_keeplora.modeling.loss import reply_logits
from mllm_keeplora.modeling.low_rank import one_low_rank_path
from mllm_keeplora.runs.files import load_tensors
from mllm_keeplora.runs.record import Outcome
from mllm_keeplora.runs.run_directory import StageDirectory

logger = get_logger(__name__)

FINISH = "finish"  # the fact of a training that holds those of the method's `finish`


def measure_a(stage: StageContext, method: Method, model: Model) -> Outcome:
    """A of every module (E2-E4); nothing where the method learns nothing in this stage."""
    return Outcome(method.initial_a(stage, model) if method.learns(stage.number) else None)


def learn(
    stage: StageContext, method: Method, model: Model, lora_a: Mapping[str, Tensor], lessons: Sequence[Lesson]
) -> Outcome:
    """Trains the method's factors: B from zero with A frozen for KeepLoRA++ (E6).

    Args:
        stage: what learns.
        method: how.
        model: the current model; it is left without adapters.
        lora_a: module name -> A [r, in]; empty where the method learns nothing in this stage.
        lessons: what is learnt beside the task (G3).

    Returns:
        `<module>.A` and `<module>.B`, fp32 on the CPU, of the modules that had room for at least one direction;
        as facts `train_stage`'s account, and what the method says of its end.

    Raises:
        StageError: no module has room, attaching the new adapter changed the model's function, or processes
            learnt different factors.
        TrainingError: training diverged.
    """
    if method.learns(stage.number):
        factors, account = _train(stage, method, model, method.start(stage, lora_a), lessons)
        if not any(b.any() for _, b in factors.values()):
            logger.warning(
                f"{stage.name} has learnt nothing in {account['steps']} step(s): every B is still 0. A warm-up begins "
                "at rate 0, so a single step is none: set train.warmup_ratio to 0, or take more steps"
            )
    else:
        factors, account = _no_update(stage), {"steps": 0, "repeated_samples": 0, "loss": []}
    named = {f"{n}.A": a for n, (a, _) in factors.items()} | {f"{n}.B": b for n, (_, b) in factors.items()}
    _check_agreement(stage, named)
    return Outcome(named, account)


def as_factors(named: Mapping[str, Tensor]) -> Factors:
    """Module name -> (A [r, in], B [out, r]), from the tensors of `learn`."""
    names = [name.removesuffix(".A") for name in named if name.endswith(".A")]
    return {name: (named[f"{name}.A"], named[f"{name}.B"]) for name in names}


def read_stage_factors(directory: StageDirectory) -> Factors:
    """What a complete stage learnt."""
    return as_factors(load_tensors(directory.tensors("train")))


def _train(
    stage: StageContext, method: Method, model: Model, start: Start, lessons: Sequence[Lesson]
) -> tuple[Factors, dict[str, Any]]:
    if not start.factors:
        raise StageError(
            f"{stage.name}: no adapted module has residual space left; lower eps_w, eps_f or general.eps_g"
        )
    run, before = stage.run, _first_logits(stage, model)
    if start.replaces_past:  # of its own modules; those that the stage does not reach keep theirs
        detach(model)
        kept = {name: pair for name, pair in stage.accumulated.items() if name not in start.factors}
        model = attach_accumulated(run.model, kept)
    past = active_adapters(model)
    adapted = attach(model, STAGE, start.factors, stage.scales, dropout=stage.train.lora_dropout)
    activate(adapted, [*past, STAGE], STAGE, method.trains)
    # Factors that replace the past hold it up to the rounding of B / s * s; new ones have B = 0.
    if not start.replaces_past and not torch.equal(before, _first_logits(stage, adapted)):
        raise StageError(f"{stage.name}: attaching the new adapter changed the output although B = 0")
    directory = run.directory.stage(stage.number, stage.task.name)
    with one_low_rank_path(adapted):
        account = train_stage(
            adapted,
            SampleDataset(stage.samples),
            stage.collator,
            stage.train,
            seed=stage.seed,
            directory=directory.checkpoints,
            log_dir=run.directory.log(directory),
            mixed=len({sample.kinds for sample in stage.samples}) > 1,
            report_to=run.config.report_to,
            device=run.device,
            hooks=method.hooks(stage, adapted),
            beside=Distillation(stage, lessons) if lessons else None,
        )
    factors, found = method.finish(stage, adapted, read_factors(adapted, STAGE, list(start.factors)))
    detach(adapted)
    return factors, {**account, **({FINISH: dict(found)} if found else {})}


def _no_update(stage: StageContext) -> Factors:
    """What a stage without learning hands on: the first one's factors are zeros, since an adapter needs some."""
    if stage.accumulated:
        return {}
    return {t.name: (torch.zeros(1, t.in_features), torch.zeros(t.out_features, 1)) for t in stage.targets}


@torch.no_grad()
def _first_logits(stage: StageContext, model: Model) -> Tensor:
    model.eval()
    return reply_logits(model, stage.run.to_device(stage.collator(stage.samples[:1]))).cpu()


def _check_agreement(stage: StageContext, tensors: Mapping[str, Tensor]) -> None:
    """Bit for bit: DDP starts all processes from the same factors and gives them the same gradients."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy().data)
    found = gather(digest.hexdigest()[:12])
    if len(set(found)) > 1:
        raise StageError(
            f"{stage.name}: the processes learnt different factors (hashes {', '.join(found)}, expected one); run "
            "all of them on the same hardware and package versions"
        )
