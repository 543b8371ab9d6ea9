"""Too little memory, said in words: which phase ran out, and the settings that lower what it needs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mllm_keeplora.config import RunConfig
from mllm_keeplora.errors import KeepLoRAError

# What errors say that are of no class of their own: of torch's allocators, cuBLAS and the CUDA driver.
_SAID = ("out of memory", "you tried to allocate", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_BEFORE_STAGES = {"load": "loading the base model", "general": "the base at the general samples"}


class DeviceMemoryError(KeepLoRAError, RuntimeError):
    """A phase that needs more memory than there is.

    Attributes:
        phase: its name.
        smaller: settings under which it needs less, name -> value; empty where none is left.
    """

    def __init__(self, message: str, phase: str = "", smaller: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.phase, self.smaller = phase, dict(smaller or {})


@contextmanager
def memory_explained(phase: str, config: RunConfig, number: int = 0, task: str | None = None) -> Iterator[None]:
    """Says which settings lower the memory of a phase that ran out of it.

    Args:
        phase: `load`, `general` (what the base does with general samples), or one of a stage's.
        config: settings of the run.
        number: of the stage.
        task: that it learns; None for the starting model.

    Raises:
        DeviceMemoryError: in place of torch's or Python's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
        if isinstance(error, KeepLoRAError) or not _is_out_of_memory(error):
            raise
        where = _BEFORE_STAGES.get(phase, f"stage {number} ({task or 'base'}), phase {phase!r}")
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        smaller = _smaller(phase, config, task)
        changes = [f"{_spelt(name, number, task)}: {str(value).lower()}" for name, value in smaller.items()]
        advice = "; ".join([", ".join(changes), *_others(phase, config)]).lstrip("; ")
        raise DeviceMemoryError(f"{where}: out of memory ({said}). What lowers it: {advice}", phase, smaller) from error


def _spelt(name: str, number: int, task: str | None) -> str:
    """Stages that are complete keep their own training settings: those of a later task alone are changed."""
    group, _, key = name.partition(".")
    batch = group == "train" and key != "activation_checkpointing"
    return f"train_overrides.{task}.{key}" if batch and number > 1 else name


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in _SAID)


def _smaller(phase: str, config: RunConfig, task: str | None) -> dict[str, object]:
    """Half the batch, what is held constant beside it, and recomputing activations."""
    train = config.train if task is None else config.train_for(task)
    if phase == "train":
        batch, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
        found: dict[str, object] = {}
        if batch > 1:  # an optimizer step takes at least as many samples as before
            found["train.per_device_train_batch_size"] = batch // 2
            found["train.gradient_accumulation_steps"] = -(-steps * batch // (batch // 2))
        return found | _recomputed(config)
    probe, asked = (
        {"probe.batch_size": config.probe.batch_size},
        {"evaluation.batch_size": config.evaluation.batch_size},
    )
    if phase in ("probe", "protect", "rehearse"):
        return _halved(probe) | _recomputed(config)
    if phase == "guard":
        return _halved(probe)
    if phase in ("general", "recall"):  # replies, and what is said and read at their tokens
        return _halved(asked | probe)
    if phase == "evaluate":
        return _halved(asked)
    return {} if config.model.quantization == "nf4" else {"model.quantization": "nf4"}


def _halved(sizes: Mapping[str, int]) -> dict[str, object]:
    return {name: size // 2 for name, size in sizes.items() if size > 1}


def _recomputed(config: RunConfig) -> dict[str, object]:
    return {} if config.train.activation_checkpointing else {"train.activation_checkpointing": True}


def _others(phase: str, config: RunConfig) -> Iterator[str]:
    """What lowers it too, at a price that only a user can name."""
    if phase == "load":
        yield "a smaller base model or a larger device"
        return
    yield "smaller images (model.max_pixels with Qwen's models, else the size in the base's preprocessor_config.json)"
    yield f"fewer frames a clip (video.frames, now {config.video.frames})"
    if phase in ("evaluate", "recall"):
        yield "a smaller max_new_tokens in the stream's entries"
    elif phase in ("general", "guard"):
        yield "shorter prompts in general.samples"
        yield f"shorter replies (general.max_new_tokens, now {config.general.max_new_tokens})"
    else:
        yield "shorter samples (train.max_length refuses long ones)"
        yield "a lower rank (language.rank, vision.rank)"
