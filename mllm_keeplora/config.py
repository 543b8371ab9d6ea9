"""Settings of a run: one YAML file, one dataclass tree; the command line wins, unknown keys are errors."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from mllm_keeplora.command_line import read_settings, settings_parser
from mllm_keeplora.errors import ConfigError as ConfigError  # known by this module's name everywhere
from mllm_keeplora.errors import did_you_mean
from mllm_keeplora.linalg.energy import check_energy
from mllm_keeplora.linalg.layer_scaling import layer_scales
from mllm_keeplora.resources import find

Tower = Literal["vision", "language"]
Dtype = Literal["float32", "bfloat16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is loaded.

    Args:
        base_model: Hub id or local directory with safetensors weights and a processor.
        revision: Commit, tag or branch of a hub model; pin a commit for reproducible runs.
        quantization: nf4 (4-bit, double quantised) in both towers, or none.
        compute_dtype: What the model computes in. float32 on CPUs, bfloat16 on GPUs.
        chat_template: Jinja file in place of the processor's own template, such as
            recipes/templates/vicuna_v1.jinja: LLaVA-1.5 as the published streams prompt it.
        attn_implementation: sdpa, eager or flash_attention_2 (needs the flash-attn extra).
        trust_remote_code: Run code that comes with the model. Off unless you have read that code.
        device: auto takes the first CUDA device if there is one.
        cpu_threads: Threads of torch's CPU operations; None leaves the choice to torch. A small model is
            faster on one, and results are bit-identical for one number of threads.
    """

    base_model: str = "recipes/small/vqa_base"
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    compute_dtype: Dtype = "float32"
    chat_template: str | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        threads = self.cpu_threads
        _require(threads is None or threads >= 1, f"model.cpu_threads must be at least 1, got {threads}")


@dataclass(frozen=True)
class TowerConfig:
    """What is adapted in one tower, and what is protected there.

    Args:
        adapt: Whether the tower gets LoRA updates at all.
        targets: Linear layers by name (q_proj, mlp.fc1, ..), or all-linear.
        rank: r, the rank of one stage's update.
        eps_w: Share of a pre-trained weight's energy that its protected principal subspace holds, in (0, 1]
            (E1).
        eps_f: Share of a learnt task's gradient energy that the protected feature subspace holds, in (0, 1]
            (E8).
        gamma: Scale of the shallowest layer's update; 1 gives KeepLoRA (E5).
    """

    adapt: bool = True
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    rank: int = 16
    eps_w: float = 0.6
    eps_f: float = 0.99
    gamma: float = 0.2

    def check(self, tower: str) -> None:
        """Raises ConfigError for a value out of range, naming the tower."""
        _require(self.rank >= 1, f"{tower}.rank must be at least 1, got {self.rank}")
        _require(len(self.targets) > 0, f"{tower}.targets is empty; name linear layers, or use [all-linear]")
        try:
            check_energy(self.eps_w, "eps_w")
            check_energy(self.eps_f, "eps_f")
            layer_scales(2, self.gamma)
        except ValueError as error:
            raise ConfigError(f"{tower}: {error}") from error


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

    fraction: float = 0.2
    max_samples: int = 256
    columns_per_rank: int = 4
    refine: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        _require(0.0 < self.fraction <= 1.0, f"probe.fraction must lie in (0, 1], got {self.fraction}")
        for name in ("max_samples", "columns_per_rank", "batch_size"):
            _require(getattr(self, name) >= 1, f"probe.{name} must be at least 1, got {getattr(self, name)}")


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

    frames: int = 8
    fps: float | None = None
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"
    timeout: float = 60.0
    cache_gb: float = 20.0

    def __post_init__(self) -> None:
        _require(self.frames >= 1, f"video.frames must be at least 1, got {self.frames}")
        _require(self.fps is None or self.fps > 0, f"video.fps must be positive, got {self.fps}")
        _require(self.timeout > 0, f"video.timeout must be positive, got {self.timeout}")
        _require(self.cache_gb >= 0, f"video.cache_gb must not be negative, got {self.cache_gb}")


@dataclass(frozen=True)
class TrainConfig:
    """Training of one stage (HF Trainer; names and meaning are its own unless stated).

    Args:
        learning_rate: Peak learning rate of AdamW.
        num_train_epochs: Passes over a task's training samples.
        max_steps: Optimizer steps; overrides the epochs when positive.
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

    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_dropout: float = 0.0
    activation_checkpointing: bool = False
    optim: str = "adamw_torch"
    max_length: int | None = None
    save_steps: int = 0
    logging_steps: int = 10
    dataloader_num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        _require(0.0 <= self.lora_dropout < 1.0, f"train.lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        _require(0.0 <= self.warmup_ratio < 1.0, f"train.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        _require(self.max_steps != 0, "train.max_steps is 0: nothing would be learnt; use -1 to count epochs")


@dataclass(frozen=True)
class EvaluationConfig:
    """Measuring retention after every stage.

    Args:
        batch_size: Questions generated together.
        limit: First questions asked of each task and general benchmark, None = all. Recorded, marked in the
            report, and refused by the leaderboard.
        general_limit: The same for the general benchmarks alone, which are large; None = limit.
    """

    batch_size: int = 32
    limit: int | None = None
    general_limit: int | None = None

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"evaluation.batch_size must be at least 1, got {self.batch_size}")
        for name in ("limit", "general_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"evaluation.{name} must be at least 1, got {value}")

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
    alpha: float = 32.0
    projector: Literal["frozen", "protected"] = "frozen"
    model: ModelConfig = field(default_factory=ModelConfig)
    language: TowerConfig = field(default_factory=TowerConfig)
    vision: TowerConfig = field(default_factory=TowerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    train_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    initial_adapter: str | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    backfill: bool = False
    cache_dir: str = "cache"
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.alpha > 0, f"alpha must be positive, got {self.alpha}")
        self.language.check("language")
        self.vision.check("vision")
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

    def train_for(self, task: str) -> TrainConfig:
        """Training settings of one task, its overrides applied.

        Raises:
            ConfigError: an override that is not a setting of `train`.
        """
        overrides = self.train_overrides.get(task, {})
        known = [f.name for f in fields(TrainConfig)]
        for key in overrides:
            hint = did_you_mean(key, known)
            _require(key in known, f"train_overrides.{task}.{key} is not a setting of train{hint}")
        _require(
            "activation_checkpointing" not in overrides,
            f"train_overrides.{task}.activation_checkpointing: it is a setting of the whole run, "
            "probes included; set it in train",
        )
        try:
            return replace(self.train, **overrides)
        except TypeError as error:
            raise ConfigError(f"train_overrides.{task}: a value of the wrong type ({error})") from error

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
    max_new_tokens: int = 48
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")


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


def identity(config: RunConfig, task: str | None) -> dict[str, Any]:
    """What makes a stage's result what it is, apart from its data: compared when a run is continued.

    The base's row (task None) depends on little. `train` enters as resolved for the task, so that settings of
    appended tasks leave finished stages valid.
    """
    values = {key: value for key, value in asdict(config).items() if key not in FREE_SETTINGS}
    values["evaluation"] = {k: values["evaluation"][k] for k in ("limit", "general_limit")}
    values["video"] = {"frames": config.video.frames, "fps": config.video.fps}
    if task is None:
        return {key: values[key] for key in ("model", "video", "evaluation", "initial_adapter")}
    free = ("logging_steps", "save_steps", "dataloader_num_workers", "max_length")
    values["train"] = {key: value for key, value in asdict(config.train_for(task)).items() if key not in free}
    return values


def config_from_dict(values: Mapping[str, Any], where: Path) -> RunConfig:
    """The settings that a run wrote down, as `asdict` gives them.

    Raises:
        ConfigError: a setting that is missing or unknown: another version wrote them.
    """
    groups: dict[str, Any] = {f.name: f.default_factory for f in fields(RunConfig) if is_dataclass(f.default_factory)}
    try:
        built = {name: group(**values[name]) for name, group in groups.items()}
        return RunConfig(**{**values, **built})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} was written by another version of this package ({error})") from error


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
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]


def build_parser(
    description: str | None, default_config: Path, prog: str = "keeplora run", flags: str = ""
) -> ArgumentParser:
    """The command line of a run: `--config FILE`, and every setting as `--group.name VALUE`."""
    parser = settings_parser(prog, description, f"[--config FILE ...] {flags}")
    parser.add_argument("--config", action="config", help=f"YAML file with settings (default: {default_config})")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_config(
    description: str | None,
    default_config: Path,
    argv: Sequence[str] | None = None,
    prog: str = "keeplora run",
    flags: str = "",
) -> RunConfig:
    """Reads the settings of a run; without `--config` the default file is read, as if it had been named.

    Args:
        description: for `--help`.
        default_config: YAML file of settings.
        argv: the command line; None takes the process's own.
        prog: the command, for `--help` and messages.
        flags: further options that the command takes, for `--help` and messages.

    Raises:
        SystemExit: after `--help`.
        ConfigError: an unknown key, a value of the wrong type, a value out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", str(default_config), *argv]
    parser = build_parser(description, default_config, prog, flags)
    values = read_settings(parser, _with_shipped_configs(argv))
    return RunConfig(**{f.name: getattr(values, f.name) for f in fields(RunConfig)})


def _with_shipped_configs(argv: Sequence[str]) -> list[str]:
    """The command line, shipped files behind `--config` by their whole path."""
    found = []
    for before, argument in zip(["", *argv], argv, strict=False):
        option, equals, value = argument.partition("=")
        if before == "--config":
            argument = str(find(argument))
        elif option == "--config" and equals:
            argument = f"--config={find(value)}"
        found.append(argument)
    return found
