"""One stage of KeepLoRA++: learn a task in the residual subspace, fold it, protect it, measure everything."""

import math
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from mllm_keeplora.adapters import ACCUMULATED, STAGE, Factors, activate, attach, read_factors
from mllm_keeplora.artifacts import (
    load_or_compute,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
    write_manifest,
)
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data.collator import ChatCollator, VqaDataset
from mllm_keeplora.data.records import Sample, SkippedRecord, select_evenly
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.evaluate import evaluate_row
from mllm_keeplora.folding import fold_factors
from mllm_keeplora.gradients import back_project_gradients, module_generator, sketch_gradients
from mllm_keeplora.layer_scaling import layer_scales
from mllm_keeplora.lora_init import lora_a_from_gradient
from mllm_keeplora.models import save_adapter
from mllm_keeplora.protected import ProtectedBases
from mllm_keeplora.sketch import extend_basis_from_sketch, refined_directions
from mllm_keeplora.streams import Stream, TaskSpec
from mllm_keeplora.subspace import orthonormality_error
from mllm_keeplora.targets import Target
from mllm_keeplora.training import train_stage

logger = get_logger(__name__)

# ||dW M||_F / ||dW||_F that fp32 factors from an fp64 re-projection stay below by an order of magnitude.
LEAKAGE_TOLERANCE = 1e-6


class StageError(KeepLoRAError, RuntimeError):
    """A stage that cannot be carried out, or whose result breaks the method's guarantee."""


@dataclass
class Workplace:
    """What all stages of a run share."""

    config: RunConfig
    stream: Stream
    records: Mapping[
        str, tuple[list[Sample], list[SkippedRecord]]
    ]  # a task's training samples, and those skipped
    model: PreTrainedModel
    processor: Any
    targets: list[Target]
    weight_files: Mapping[str, Path]
    run_dir: Path
    device: torch.device

    def bases(self, feature_files: Sequence[Path]) -> ProtectedBases:
        """M of every module, given the feature bases of the stages so far."""
        return ProtectedBases(self.weight_files, feature_files, self.device)


@dataclass
class StageResult:
    """What a stage hands to the next one."""

    manifest: dict[str, Any]
    accumulated: Factors


@dataclass
class Clock:
    """Wall time of a stage's phases in seconds; a phase that was read from its file costs next to nothing."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        """The phases and their sum."""
        return {**self.seconds, "total": sum(self.seconds.values())}


def run_stage(
    work: Workplace,
    number: int,
    task: TaskSpec,
    accumulated: Factors,
    feature_files: Sequence[Path],
    header: dict[str, Any],
) -> StageResult:
    """Carries out stage `number`; phases whose files exist (an interrupted stage) are not repeated.

    Args:
        work: shared by all stages; its model carries no adapter before and after.
        number: 1-based.
        task: what is learnt.
        accumulated: factors of all earlier stages, scales absorbed in B; empty before the first.
        feature_files: their feature bases, oldest first.
        header: entries of the manifest that the stream knows (predecessor's hash, identity, data hashes, ..).

    Raises:
        StageError: no residual space left, a function changed by attaching, leakage above 1e-6.
    """
    directory = stage_directory(work.run_dir, number, task.name)
    seed, clock = work.config.seed + number, Clock()
    train = work.config.train_for(task.name)
    bases = work.bases(feature_files)
    samples, skipped = work.records[task.name]
    collator = ChatCollator(work.processor, train.max_length)
    probe_indices = select_evenly(len(samples), work.config.probe.fraction, work.config.probe.max_samples)
    probe = _Probe(work, VqaDataset([samples[i] for i in probe_indices]), collator, seed)

    model = attach_accumulated(work.model, accumulated)
    keep = [ACCUMULATED] if accumulated else []
    with clock.phase("probe"):
        lora_a = load_or_compute(
            directory / "lora_a.safetensors", lambda: _initial_a(work, bases, probe, model, keep, number)
        )
    scales = stage_scales(work.config, work.targets)
    active = [t for t in work.targets if lora_a[t.name].shape[0] > 0]
    if not active:
        raise StageError(
            f"stage {number} ({task.name}): no adapted module has residual space left; lower eps_w or eps_f"
        )
    with clock.phase("train"):
        factors, training = _learn(
            work, model, active, lora_a, scales, VqaDataset(samples), collator, directory, task, number
        )
    detach(model)

    table = _module_table(work, bases, active, factors, scales, number)
    folded = _fold(accumulated, factors, scales)
    model = attach(work.model, ACCUMULATED, folded, dict.fromkeys(folded, 1.0))
    save_adapter(directory / "adapter", model, work.config.model)
    with clock.phase("feature_basis"):
        _protect(work, bases, probe, model, directory, table)
    with clock.phase("evaluation"):
        scores = evaluate_stage(work, model, directory)
    model.unload()

    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    manifest = {
        **header,
        "probe_indices": probe_indices,
        "modules": list(table.values()),
        "counts": _counts(samples, skipped, factors, work, training),
        "timings": clock.total(),
        "peak_memory_bytes": peak_memory(work.device),
        "loss": training["loss"],
        "scores": scores,
    }
    return StageResult(write_manifest(directory, manifest), folded)


def stage_directory(run_dir: Path, number: int, task: str | None) -> Path:
    """`stages/00-base`, `stages/01-<task>`, .."""
    return run_dir / "stages" / f"{number:02d}-{task or 'base'}"


def attach_accumulated(model: PreTrainedModel, accumulated: Factors) -> PreTrainedModel | PeftModel:
    """The current model: the base, or the base with the folded past."""
    return attach(model, ACCUMULATED, accumulated, dict.fromkeys(accumulated, 1.0)) if accumulated else model


def detach(model: PreTrainedModel | PeftModel) -> None:
    """Takes every adapter off again."""
    if isinstance(model, PeftModel):
        model.unload()


def stage_scales(config: RunConfig, targets: Sequence[Target]) -> dict[str, float]:
    """s_l = lambda_l * alpha / r with the nominal r per module (E5); lambda = 1 for sequential LoRA."""
    towers = config.towers()
    return {t.name: layer_lambda(config, t) * config.alpha / towers[t.tower].rank for t in targets}


def layer_lambda(config: RunConfig, target: Target) -> float:
    """lambda_l of a module's layer, within its tower."""
    if config.method == "lora":
        return 1.0
    return layer_scales(target.num_layers, config.towers()[target.tower].gamma)[target.depth]


def evaluate_stage(work: Workplace, model: PreTrainedModel | PeftModel, directory: Path) -> dict[str, Any]:
    """The full row: every task of the stream and every general benchmark; kept in a file once measured."""
    path = directory / "evaluation.json"
    if not path.exists():
        scores = evaluate_row(
            model,
            work.processor,
            work.stream,
            work.run_dir / "eval_tasks",
            directory / "evaluation",
            batch_size=work.config.evaluation.batch_size,
            limit=work.config.evaluation.limit,
        )
        write_json(path, scores)
    return dict(read_json(path))


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, bytes: allocated on the GPU, else the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class _Probe:
    """The probe sample of a task, read anew in every pass."""

    work: Workplace
    samples: VqaDataset
    collator: ChatCollator
    seed: int

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Model inputs with labels, in order, on the device."""
        loader = DataLoader(
            self.samples, batch_size=self.work.config.probe.batch_size, collate_fn=self.collator
        )
        for batch in tqdm(loader, desc="task gradients", unit="batch", disable=None, leave=False):
            yield {key: value.to(self.work.device) for key, value in batch.items()}

    def sketch(
        self, model: PreTrainedModel | PeftModel, keep: Sequence[str], pass_number: int
    ) -> dict[str, Tensor]:
        """Omega^T G of every module, q = columns_per_rank * r; each pass draws its own Omega."""
        towers, factor = self.work.config.towers(), self.work.config.probe.columns_per_rank
        columns = {t.name: factor * towers[t.tower].rank for t in self.work.targets}
        return sketch_gradients(
            model, self.work.targets, columns, self.batches, seed=2 * self.seed + pass_number, keep=keep
        )


def _initial_a(
    work: Workplace,
    bases: ProtectedBases,
    probe: _Probe,
    model: PreTrainedModel | PeftModel,
    keep: Sequence[str],
    number: int,
) -> dict[str, Tensor]:
    """A_t of every module: from the residual gradient (E2-E4), or PEFT's default init for sequential LoRA."""
    if work.config.method == "lora":
        return {t.name: _kaiming_a(t, work.config.towers()[t.tower].rank, probe.seed) for t in work.targets}
    towers = work.config.towers()
    if number == 1:
        _check_rank_fits(work, bases)
    sketches = probe.sketch(model, keep, 0)
    if work.config.probe.refine:
        sketches = _refine(work, bases, probe, model, keep, sketches)
    return {
        t.name: lora_a_from_gradient(
            sketches[t.name].to(work.device), bases.load(t), towers[t.tower].rank
        ).cpu()
        for t in tqdm(work.targets, desc="residual subspaces", unit="module", disable=None, leave=False)
    }


def _kaiming_a(target: Target, rank: int, seed: int) -> Tensor:
    generator = module_generator(seed, target.name)
    a = torch.empty(rank, target.in_features)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a


def _check_rank_fits(work: Workplace, bases: ProtectedBases) -> None:
    """E9 before the first stage: a rank that the residual space cannot hold is a mistake in the settings."""
    for target in work.targets:
        rank, k = work.config.towers()[target.tower].rank, bases.load(target).shape[1]
        if rank > target.in_features - k:
            raise StageError(
                f"{target.name}: rank {rank} exceeds its residual space of {target.in_features} - {k} = "
                f"{target.in_features - k} directions; lower {target.tower}.rank or {target.tower}.eps_w"
            )


def _refine(
    work: Workplace,
    bases: ProtectedBases,
    probe: _Probe,
    model: PreTrainedModel | PeftModel,
    keep: Sequence[str],
    sketches: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The optional second pass: the projected sketch, ordered by what G really holds along it."""
    rows = {
        t.name: lora_a_from_gradient(
            sketches[t.name].to(work.device), bases.load(t), sketches[t.name].shape[0]
        ).cpu()
        for t in work.targets
    }
    rows = {name: a for name, a in rows.items() if a.shape[0] > 0}
    out_features = {t.name: t.out_features for t in work.targets}
    images = back_project_gradients(model, rows, out_features, probe.batches, keep=keep)
    return {
        name: refined_directions(rows[name], images[name]) if name in rows else sketch
        for name, sketch in sketches.items()
    }


def _learn(
    work: Workplace,
    model: PreTrainedModel | PeftModel,
    active: Sequence[Target],
    lora_a: Mapping[str, Tensor],
    scales: Mapping[str, float],
    samples: VqaDataset,
    collator: ChatCollator,
    directory: Path,
    task: TaskSpec,
    number: int,
) -> tuple[Factors, dict[str, Any]]:
    """Trains B from zero with A frozen (E6; sequential LoRA trains both); returns factors and account."""
    path, account = directory / "factors.safetensors", directory / "training.json"
    if not (path.exists() and account.exists()):
        config = work.config.train_for(task.name)
        start = {
            t.name: (lora_a[t.name], torch.zeros(t.out_features, lora_a[t.name].shape[0])) for t in active
        }
        before = _first_logits(work, model, samples, collator)
        adapters = [ACCUMULATED, STAGE] if isinstance(model, PeftModel) else [STAGE]
        peft_model = attach(model, STAGE, start, scales, dropout=config.lora_dropout)
        activate(peft_model, adapters, STAGE, "both" if work.config.method == "lora" else "B")
        if not torch.equal(before, _first_logits(work, peft_model, samples, collator)):
            raise StageError(
                f"stage {number}: attaching the new adapter changed the model's output although B = 0"
            )
        training = train_stage(
            peft_model,
            samples,
            collator,
            config,
            seed=work.config.seed + number,
            directory=directory / "checkpoints",
            log_dir=work.run_dir / "tensorboard" / directory.name,
            report_to=work.config.report_to,
            device=work.device,
        )
        factors = read_factors(peft_model, STAGE, [t.name for t in active])
        if not isinstance(model, PeftModel):
            peft_model.unload()
        save_tensors(path, {f"{n}.{k}": f for n, (a, b) in factors.items() for k, f in (("A", a), ("B", b))})
        write_json(account, training)
    stored = load_tensors(path)
    return {t.name: (stored[f"{t.name}.A"], stored[f"{t.name}.B"]) for t in active}, read_json(account)


@torch.no_grad()
def _first_logits(
    work: Workplace, model: PreTrainedModel | PeftModel, samples: VqaDataset, collator: ChatCollator
) -> Tensor:
    model.eval()
    batch = {key: value.to(work.device) for key, value in collator([samples[0]]).items()}
    return model(**batch).logits.cpu()


def _fold(accumulated: Factors, factors: Factors, scales: Mapping[str, float]) -> Factors:
    """The past and the new update as one (E7); a module of rank 0 in this stage is in the past alone."""
    folded = {}
    for name in dict.fromkeys([*accumulated, *factors]):
        past = [(*accumulated[name], 1.0)] if name in accumulated else []
        new = [(*factors[name], scales[name])] if name in factors else []
        folded[name] = fold_factors(past + new)
    return folded


def leakage(a: Tensor, b: Tensor, basis: Tensor) -> float:
    """||dW M||_F / ||dW||_F for dW = B A, in fp64 without forming dW; 0 when dW = 0.

    Args:
        a: [r, in].
        b: [out, r]; B = Q R gives ||B X|| = ||R X||.
        basis: M, [in, k].
    """
    r = torch.linalg.qr(b.double()).R
    update = r @ a.double()
    norm = float(update.norm())
    return float((update @ basis.double()).norm()) / norm if norm > 0.0 else 0.0


def _module_table(
    work: Workplace,
    bases: ProtectedBases,
    active: Sequence[Target],
    factors: Factors,
    scales: Mapping[str, float],
    number: int,
) -> dict[str, dict[str, Any]]:
    """One row per adapted module; checks that no update reaches what is protected."""
    trained = {t.name for t in active}
    table = {}
    for t in work.targets:
        basis = bases.load(t).cpu()
        leak = leakage(*factors[t.name], basis) if t.name in trained else 0.0
        if leak > LEAKAGE_TOLERANCE:
            raise StageError(
                f"stage {number}: the update of {t.name} reaches {leak:.1e} of its norm into the "
                "protected subspace, at most "
                f"{LEAKAGE_TOLERANCE:.0e} is allowed; the stage is not folded"
            )
        table[t.name] = {
            "name": t.name,
            "tower": t.tower,
            "depth": t.depth,
            "in_features": t.in_features,
            "out_features": t.out_features,
            "k_w": bases.weight_basis(t).shape[1],
            "k_f": basis.shape[1] - bases.weight_basis(t).shape[1],
            "rank": factors[t.name][0].shape[0] if t.name in trained else 0,
            "lambda": layer_lambda(work.config, t),
            "scale": scales[t.name],
            "leakage": leak,
            "orthonormality_error": orthonormality_error(basis),
        }
    return table


def _protect(
    work: Workplace,
    bases: ProtectedBases,
    probe: _Probe,
    model: PeftModel,
    directory: Path,
    table: dict[str, dict[str, Any]],
) -> None:
    """Adds the feature directions of the task just learnt (E8); completes the rows of `table`."""
    path, account = directory / "feature_basis.safetensors", directory / "feature_basis.json"
    if not (path.exists() and account.exists()):
        directions, facts = _feature_directions(work, bases, probe, model)
        save_tensors(path, directions)
        write_json(account, facts)
    for name, facts in read_json(account).items():
        table[name].update(facts)


def _feature_directions(
    work: Workplace, bases: ProtectedBases, probe: _Probe, model: PeftModel
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    nothing = work.config.method == "lora"
    sketches = {} if nothing else probe.sketch(model, [ACCUMULATED], 1)
    directions: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for t in work.targets:
        if nothing:
            directions[t.name] = torch.zeros(t.in_features, 0)
            facts[t.name] = {"k_f_added": 0, "captured": None, "saturated": False}
            continue
        tower, basis = work.config.towers()[t.tower], bases.load(t)
        extended = extend_basis_from_sketch(basis, sketches[t.name].to(work.device), tower.eps_f)
        directions[t.name] = extended.basis[:, basis.shape[1] :].cpu()
        facts[t.name] = {
            "k_f_added": directions[t.name].shape[1],
            "captured": extended.captured,
            "saturated": extended.saturated,
        }
    saturated = [name for name, fact in facts.items() if fact["saturated"]]
    if saturated:
        logger.warning(
            f"{len(saturated)} of {len(facts)} modules need more directions than their sketch has "
            f"to reach eps_f, {saturated[0]} "
            f"first ({facts[saturated[0]]['captured']:.3f} held); raise probe.columns_per_rank to "
            "protect more of this task"
        )
    return directions, facts


def _counts(
    samples: Sequence[Any],
    skipped: Sequence[SkippedRecord],
    factors: Factors,
    work: Workplace,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    trained = sum(b.numel() + (a.numel() if work.config.method == "lora" else 0) for a, b in factors.values())
    return {
        "train_samples": len(samples),
        "steps": training["steps"],
        "trainable_parameters": trained,
        "skipped_records": [vars(record) for record in skipped],
    }
