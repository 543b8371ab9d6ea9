"""Settings of a run: one YAML file, one dataclass tree; the command line wins, unknown keys are errors."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.errors import ConfigError as ConfigError  # known by this module's name everywhere
from mllm_keeplora.errors import did_you_mean
from mllm_keeplora.resources import find, unusable
from mllm_keeplora.settings import Range, build, check_settings, flat_settings, hints_of, shown, typed
from mllm_keeplora.yaml_files import read_yaml

Tower = Literal["vision", "language"]
Dtype = Literal["float32", "bfloat16"]

# Ranges that several settings have. Upper ends are what no sensible run comes near.
Share = Annotated[float, Range(0, 1, "(]")]
Count = Annotated[int, Range(1, 1_000_000_000)]
LearningRate = Annotated[float, Range(0, 10, "(]")]
BatchSize = Annotated[int, Range(1, 65_536)]
NewTokens = Annotated[int, Range(1, 65_536)]
Seed = Annotated[int, Range(0, 4_000_000_000)]  # numpy takes 32 bits, and stage t adds t


_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
KERNELS_OWNER = "kernels-community"  # on the hub; Hugging Face builds its kernels from source
_HUB_KERNEL = re.compile(r"([\w.-]+)/[\w.-]+(@[\w.-]+)?(:\w+)?")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# Settings that are paths, by their dotted names.
_PATHS = (
    *("run_dir", "stream", "data_root", "initial_adapter", "cache_dir"),
    *("model.base_model", "model.chat_template", "general.samples", "general.media_root"),
)
_FILES = ("stream", "model.chat_template", "general.samples")  # those that are files; the others are folders


def _check_paths(prefix: str, settings: Any) -> None:
    """Those of a dataclass itself; its groups look at theirs."""
    for name in _PATHS:
        group, _, last = name.rpartition(".")
        if group == prefix.rstrip("."):
            _check_path(name, getattr(settings, last))


def _check_path(name: str, path: str | None) -> None:
    """A shell writes `~` and `$NAME` out, a YAML file does not; a variable that is not set leaves nothing."""
    _require(path != "", f"{name} is empty; name a path, or leave it out for its default")
    if path is not None:
        variable = re.search(r"\$\{?[A-Za-z_]", path) and not os.path.exists(path)  # noqa: PTH110 - never raises
        _require(
            not (variable or path.startswith("~")),
            f"{name} is {shown(path)}; ~ and variables are not written out here, name the path itself",
        )
        reason = unusable(path)
        _require(reason is None, f"{name} {shown(path)} cannot be read: {reason}; name another")
        _require(name in _FILES or not os.path.isfile(path), f"{name} is {shown(path)}, a file; name a folder")  # noqa: PTH113


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is loaded.

    Args:
        base_model: Hub id or local directory with safetensors weights and a processor.
        revision: Commit, tag or branch of a hub model; pin a commit for reproducible runs.
        quantization: nf4 (4-bit, double quantised) in both towers, or none. A base whose weights are stored quantised
            is refused, but for one in NF4 with nf4, which is taken as it is.
        compute_dtype: What the model computes in. float32 on CPUs, bfloat16 on GPUs.
        chat_template: Jinja file in place of the processor's own template, such as
            recipes/templates/vicuna_v1.jinja: LLaVA-1.5 as the published streams prompt it.
        max_pixels: Most pixels that the processor leaves a picture and each frame of a clip, for models that take them
            in their own size (Qwen's). Fewer pixels are fewer tokens. None keeps the processor's own bound.
        attn_implementation: sdpa, eager, flash_attention_2 (needs the flash-attn extra), flash_attention_3 (Hopper
            GPUs), or a kernel of the hub by OWNER/NAME, such as kernels-community/flash-attn2, with @REVISION and
            :FUNCTION behind it where wanted (needs the package kernels). One of another owner than kernels-community
            needs trust_remote_code.
        trust_remote_code: Run code that comes with the model, or with a kernel. Off unless you have read that code.
        device: auto takes the first CUDA device if there is one.
        cpu_threads: Threads of torch's CPU operations; None leaves the choice to torch. A small model is
            faster on one, and results are bit-identical for one number of threads.
    """

    base_model: str = "recipes/small/vqa_base"
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    compute_dtype: Dtype = "float32"
    chat_template: str | None = None
    max_pixels: Annotated[int, Range(1, 1_000_000_000)] | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: Annotated[int, Range(1, 1024)] | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        _check_paths("model.", self)
        wanted, hub_kernel = self.attn_implementation, _HUB_KERNEL.fullmatch(self.attn_implementation)
        _require(
            wanted in _ATTENTION or hub_kernel is not None,
            f"model.attn_implementation: expected one of {', '.join(_ATTENTION)}, or a kernel of the hub "
            f"(OWNER/NAME), found {shown(wanted)}{did_you_mean(wanted, _ATTENTION)}",
        )
        _require(
            hub_kernel is None or hub_kernel[1] == KERNELS_OWNER or self.trust_remote_code,
            f"model.attn_implementation: {wanted} is native code of {wanted.split('/')[0]} that runs on this machine; "
            f"read it and set model.trust_remote_code: true, or take a kernel of {KERNELS_OWNER}",
        )
        _require(
            wanted in ("sdpa", "eager") or (self.compute_dtype == "bfloat16" and self.device != "cpu"),
            f"model.attn_implementation: {wanted} computes in bfloat16 on GPUs alone, found compute_dtype "
            f"{self.compute_dtype} and device {self.device}; set compute_dtype: bfloat16, or take sdpa",
        )


@dataclass(frozen=True)
class TowerConfig:
    """What is adapted in one tower, and what is protected there.

    Args:
        adapt: Whether the tower gets LoRA updates at all.
        targets: Linear layers by name (q_proj, mlp.fc1, ..), or all-linear.
        rank: r, the rank of one stage's update.
        eps_w: Share of a pre-trained weight's energy that its protected principal subspace holds (E1).
        eps_f: Share of a learnt task's gradient energy that the protected feature subspace holds (E8).
        gamma: Scale of the shallowest layer's update; 1 gives KeepLoRA (E5).
    """

    adapt: bool = True
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    rank: Annotated[int, Range(1, 16_384)] = 16
    eps_w: Share = 0.6
    eps_f: Share = 0.99
    gamma: Annotated[float, Range(0, 1)] = 0.2


@dataclass(frozen=True)
class ProbeConfig:
    """The sample and the sketch from which task gradients are measured (E2).

    Args:
        fraction: Share of a task's training samples, evenly spaced.
        max_samples: Cap on their number.
        columns_per_rank: q / r, columns of the sketch per rank of the update.
        refine: A second pass that orders and sharpens the directions (Rayleigh-Ritz).
        batch_size: Samples per forward and backward of a probe pass.
    """

    fraction: Share = 0.2
    max_samples: Count = 256
    columns_per_rank: Annotated[int, Range(1, 64)] = 4
    refine: bool = False
    batch_size: BatchSize = 8

    def __post_init__(self) -> None:
        check_settings(self, "probe.")


@dataclass(frozen=True)
class VideoConfig:
    """How clips become frames; the same in probes, training and evaluation.

    Args:
        frames: Frames taken from a clip, evenly spaced from its first to its last, by time where its rate
            varies; with fps set, the most that are taken.
        fps: Frames per second of the clip, in place of a fixed number; None takes `frames` of every clip. Only
            Qwen's models take clips of different lengths in a batch; others need batch sizes of 1.
        backend: pyav decodes every file and checks each frame. decord and torchcodec (to be installed by you)
            decode every clip a second time; one of which they give other frames than pyav is refused.
        timeout: Seconds that decoding one clip may take before its decoder is ended and the clip is refused.
        cache_gb: Decoded frames kept on disk under cache_dir, in GB (1e9 bytes); 0 keeps none.
    """

    frames: Annotated[int, Range(1, 4096)] = 8
    fps: Annotated[float, Range(0, 1000, "(]")] | None = None
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"
    timeout: Annotated[float, Range(0, 86_400, "(]")] = 60.0
    cache_gb: Annotated[float, Range(0, 1_000_000)] = 20.0

    def __post_init__(self) -> None:
        check_settings(self, "video.")


@dataclass(frozen=True)
class TrainConfig:
    """Training of one stage (HF Trainer; names and meaning are its own unless stated).

    Args:
        learning_rate: Peak learning rate of AdamW.
        num_train_epochs: Passes over a task's training samples.
        max_steps: Optimizer steps in place of epochs; -1 counts epochs.
        per_device_train_batch_size: Samples per forward.
        gradient_accumulation_steps: Forwards per optimizer step.
        lr_scheduler_type: Schedule after the warm-up.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: AdamW's decay of the trained factor.
        max_grad_norm: Gradient clipping.
        lora_dropout: On the stage's LoRA path. Above 0 inputs are no longer orthogonal to A while training.
        activation_checkpointing: Recompute activations in the backward pass (probe passes too).
        optim: Optimizer name of transformers.
        max_length: Largest sample in tokens, image tokens included; a longer one is an error, never cut. None
            = no limit.
        save_steps: Steps between checkpoints inside a stage, 0 = none: training that was interrupted starts again.
        logging_steps: Steps between logged losses.
        dataloader_num_workers: Worker processes that read images.
    """

    learning_rate: LearningRate = 2e-4
    num_train_epochs: Annotated[float, Range(0, 100_000, "(]")] = 1.0
    max_steps: Literal[-1] | Count = -1
    per_device_train_batch_size: BatchSize = 8
    gradient_accumulation_steps: BatchSize = 1
    lr_scheduler_type: str = "cosine"
    warmup_ratio: Annotated[float, Range(0, 1, "[)")] = 0.03
    weight_decay: Annotated[float, Range(0, 10)] = 0.0
    max_grad_norm: Annotated[float, Range(0, 1_000_000_000, "(]")] = 1.0
    lora_dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    activation_checkpointing: bool = False
    optim: str = "adamw_torch"
    max_length: Count | None = None
    save_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    logging_steps: Count = 10
    dataloader_num_workers: Annotated[int, Range(0, 256)] = 0

    def __post_init__(self) -> None:
        check_settings(self, "train.")


@dataclass(frozen=True)
class GeneralConfig:
    """What the base can do and a run is to keep: prompts that the base answers itself, once, before it learns.

    Args:
        samples: builtin (256 prompts of knowledge, reasoning, writing and pictures), a file of records in any
            form that tasks have (their last answers are not read), for a CLIP a YAML of pictures and the classes
            that they are compared with, or none.
        media_root: Folder that the file's image and video paths are relative to; None takes the file's own.
        max_samples: Most prompts that are taken, evenly spaced. Every fourth is held out for the budget.
        max_new_tokens: Longest reply of the base, in tokens.
        eps_g: Share of the energy of every module's inputs over prompts and replies that is protected before the
            first stage (G2), in (0, 1]; None protects none of it.
        columns: Most columns of the sketch that these directions come from, per module.
        rehearsed: Training prompts of each past task that are learnt like general ones, by what the model itself
            answered before the stage; their own answers are not learnt.
        share: Share of general and rehearsed samples in what each training step sees (G3), in [0, 1); the task's own
            samples stay as many as they are.
        distil: What they are learnt by: kl (the divergence from what the base said over its replies, of rehearsed
            ones from what the model said before the stage) or replies (the cross-entropy of these).
        weight: Factor of that loss beside the task's.
        budget: Most by which a stage may raise the divergence from the base on held-out prompts, in nats a
            token (G4); the stage's update is scaled down until it keeps to it. None scales nothing.
    """

    samples: str = "none"
    media_root: str | None = None
    max_samples: Annotated[int, Range(4, 1_000_000)] = 256
    max_new_tokens: NewTokens = 64
    eps_g: Share | None = 0.95
    columns: Annotated[int, Range(4, 65_536)] = 512
    rehearsed: Annotated[int, Range(0, 1_000_000)] = 0
    share: Annotated[float, Range(0, 1, "[)")] = 0.0
    distil: Literal["kl", "replies"] = "kl"
    weight: Annotated[float, Range(0, 1_000, "(]")] = 1.0
    budget: Annotated[float, Range(0, 1_000, "(]")] | None = None

    def __post_init__(self) -> None:
        check_settings(self, "general.")
        _check_paths("general.", self)
        needing = {"share": self.share if not self.rehearsed else 0, "budget": self.budget}
        wanted = [name for name, given in needing.items() if given]
        _require(
            self.samples != "none" or not wanted,
            f"general.{' and general.'.join(wanted)} need prompts; set general.samples to builtin or a file",
        )
        _require(not self.rehearsed or self.share > 0, "general.rehearsed needs a general.share above 0, such as 0.2")

    @property
    def given(self) -> bool:
        """Whether there are general samples at all."""
        return self.samples != "none"

    def beside(self, batch: int, passes: int) -> list[int]:
        """General samples in each forward pass of a training step, as evenly as they can be spread.

        Args:
            batch: samples of the task in a pass.
            passes: that accumulate to a step, which sees one general sample at least.
        """
        whole = max(1, round(batch * passes * self.share / (1.0 - self.share))) if self.share else 0
        return [(number + 1) * whole // passes - number * whole // passes for number in range(passes)]


@dataclass(frozen=True)
class EvaluationConfig:
    """Measuring retention after every stage.

    Args:
        batch_size: Questions generated together.
        limit: First questions asked of each task and general benchmark, None = all. Recorded, marked in the
            report, and refused by the leaderboard.
        general_limit: The same for the general benchmarks alone, which are large; None = limit.
    """

    batch_size: BatchSize = 32
    limit: Count | None = None
    general_limit: Count | None = None

    def __post_init__(self) -> None:
        check_settings(self, "evaluation.")

    def limits(self) -> dict[str, int | None]:
        """Most questions asked per task of the stream ("task") and per general benchmark ("general")."""
        return {"task": self.limit, "general": self.general_limit or self.limit}


@dataclass(frozen=True)
class RunConfig:
    """A KeepLoRA++ run over a stream of tasks.

    Args:
        run_dir: Where everything of the run is written; the same command on the same directory continues it.
        stream: YAML file with the ordered tasks and the general benchmarks.
        data_root: Folder of the stream's data; None takes the stream file's own.
        method: A file of mllm_keeplora/methods: keeplora (KeepLoRA++; gamma 1 gives KeepLoRA), lora
            (sequential LoRA, nothing protected), or a rival (docs/methods.md).
        method_options: Settings that the method alone has, e.g. {features_from: activations} for keeplora.
        alpha: LoRA alpha; an update is lambda_l * alpha / r * B A.
        projector: frozen, or protected (adapted like a layer of the vision tower).
        model: The base model.
        language: The language tower.
        vision: The vision tower.
        probe: Task gradients.
        video: How clips become frames.
        train: Training of a stage.
        train_overrides: Per task name, settings of train that differ there, e.g. {Med: {num_train_epochs:
            3}}.
        general: What the base can do and the run is to keep.
        evaluation: Measuring retention.
        initial_adapter: Directory of a PEFT LoRA adapter to start from, as if earlier stages had left it.
        on_bad_record: error, or skip (every skipped record is named in the manifest).
        backfill: Evaluate tasks that were appended to a finished stream at the earlier stages too.
        cache_dir: Weight bases, reused by every run on the same base model, and decoded frames.
        report_to: Loggers of the HF Trainer.
        seed: The one seed; stage t uses seed + t.
    """

    run_dir: str = "runs/vqa_small"
    stream: str = "recipes/streams/small_vqa.yaml"
    data_root: str | None = None
    method: str = "keeplora"
    method_options: dict[str, Any] = field(default_factory=dict)
    alpha: Annotated[float, Range(0, 1_000_000, "(]")] = 32.0
    projector: Literal["frozen", "protected"] = "frozen"
    model: ModelConfig = field(default_factory=ModelConfig)
    language: TowerConfig = field(default_factory=TowerConfig)
    vision: TowerConfig = field(default_factory=TowerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    train_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    general: GeneralConfig = field(default_factory=GeneralConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    initial_adapter: str | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    backfill: bool = False
    cache_dir: str = "cache"
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    seed: Seed = 0

    @classmethod
    def read(cls, *files: str | Path) -> "RunConfig":
        """The settings in YAML files, of which the later win, as `keeplora run --config FILE` takes them.

        Raises:
            ConfigError: an unknown key, a value of the wrong kind or out of range, or a file that cannot be read.
        """
        return build(cls, _read_layers(files))

    def __post_init__(self) -> None:
        check_settings(self)
        _check_paths("", self)
        for name in ("language", "vision"):
            targets = getattr(self, name).targets
            _require(len(targets) > 0, f"{name}.targets is empty; name linear layers, or use [all-linear]")
        _require(
            self.language.adapt or self.vision.adapt,
            "language.adapt and vision.adapt are both false: nothing to learn",
        )
        _require(
            self.projector == "frozen" or self.vision.adapt,
            "projector: protected adapts the projector with the vision tower's settings; set vision.adapt: true",
        )
        for task in self.train_overrides:
            self.train_for(task)
        own, initial = os.path.realpath(self.run_dir), os.path.realpath(self.initial_adapter or os.sep)
        _require(
            not Path(initial).is_relative_to(own),
            f"initial_adapter {self.initial_adapter} lies in run_dir {self.run_dir}, which the run writes; copy it "
            "elsewhere",
        )

    def train_for(self, task: str) -> TrainConfig:
        """Training settings of one task, its overrides applied.

        Raises:
            ConfigError: an override that is not a setting of `train`, or a value that cannot be used.
        """
        overrides = self.train_overrides.get(task, {})
        hints, values = hints_of(TrainConfig), {}
        for key, value in overrides.items():
            name, hint = f"train_overrides.{task}.{key}", did_you_mean(key, hints)
            _require(key in hints, f"{name} is not a setting of train{hint}")
            values[key] = typed(value, hints[key], name)
        _require(
            "activation_checkpointing" not in overrides,
            f"train_overrides.{task}.activation_checkpointing: it is a setting of the whole run, "
            "probes included; set it in train",
        )
        return replace(self.train, **values)

    def towers(self) -> dict[Tower, TowerConfig]:
        """The adapted towers."""
        towers: dict[Tower, TowerConfig] = {"vision": self.vision, "language": self.language}
        return {name: tower for name, tower in towers.items() if tower.adapt}


@dataclass(frozen=True)
class JudgeConfig:
    """The model that grades a run's replies, and how it decodes.

    Args:
        judge: Directory or hub id of a chat model with safetensors weights.
        revision: Commit, tag or branch of a hub model.
        quantization: nf4 keeps the judge's linear layers in 4 bits, none all weights in dtype.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        max_new_tokens: Longest verdict, in tokens.
        batch_size: Replies judged together.
    """

    judge: str
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_new_tokens: NewTokens = 48
    batch_size: BatchSize = 16

    def __post_init__(self) -> None:
        check_settings(self)


# What a continued run may change: it decides no number (train and its overrides are compared per task
# instead).
FREE_SETTINGS = (
    "on_bad_record",
    "run_dir",
    "stream",
    "data_root",
    "train_overrides",
    "train",
    "backfill",
    "cache_dir",
    "report_to",
)


# These decide what a phase needs of memory, and as the number of processes does, rounding and which numbers a sketch of
# inputs draws. Manifests of earlier versions hold them.
FREED_SETTINGS = ("probe.batch_size", "train.activation_checkpointing")


def identity(config: RunConfig, task: str | None) -> dict[str, Any]:
    """What makes a stage's result what it is, apart from its data: compared when a run is continued.

    The base's row (task None) depends on little. `train` enters as resolved for the task, so that settings of
    appended tasks leave finished stages valid.
    """
    values = {key: value for key, value in asdict(config).items() if key not in FREE_SETTINGS}
    values["evaluation"] = {k: values["evaluation"][k] for k in ("limit", "general_limit")}
    values["video"] = {"frames": config.video.frames, "fps": config.video.fps}
    values["probe"] = {key: value for key, value in values["probe"].items() if key != "batch_size"}
    if task is None:
        return {key: values[key] for key in ("model", "video", "evaluation", "initial_adapter")}
    free = ("logging_steps", "save_steps", "dataloader_num_workers", "max_length", "activation_checkpointing")
    values["train"] = {key: value for key, value in asdict(config.train_for(task)).items() if key not in free}
    return values


def config_from_dict(values: Mapping[str, Any], where: Path) -> RunConfig:
    """The settings that a run wrote down, as `asdict` gives them.

    Raises:
        ConfigError: a group that is missing, a setting that is unknown or holds what it cannot: another version wrote
            them, or somebody edited them.
    """
    groups = [f.name for f in fields(RunConfig) if is_dataclass(f.default_factory)]
    try:
        flat = flat_settings(RunConfig, values)
        missing = [name for name in groups if name not in values]
        _require(not missing, f"{', '.join(missing)} is missing")
        return build(RunConfig, flat)
    except ConfigError as error:
        raise ConfigError(f"{where} was written by another version of this package, or edited ({error})") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as the command line spells them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, one phrase a setting."""
    there, now = flatten(old), flatten(new)
    return [
        f"{key}: {shown(there.get(key))} there, {shown(now.get(key))} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]


def parse_config(
    description: str | None,
    default_config: Path,
    argv: Sequence[str] | None = None,
    prog: str = "keeplora run",
    flags: Mapping[str, str] | None = None,
) -> RunConfig:
    """Reads the settings of a run: those of the files that `--config` names, then those of the command line.

    What names another method leaves the options of the method before it behind: they belong to that method.

    Args:
        description: for `--help`.
        default_config: YAML file that is read where `--config` names none.
        argv: the command line; None takes the process's own.
        prog: the command, for `--help` and messages.
        flags: further options, which the command has read already, as `OptionParser.add_read` takes them.

    Raises:
        SystemExit: after `--help`.
        ConfigError: an unknown key, a value of the wrong kind or out of range, or a file that cannot be read.
    """
    flags = flags or {}
    parser = OptionParser(prog, description, " ".join(["[--config FILE ...]", *(f"[--{flag}]" for flag in flags)]))
    parser.add_read(flags)
    text = f"YAML file with settings; of several the later wins (default: {default_config})"
    parser.add_argument("--config", action="append", metavar="FILE", help=text)
    parser.add_settings(RunConfig)
    given = parser.read(sys.argv[1:] if argv is None else argv)
    return build(RunConfig, _read_layers(given.config or [default_config], vars(given)))


def _read_layers(files: Sequence[str | Path], *given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of files and then of others, the later ones winning; options belong to the method they stand with."""
    flat: dict[str, Any] = {}
    for layer in (*(_read_file(find(file)) for file in files), *given):
        if layer.get("method") not in (None, flat.get("method")):
            flat.pop("method_options", None)
        flat |= layer
    return flat


def _read_file(path: Path) -> dict[str, Any]:
    try:
        flat = flat_settings(RunConfig, read_yaml(path))
        for name in flat.keys() & set(_PATHS):
            _check_path(name, flat[name])
        return flat
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
