"""Opening the result of a run, also of one that goes on: its base model with the accumulated adapter."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from mllm_keeplora.config import ModelConfig, VideoConfig
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.modeling.loading import DTYPES, load_base
from mllm_keeplora.runs.files import ArtifactError, read_json


def run_model_config(run_dir: Path) -> ModelConfig:
    """How the run loaded its base model.

    Raises:
        ArtifactError: no such run, or no adapter in it yet.
    """
    if not (run_dir / "adapter" / "adapter_config.json").is_file():
        raise ArtifactError(
            f"{run_dir} holds no adapter/: name the directory of a run that has learnt a task"
        )
    return ModelConfig(**read_json(run_dir / "config.json")["model"])


def run_reader(run_dir: Path) -> VideoReader:
    """Decodes clips as the run did; nothing is cached."""
    return VideoReader(VideoConfig(**read_json(run_dir / "config.json")["video"]), cache_dir=None)


def load_run(run_dir: Path) -> tuple[PeftModel, Any]:
    """The run's model, as the last stage that has learnt left it, and its processor.

    Raises:
        ArtifactError: no such run, or no adapter in it yet.
        ConfigError: the base model cannot be loaded.
    """
    model, processor = load_base(run_model_config(run_dir))
    adapted = PeftModel.from_pretrained(model, str(run_dir / "adapter"))
    adapted.eval()
    return adapted, processor


def load_dense(config: ModelConfig, adapter: Path | None) -> tuple[Any, Any]:
    """The model with plain linear layers, and its processor.

    A 4-bit base is dequantised to its compute dtype: the weights that it computes with, no longer in 4 bits.

    Args:
        config: how the base is loaded.
        adapter: directory of a PEFT adapter that is added to those weights; None leaves the base as it is.

    Raises:
        ConfigError: the base model cannot be loaded.
    """
    model: Any
    model, processor = load_base(config)
    if config.quantization == "nf4":
        model.dequantize(DTYPES[config.compute_dtype])
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model, processor
