"""A run over a stream: opened, checked and locked; its stages are opened from here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from mllm_keeplora.config import ConfigError, RunConfig, config_from_dict
from mllm_keeplora.continual.general import check_form, check_unwatched, general_bases, general_samples, prompts
from mllm_keeplora.continual.history import History
from mllm_keeplora.continual.learning import read_stage_factors
from mllm_keeplora.continual.memory import memory_explained
from mllm_keeplora.continual.stage import Stage, check_ranks, open_context
from mllm_keeplora.continual.trainer import check_loggers, check_settings
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import SkippedRecord
from mllm_keeplora.data.stream import Stream, check_kind, load_stream, load_training_records
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import (
    end_processes,
    from_main,
    is_main,
    lost_processes_explained,
    num_processes,
    start_processes,
    wait_for_everyone,
)
from mllm_keeplora.distributed.sharding import shard_base, sharding_asked
from mllm_keeplora.evaluation.answer import generation_settings
from mllm_keeplora.evaluation.score import check_logins
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import Method, load_method
from mllm_keeplora.methods.context import RunContext, StageContext
from mllm_keeplora.modeling.adapters import ACCUMULATED, Factors, attach, detach
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.modeling.families import check_clip_lengths
from mllm_keeplora.modeling.loading import (
    load_base,
    load_base_processor,
    read_model_config,
    resolve_device,
    save_adapter,
)
from mllm_keeplora.modeling.saved_adapters import read_initial_adapter
from mllm_keeplora.modeling.targets import targets_of
from mllm_keeplora.probes.protected_bases import weight_basis_directory, weight_basis_files
from mllm_keeplora.resources import find
from mllm_keeplora.runs.files import ArtifactError, read_json, remove_temporaries, sha256_json, write_json
from mllm_keeplora.runs.locks import only_run
from mllm_keeplora.runs.run_directory import RunDirectory

logger = get_logger(__name__)


class Run:
    """A run that this process holds.

    Attributes:
        config, stream, method: what was asked for.
        directory: where it writes.
        history: its stages so far.
    """

    def __init__(self, config: RunConfig, stream: Stream, method: Method, history: History) -> None:
        self.config, self.stream, self.method, self.history = config, stream, method, history
        self.directory = history.directory

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig) -> Iterator["Run"]:
        """Opens, checks and locks a run; no model is loaded yet.

        Under `torchrun` or `accelerate launch` all processes call it, on a run directory, cache and data that all of
        them see. A run may be continued with another number of processes.

        Raises:
            ConfigError, StreamError: settings or data that cannot be used.
            ArtifactError: the run directory is held by another process, belongs to another config, was edited, or
                is no directory of a run.
            WriteError: the run directory cannot be written.
        """
        device = resolve_device(config.model)
        start_processes(cpu=device.type == "cpu")
        root = Path(config.data_root) if config.data_root else None
        stream = load_stream(Path(config.stream), root, cache_dir=config.cache_dir)
        method = check_before(config, stream, device)
        directory = RunDirectory(Path(config.run_dir))
        with lost_processes_explained(), _held(directory):
            history = from_main(lambda: _begin(config, stream, method, directory))
            yield cls(config, stream, method, history)
        end_processes()

    @cached_property
    def context(self) -> RunContext:
        """The model, the data and the weight bases (E1), loaded on first use.

        Raises:
            ConfigError, TargetError, RecordError: a model or records that cannot be used.
            StageError: a rank that the residual space cannot hold (E9).
            DeviceMemoryError: a base model that does not fit.
        """
        with memory_explained("load", self.config):
            return _load_context(self)

    def stage_context(self, number: int, accumulated: Factors) -> StageContext:
        """What the method works with in stage `number` (1-based), after the stages that left `accumulated`."""
        return open_context(self.context, self.method, number, accumulated)

    @contextmanager
    def stage(self, number: int) -> Iterator[Stage]:
        """Opens the next stage; when the block ends well its manifest is written and the stage is complete."""
        history, path = self.history, self.history.stage(number)
        stage = Stage(
            self.context, path, history.header(number), {**history.inputs(number), **self._learnt_early(number)}
        )
        with memory_explained("fold", self.config, number, history.task_name(number)):  # and what else is no phase
            yield stage
        history.manifests.append(stage.finish())

    def _learnt_early(self, number: int) -> dict[str, Any]:
        """Data of later tasks that stage `number` learns already, since their own stages learn nothing."""
        history, later = self.history, range(number + 1, len(self.stream.tasks) + 1)
        if number == 0 or not self.method.learns(number):
            return {}
        names = [str(history.task_name(n)) for n in later if not self.method.learns(n)]
        return {"early": {name: history.data[name] for name in names}} if names else {}

    def accumulated(self, number: int) -> Factors:
        """Factors after stage `number`, bit for bit as they were; before the first, those of `initial_adapter`."""
        initial = self.config.initial_adapter
        base = self.config.model.base_model
        factors = read_initial_adapter(self.context.model, Path(initial), base) if initial else {}
        for n in range(1, number + 1):
            scales = {m["name"]: m["scale"] for m in self.history.manifests[n]["modules"]}
            factors = self.method.fold(factors, read_stage_factors(self.history.stage(n)), scales)
        return factors

    def write_adapter(self, accumulated: Factors) -> None:
        """Writes factors as the run's adapter; the base carries nothing before or after."""
        base, processor = self.context.model, self.context.processor
        generation = generation_settings(base, processor)
        model = attach(base, ACCUMULATED, accumulated, dict.fromkeys(accumulated, 1))
        from_main(lambda: save_adapter(self.directory.adapter, model, self.config.model, processor, generation))
        detach(model)


def check_before(config: RunConfig, stream: Stream, device: torch.device) -> Method:
    """Refuses what no run can use, before one has written anything or loaded a model; `keeplora plan` asks the same.

    Args:
        config: settings.
        stream: of these; where its data are missing, nothing is said of them.
        device: that the run uses.

    Returns:
        The method.

    Raises:
        ConfigError: settings that cannot be used, or not together.
        RecordError: general samples or test questions that cannot be read.
        ArtifactError: a run directory that holds something else.
    """
    method = load_method(config)
    _check_folders(config, stream)
    _check_ours(RunDirectory(Path(config.run_dir)))
    _check_train_settings(config, stream, device)
    _check_general(config, stream, method)
    return method


def _begin(config: RunConfig, stream: Stream, method: Method, directory: RunDirectory) -> History:
    """The history, and the files that other commands read; written also for a finished run: data may have moved."""
    for folder in (directory.path, Path(config.cache_dir)):
        remove_temporaries(folder)
    history = History.read(config, stream, directory)
    _check_appended(history, method)
    write_json(directory.config, asdict(config))
    write_task_files(stream, directory.task_files)
    return history


def _check_appended(history: History, method: Method) -> None:
    """A method that learns all tasks in the first stage has not learnt one that was appended after it."""
    if len(history.manifests) < 2 or not method.learns(1):
        return
    seen = history.manifests[1]["data"]
    for number in history.missing_stages:
        if not method.learns(number) and history.task_name(number) not in seen:
            raise ArtifactError(
                f"method {history.config.method} learns all tasks in its first stage, which is complete in "
                f"{history.directory.path} and has not seen {history.task_name(number)}; use another run_dir"
            )


def _check_ours(directory: RunDirectory) -> None:
    """A folder of somebody's own is not written into, nor one where a file is in a folder's place."""
    for folder in (directory.stages, directory.task_files, directory.logs):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file, expected a folder; put the folder back, or remove the file")
    if directory.edit.exists():
        raise ArtifactError(
            f"run_dir {directory.path} holds an adapter that was made of another run's stages; name an empty or a new "
            "one"
        )
    if directory.stages.is_dir() or not directory.path.is_dir():
        return
    found = sorted(path.name for path in directory.path.iterdir() if path != directory.lock)
    if not found:
        return
    try:
        config_from_dict(read_json(directory.config), directory.config)
    except (ArtifactError, ConfigError) as error:
        raise ArtifactError(
            f"run_dir {directory.path} is no directory of a run: it holds {', '.join(found[:3])} and no "
            f"{directory.stages.name}/; name an empty or a new one"
        ) from error


def _check_folders(config: RunConfig, stream: Stream) -> None:
    """What a run writes does not lie among the files of others, nor theirs among what it writes and people delete."""
    own, cache, base = _real(config.run_dir), _real(config.cache_dir), find(config.model.base_model)
    others = {
        "the working directory": Path.cwd(),
        f"data_root {stream.data_root}": _real(stream.data_root),
        f"cache_dir {config.cache_dir}": cache,
    }
    if base.is_dir():  # not a name on the hub
        others[f"model.base_model {config.model.base_model}"] = _real(base)
    for name, path in others.items():
        if path.is_relative_to(own):
            raise ConfigError(
                f"{name} {'is' if path == own else 'lies in'} run_dir {config.run_dir}, which is to hold the files of "
                "the run alone; name another run_dir, such as runs/NAME"
            )
    for name, path in (("run_dir", own), ("cache_dir", cache)):
        file = next((part for part in path.parents if os.path.isfile(part)), None)  # noqa: PTH113 - never raises
        if file is not None:
            raise ConfigError(f"{name} {path} cannot be made: {file} is a file; name another")


def _real(path: str | Path) -> Path:
    """Links resolved, as far as they lead anywhere."""
    return Path(os.path.realpath(path))


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    """Holds the run directory, by a lock of the main process."""
    with only_run(directory.lock) if is_main() else nullcontext():
        wait_for_everyone()
        yield


def _check_train_settings(config: RunConfig, stream: Stream, device: torch.device) -> None:
    """Settings of every task, before any of them has cost anything."""
    tasks = [task.name for task in stream.tasks]
    for name in config.train_overrides:
        if name not in tasks:
            raise ConfigError(f"train_overrides names {name!r}, no task of the stream ({', '.join(tasks)})")
    check_loggers(config.report_to)
    for name in tasks:
        check_settings(config.train_for(name), device)


def _check_general(config: RunConfig, stream: Stream, method: Method) -> None:
    """What can be said of the general samples before a model is loaded."""
    if config.general.given:
        asked = prompts(config.general, Preflight(VideoReader(config.video, None)))
        check_unwatched(asked, stream)
    if config.general.budget is not None and not method.adds_updates:
        raise ConfigError(
            f"general.budget scales a stage's update, and method {config.method} trains one adapter on throughout; "
            "leave it out, or take a method that adds an update to the past"
        )


def check_kinds(stream: Stream, processor: Any, general: Sequence[Sample]) -> None:
    """Refuses what a model of that kind cannot do: choose among classes, or answer in words.

    Args:
        stream: to be learnt.
        processor: the base model's.
        general: the general prompts.

    Raises:
        StreamError: a task of the other kind.
        ConfigError: general prompts of the other kind, or a CLIP that is to be spread.
    """
    check_kind(stream, processor)
    if classifies(processor) and sharding_asked():
        raise ConfigError("FSDP spreads models that answer in words, and the base model is a CLIP; leave it out")
    check_form(general, processor)


def check_seen(config: RunConfig, records: Mapping[str, tuple[Sequence[Sample], Any]]) -> None:
    """Refuses samples that no adapted layer sees: they have no gradient, of which torch would say so in mid-stage.

    Args:
        config: settings.
        records: task -> its samples, and what else was found of it.

    Raises:
        ConfigError: the language tower is not adapted, and a sample is text alone.
    """
    if config.language.adapt:
        return
    for task, (samples, _) in records.items():
        unseen = [sample.id for sample in samples if not sample.kinds]
        if unseen:
            raise ConfigError(
                f"{task}: {len(unseen)} of {len(samples)} training records show no image or clip, {unseen[0]!r} first, "
                "and language.adapt is false, so no adapted layer sees them; leave them out, or set language.adapt: "
                "true"
            )


def _checked_records(
    config: RunConfig, stream: Stream, reader: VideoReader, general: Sequence[Sample]
) -> dict[str, tuple[list[Sample], list[SkippedRecord]]]:
    """What the stages train on, every record of the run checked."""
    tasks = [task.name for task in stream.tasks]
    processor = load_base_processor(config.model)
    check_kinds(stream, processor, general)
    preflight = Preflight.of_run(config, tasks, processor, reader)
    records = load_training_records(stream, config.on_bad_record, preflight)
    check_seen(config, records)
    for task, lines in preflight.trained.items():
        logger.info("\n  ".join([f"{task} trains on", *lines]))
    return records


def _load_context(run: Run) -> RunContext:
    config, stream, cache = run.config, run.stream, Path(run.config.cache_dir)
    if config.video.fps is not None:
        check_clip_lengths(config, read_model_config(config.model))
    reader = VideoReader(config.video, cache)
    general = run.history.prompts if config.general.given else []
    records = from_main(lambda: _checked_records(config, stream, reader, general))
    stock = [spec.lmms_eval_task for spec in stream.general if spec.lmms_eval_task is not None]
    from_main(lambda: check_logins(stock, run.directory.task_files))
    logger.info(f"loading {config.model.base_model} ({config.model.quantization})")
    model, processor = load_base(config.model)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    towers = config.towers()
    media = {kind for samples, _ in records.values() for sample in samples for kind in sample.kinds}
    targets = targets_of(model, config, media)
    bases = weight_basis_directory(cache, run.history.base_hash, config.model)
    eps_w = {name: tower.eps_w for name, tower in towers.items()}
    context = RunContext(
        config=config,
        stream=stream,
        directory=run.directory,
        records=records,
        model=model,
        processor=processor,
        reader=reader,
        targets=targets,
        weight_files=weight_basis_files(model, targets, eps_w, bases) if run.method.protects_weights else {},
        device=resolve_device(config.model),
    )
    if config.general.given:
        with memory_explained("general", config):
            context = _with_general(run, context)
    from_main(lambda: check_ranks(context))
    for number in range(1, len(stream.tasks) + 1):
        run.method.samples(context, number)  # what a late stage cannot train on is said before the first
    if sharding_asked():
        logger.info(f"spreading the language layers over {num_processes()} processes (FSDP)")
        shard_base(model)  # after the weight bases, which need whole weights
    return context


def _with_general(run: Run, context: RunContext) -> RunContext:
    """The context with the general samples (G1), and what is protected of them (G2)."""
    key = sha256_json([run.history.base_hash, run.history.general_hash])
    general = general_samples(context, run.history.prompts, key)
    asked = context.config.general.eps_g is not None
    if asked and not run.method.projects:
        logger.info(f"method {context.config.method} projects nothing: general.eps_g is of no use to it")
    protects = asked and run.method.projects
    basis = general_bases(context, [lesson.sample for lesson in general.learnt], key) if protects else None
    return replace(context, general=general, general_basis=basis)
