"""What a run will need, worked out before anything of it is loaded: `--plan` on a recipe's command line.

The base model is built without weights from its config, its layers are found by the same `find_targets`, and
everything else is arithmetic on shapes. The plan opens the config, the processor, the headers of the weights
and (where the data are there) the records and one sample a task. It writes nothing.

Numbers are those of one process.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate.big_modeling import init_empty_weights
from accelerate.utils import get_max_memory
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's, without network
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig, TrainConfig
from mllm_keeplora.data.collator import ChatCollator, process_media, render_prompt
from mllm_keeplora.data.records import Sample, read_records, select_evenly
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec, load_stream
from mllm_keeplora.data.video.reader import Clip, VideoReader
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.linalg.sketch import HELD_OUT_SHARE
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.modeling.families import LANGUAGE_LAYERS, Media, family_of
from mllm_keeplora.modeling.linear4bit import is_linear
from mllm_keeplora.modeling.loading import (
    DTYPES,
    check_revision,
    known_base_hash,
    load_processor,
    resolve_device,
)
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.planning.memory_model import (
    PHASES,
    MemoryModel,
    SampleShape,
    most_columns,
    optimizer_state,
)
from mllm_keeplora.runs.files import read_json

GB = 1e9
# Share of a device's free memory that the estimate leaves alone: CUDA context, fragmentation, and its error.
HEADROOM = 0.1
# Assumed where the data are not there: tokens of question and answer, and what is shown.
ASSUMED_TEXT_TOKENS = 256
ASSUMED_IMAGE = (480, 640)  # height, width
RECORDS_SAMPLED = 64  # per task, to find a long one


class PlanError(KeepLoRAError, RuntimeError):
    """A run that does not fit the device's memory; the message names settings that do."""


# --- the model, without weights ---


def _fetched(config: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained."""
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision or "main"}


def build_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The base model from its config alone, parameters on the meta device.

    Raises:
        ConfigError: the config is neither in a directory here nor in the hub's cache nor on the hub; a
            revision of a directory.
        TargetError: an unknown model family.
    """
    check_revision(config)
    try:
        model_config = AutoConfig.from_pretrained(config.base_model, **_fetched(config))
        family_of(model_config)
        return skeleton_of(model_config, config)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, KeepLoRAError):
            raise
        raise ConfigError(
            f"--plan needs the config of {config.base_model!r}, which is neither a directory here nor in the "
            f"hub's cache nor to be fetched ({_first_line(error)}). Connect once, or put its config.json and "
            "processor files (weights are not needed) in a directory and pass --model.base_model DIRECTORY"
        ) from error


def skeleton_of(model_config: Any, config: ModelConfig) -> PreTrainedModel:
    """A model of that config without weights; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForImageTextToText.from_config(
            model_config,
            dtype=DTYPES[config.compute_dtype],
            attn_implementation="eager" if config.attn_implementation == "eager" else "sdpa",
            trust_remote_code=config.trust_remote_code,
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe_weights(config: ModelConfig, model: PreTrainedModel) -> str:
    """What the headers of the weights say, or where that could not be read the config's parameter count."""
    counted = sum(p.numel() for p in model.parameters())
    by_config = f"{_count(counted)} parameters by the config"
    try:
        found = _read_headers(config)
    except (HTTPError, OSError, NotASafetensorsRepoError, SafetensorError) as error:
        return f"{by_config}; headers of its weights not read ({_first_line(error)})"
    if not found:
        return f"{by_config}; no *.safetensors in the directory yet"
    numbers, size, files = (sum(column) for column in zip(*found, strict=True))
    text = f"{_count(numbers)} parameters, {size / GB:.3g} GB in {files} safetensors file(s)"
    # Tied weights are stored once or twice; anything beyond that is another model than the config's.
    return text if abs(numbers - counted) <= 0.1 * counted else f"{text}, but {by_config}: they do not belong"


def _read_headers(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(parameters, bytes, 1) of each file of weights."""
    directory = Path(config.base_model)
    if directory.is_dir():
        return [(*_read_header(file), 1) for file in sorted(directory.glob("*.safetensors"))]
    metadata = get_safetensors_metadata(config.base_model, revision=config.revision)
    tensors = [list(file.tensors.values()) for file in metadata.files_metadata.values()]
    return [
        (sum(t.parameter_count for t in file), max(t.data_offsets[1] for t in file), 1) for file in tensors
    ]


def _read_header(file: Path) -> tuple[int, int]:
    with safe_open(file, framework="pt") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes), file.stat().st_size


def left_out(model: PreTrainedModel, targets: Sequence[Target], config: RunConfig) -> dict[str, int]:
    """Why linear layers are not adapted -> their number."""
    family, adapted = family_of(model.config), {target.name for target in targets}
    towers = {layers: "vision" for layers in family.vision_layers.values()} | {LANGUAGE_LAYERS: "language"}
    reached = {t.name.rsplit(f".{t.depth}.", 1)[0] for t in targets}
    depth = {layers: family.used_vision_layers(model.config) for layers in family.vision_layers.values()}
    reasons: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_linear(module) and name not in adapted:
            reason = _reason(name, towers, reached, depth, family.projectors, config)
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def _reason(
    name: str,
    towers: Mapping[str, str],
    reached: set[str],
    depth: Mapping[str, int],
    projectors: Sequence[str],
    config: RunConfig,
) -> str:
    if any(name.startswith(f"{projector}.") for projector in projectors):
        return "projector (projector: frozen)"
    layers = next((layers for layers in towers if name.startswith(f"{layers}.")), None)
    if layers is None:
        return "outside the towers' layers (lm_head, poolers, embeddings of patches)"
    tower = towers[layers]
    if not getattr(config, tower).adapt:
        return f"{tower} tower ({tower}.adapt: false)"
    if int(name.removeprefix(f"{layers}.").split(".")[0]) >= depth.get(layers, math.inf):
        return "vision layers behind the one that features are read from (no gradient)"
    if layers not in reached:
        return f"{layers}: the samples show nothing that it sees"
    return f"{tower}: not among {tower}.targets"


# --- the longest sample ---


def sample_shape(
    inputs: Mapping[str, Any], model_config: Any, media: Media | None, source: str
) -> SampleShape:
    """The shape of one sample from its model inputs."""
    rows = pixels = 0
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs:
            values = torch.as_tensor(inputs[key])
            rows += _vision_rows(values, model_config.vision_config)
            pixels += values.numel()
    return SampleShape(int(inputs["input_ids"].shape[-1]), rows, pixels, media, source)


def _vision_rows(pixels: torch.Tensor, vision: Any) -> int:
    if pixels.ndim == 2:  # Qwen: patches already, [rows, values of one]
        return pixels.shape[0]
    pictures = pixels.shape[:-3].numel()
    return pictures * (pixels.shape[-2] // vision.patch_size * (pixels.shape[-1] // vision.patch_size) + 1)


def assumed_shape(processor: Any, model: PreTrainedModel, config: RunConfig) -> SampleShape:
    """One synthetic image or clip through the processor, and an assumed number of tokens beside it."""
    media: Media = "video" if "video" in family_of(model.config).vision_layers else "image"
    height, width = ASSUMED_IMAGE
    images = [Image.new("RGB", (width, height))] if media == "image" else []
    clips = [] if media == "image" else [_grey_clip(config.video.frames, height, width)]
    inputs = process_media(processor, images, clips, [render_prompt(processor, "", media)])
    shown = f"{width}x{height} image" if media == "image" else f"clip of {config.video.frames} frames"
    source = f"assumed: a {shown} and {ASSUMED_TEXT_TOKENS} tokens of text; the data are not there"
    shape = sample_shape(inputs, model.config, media, source)
    return replace(shape, tokens=shape.tokens + ASSUMED_TEXT_TOKENS)


def _grey_clip(frames: int, height: int, width: int) -> Clip:
    return Clip(np.zeros((frames, height, width, 3), np.uint8), tuple(range(frames)), 8.0, frames)


def longest_shape(
    processor: Any, model: PreTrainedModel, config: RunConfig, records: Mapping[str, list[Sample]]
) -> SampleShape:
    """The longest of the tasks' long samples: per task the longest text of a sample of records, collated."""
    collator = ChatCollator(processor, None, VideoReader(config.video, None))
    shapes = []
    for task, samples in records.items():
        drawn = [samples[i] for i in select_evenly(len(samples), 1.0, RECORDS_SAMPLED)]
        sample = max(drawn, key=lambda s: sum(len(turn.question) + len(turn.answer) for turn in s.turns))
        source = f"{task}, record {sample.id!r}: the longest text of {RECORDS_SAMPLED} records a task"
        shapes.append(sample_shape(collator([sample]), model.config, sample.media, source))
    return max(shapes, key=lambda shape: (shape.tokens, shape.vision_tokens))


# --- what the run does ---


@dataclass(frozen=True)
class Work:
    """Passes over one task's data.

    Attributes:
        task: its name.
        samples: for training; None where the data are not there.
        probe_samples, steps: None likewise.
        probe_passes: per stage.
        questions: of its test file; None likewise.
    """

    task: str
    samples: int | None
    probe_samples: int | None
    steps: int | None
    probe_passes: int
    questions: int | None


def work_of(stream: Stream, config: RunConfig, records: Mapping[str, list[Sample]]) -> list[Work]:
    """What every stage goes through."""
    passes = load_method(config).probe_passes(config)
    found = []
    for task in stream.tasks:
        samples = len(records[task.name]) if task.name in records else None
        probed = steps = None
        if samples is not None:
            probe = config.probe
            probed = len(select_evenly(samples, probe.fraction, probe.max_samples))
        if samples is not None or config.train_for(task.name).max_steps > 0:
            steps = optimizer_steps(config.train_for(task.name), samples or 0)
        found.append(Work(task.name, samples, probed, steps, passes, _questions(stream, task, config)))
    return found


def optimizer_steps(train: TrainConfig, samples: int) -> int:
    """Steps of one stage on one process, as the HF Trainer counts them."""
    if train.max_steps > 0:
        return train.max_steps
    batches = -(-samples // train.per_device_train_batch_size)
    return math.ceil(train.num_train_epochs * -(-batches // train.gradient_accumulation_steps))


def _questions(stream: Stream, spec: TaskSpec | GeneralSpec, config: RunConfig) -> int | None:
    """Questions of a task or benchmark; None for a stock benchmark and where the file is not there."""
    test, answers = stream.test_file(spec), stream.answers_file(spec)
    if test is None or not all(file.exists() for file in (test, answers) if file is not None):
        return None
    samples, _ = read_records(
        test, stream.test_media_root(spec), answers=answers, allow_text_only=spec.allow_text_only
    )
    count = sum(len(sample.turns) for sample in samples.values())
    limit = config.evaluation.limits()["task" if isinstance(spec, TaskSpec) else "general"]
    return min(count, limit or count)


def read_training(stream: Stream) -> dict[str, list[Sample]]:
    """The records of the tasks whose training files are there; images and clips are not opened."""
    found = {}
    for task in stream.tasks:
        if stream.train_file(task).exists():
            samples, _ = read_records(
                stream.train_file(task),
                stream.media_root(task),
                prompt_suffix=task.prompt_suffix,
                allow_text_only=task.allow_text_only,
            )
            if samples:
                found[task.name] = list(samples.values())
    return found


@dataclass(frozen=True)
class Rates:
    """Seconds measured in an earlier run.

    Attributes:
        run: its directory.
        step: seconds of an optimizer step.
        probe: of a sample in a probe pass, the decompositions after it included.
        question: of an evaluated question.
    """

    run: Path
    step: float
    probe: float
    question: float


def measured_rates(config: RunConfig, base_hash: str | None) -> Rates | None:
    """Medians over the finished stages of the newest run beside this one's run_dir with the same base,
    precision and batches; None where there is none."""
    manifests: dict[Path, list[dict[str, Any]]] = {}
    for path in Path(config.run_dir).parent.glob("*/stages/*/manifest.json"):
        manifest = read_json(path)
        if base_hash is not None and manifest["stage"] and _comparable(manifest, config, base_hash):
            manifests.setdefault(path.parents[2], []).append(manifest)
    if not manifests:
        return None
    run = max(manifests, key=lambda directory: directory.stat().st_mtime)
    rates = [_stage_rates(manifest) for manifest in manifests[run]]
    return Rates(run, *(median(column) for column in zip(*rates, strict=True)))


def _comparable(manifest: Mapping[str, Any], config: RunConfig, base_hash: str) -> bool:
    train, model = manifest["config"]["train"], manifest["config"]["model"]
    same_train = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing")
    same_model = ("quantization", "compute_dtype", "attn_implementation")
    return (
        manifest["base_model"]["hash"] == base_hash
        and manifest["method"] == config.method
        and manifest["counts"]["steps"] > 0
        and all(train[key] == getattr(config.train, key) for key in same_train)
        and all(model[key] == getattr(config.model, key) for key in same_model)
    )


def _stage_rates(manifest: Mapping[str, Any]) -> tuple[float, float, float]:
    timings, probed = manifest["timings"], 2 * len(manifest["probe_indices"])
    questions = sum(score["n"] for score in manifest["scores"].values())
    return (
        timings["train"] / manifest["counts"]["steps"],
        (timings["probe"] + timings["feature_basis"]) / max(1, probed),
        timings["evaluation"] / max(1, questions),
    )


# --- the plan ---


@dataclass(frozen=True)
class Plan:
    """Everything that `format_plan` prints.

    Attributes:
        config, stream: what was asked for.
        weights: what the headers of the base's weights say.
        memory: bytes per phase.
        excluded: why linear layers are not adapted -> their number.
        work: per task.
        general: name -> questions of the general benchmarks, None where not known.
        cached_bases: bytes of the weight bases that are cached already, and the number of modules they cover.
        rates: of an earlier run.
        device: what the memory was compared with.
        available: its free bytes.
    """

    config: RunConfig
    stream: Stream
    weights: str
    memory: MemoryModel
    excluded: Mapping[str, int]
    work: Sequence[Work]
    general: Mapping[str, int | None]
    cached_bases: Mapping[str, int]
    rates: Rates | None
    device: str
    available: int


def make_plan(config: RunConfig, memory_gb: float | None = None) -> Plan:
    """Works out a run's plan.

    Args:
        config: settings.
        memory_gb: memory of a card that is not here; None looks at the device that the run would use.

    Raises:
        ConfigError, TargetError, StreamError, RecordError: what the run itself would refuse.
    """
    stream = load_stream(
        Path(config.stream), Path(config.data_root) if config.data_root else None, check_files=False
    )
    model = build_skeleton(config.model)
    records = read_training(stream)
    processor = _load_processor(config.model)
    if records:
        shape = longest_shape(processor, model, config, records)
    else:
        shape = assumed_shape(processor, model, config)
    media = {s.media for samples in records.values() for s in samples if s.media is not None}
    targets = targets_of(model, config, media or {shape.media or "image"})
    device, available, on_cpu = _device(config.model, memory_gb)
    new_tokens = max(spec.max_new_tokens for spec in stream.specs)
    base_hash = _known_hash(config)
    return Plan(
        config,
        stream,
        describe_weights(config.model, model),
        MemoryModel(model, targets, config, shape, len(stream.tasks), new_tokens, on_cpu),
        left_out(model, targets, config),
        work_of(stream, config, records),
        {spec.name: _questions(stream, spec, config) for spec in stream.general},
        cached_bases(config, targets, base_hash),
        measured_rates(config, base_hash),
        device,
        available,
    )


def _known_hash(config: RunConfig) -> str | None:
    """What an earlier run with this cache remembers of the base; None where there was none."""
    base, revision = config.model.base_model, config.model.revision
    directory = Path(base)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(base, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return known_base_hash(directory, Path(config.cache_dir))


def targets_of(model: PreTrainedModel, config: RunConfig, media: set[Media]) -> list[Target]:
    """The adapted layers, as a run finds them."""
    patterns = {name: tower.targets for name, tower in config.towers().items()}
    return find_targets(model, patterns, media=media, protect_projector=config.projector == "protected")


def _load_processor(config: ModelConfig) -> Any:
    try:
        return load_processor(config, config.base_model, **_fetched(config))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--plan counts tokens with the processor of {config.base_model!r}, which cannot be loaded "
            f"({_first_line(error)}); connect once, or pass --model.base_model DIRECTORY with its files"
        ) from error


def _device(config: ModelConfig, memory_gb: float | None) -> tuple[str, int, bool]:
    """(what is planned for, its free bytes, whether it is the host's memory)."""
    if memory_gb is not None:
        return f"a device of {memory_gb:g} GB", int(memory_gb * GB), config.device == "cpu"
    device = resolve_device(config)
    if device.type == "cpu":
        return "free memory of this machine (CPU)", int(get_max_memory()["cpu"]), True
    name = torch.cuda.get_device_name(device)
    return f"free memory of {name}", int(torch.cuda.mem_get_info(device)[0]), False


def cached_bases(config: RunConfig, targets: Sequence[Target], base_hash: str | None) -> dict[str, int]:
    """Module name -> k of the weight bases that an earlier run on the same base has left in the cache."""
    if base_hash is None or not load_method(config).protects_weights:
        return {}
    loaded = f"{config.model.quantization}-{config.model.compute_dtype}"
    directory = Path(config.cache_dir) / "weight_bases" / f"{base_hash[:16]}-{loaded}"
    towers, found = config.towers(), {}
    for t in targets:
        file = directory / f"{t.name}-eps{towers[t.tower].eps_w!r}.safetensors"
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                found[t.name] = int(opened.get_slice("basis").get_shape()[1])
    return found


def needed(memory: MemoryModel) -> int:
    """Bytes that a device has to have free: the largest phase and the headroom."""
    return math.ceil(memory.peak() / (1 - HEADROOM))


def check_fits(plan: Plan) -> None:
    """Compares the peak with the device.

    Raises:
        PlanError: it does not fit; names the settings that would make it fit, found by planning with them.
    """
    if needed(plan.memory) <= plan.available:
        return
    text = (
        f"the run needs {needed(plan.memory) / GB:.2f} GB ({HEADROOM:.0%} of it headroom), "
        f"{plan.available / GB:.2f} GB are there ({plan.device})"
    )
    fitting = find_fitting(plan.memory, plan.available)
    if fitting is None:
        phase, items = _largest_phase(plan.memory)
        raise PlanError(
            f"{text}. No smaller batch, rank or choice of towers makes it fit: in the phase {phase} the base "
            f"alone takes {sum(n for name, n in items.items() if name.startswith('base')) / GB:.2f} GB. Take "
            "a larger device or a smaller base model"
        )
    changed = ", ".join(f"{name}: {value}" for name, value in _changes(plan.config, fitting.config).items())
    raise PlanError(f"{text}. It fits, with {needed(fitting) / GB:.2f} GB, under {changed}")


def find_fitting(memory: MemoryModel, available: int) -> MemoryModel | None:
    """Changes settings one after the other, those that change no result first, until it fits."""
    while needed(memory) > available:
        smaller = _smaller(memory.config, _largest_phase(memory)[0])
        if smaller is None:
            return None
        media = {kind for target in memory.targets for kind in target.media}
        memory = replace(memory, config=smaller, targets=targets_of(memory.model, smaller, media))
    return memory


def _largest_phase(memory: MemoryModel) -> tuple[str, dict[str, int]]:
    return max(memory.phases().items(), key=lambda phase: sum(phase[1].values()))


def _smaller(config: RunConfig, phase: str) -> RunConfig | None:
    """The next change that lowers what `phase` needs; None where none is left."""
    train, probe, evaluation = config.train, config.probe, config.evaluation
    size = train.per_device_train_batch_size
    if config.model.quantization == "none":
        return replace(config, model=replace(config.model, quantization="nf4"))
    if phase in ("probe", "train") and not train.activation_checkpointing:
        return replace(config, train=replace(train, activation_checkpointing=True))
    if phase == "train" and size > 1:
        halved = replace(
            train,
            per_device_train_batch_size=-(-size // 2),
            gradient_accumulation_steps=train.gradient_accumulation_steps * size // -(-size // 2),
        )
        return replace(config, train=halved)
    if phase == "probe" and probe.batch_size > 1:
        return replace(config, probe=replace(probe, batch_size=-(-probe.batch_size // 2)))
    if phase == "evaluation" and evaluation.batch_size > 1:
        return replace(config, evaluation=replace(evaluation, batch_size=-(-evaluation.batch_size // 2)))
    if phase == "weight bases":
        return None
    largest = max(tower.rank for tower in config.towers().values())
    if largest > 4:
        language, vision = (
            replace(tower, rank=min(tower.rank, largest // 2)) for tower in (config.language, config.vision)
        )
        return replace(config, language=language, vision=vision)
    if config.vision.adapt and config.language.adapt and config.projector == "frozen":
        return replace(config, vision=replace(config.vision, adapt=False))
    return None


def _changes(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """Settings that differ -> their new value as YAML has it."""
    found: dict[str, str] = {}
    for name in old.__dataclass_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if hasattr(after, "__dataclass_fields__"):
            found |= _changes(before, after, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(after).lower() if isinstance(after, bool) else str(after)
    return found


# --- as text ---


def format_plan(plan: Plan) -> str:
    """The plan as one block of text."""
    sections = (_model_lines, _memory_lines, _disk_lines, _work_lines, _time_lines)
    return "\n".join(line for section in sections for line in section(plan))


def _model_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    model = plan.config.model
    kind = f"{memory.model.config.model_type}, {model.quantization}, {model.compute_dtype}"
    yield f"base model   {model.base_model} ({kind}): {plan.weights}"
    for tower, settings in plan.config.towers().items():
        found = [t for t in memory.targets if t.tower == tower]
        weights = sum(t.in_features * t.out_features for t in found)
        factors = sum(settings.rank * (t.in_features + t.out_features) for t in found)
        yield (
            f"  {tower:9s}  {len(found)} modules adapted, {_count(weights)} weights, "
            f"rank {settings.rank}: {_count(factors)} factor parameters a stage"
        )
    for reason, number in plan.excluded.items():
        yield f"  left out   {number} linear layers: {reason}"
    shape = memory.shape
    yield f"sample       {shape.tokens} tokens, {shape.vision_tokens} rows of the vision tower"
    yield f"             {shape.source}"
    limit = plan.config.train.max_length
    if limit is not None and shape.tokens > limit:
        yield f"             longer than train.max_length {limit}: the run would stop at it"


def _memory_lines(plan: Plan) -> Iterator[str]:
    phases = plan.memory.phases()
    yield f"memory, GB   {'':18s}" + "".join(f"{phase:>14s}" for phase in PHASES)
    items = dict.fromkeys(item for phase in phases.values() for item in phase)
    for item in items:
        cells = (f"{phases[p][item] / GB:14.3f}" if item in phases[p] else f"{'-':>14s}" for p in PHASES)
        yield f"  {item:29s}" + "".join(cells)
    yield f"  {'sum':29s}" + "".join(f"{sum(phases[p].values()) / GB:14.3f}" for p in PHASES)
    train = plan.config.train
    other = replace(train, activation_checkpointing=not train.activation_checkpointing)
    memory = replace(plan.memory, config=replace(plan.config, train=other))
    word = "with" if other.activation_checkpointing else "without"
    sums = (f"{sum(items.values()) / GB:14.3f}" for items in memory.phases().values())
    yield f"  {f'sum {word} checkpointing':29s}" + "".join(sums)
    peak, free = plan.memory.peak() / GB, plan.available / GB
    verdict = "fits" if needed(plan.memory) <= plan.available else "does NOT fit"
    yield (
        f"  peak {peak:.2f} GB, {needed(plan.memory) / GB:.2f} with headroom; {free:.2f} GB are there "
        f"({plan.device}): {verdict}"
    )


def _disk_lines(plan: Plan) -> Iterator[str]:
    memory, towers, stages = plan.memory, plan.config.towers(), len(plan.stream.tasks)
    yield "disk, GB"
    bases = features = 0
    if memory.method.protects_weights:
        bases = sum(
            4 * t.in_features * plan.cached_bases.get(t.name, most_columns(t, plan.config))
            for t in memory.targets
        )
        cached = len(plan.cached_bases)
        how = (
            "exact" if cached == len(memory.targets) else f"at most, {cached} of {len(memory.targets)} cached"
        )
        shares = ", ".join(f"k <= {t.eps_w:g} min(in, out) for {n}" for n, t in towers.items())
        yield f"  weight bases     {bases / GB:9.3f}  ({how}; {shares})"
    if memory.method.protects_features:
        features = sum(
            4 * t.in_features * math.ceil((1 - HELD_OUT_SHARE) * memory.columns(t)) for t in memory.targets
        )
        yield f"  feature bases    {stages * features / GB:9.3f}  (at most, {stages} stages)"
    one = 4 * memory.factors()
    adapter = one * (2 * stages - 1)
    last = max(towers.values(), key=lambda t: t.rank).rank * stages
    yield f"  adapter          {adapter / GB:9.3f}  (rank {last} in the end, and the one it replaces)"
    yield f"  stages' factors  {(one + 4 * memory.factors('A')) * stages / GB:9.3f}"
    checkpoints = 0
    if any(train.save_steps for train in memory.train_settings()):
        state = max(4 + optimizer_state(train.optim) for train in memory.train_settings())
        checkpoints = 3 * state * memory.factors(memory.method.trains)
        yield f"  checkpoints      {checkpoints / GB:9.3f}  (two and the one being written, during a stage)"
    frames = plan.config.video.cache_gb if memory.shape.media == "video" else 0.0
    if frames:
        yield f"  frames           {frames:9.3f}  (at most: video.cache_gb)"
    total = bases + stages * features + adapter + (one + 4 * memory.factors("A")) * stages + checkpoints
    yield f"  sum              {total / GB + frames:9.3f}  (answers and logs come on top)"


def _work_lines(plan: Plan) -> Iterator[str]:
    yield f"stages       {'':12s}{'samples':>10s}{'probe':>16s}{'epochs':>8s}{'steps':>8s}{'questions':>11s}"
    for work in plan.work:
        train = plan.config.train_for(work.task)
        probe = "-" if not work.probe_passes else f"{work.probe_passes} x {_known(work.probe_samples)}"
        epochs = "-" if train.max_steps > 0 else f"{train.num_train_epochs:g}"
        yield (
            f"  {work.task:23s}{_known(work.samples):>10s}{probe:>16s}{epochs:>8s}{_known(work.steps):>8s}"
            f"{_known(work.questions):>11s}"
        )
    for name, questions in plan.general.items():
        yield f"  {name:23s}{'':42s}{_known(questions):>11s}"
    rows = len(plan.work) + 1
    sizes = [*(work.questions for work in plan.work), *plan.general.values()]
    asked = sum(n for n in sizes if n is not None)
    unknown = sum(n is None for n in sizes)
    yield f"  evaluations: {rows} rows of {asked} questions" + (f" and {unknown} unknown" if unknown else "")


def _time_lines(plan: Plan) -> Iterator[str]:
    rates = plan.rates
    if rates is None:
        yield "time         no measured rate: no finished stage on this base with these settings"
        return
    yield (
        f"time         {rates.step:.3g} s a step, {rates.probe:.3g} s a probe sample, {rates.question:.3g} s "
        f"a question (measured by {rates.run})"
    )
    known = [w for w in plan.work if w.steps is not None and w.probe_samples is not None]
    asked = [*(w.questions for w in plan.work), *plan.general.values()]
    if len(known) < len(plan.work) or None in asked:
        yield "             no total: the data are not there, or a stock benchmark's size is not known"
        return
    learning = sum(
        (w.steps or 0) * rates.step + w.probe_passes * (w.probe_samples or 0) * rates.probe for w in known
    )
    total = learning + (len(plan.work) + 1) * sum(n or 0 for n in asked) * rates.question
    yield f"             about {total / 60:.0f} minutes; weight bases and checking the data come on top"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)
