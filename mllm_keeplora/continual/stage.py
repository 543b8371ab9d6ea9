"""One stage of KeepLoRA++: learn a task in the residual subspace, fold it, protect it, measure everything.

Where methods differ, the stage asks `Workplace.method`; the order of the steps is the same for all.
"""

import hashlib
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_keeplora.continual.trainer import train_stage
from mllm_keeplora.data.collator import SampleDataset
from mllm_keeplora.distributed.processes import from_main, gather
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.linalg.folding import fold_factors
from mllm_keeplora.linalg.subspace import orthonormality_error
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import (
    ADAPTER,
    FACTORS,
    FEATURES,
    MEMORY,
    Model,
    Stage,
    Workplace,
    active_adapters,
    attach_accumulated,
    detach,
)
from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, Factors, activate, attach, read_factors
from mllm_keeplora.modeling.fused_past import past_in_base
from mllm_keeplora.modeling.loading import save_adapter
from mllm_keeplora.probes.protected_bases import ProtectedBases
from mllm_keeplora.runs.files import (
    load_or_compute,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    sha256_json,
    write_json,
)
from mllm_keeplora.runs.manifests import MANIFEST, write_manifest

Table = dict[str, dict[str, Any]]  # module name -> its row in the manifest

# ||dW M||_F / ||dW||_F that fp32 factors from an fp64 re-projection stay below by an order of magnitude.
LEAKAGE_TOLERANCE = 1e-6


class StageError(KeepLoRAError, RuntimeError):
    """A stage that cannot be carried out, or whose result breaks the method's guarantee."""


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
    learns, a_file = work.method.learns(stage.number), directory / "lora_a.safetensors"
    with clock.phase("probe"):
        lora_a = load_or_compute(a_file, lambda: work.method.initial_a(stage, model)) if learns else None
    with clock.phase("train"):
        factors, account = learn(stage, model, lora_a)
    detach(model)

    with clock.phase("fold"):
        table = from_main(lambda: module_table(stage, factors))
        folded = fold(work.method, stage.accumulated, factors, stage.folded_scales)
        model = attach(work.model, ACCUMULATED, folded, dict.fromkeys(folded, 1))
        from_main(lambda: save_adapter(work.run_dir / ADAPTER, model, work.config.model))
    with clock.phase("feature_basis"):
        protect(stage, model, table, factors)
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
        "adapter": from_main(lambda: adapter_hash(work.run_dir)),
        "loss": account["loss"],
        "scores": scores,
    }
    return StageResult(from_main(lambda: write_manifest(directory, manifest)), folded)


def learn(stage: Stage, model: Model, lora_a: Mapping[str, Tensor] | None) -> tuple[Factors, dict[str, Any]]:
    """Trains the method's factors: B from zero with A frozen for KeepLoRA++ (E6).

    Args:
        stage, model: what learns.
        lora_a: module name -> A; None where the method learns nothing in this stage.

    Returns:
        Module name -> (A, B) of the modules that had room for at least one direction, and `train_stage`'s
        account.

    Raises:
        StageError: no module has room, attaching the new adapter changed the model's function, or processes
            learnt different factors.
        TrainingError: training diverged.
    """
    path, account = stage.directory / FACTORS, stage.directory / "training.json"
    if not from_main(lambda: path.exists() and account.exists()):
        factors, training = no_update(stage) if lora_a is None else _train(stage, model, lora_a)
        named = {f"{n}.A": a for n, (a, _) in factors.items()} | {
            f"{n}.B": b for n, (_, b) in factors.items()
        }
        _check_agreement(stage, named)
        from_main(lambda: save_tensors(path, named))
        from_main(lambda: write_json(account, training))
    return read_stage_factors(stage.directory), read_json(account)


def read_stage_factors(directory: Path) -> Factors:
    """What the stage of that directory learnt: module name -> (A [r, in], B [out, r]), fp32."""
    stored = load_tensors(directory / FACTORS)
    names = [name.removesuffix(".A") for name in stored if name.endswith(".A")]
    return {name: (stored[f"{name}.A"], stored[f"{name}.B"]) for name in names}


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
    method, start = work.method, _start(stage, lora_a)
    if not start:
        raise StageError(
            f"stage {stage.number} ({stage.task.name}): no adapted module has residual space left; "
            "lower eps_w or eps_f"
        )
    # A continued past is in the stage's own factors, up to the rounding of B / s * s.
    continued = method.continues and bool(stage.accumulated)
    before, past = _first_logits(stage, model), [] if continued else active_adapters(model)
    adapted = attach(model, STAGE, start, stage.scales, dropout=stage.train.lora_dropout)
    activate(adapted, [*past, STAGE], STAGE, method.trains)
    if not continued and not torch.equal(before, _first_logits(stage, adapted)):
        raise StageError(f"stage {stage.number}: attaching the new adapter changed the output although B = 0")
    with past_in_base(adapted, past) as beside:
        activate(adapted, [*beside, STAGE], STAGE, method.trains)
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
            hooks=method.hooks(stage, adapted),
        )
    factors = read_factors(adapted, STAGE, list(start))
    detach(adapted)
    return factors, training


def _start(stage: Stage, lora_a: Mapping[str, Tensor]) -> Factors:
    """B = 0 beside the given A; what a continuing method has learnt so far, where there is any."""
    start = {
        t.name: (lora_a[t.name], torch.zeros(t.out_features, len(lora_a[t.name])))
        for t in stage.targets
        if len(lora_a[t.name]) > 0
    }
    if stage.work.method.continues:
        past = {name: stage.accumulated[name] for name in start if name in stage.accumulated}
        start |= {name: (a, b / stage.scales[name]) for name, (a, b) in past.items()}
    return start


def no_update(stage: Stage) -> tuple[Factors, dict[str, Any]]:
    """What a stage without learning hands on; the first one's factors are zeros, since an adapter needs
    some."""
    account: dict[str, Any] = {"steps": 0, "repeated_samples": 0, "loss": []}
    if stage.accumulated:
        return {}, account
    return {
        t.name: (torch.zeros(1, t.in_features), torch.zeros(t.out_features, 1)) for t in stage.targets
    }, account


@torch.no_grad()
def _first_logits(stage: Stage, model: Model) -> Tensor:
    model.eval()
    return model(**stage.work.to_device(stage.collator(stage.samples[:1]))).logits.cpu()


def fold(method: Method, accumulated: Factors, factors: Factors, scales: Mapping[str, float]) -> Factors:
    """The past and the new update as one (E7); a module of rank 0 in this stage is in the past alone.

    Where the method trains on one adapter throughout, the new factors hold their modules' past already.
    """
    folded = {}
    for name in dict.fromkeys([*accumulated, *factors]):
        new = [(*factors[name], scales[name])] if name in factors else []
        replaced = new and method.continues
        past = [(*accumulated[name], 1.0)] if name in accumulated and not replaced else []
        folded[name] = fold_factors(past + new)
    return folded


def accumulated_after(method: Method, initial: Factors, directories: Sequence[Path]) -> Factors:
    """The accumulated factors once the stages of these directories are learnt, bit for bit as they were.

    Args:
        method: of the run.
        initial: what the first stage started from.
        directories: of complete stages, in the order of learning.
    """
    accumulated = initial
    for directory in directories:
        scales = {m["name"]: m["scale"] for m in read_json(directory / MANIFEST)["modules"]}
        accumulated = fold(method, accumulated, read_stage_factors(directory), scales)
    return accumulated


def adapter_hash(run_dir: Path) -> str | None:
    """sha256 of the accumulated adapter's tensors, which lie outside the stages; None without an adapter."""
    file = run_dir / ADAPTER / "adapter_model.safetensors"
    return sha256_file(file) if file.exists() else None


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
    table, bases, scales = {}, stage.bases, stage.folded_scales
    layer_scale = stage.work.method.folded_layer_scale
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
            "lambda": layer_scale(stage.work.config, t),
            "scale": scales[t.name],
            "leakage": leak,
            "orthonormality_error": orthonormality_error(basis),
        }
    return table


def protect(stage: Stage, model: Model, table: Table, factors: Factors) -> None:
    """Keeps what later stages need of the task just learnt, feature directions (E8) above all; completes the
    rows of `table`."""
    method, account = stage.work.method, stage.directory / "feature_basis.json"
    if not from_main(account.exists):
        features, memory = method.features(stage, model), method.remember(stage, model, factors)
        from_main(lambda: save_tensors(stage.directory / MEMORY, memory) if memory else None)
        from_main(lambda: save_tensors(stage.directory / FEATURES, features.directions))
        from_main(lambda: write_json(account, features.facts))
    for name, facts in read_json(account).items():
        table[name].update(facts)


def counts(stage: Stage, factors: Factors, account: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of what went into a stage, and which records did not."""
    both = stage.work.method.trains == "both"
    return {
        "train_samples": len(stage.samples) if account["steps"] else 0,
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
            general_limit=work.config.evaluation.general_limit,
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
