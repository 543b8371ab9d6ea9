"""What a run will need, worked out before anything of it is loaded.

The base model is built without weights from its config, its layers are found as a run finds them, and
everything else is arithmetic on shapes. The plan opens the config, the processor, the headers of the weights
and (where the data are there) the records and one sample a task. It writes nothing.

Numbers are those of one process. A base that is spread over several is whole in the phases that need it whole: weight
bases and evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import get_max_memory
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig, TrainConfig, config_from_dict
from mllm_keeplora.continual.general import prompts
from mllm_keeplora.continual.history import History
from mllm_keeplora.continual.run import check_before, check_kinds
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.record_files import HubTable
from mllm_keeplora.data.records import read_records, select_evenly
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec, load_stream, named_paths
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import num_processes
from mllm_keeplora.distributed.sharding import sharding_asked
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.linalg.sketch import HELD_OUT_SHARE
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import RunContext
from mllm_keeplora.modeling.families import check_clip_lengths
from mllm_keeplora.modeling.loading import known_base_hash, resolve_device
from mllm_keeplora.modeling.targets import Target, left_out, targets_of
from mllm_keeplora.planning import skeleton
from mllm_keeplora.planning.memory_model import MemoryModel, optimizer_state
from mllm_keeplora.planning.time_model import Rates
from mllm_keeplora.probes.protected_bases import weight_basis_directory, weight_basis_file, weight_basis_size
from mllm_keeplora.resources import find, is_there
from mllm_keeplora.runs.files import read_json
from mllm_keeplora.runs.run_directory import RunDirectory
from mllm_keeplora.units import GB

# A run is refused before it begins where its estimated peak is more than so many times the free memory. Up to there it
# may fit: a phase has been measured to take 1.68 times less than its estimate (docs/plan.md).
IMPOSSIBLE = 2.0
# The column of the plan that a phase of a run belongs to.
_COLUMNS = {"load": "weight bases", "train": "train", **dict.fromkeys(("evaluate", "general", "recall"), "evaluation")}
# Share of a device's free memory that the estimate leaves alone: CUDA context, fragmentation, and its error.
HEADROOM = 0.1
logger = get_logger(__name__)

PROBING = ("probe", "protect", "rehearse")  # the timed phases of a stage that hold its probe passes
# Settings that an earlier run shares with this one where its seconds are used.
_pace = attrgetter(
    *("method", "method_options", "probe.refine"),
    *("model.quantization", "model.compute_dtype", "model.attn_implementation"),
    *("train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
    "train.activation_checkpointing",
)
# The setting that decides how many samples a phase holds at once.
_BATCH_SIZES = {
    "probe": "probe.batch_size",
    "train": "train.per_device_train_batch_size",
    "evaluation": "evaluation.batch_size",
}


class PlanError(KeepLoRAError, RuntimeError):
    """A run that does not fit the device's memory; the message names settings that do."""


class Work(NamedTuple):
    """What a stage goes through; None where the data are not there."""

    task: str
    samples: int | None  # for training
    probe_samples: int | None
    steps: int | None
    probe_passes: int
    questions: int | None  # of the test file


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    weights: str  # what the headers of the base's weights say
    memory: MemoryModel  # bytes per phase, and the settings
    excluded: Mapping[str, int]  # why linear layers are not adapted -> their number
    work: Sequence[Work]
    general: Mapping[str, int | None]  # general benchmark -> its questions, None where not known
    cached_bases: Mapping[str, int]  # module name -> k of the weight bases that are cached already
    rates: Rates | None  # measured
    device: str  # what the memory was compared with
    available: int  # its free bytes

    @property
    def questions(self) -> list[int | None]:
        """Of every task and general benchmark; None where not known."""
        return [*(work.questions for work in self.work), *self.general.values()]

    def seconds(self, rates: Rates) -> float | None:
        """Of all stages and evaluations; None where a number is not known."""
        if None in self.questions or any(None in work for work in self.work):
            return None
        rows, asked = len(self.work) + 1, sum(n or 0 for n in self.questions)
        steps = sum(work.steps or 0 for work in self.work)
        probed = sum(work.probe_passes * (work.probe_samples or 0) for work in self.work)
        once = len(self.work) * rates.stage + rates.weight_bases
        return steps * rates.step + probed * rates.probe + rows * asked * rates.question + once

    def disk(self) -> dict[str, float]:
        """What the run's files and its cache hold at most -> bytes."""
        found: dict[str, float] = {}
        memory, stages = self.memory, len(self.work)
        video, settings = memory.config.video, memory.train_settings()
        if memory.method.protects_weights:
            k = {t.name: self.cached_bases.get(t.name, memory.most_k(t)) for t in memory.targets}
            found["weight bases"] = sum(4 * t.in_features * k[t.name] for t in memory.targets)
        if memory.method.protects_features:
            q = {t.name: math.ceil((1 - HELD_OUT_SHARE) * memory.columns(t)) for t in memory.targets}
            found["feature bases"] = stages * sum(4 * t.in_features * q[t.name] for t in memory.targets)
        found["adapter"] = 4 * memory.factors() * (2 * stages - 1)
        found["stages' factors"] = 4 * (memory.factors() + memory.factors("A")) * stages
        if any(train.save_steps for train in settings):
            state = max(4 + optimizer_state(train.optim) for train in settings)
            found["checkpoints"] = 3 * state * memory.factors(memory.method.trains)
        if memory.shape.media == "video" and video.cache_gb:
            found["frames"] = video.cache_gb * GB
        return found


def make_plan(config: RunConfig, memory_gb: float | None = None) -> Plan:
    """Works out a run's plan.

    Args:
        config: settings.
        memory_gb: memory of a card that is not here; None looks at the device that the run would use.

    Raises:
        ConfigError, TargetError, StreamError, RecordError: what the run itself would refuse.
    """
    root = Path(config.data_root) if config.data_root else None
    stream = load_stream(Path(config.stream), root, check_files=False, cache_dir=config.cache_dir)
    model, processor = skeleton.build_skeleton(config.model), skeleton.build_processor(config.model)
    check_clip_lengths(config, model.config)
    asked = _general_prompts(config)
    check_kinds(stream, processor, asked)
    records = read_training(stream)
    if records:
        shape = skeleton.longest_shape(processor, model, config, records)
    else:
        named = (stream.classes(task) for task in stream.tasks if "names" in (task.classes or ()))
        shape = skeleton.assumed_shape(processor, model, config, [classes for classes in named if classes is not None])
    shape = shape._replace(prompts_beside=_prompts_beside(config, asked, records))
    media = {kind for samples in records.values() for sample in samples for kind in sample.kinds}
    targets = targets_of(model, config, media or {shape.media or "image"})
    run = RunContext(
        config=config,
        stream=stream,
        directory=RunDirectory(Path(config.run_dir)),
        records={task: (samples, []) for task, samples in records.items()},
        model=model,
        processor=processor,
        reader=VideoReader(config.video, None),
        targets=targets,
        weight_files={},
        device=torch.device("meta"),
    )
    device, available, on_cpu = _device(config.model, memory_gb)
    new_tokens = max(spec.max_new_tokens for spec in stream.specs)
    base_hash = _known_hash(config)
    spread = num_processes() if sharding_asked() else 1
    return Plan(
        weights=skeleton.describe_weights(config.model, model),
        memory=MemoryModel(model, targets, config, shape, len(stream.tasks), new_tokens, on_cpu, spread),
        excluded=left_out(model, targets, config),
        work=[_work(run, number) for number in range(1, len(stream.tasks) + 1)],
        general={spec.name: _questions(stream, spec, config) for spec in stream.general},
        cached_bases=cached_bases(config, targets, base_hash),
        rates=measured_rates(config, base_hash),
        device=device,
        available=available,
    )


def check_run(config: RunConfig, memory_gb: float | None = None) -> None:
    """Refuses what the run itself would refuse before it loads a model, as far as data and weights are there.

    A run directory with stages is compared with the settings where an earlier run has hashed the base.

    Args:
        config: settings.
        memory_gb: memory of a card that is not here; None takes the device that the run would use.

    Raises:
        ConfigError, StreamError, RecordError, ArtifactError: as `Run.open`.
    """
    root = Path(config.data_root) if config.data_root else None
    stream = load_stream(Path(config.stream), root, check_files=False, cache_dir=config.cache_dir)
    device = torch.device("cpu") if memory_gb is not None else _own_device(config.model)
    general = config.general
    if general.given and general.samples != "builtin" and not is_there(find(general.samples)):
        general = replace(general, samples="builtin", media_root=None)  # the file may yet come, as other data may
    check_before(replace(config, general=general), stream, device)
    directory = RunDirectory(Path(config.run_dir))
    there = all(is_there(path) for spec in stream.specs for path in named_paths(stream, spec))
    if there and directory.stages.is_dir() and _known_hash(config) is not None:
        History.read(config, stream, directory)


def _general_prompts(config: RunConfig) -> list[Sample]:
    """The general prompts; none where their file is not there yet."""
    general = config.general
    there = general.samples == "builtin" or (general.given and is_there(find(general.samples)))
    return prompts(general) if there else []


def _prompts_beside(config: RunConfig, asked: Sequence[Sample], records: Mapping[str, list[Sample]]) -> int:
    """Prompts of a CLIP that pass beside those of a task in training: at most all texts of all pictures."""
    if not config.general.share:
        return 0
    past = [sample for samples in records.values() for sample in samples[:1]] if config.general.rehearsed else []
    lists = dict.fromkeys(sample.classes for sample in (*asked, *past) if sample.classes is not None)
    return sum(len(classes.names) for classes in lists)


def read_training(stream: Stream) -> dict[str, list[Sample]]:
    """The records of the tasks whose training files are there; images and clips are not opened."""
    found = {}
    for task in stream.tasks:
        file = stream.train_file(task)
        if isinstance(file, HubTable) or file.exists():
            samples, _ = read_records(
                file,
                stream.media_root(task),
                prompt_suffix=task.prompt_suffix,
                allow_text_only=task.allow_text_only,
                extracted=stream.extracted,
                classes=stream.classes(task),
            )
            found[task.name] = list(samples.values())
    return {task: samples for task, samples in found.items() if samples}


def _work(run: RunContext, number: int) -> Work:
    """What stage `number` (1-based) goes through, in its method's choice."""
    config, task, method = run.config, run.stream.tasks[number - 1], load_method(run.config)
    passes, questions = method.probe_passes(config, number), _questions(run.stream, task, config)
    train = method.train_config(run, config.train_for(task.name))
    if not method.learns(number):
        return Work(task.name, 0, 0, 0, 0, questions)
    try:
        samples = len(method.samples(run, number))
    except KeyError:  # `run.records` lacks a task whose data are not there
        steps = train.max_steps if train.max_steps > 0 else None
        return Work(task.name, None, None, steps, passes, questions)
    probed = len(select_evenly(samples, config.probe.fraction, config.probe.max_samples))
    return Work(task.name, samples, probed, optimizer_steps(train, samples), passes, questions)


def optimizer_steps(train: TrainConfig, samples: int) -> int:
    """Steps of one stage on one process, as the HF Trainer counts them."""
    if train.max_steps > 0:
        return train.max_steps
    batches = -(-samples // train.per_device_train_batch_size)
    return math.ceil(train.num_train_epochs * -(-batches // train.gradient_accumulation_steps))


def _questions(stream: Stream, spec: TaskSpec | GeneralSpec, config: RunConfig) -> int | None:
    """Questions of a task or benchmark; None for a stock benchmark and where the file is not there."""
    test, answers = stream.test_file(spec), stream.answers_file(spec)
    if test is None or not all(file.exists() for file in (test, answers) if isinstance(file, Path)):
        return None
    samples, _ = read_records(
        test,
        stream.test_media_root(spec),
        answers=answers,
        allow_text_only=spec.allow_text_only,
        extracted=stream.extracted,
        classes=stream.classes(spec),
    )
    count = sum(len(sample.questions) for sample in samples.values())
    limit = config.evaluation.limits()["task" if isinstance(spec, TaskSpec) else "general"]
    return min(count, limit or count)


def measured_rates(config: RunConfig, base_hash: str | None) -> Rates | None:
    """Medians over the complete stages of the newest run beside this one's run_dir with the same base,
    method, precision and batches; None where there is none."""
    method = load_method(config)
    runs = sorted(Path(config.run_dir).parent.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
    for run in runs:
        files = [stage.manifest for stage in RunDirectory(run).found_stages()]
        manifests = [read_json(file) for file in files if file.exists()]
        alike = [m for m in manifests if _comparable(m, config, base_hash)]
        rates = [stage_rates(m, method.probe_passes(config, m["stage"])) for m in alike]
        if rates:
            # Decompositions are in the seconds of a probe sample.
            return Rates(f"measured by {run}", *(median(column) for column in zip(*rates, strict=True)))
    return None


def _comparable(manifest: Mapping[str, Any], config: RunConfig, base_hash: str | None) -> bool:
    """Whether a stage learnt something on the same base at the same pace."""
    try:
        same_pace = _pace(config_from_dict(manifest["config"], Path(config.run_dir))) == _pace(config)
    except ConfigError:  # of another version
        return False
    timed = manifest["timings"].keys() >= {*PROBING, "train", "evaluate"}
    learnt = manifest["stage"] > 0 and manifest["counts"]["steps"] > 0
    return same_pace and timed and learnt and manifest["base_model"]["hash"] == base_hash


def stage_rates(manifest: Mapping[str, Any], probe_passes: int) -> tuple[float, float, float]:
    """Seconds of a step, of a sample in a probe pass (0 without passes) and of a question in a stage."""
    timings, probed = manifest["timings"], probe_passes * len(manifest["probe_indices"])
    questions = sum(score["n"] for score in manifest["scores"].values())
    return (
        timings["train"] / manifest["counts"]["steps"],
        sum(timings[phase] for phase in PROBING) / probed if probed else 0.0,
        timings["evaluate"] / max(1, questions),
    )


def cached_bases(config: RunConfig, targets: Sequence[Target], base_hash: str | None) -> dict[str, int]:
    """Module name -> k of the weight bases that an earlier run on the same base has left in the cache."""
    if base_hash is None or not load_method(config).protects_weights:
        return {}
    directory = weight_basis_directory(Path(config.cache_dir), base_hash, config.model)
    files = {t.name: weight_basis_file(directory, t.name, config.towers()[t.tower].eps_w) for t in targets}
    sizes = {name: weight_basis_size(file) for name, file in files.items()}
    return {name: k for name, k in sizes.items() if k is not None}


def _known_hash(config: RunConfig) -> str | None:
    """What an earlier run with this cache remembers of the base; None where there was none."""
    base, directory = config.model.base_model, find(config.model.base_model)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(base, revision=config.model.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return known_base_hash(directory, Path(config.cache_dir))


def _device(config: ModelConfig, memory_gb: float | None) -> tuple[str, int, bool]:
    """(what is planned for, its free bytes, whether it is the host's memory)."""
    if memory_gb is not None:
        return f"a device of {memory_gb:g} GB", int(memory_gb * GB), config.device == "cpu"
    device = _own_device(config)
    if device.type == "cpu":
        return "free memory of this machine (CPU)", int(get_max_memory()["cpu"]), True
    name = torch.cuda.get_device_name(device)
    return f"free memory of {name}", int(torch.cuda.mem_get_info(device)[0]), False


def _own_device(config: ModelConfig) -> torch.device:
    try:
        return resolve_device(config)
    except ConfigError as error:
        raise ConfigError(f"{error}. --memory_gb GB plans for a card that is not here") from error


def needed(memory: MemoryModel) -> int:
    """Bytes that a device has to have free: the largest phase and the headroom."""
    return math.ceil(memory.peak() / (1 - HEADROOM))


def check_fits(plan: Plan) -> None:
    """Compares the peak with the device.

    Raises:
        PlanError: it does not fit; names the settings that would make it fit, found by planning with them.
    """
    need = needed(plan.memory)
    if need <= plan.available:
        return
    text = (
        f"the run needs {need / GB:.2f} GB ({HEADROOM:.0%} of it headroom), {plan.available / GB:.2f} GB are "
        f"there ({plan.device})"
    )
    found = find_fitting(plan.memory, plan.available)
    if found is None:
        phase, items = _largest_phase(plan.memory)
        base = sum(size for item, size in items.items() if item.startswith("base"))
        raise PlanError(
            f"{text}. No smaller batch, rank or choice of towers makes it fit: in the phase {phase} the base "
            f"alone takes {base / GB:.2f} GB. Take a larger device or a smaller base model"
        )
    fitting, changes = found
    changed = ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
    raise PlanError(f"{text}. It fits, with {needed(fitting) / GB:.2f} GB, under {changed}")


def warn_of_memory(config: RunConfig) -> None:
    """Compares a run's peak with its device before it begins: what is only estimated stops no run that may fit.

    A plan that cannot be made says nothing here: the run refuses the same settings in its own words.

    Raises:
        PlanError: the peak is more than `IMPOSSIBLE` times what is free.
    """
    try:
        plan = make_plan(config)
    except KeepLoRAError:
        return
    try:
        check_fits(plan)
    except PlanError as error:
        if plan.memory.peak() > IMPOSSIBLE * plan.available:
            raise PlanError(f"{error}. The run does not begin: it needs over {IMPOSSIBLE:g} times as much") from error
        logger.warning(f"by estimate {error}. The run begins all the same, and may run out of memory")


def smaller_figures(config: RunConfig, phase: str, changes: Mapping[str, Any]) -> str:
    """What the plan says of a phase that ran out of memory, and of it with some settings changed; else nothing."""
    try:
        memory = make_plan(config).memory
    except KeepLoRAError:
        return ""
    changed = replace(memory, config=_with(config, changes))
    now, then = (sum(m.phases()[_COLUMNS.get(phase, "probe")].values()) / GB for m in (memory, changed))
    return f"By the plan the phase takes {now:.2f} GB" + (f", {then:.2f} GB with the first of these" if changes else "")


def find_fitting(memory: MemoryModel, available: int) -> tuple[MemoryModel, dict[str, Any]] | None:
    """Changes settings one after the other, those that touch results least first, until the run fits.

    Returns:
        The memory then, and setting -> new value; None where no setting is left to change.
    """
    media = {kind for target in memory.targets for kind in target.media}
    changes: dict[str, Any] = {}
    while needed(memory) > available:
        smaller = _smaller(memory.config, _largest_phase(memory)[0])
        if not smaller:
            return None
        config = _with(memory.config, smaller)
        memory = replace(memory, config=config, targets=targets_of(memory.model, config, media))
        changes |= smaller
    return memory, changes


def _largest_phase(memory: MemoryModel) -> tuple[str, dict[str, int]]:
    return max(memory.phases().items(), key=lambda phase: sum(phase[1].values()))


def _smaller(config: RunConfig, phase: str) -> dict[str, Any]:
    """The next change that lowers what `phase` needs, setting -> value; empty where none is left."""
    if config.model.quantization == "none":
        return {"model.quantization": "nf4"}
    if phase in ("probe", "train") and not config.train.activation_checkpointing:
        return {"train.activation_checkpointing": True}
    if phase == "weight bases":
        return {}
    size = attrgetter(_BATCH_SIZES[phase])(config)
    if size > 1:
        half, accumulation = -(-size // 2), config.train.gradient_accumulation_steps
        passes = -(-accumulation * size // half)  # an optimizer step takes at least as many samples as before
        steps = {"train.gradient_accumulation_steps": passes} if phase == "train" else {}
        return {_BATCH_SIZES[phase]: half, **steps}
    largest = max(tower.rank for tower in config.towers().values())
    if largest > 4:
        ranks = {"language.rank": config.language.rank, "vision.rank": config.vision.rank}
        return {name: largest // 2 for name, rank in ranks.items() if rank > largest // 2}
    both = config.vision.adapt and config.language.adapt
    return {"vision.adapt": False} if both and config.projector == "frozen" else {}


def _with(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The settings with some of them changed, by their names on the command line."""
    for name, value in changes.items():
        group, key = name.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{key: value})})
    return config
