"""A stage while it runs: its context, its record, and what is checked and told of it."""

import resource
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.continual.history import adapter_hash
from mllm_keeplora.continual.memory import memory_explained
from mllm_keeplora.distributed.processes import from_main, gather, shared_out
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.answer import generation_settings
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.linalg.subspace import orthonormality_error
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import RunContext, StageContext
from mllm_keeplora.modeling.adapters import Factors, Model, attach_accumulated, detach
from mllm_keeplora.modeling.loading import save_adapter
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.protected_bases import ProtectedBases
from mllm_keeplora.runs.files import sha256_json
from mllm_keeplora.runs.manifests import write_manifest
from mllm_keeplora.runs.record import Outcome, Phase, StageRecord
from mllm_keeplora.runs.run_directory import StageDirectory

logger = get_logger(__name__)

# ||dW M||_F / ||dW||_F that fp32 factors from an fp64 re-projection stay below by an order of magnitude.
LEAKAGE_TOLERANCE = 1e-6


class StageError(KeepLoRAError, RuntimeError):
    """A stage that cannot be carried out, or whose result breaks the method's guarantee."""


class Stage:
    """One stage, opened by `Run.stage`.

    Attributes:
        run: what all stages share.
        directory: where it writes.
        header: entries of its manifest that were known before it began.
        record: its phases.
        manifest: entries that it adds to the header.
    """

    def __init__(
        self, run: RunContext, directory: StageDirectory, header: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> None:
        """Claims the stage's folder; see `StageRecord` for `inputs`."""
        self.run, self.directory, self.header = run, directory, header
        self.record = StageRecord(directory, inputs)
        self.manifest: dict[str, Any] = {"modules": [], "counts": {}, "loss": []}
        self._model: Model = run.model

    def phase(self, name: str, compute: Callable[[], Outcome], key: str = "") -> Phase:
        """See `StageRecord.phase`.

        Raises:
            DeviceMemoryError: too little memory; names what lowers it.
        """
        with memory_explained(name, self.run.config, self.header["stage"], self.header["task"]):
            return self.record.phase(name, compute, key)

    def note(self, **entries: Any) -> None:
        """Adds entries to the manifest."""
        self.manifest |= entries

    def current_model(self, accumulated: Factors) -> Model:
        """The base with the accumulated factors (E7), in place of what was on it."""
        detach(self._model)
        self._model = attach_accumulated(self.run.model, accumulated)
        return self._model

    def save_adapter(self) -> None:
        """Writes the current model's factors as the run's adapter."""
        model = cast(PeftModel, self._model)  # a stage that learns leaves factors, zeros at least
        run = self.run
        generation = generation_settings(run.model, run.processor)
        from_main(lambda: save_adapter(run.directory.adapter, model, run.config.model, run.processor, generation))

    def evaluate(self, model: Model) -> None:
        """The row of the accuracy matrix: every task of the stream and every general benchmark.

        A row measured on other data (the stage was interrupted) is measured again.
        """
        key = sha256_json(self.header["data"])
        row = self.phase("evaluate", lambda: Outcome(facts=evaluate(self.run, model, self.directory)), key)
        self.note(scores=row.facts)

    def finish(self) -> dict[str, Any]:
        """Leaves the base without adapters and writes the manifest, last; returns it."""
        detach(self._model)
        timings = {**self.record.timings, "total": sum(self.record.timings.values())}
        self.note(timings=timings, peak_memory_bytes=peak_memory(self.run.device))
        return from_main(self._write_manifest)

    def _write_manifest(self) -> dict[str, Any]:
        shutil.rmtree(self.directory.checkpoints, ignore_errors=True)
        self.note(adapter=adapter_hash(self.run.directory))
        return write_manifest(self.directory, {**self.header, **self.manifest})


def open_context(run: RunContext, method: Method, number: int, accumulated: Factors) -> StageContext:
    """Stage `number` (1-based) with everything resolved that its method decides.

    Args:
        run: that the stage belongs to.
        method: of the run.
        number: of the stage.
        accumulated: factors of all earlier stages.
    """
    task, config = run.stream.tasks[number - 1], run.config
    samples = method.samples(run, number)
    media = {kind for sample in samples for kind in sample.kinds}
    targets = [target for target in run.targets if target.is_reached_by(media)]
    earlier = [run.directory.stage(n, run.stream.tasks[n - 1].name) for n in range(1, number)]
    return StageContext(
        run=run,
        number=number,
        task=task,
        accumulated=accumulated,
        earlier=earlier,
        samples=samples,
        train=method.train_config(run, config.train_for(task.name)),
        targets=targets,
        layer_scales={t.name: method.layer_scale(config, t) for t in targets},
        folded_layer_scales={t.name: method.folded_layer_scale(config, t) for t in targets},
    )


def check_no_leakage(stage: StageContext, factors: Factors, bases: ProtectedBases) -> dict[str, dict[str, Any]]:
    """Makes sure that the update does not reach what is protected: dW M = 0.

    Returns:
        Module name -> its row in the manifest.

    Raises:
        StageError: an update that does.
    """
    exact_products(bases.device)
    rows = shared_out(stage.targets, lambda t: _module_row(stage, t, factors, bases), "leakage")
    return {row["name"]: row for row in rows}


def _module_row(stage: StageContext, t: Target, factors: Factors, bases: ProtectedBases) -> dict[str, Any]:
    basis, (k_w, k_g, _) = bases.load(t), bases.sizes(t)
    a, b = factors.get(t.name, (torch.zeros(0, t.in_features), torch.zeros(t.out_features, 0)))
    leak = leakage(a.to(basis.device), b.to(basis.device), basis)
    if leak > LEAKAGE_TOLERANCE:
        raise StageError(
            f"{stage.name}: the update of {t.name} reaches {leak:.1e} of its norm into the protected subspace, at "
            f"most {LEAKAGE_TOLERANCE:.0e} is allowed; the stage is not folded"
        )
    return {
        "name": t.name,
        "tower": t.tower,
        "depth": t.depth,
        "in_features": t.in_features,
        "out_features": t.out_features,
        "k_w": k_w,
        "k_g": k_g,
        "k_f": basis.shape[1] - k_w - k_g,
        "rank": len(a),
        "lambda": stage.folded_layer_scales[t.name],
        "scale": stage.folded_scales[t.name],
        "leakage": leak,
        "answer": protected_answer(a, basis),
        "orthonormality_error": orthonormality_error(basis),
    }


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


def protected_answer(a: Tensor, basis: Tensor) -> float:
    """||A M||_F / ||A||_F by the fp32 product that training makes, not by an fp64 one: what A answers protected inputs.

    Args:
        a: A, [r, in].
        basis: M, [in, k], orthonormal columns, on the device of training.

    Returns:
        About 5e-8 in fp32; 4e-5 where the factors were rounded to TF32. 0 where nothing is protected or A has no rows.
    """
    if 0 in (*a.shape, *basis.shape):
        return 0.0
    return float(torch.nn.functional.linear(basis.T, a.to(basis)).norm() / a.norm())


def check_ranks(run: RunContext) -> None:
    """E9 before the first stage: a rank that the weights' residual space cannot hold is a mistake in the settings.

    What general inputs take of that space differs from sample to sample, as with features of past tasks: modules that
    they leave less room learn at the rank that fits, and a warning says how many.

    Raises:
        StageError: names the module, its residual space and the settings that decide it.
    """
    bases = ProtectedBases(run.weight_files, run.general_basis, [], run.device)
    narrow = []
    for t in run.targets:
        rank, (k_w, k_g, _) = run.rank(t), bases.sizes(t)
        left = t.in_features - k_w
        if rank > left:
            raise StageError(
                f"{t.name}: rank {rank} exceeds its residual space of {t.in_features} - {k_w} = {left} "
                f"directions; lower {t.tower}.rank or {t.tower}.eps_w"
            )
        if rank > left - k_g:
            narrow.append(f"{t.name} ({left - k_g} left of {t.in_features}, {k_g} of them protected as general inputs)")
    if narrow:
        logger.warning(
            f"{len(narrow)} of {len(run.targets)} modules have fewer directions left than their rank and learn with "
            f"those, {narrow[0]} first; lower general.eps_g to leave them more"
        )


def counts(stage: StageContext, method: Method, factors: Factors, account: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of what went into a stage, and the records that did not.

    Args:
        stage: what has learnt.
        method: how.
        factors: what it has learnt.
        account: of the training, as `train_stage` returns it.
    """
    _, skipped = stage.run.records[stage.task.name]
    both = method.trains == "both"
    return {
        "train_samples": len(stage.samples) if account["steps"] else 0,
        "steps": account["steps"],
        "repeated_samples": account["repeated_samples"],
        "trainable_parameters": sum(b.numel() + both * a.numel() for a, b in factors.values())
        if account["steps"]
        else 0,
        "skipped_records": [vars(record) for record in skipped],
    }


def evaluate(
    run: RunContext, model: Model, stage: StageDirectory, names: Iterable[str] | None = None
) -> dict[str, Any]:
    """Scores of a model, and every question with its reply under the stage's folder.

    Args:
        run: the run.
        model: what is evaluated.
        stage: whose row it is.
        names: cells of the row that were left out; None for the whole row.
    """
    settings = run.config.evaluation
    return dict(
        evaluate_row(
            model,
            run.processor,
            run.stream,
            run.directory.task_files,
            stage.replies if names is None else stage.backfilled_replies,
            reader=run.reader,
            names=None if names is None else list(names),
            batch_size=settings.batch_size,
            limit=settings.limit,
            general_limit=settings.general_limit,
        )
    )


def peak_memory(device: torch.device) -> int:
    """Largest memory so far of any process, bytes: allocated on its GPU, else its resident set."""
    if device.type == "cuda":
        own = int(torch.cuda.max_memory_allocated(device))
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(gather(own))
