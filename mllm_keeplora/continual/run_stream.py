"""KeepLoRA++ over a stream: learn a task in the residual subspace, fold it, protect it, measure everything.

`run_stage` is the algorithm. Where methods differ it asks `Run.method`; the order of the steps is the same for all.
docs/equations.md says what E1 to E9 are.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from accelerate.logging import get_logger

from mllm_keeplora.config import RunConfig
from mllm_keeplora.continual.general import guard, recall, recalled
from mllm_keeplora.continual.history import add_backfill
from mllm_keeplora.continual.learning import FINISH, as_factors, learn, measure_a
from mllm_keeplora.continual.memory import memory_explained
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.stage import Stage, check_no_leakage, counts, evaluate
from mllm_keeplora.continual.trainer import CURVES
from mllm_keeplora.distributed.processes import from_main, num_processes
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import Lesson, StageContext
from mllm_keeplora.modeling.adapters import Factors, Model, attach_accumulated, detach
from mllm_keeplora.runs.files import write_json
from mllm_keeplora.runs.record import Outcome

logger = get_logger(__name__)

AfterStage = Callable[[dict[str, Any]], None]


def run_stage(run: Run, number: int, past: Factors) -> Factors:
    """Learns the stream's task `number` (1-based); phases that an interrupted stage has finished are not repeated.

    Args:
        run: its base model carries no adapter before and after.
        number: of the stage, the first that is missing.
        past: factors of all earlier stages, scales absorbed in B.

    Returns:
        `past` with this stage folded in.

    Raises:
        StageError: no residual space left, a new adapter that changed the model's output, or an update that
            reaches what is protected.
    """
    method, context = run.method, run.stage_context(number, past)
    with run.stage(number) as stage:  # claims the folder; writes the manifest when all went well
        model = stage.current_model(past)  # the base and what was learnt so far (E7)
        bases = context.bases  # M: principal subspaces of the weights (E1), features of past tasks (E8)

        probe = stage.phase("probe", lambda: measure_a(context, method, model))  # A (E2-E4)
        lessons = lessons_of(stage, context, method, model) if method.learns(number) else []  # G3
        train = stage.phase("train", lambda: learn(context, method, model, probe.tensors, lessons))  # B (E5, E6)
        factors = as_factors(train.tensors)

        if run.config.general.budget is not None:
            held = stage.phase("guard", lambda: Outcome(facts=guard(context, method, stage.current_model, factors)))
            context = context.scaled(held.facts["factors"])  # G4
            stage.note(guard=held.facts)

        with stage.record.timed("fold"):
            table = check_no_leakage(context, factors, bases)  # dW M = 0
            past = method.fold(past, factors, context.folded_scales)  # E7
            model = stage.current_model(past)
            stage.save_adapter()

        protect = stage.phase("protect", lambda: Outcome(*method.features(context, model)))  # E8
        stage.phase("rehearse", lambda: Outcome(method.rehearsal(context, model) or None))
        stage.evaluate(model)

        rows = [{**row, **protect.facts[name]} for name, row in table.items()]
        stage.note(modules=rows, counts=counts(context, method, factors, train.facts))
        stage.note(**{name: train.facts[name] for name in (*CURVES, FINISH) if name in train.facts})
        probed = method.learns(number) and method.probe_passes(context.run.config, number)
        stage.note(probe_indices=context.probe_indices if probed else [])
    return past


def lessons_of(stage: Stage, context: StageContext, method: Method, model: Model) -> list[Lesson]:
    """What the stage learns beside its task: general prompts and those of past tasks, with the model's own replies."""
    settings, general = context.run.config.general, context.run.general
    lessons = list(general.learnt) if general is not None and settings.share else []
    if settings.rehearsed and context.number > 1:
        lessons += recalled(context, method, stage.phase("recall", lambda: recall(context, method, model)))
    return lessons


def run_stream(config: RunConfig, after_stage: AfterStage = lambda matrix: None) -> dict[str, Any]:
    """Runs, or continues, a stream; returns the content of `retention.json`.

    Complete stages are checked against their manifests and kept. The first incomplete one continues from its last
    finished phase. `Run.open` says what several processes need.

    Args:
        config: the settings.
        after_stage: is given the rows of scores so far (`History.matrix`) after each stage, on the main process.

    Raises:
        KeepLoRAError: see `Run.open`, `Run.context` and `run_stage`; what was complete is kept.
        TrainingError, EvaluationError, WriteError: a stage that failed; what was complete is kept.
    """
    with Run.open(config) as run:
        cells = from_main(run.history.missing_cells) if config.backfill else {}
        if run.history.missing_stages or cells or not from_main(run.history.has_its_adapter):
            _run_missing_stages(run, after_stage)
            if config.backfill:
                _backfill(run)
        return from_main(lambda: _write_retention(run))


def _run_missing_stages(run: Run, after_stage: AfterStage) -> None:
    _say_other_process_count(run)
    past = run.accumulated(len(run.history.manifests) - 1)
    missing = run.history.missing_stages
    for number in progress("stream", "stages", missing, total=len(run.stream.tasks) + 1, initial=missing.start):
        task = run.history.task_name(number)
        if task is None:
            logger.info("stage 0: measuring the starting model")
            measure_start(run, past)
        else:
            logger.info(f"stage {number} of {len(run.stream.tasks)}: {task}")
            past = run_stage(run, number, past)
        logger.info(stage_summary(run.history.manifests[-1]))
        from_main(lambda: after_stage(run.history.matrix()))
    if not from_main(run.history.has_its_adapter):  # somebody removed it, or the stages that it was written after
        logger.info("putting the adapter together from the stages' factors")
        run.write_adapter(past)


def _say_other_process_count(run: Run) -> None:
    """Their number changes no stage's identity, but a step takes per_device_train_batch_size samples of each."""
    manifests = run.history.manifests
    before = manifests[-1].get("num_processes", 1) if manifests else num_processes()
    if before != num_processes():
        logger.warning(
            f"the stages so far ran on {before} process(es), these on {num_processes()}: with the same "
            "settings a training step now takes another number of samples"
        )


def measure_start(run: Run, past: Factors) -> None:
    """Row 0: what the starting model can do."""
    with run.stage(0) as stage:
        stage.evaluate(stage.current_model(past))


def _backfill(run: Run) -> None:
    """Evaluates what earlier rows lack, from the factors that the stages stored."""
    for number, names in from_main(run.history.missing_cells).items():
        logger.info(f"backfilling stage {number}: {', '.join(names)}")
        stage = run.history.stage(number)
        model = attach_accumulated(run.context.model, run.accumulated(number))
        with memory_explained("evaluate", run.config, number, run.history.task_name(number)):
            scores = evaluate(run.context, model, stage, names)
        detach(model)
        cells = {name: {"data": run.history.data[name], "score": score} for name, score in scores.items()}
        from_main(partial(add_backfill, stage, cells))


def _write_retention(run: Run) -> dict[str, Any]:
    retention = run.history.retention()
    write_json(run.directory.retention, retention)
    return retention


def stage_summary(manifest: dict[str, Any]) -> str:
    """One table a stage: per tower the ranks, bases and leakage, and the row of scores."""
    lines = [f"stage {manifest['stage']} ({manifest['task'] or 'base'})"]
    for tower in ("vision", "language"):
        rows = [m for m in manifest["modules"] if m["tower"] == tower]
        if rows:
            keys = ("k_w", *(["k_g"] if any(m["k_g"] for m in rows) else []), "k_f", "k_f_added", "rank")
            columns = [f"{key} {_spread([m[key] for m in rows])}" for key in keys]
            leak = max(m["leakage"] for m in rows)
            lines.append(f"  {tower:8s} {len(rows):3d} modules  {'  '.join(columns)}  leakage <= {leak:.1e}")
    lines.append("  scores   " + "  ".join(f"{n} {score['value']:.3f}" for n, score in manifest["scores"].items()))
    lines.append("  seconds  " + "  ".join(f"{name} {s:.1f}" for name, s in manifest["timings"].items()))
    return "\n".join(lines)


def _spread(values: list[int]) -> str:
    return f"{min(values)}..{median(values):g}..{max(values)}"
