"""One stage of KeepLoRA++: learn a task in the residual subspace, fold it, protect it, measure everything."""

import hashlib
import math
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
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
    sha256_json,
    write_json,
    write_manifest,
)
from mllm_keeplora.config import RunConfig, TrainConfig
from mllm_keeplora.data.collator import IGNORED_LABEL, ChatCollator, SampleDataset
from mllm_keeplora.data.records import Sample, SkippedRecord, select_evenly
from mllm_keeplora.data.video import VideoReader
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.evaluate import evaluate_row
from mllm_keeplora.folding import fold_factors
from mllm_keeplora.gradients import back_project_gradients, module_generator, sketch_gradients
from mllm_keeplora.layer_scaling import layer_scales
from mllm_keeplora.lora_init import lora_a_from_gradient
from mllm_keeplora.models import save_adapter
from mllm_keeplora.processes import from_main, gather, hide_bar, is_main, own_share
from mllm_keeplora.protected import ProtectedBases
from mllm_keeplora.sharding import fillers
from mllm_keeplora.sketch import extend_basis_from_sketch, refined_directions
from mllm_keeplora.streams import Stream, TaskSpec
from mllm_keeplora.subspace import orthonormality_error
from mllm_keeplora.targets import Target
from mllm_keeplora.training import train_stage

logger = get_logger(__name__)

Model = PreTrainedModel | PeftModel
Table = dict[str, dict[str, Any]]  # module name -> its row in the manifest

# ||dW M||_F / ||dW||_F that fp32 factors from an fp64 re-projection stay below by an order of magnitude.
LEAKAGE_TOLERANCE = 1e-6


class StageError(KeepLoRAError, RuntimeError):
    """A stage that cannot be carried out, or whose result breaks the method's guarantee."""


@dataclass
class Workplace:
    """What all stages of a run share.

    Attributes:
        config, stream: what was asked for.
        records: task name -> (its training samples, the records left out).
        model: the base model, without adapters between stages.
        processor: of the base model.
        reader: decodes clips, for probes, training and evaluation alike.
        targets: the modules that some task of the stream adapts.
        weight_files: module name -> file with its weight basis; empty where nothing is protected.
        run_dir: where the run writes.
        device: where the model lies.
    """

    config: RunConfig
    stream: Stream
    records: Mapping[str, tuple[list[Sample], list[SkippedRecord]]]
    model: PreTrainedModel
    processor: Any
    reader: VideoReader
    targets: list[Target]
    weight_files: Mapping[str, Path]
    run_dir: Path
    device: torch.device

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device."""
        return {key: value.to(self.device) for key, value in batch.items()}


@dataclass
class Clock:
    """Wall time of phases in seconds; a phase that was read from its file costs next to nothing."""

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


@dataclass
class Stage:
    """One stage's own facts.

    Attributes:
        work: shared by all stages.
        number: 1-based.
        task: what is learnt.
        accumulated: factors of all earlier stages, scales absorbed in B; empty before the first.
        feature_files: their feature bases, oldest first.
    """

    work: Workplace
    number: int
    task: TaskSpec
    accumulated: Factors
    feature_files: Sequence[Path]

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return stage_directory(self.work.run_dir, self.number, self.task.name)

    @property
    def seed(self) -> int:
        """Seed of everything random in the stage."""
        return self.work.config.seed + self.number

    @property
    def train(self) -> TrainConfig:
        """Training settings, the task's overrides applied."""
        return self.work.config.train_for(self.task.name)

    @property
    def samples(self) -> list[Sample]:
        """Training samples."""
        return self.work.records[self.task.name][0]

    @cached_property
    def collator(self) -> ChatCollator:
        """Samples to model inputs; shared by probes and training because it remembers tokens."""
        return ChatCollator(self.work.processor, self.train.max_length, self.work.reader)

    @cached_property
    def targets(self) -> list[Target]:
        """The modules that the task's samples reach; of Video-LLaVA's two vision towers, say, the one for
        clips."""
        media = {sample.media for sample in self.samples if sample.media is not None}
        return [target for target in self.work.targets if target.is_reached_by(media)]

    @cached_property
    def probe_indices(self) -> list[int]:
        """The samples from which task gradients are measured."""
        probe = self.work.config.probe
        return select_evenly(len(self.samples), probe.fraction, probe.max_samples)

    @property
    def bases(self) -> ProtectedBases:
        """M, under which the stage trains."""
        return ProtectedBases(self.work.weight_files, self.feature_files, self.work.device)

    @property
    def scales(self) -> dict[str, float]:
        """s_l = lambda_l * alpha / r with the nominal r, per module (E5)."""
        config, towers = self.work.config, self.work.config.towers()
        return {t.name: layer_lambda(config, t) * config.alpha / towers[t.tower].rank for t in self.targets}

    def rank(self, target: Target) -> int:
        """The nominal r of a module."""
        return self.work.config.towers()[target.tower].rank

    def probe_batches(self) -> Iterator[dict[str, Tensor]]:
        """The probe sample as model inputs with labels, in order; of several processes each takes its share.

        Batches are shared out whole: one process's batches are those of a run with one, padding included.
        """
        samples = SampleDataset([self.samples[i] for i in self.probe_indices])
        size = self.work.config.probe.batch_size
        rows = [list(range(len(samples)))[start : start + size] for start in range(0, len(samples), size)]
        own = own_share(rows)
        own_and_fillers = [*own, *fillers(self.work.model, own, rows[0])]
        loader = DataLoader(samples, batch_sampler=own_and_fillers, collate_fn=self.collator)
        progress = tqdm(loader, desc="task gradients", unit="batch", disable=hide_bar(), leave=False)
        for number, batch in enumerate(progress):
            if number >= len(own):
                batch["labels"].fill_(IGNORED_LABEL)
            yield self.work.to_device(batch)

    def sketch(self, model: Model, pass_number: int) -> dict[str, Tensor]:
        """Omega^T G of every module, q = columns_per_rank * r; each pass of the run draws its own Omega."""
        per_rank = self.work.config.probe.columns_per_rank
        columns = {t.name: per_rank * self.rank(t) for t in self.targets}
        seed = 2 * self.seed + pass_number
        return sketch_gradients(
            model, self.targets, columns, self.probe_batches, seed, keep=active_adapters(model)
        )


@dataclass
class StageResult:
    """What a stage hands to the next one."""

    manifest: dict[str, Any]
    accumulated: Factors


def run_stage(stage: Stage, header: Mapping[str, Any]) -> StageResult:
    """Carries out a stage; phases whose files exist (an interrupted stage) are not repeated.

    Args:
        stage: its model carries no adapter before and after.
        header: entries of the manifest that the stream knows (predecessor's hash, identity, data hashes, ..).

    Raises:
        StageError: no residual space left, a function changed by attaching, leakage above 1e-6.
    """
    work, directory, clock = stage.work, stage.directory, Clock()

    model = attach_accumulated(work.model, stage.accumulated)
    with clock.phase("probe"):
        lora_a = load_or_compute(directory / "lora_a.safetensors", lambda: initial_a(stage, model))
    with clock.phase("train"):
        factors, account = learn(stage, model, lora_a)
    detach(model)

    with clock.phase("fold"):
        table = from_main(lambda: module_table(stage, factors))
        folded = fold(stage.accumulated, factors, stage.scales)
        model = attach(work.model, ACCUMULATED, folded, dict.fromkeys(folded, 1.0))
        from_main(lambda: save_adapter(directory / "adapter", model, work.config.model))
    with clock.phase("feature_basis"):
        protect(stage, model, table)
    with clock.phase("evaluation"):
        scores = evaluate_stage(work, model, directory, header["data"])
    detach(model)

    from_main(lambda: shutil.rmtree(directory / "checkpoints", ignore_errors=True))
    manifest = {
        **header,
        "probe_indices": stage.probe_indices,
        "modules": list(table.values()),
        "counts": counts(stage, factors, account),
        "timings": clock.total(),
        "peak_memory_bytes": peak_memory(work.device),
        "loss": account["loss"],
        "scores": scores,
    }
    return StageResult(from_main(lambda: write_manifest(directory, manifest)), folded)


def initial_a(stage: Stage, model: Model) -> dict[str, Tensor]:
    """A_t of every module: from the residual gradient (E2-E4), or PEFT's default init for sequential LoRA.

    The main process alone decomposes: rounding differs between machines, and A must not.

    Returns:
        Module name -> A; empty on the other processes.
    """
    targets, bases = stage.targets, stage.bases
    if stage.work.config.method == "lora":
        return {t.name: _kaiming_a(t, stage.rank(t), stage.seed) for t in targets}
    gradients = stage.sketch(model, 0)
    if stage.work.config.probe.refine:
        gradients = _refine(stage, model, gradients)
    if not is_main():
        return {}
    return {
        t.name: lora_a_from_gradient(gradients[t.name].to(bases.device), bases.load(t), stage.rank(t)).cpu()
        for t in tqdm(targets, desc="residual subspaces", unit="module", disable=None, leave=False)
    }


def _kaiming_a(target: Target, rank: int, seed: int) -> Tensor:
    a = torch.empty(rank, target.in_features)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=module_generator(seed, target.name))
    return a


def _refine(stage: Stage, model: Model, sketches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optional second pass: the projected sketch, ordered by what G really holds along it."""
    rows = from_main(lambda: _projected_rows(stage, sketches))
    if not rows:
        return dict(sketches)
    out_features = {t.name: t.out_features for t in stage.targets}
    images = back_project_gradients(
        model, rows, out_features, stage.probe_batches, keep=active_adapters(model)
    )
    refined = {name: refined_directions(rows[name], images[name]) for name in rows}
    return {**sketches, **refined}


def _projected_rows(stage: Stage, sketches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal rows that span a module's projected sketch; modules without any are left out."""
    bases, rows = stage.bases, {}
    for t in stage.targets:
        sketch = sketches[t.name].to(bases.device)
        span = lora_a_from_gradient(sketch, bases.load(t), len(sketch)).cpu()
        if len(span) > 0:
            rows[t.name] = span
    return rows


def learn(stage: Stage, model: Model, lora_a: Mapping[str, Tensor]) -> tuple[Factors, dict[str, Any]]:
    """Trains B from zero with A frozen (E6; sequential LoRA trains both).

    Returns:
        Module name -> (A, B) of the modules that had room for at least one direction, and `train_stage`'s
        account.

    Raises:
        StageError: no module has room, attaching the new adapter changed the model's function, or processes
            learnt different factors.
        TrainingError: training diverged.
    """
    path, account = stage.directory / "factors.safetensors", stage.directory / "training.json"
    if not from_main(lambda: path.exists() and account.exists()):
        factors, training = _train(stage, model, lora_a)
        named = {f"{n}.A": a for n, (a, _) in factors.items()} | {
            f"{n}.B": b for n, (_, b) in factors.items()
        }
        _check_agreement(stage, named)
        from_main(lambda: save_tensors(path, named))
        from_main(lambda: write_json(account, training))
    stored = load_tensors(path)
    names = [name.removesuffix(".A") for name in stored if name.endswith(".A")]
    return {name: (stored[f"{name}.A"], stored[f"{name}.B"]) for name in names}, read_json(account)


def _check_agreement(stage: Stage, tensors: Mapping[str, Tensor]) -> None:
    """Bit for bit: DDP starts all processes from the same factors and gives them the same gradients."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy().data)
    found = gather(digest.hexdigest()[:12])
    if len(set(found)) > 1:
        raise StageError(
            f"stage {stage.number} ({stage.task.name}): the processes learnt different factors (hashes "
            f"{', '.join(found)}, expected one); run all of them on the same hardware and package versions"
        )


def _train(stage: Stage, model: Model, lora_a: Mapping[str, Tensor]) -> tuple[Factors, dict[str, Any]]:
    work = stage.work
    start = {
        t.name: (lora_a[t.name], torch.zeros(t.out_features, len(lora_a[t.name])))
        for t in stage.targets
        if len(lora_a[t.name]) > 0
    }
    if not start:
        raise StageError(
            f"stage {stage.number} ({stage.task.name}): no adapted module has residual space left; "
            "lower eps_w or eps_f"
        )
    before, past = _first_logits(stage, model), active_adapters(model)
    adapted = attach(model, STAGE, start, stage.scales, dropout=stage.train.lora_dropout)
    activate(adapted, [*past, STAGE], STAGE, "both" if work.config.method == "lora" else "B")
    if not torch.equal(before, _first_logits(stage, adapted)):
        raise StageError(f"stage {stage.number}: attaching the new adapter changed the output although B = 0")
    training = train_stage(
        adapted,
        SampleDataset(stage.samples),
        stage.collator,
        stage.train,
        seed=stage.seed,
        directory=stage.directory / "checkpoints",
        log_dir=work.run_dir / "tensorboard" / stage.directory.name,
        mixed=len({sample.media for sample in stage.samples}) > 1,
        report_to=work.config.report_to,
        device=work.device,
    )
    factors = read_factors(adapted, STAGE, list(start))
    detach(adapted)
    return factors, training


@torch.no_grad()
def _first_logits(stage: Stage, model: Model) -> Tensor:
    model.eval()
    return model(**stage.work.to_device(stage.collator(stage.samples[:1]))).logits.cpu()


def fold(accumulated: Factors, factors: Factors, scales: Mapping[str, float]) -> Factors:
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


def module_table(stage: Stage, factors: Factors) -> Table:
    """One row per adapted module.

    Raises:
        StageError: an update that reaches what is protected.
    """
    table, bases, scales = {}, stage.bases, stage.scales
    for t in stage.targets:
        basis, k_w = bases.load(t), bases.weight_basis(t).shape[1]
        a, b = factors.get(t.name, (torch.zeros(0, t.in_features), torch.zeros(t.out_features, 0)))
        leak = leakage(a.to(basis.device), b.to(basis.device), basis)
        if leak > LEAKAGE_TOLERANCE:
            raise StageError(
                f"stage {stage.number}: the update of {t.name} reaches {leak:.1e} of its norm into "
                "the protected "
                f"subspace, at most {LEAKAGE_TOLERANCE:.0e} is allowed; the stage is not folded"
            )
        table[t.name] = {
            "name": t.name,
            "tower": t.tower,
            "depth": t.depth,
            "in_features": t.in_features,
            "out_features": t.out_features,
            "k_w": k_w,
            "k_f": basis.shape[1] - k_w,
            "rank": len(a),
            "lambda": layer_lambda(stage.work.config, t),
            "scale": scales[t.name],
            "leakage": leak,
            "orthonormality_error": orthonormality_error(basis),
        }
    return table


def protect(stage: Stage, model: Model, table: Table) -> None:
    """Adds the feature directions of the task just learnt (E8); completes the rows of `table`."""
    path, account = stage.directory / "feature_basis.safetensors", stage.directory / "feature_basis.json"
    if not from_main(lambda: path.exists() and account.exists()):
        directions, facts = _feature_directions(stage, model)
        from_main(lambda: save_tensors(path, directions))
        from_main(lambda: write_json(account, facts))
    for name, facts in read_json(account).items():
        table[name].update(facts)


def _feature_directions(stage: Stage, model: Model) -> tuple[dict[str, Tensor], Table]:
    """The added directions and what is said of them; both empty on all processes but the main one."""
    directions: dict[str, Tensor] = {}
    facts: Table = {}
    if stage.work.config.method == "lora":
        for t in stage.targets:
            directions[t.name] = torch.zeros(t.in_features, 0)
            facts[t.name] = {"k_f_added": 0, "captured": None, "saturated": False}
        return directions, facts
    sketches, bases, towers = stage.sketch(model, 1), stage.bases, stage.work.config.towers()
    if not is_main():
        return {}, {}
    for t in stage.targets:
        basis = bases.load(t)
        extended = extend_basis_from_sketch(basis, sketches[t.name].to(bases.device), towers[t.tower].eps_f)
        directions[t.name] = extended.basis[:, basis.shape[1] :].cpu()
        facts[t.name] = {
            "k_f_added": directions[t.name].shape[1],
            "captured": extended.captured,
            "saturated": extended.saturated,
        }
    saturated = [name for name, fact in facts.items() if fact["saturated"]]
    if saturated:
        logger.warning(
            f"{len(saturated)} of {len(facts)} modules need more directions than their sketch has to reach "
            f"eps_f, {saturated[0]} first ({facts[saturated[0]]['captured']:.3f} held); raise "
            "probe.columns_per_rank to protect more of this task"
        )
    return directions, facts


def counts(stage: Stage, factors: Factors, account: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of what went into a stage, and which records did not."""
    both = stage.work.config.method == "lora"
    return {
        "train_samples": len(stage.samples),
        "steps": account["steps"],
        "repeated_samples": account["repeated_samples"],
        "trainable_parameters": sum(b.numel() + both * a.numel() for a, b in factors.values()),
        "skipped_records": [vars(record) for record in stage.work.records[stage.task.name][1]],
    }


def check_ranks(work: Workplace) -> None:
    """E9 before the first stage: a rank that the residual space cannot hold is a mistake in the settings.

    Raises:
        StageError: names the module, its residual space and the settings that decide it.
    """
    bases = ProtectedBases(work.weight_files, [], work.device)
    for t in work.targets:
        rank, k = work.config.towers()[t.tower].rank, bases.weight_basis(t).shape[1]
        if rank > t.in_features - k:
            raise StageError(
                f"{t.name}: rank {rank} exceeds its residual space of {t.in_features} - {k} = "
                f"{t.in_features - k} directions; lower {t.tower}.rank or {t.tower}.eps_w"
            )


def stage_directory(run_dir: Path, number: int, task: str | None) -> Path:
    """`stages/00-base`, `stages/01-<task>`, .."""
    return run_dir / "stages" / f"{number:02d}-{task or 'base'}"


def attach_accumulated(model: PreTrainedModel, accumulated: Factors) -> Model:
    """The current model: the base, or the base with the folded past."""
    return attach(model, ACCUMULATED, accumulated, dict.fromkeys(accumulated, 1.0)) if accumulated else model


def detach(model: Model) -> None:
    """Takes every adapter off again."""
    if isinstance(model, PeftModel):
        model.unload()


def active_adapters(model: Model) -> list[str]:
    """The adapters that belong to the current model; none on the bare base."""
    return list(model.active_adapters) if isinstance(model, PeftModel) else []


def layer_lambda(config: RunConfig, target: Target) -> float:
    """lambda_l of a module's layer, within its tower; 1 for sequential LoRA."""
    if config.method == "lora":
        return 1.0
    return layer_scales(target.num_layers, config.towers()[target.tower].gamma)[target.depth]


def evaluate_stage(work: Workplace, model: Model, directory: Path, data: Mapping[str, str]) -> dict[str, Any]:
    """The full row: every task of the stream and every general benchmark; kept in a file once measured.

    Args:
        work, model: what is evaluated.
        directory: of the stage.
        data: name -> hash of the data; a row measured on other data (an interrupted stage) is measured again.
    """
    path, measured = directory / "evaluation.json", sha256_json(data)
    if not from_main(lambda: path.exists() and read_json(path)["data"] == measured):
        scores = evaluate_row(
            model,
            work.processor,
            work.stream,
            work.run_dir / "eval_tasks",
            directory / "evaluation",
            reader=work.reader,
            batch_size=work.config.evaluation.batch_size,
            limit=work.config.evaluation.limit,
        )
        from_main(lambda: write_json(path, {"data": measured, "scores": scores}))
    return dict(read_json(path)["scores"])


def peak_memory(device: torch.device) -> int:
    """Largest memory so far of any process, bytes: allocated on its GPU, else its resident set."""
    if device.type == "cuda":
        own = int(torch.cuda.max_memory_allocated(device))
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(gather(own))
