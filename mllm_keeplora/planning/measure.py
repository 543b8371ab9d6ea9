"""Seconds of a run's parts on the machine at hand, from a stage that is a few steps long."""

import time
from dataclasses import replace
from tempfile import TemporaryDirectory

from mllm_keeplora.config import ConfigError, RunConfig
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import measure_start, run_stage
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model
from mllm_keeplora.planning.plan import PROBING, stage_rates
from mllm_keeplora.planning.time_model import Rates
from mllm_keeplora.units import format_count

STEPS = 20


def measure(config: RunConfig) -> Rates:
    """Runs the first stage with 20 steps, one batch of each probe pass and one of every task's questions.

    The stage lies in a temporary folder. What is kept for the run itself is what `cache_dir` holds: weight bases, the
    base's replies to general prompts, frames of clips.

    Raises:
        ConfigError: a method that learns nothing in its first stage.
        KeepLoRAError: as of the run.
    """
    with TemporaryDirectory(prefix="keeplora_measure_") as folder, Run.open(_short(config, folder)) as run:
        if not run.method.learns(1):
            raise ConfigError(f"method {config.method} learns nothing in its first stage: there is nothing to measure")
        measure_start(run, past := run.accumulated(0))
        context = run.stage_context(1, past)
        probe = _probe_seconds(context, run.context.model) if run.method.probe_passes(run.config, 1) else 0.0
        run_stage(run, 1, past)
        manifest = run.history.manifests[1]
    step, _, question = stage_rates(manifest, probe_passes=0)
    passes = run.method.probe_passes(run.config, 1)
    apart = sum(manifest["timings"][phase] for phase in PROBING) - passes * len(manifest["probe_indices"]) * probe
    said = f"measured here: {format_count(manifest['counts']['steps'])} steps, a batch of each other phase"
    return Rates(said, step, probe, question, max(0.0, apart))


def _short(config: RunConfig, run_dir: str) -> RunConfig:
    """The run with a first stage that takes minutes at most; what one step or batch takes stays."""
    train = replace(config.train, max_steps=STEPS, save_steps=0)
    some = config.evaluation.batch_size
    return replace(
        config,
        run_dir=run_dir,
        train=train,
        train_overrides={},
        probe=replace(config.probe, fraction=1.0, max_samples=config.probe.batch_size),
        evaluation=replace(config.evaluation, limit=some, general_limit=some),
        backfill=False,
        report_to=[],
    )


def _probe_seconds(context: StageContext, model: Model) -> float:
    """Of a sample in a gradient pass; the passes over inputs alone take less."""
    context.sketch(model, 0)  # the first of all allocates and tunes
    started = time.perf_counter()
    context.sketch(model, 0)  # gives the gradients on the host, so the device is done
    return (time.perf_counter() - started) / len(context.probe_indices)
