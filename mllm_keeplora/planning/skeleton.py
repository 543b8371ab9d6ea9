"""The base model without weights, and the shape of what it is given."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.big_modeling import init_empty_weights
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's, without network
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig
from mllm_keeplora.data.classification import process_pictures, tokenise
from mllm_keeplora.data.collator import classes_in, collator_of, prepare_questions
from mllm_keeplora.data.conversation import Classes, Message, Part, Sample
from mllm_keeplora.data.records import select_evenly
from mllm_keeplora.data.video.reader import Clip, VideoReader
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.clip import CLIPClassifier, classifies
from mllm_keeplora.modeling.families import Media, family_of
from mllm_keeplora.modeling.loading import (
    DTYPES,
    check_revision,
    load_processor,
    model_config_of,
    stored_quantization,
)
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.resources import find
from mllm_keeplora.units import format_bytes, format_count

# Assumed where the data are not there: tokens of question and answer, and what is shown.
ASSUMED_TEXT_TOKENS = 256
ASSUMED_IMAGE = (480, 640)  # height, width
ASSUMED_CLASSES = 100
RECORDS_SAMPLED = 64  # per task, to find a long one


def build_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The base model from its config alone, parameters on the meta device.

    Raises:
        ConfigError: the config cannot be had, or a revision of a directory.
        TargetError: an unknown model family.
    """
    check_revision(config)
    with _fetching(config, "config") as source:
        return skeleton_of(model_config_of(config, source.pop("pretrained_model_name_or_path"), **source), config)


def skeleton_of(model_config: Any, config: ModelConfig) -> PreTrainedModel:
    """A model of that config without weights; its buffers are real."""
    attention = "eager" if config.attn_implementation == "eager" else "sdpa"
    settings = {"dtype": DTYPES[config.compute_dtype], "attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        if family_of(model_config).classifies:
            return CLIPClassifier._from_config(model_config, **settings)
        settings["trust_remote_code"] = config.trust_remote_code
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(model_config, **settings)
    # What ties embeddings and lm_head is undone without weights. Where the language model's own config does not tie
    # them, as InternVL3-8B's, its weights hold both, and loading keeps them apart whatever the whole config says.
    if model_config.tie_word_embeddings and model_config.get_text_config().tie_word_embeddings:
        model.tie_weights()
    return model


def build_processor(config: ModelConfig) -> Any:
    """The base model's processor.

    Raises:
        ConfigError: it cannot be had.
    """
    with _fetching(config, "processor") as source:
        return load_processor(config, source.pop("pretrained_model_name_or_path"), **source)


@contextmanager
def _fetching(config: ModelConfig, what: str) -> Iterator[dict[str, Any]]:
    """Gives the arguments of a from_pretrained, and explains its failures."""
    try:
        yield {
            "pretrained_model_name_or_path": str(find(config.base_model)),
            "trust_remote_code": config.trust_remote_code,
            "revision": config.revision or "main",
        }
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, KeepLoRAError):
            raise
        raise ConfigError(
            f"a plan needs the {what} of {config.base_model!r}, which is neither a directory here nor in the "
            f"hub's cache nor to be fetched ({_first_line(error)}). Connect once, or put its config.json and "
            "processor files (weights are not needed) in a directory and pass --model.base_model DIRECTORY"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_weights(config: ModelConfig, model: PreTrainedModel) -> str:
    """What the headers of the weights say, or where those cannot be read the config's parameter count."""
    counted = sum(p.numel() for p in model.parameters())
    by_config, directory = f"{format_count(counted)} parameters by the config", find(config.base_model)
    try:
        if directory.is_dir():
            found = get_local_safetensors_metadata(directory)
        else:
            found = get_safetensors_metadata(config.base_model, revision=config.revision)
    except NotASafetensorsRepoError:
        return f"{by_config}; no safetensors weights there yet"
    except (HTTPError, OSError, SafetensorsParsingError) as error:
        return f"{by_config}; headers of its weights not read ({_first_line(error)})"
    files = [file.tensors.values() for file in found.files_metadata.values()]
    numbers, size = sum(found.parameter_count.values()), sum(max(t.data_offsets[1] for t in f) for f in files)
    text = f"{format_count(numbers)} parameters, {format_bytes(size)} in {len(files)} safetensors file(s)"
    # Tied weights are stored once or twice; anything beyond that is another model than the config's.
    if stored_quantization(model.config) is not None:
        return f"{text}, stored quantised"  # several numbers packed in one
    return text if abs(numbers - counted) <= 0.1 * counted else f"{text}, but {by_config}: they do not belong"


class SampleShape(NamedTuple):
    """The longest sample that the plan reckons with."""

    tokens: int  # media tokens included
    supervised: int  # of them, those that give logits
    vision_tokens: int  # rows of the vision tower: patches of all tiles or frames, class tokens included
    pixels: int  # numbers of its pixel values
    media: Media | None  # what it shows
    source: str  # where that is from
    # Of a model that chooses among classes: prompts of `tokens` that pass with a batch, whatever its size, and those of
    # general and rehearsed pictures that pass with them in training. 0 where a sample's tokens are its own.
    prompts: int = 0
    prompts_beside: int = 0

    def texts(self, batch: int) -> int:
        """How many sequences of `tokens` pass with a batch of samples."""
        return self.prompts or batch


def sample_shape(inputs: Mapping[str, Any], model_config: Any, media: Media | None, source: str) -> SampleShape:
    """The shape of one sample from its model inputs."""
    # pixel_values of images, pixel_values_videos of clips; Video-LLaVA has pixel_values_images.
    pixels = [torch.as_tensor(inputs[key]) for key in inputs if key.startswith("pixel_values")]
    rows = [family_of(model_config).vision_rows(values, model_config.vision_config) for values in pixels]
    numbers = sum(values.numel() for values in pixels)
    supervised = int((inputs["labels"] != IGNORED_LABEL).sum()) if "labels" in inputs else 0
    tokens, prompts = int(inputs["input_ids"].shape[-1]), classes_in(inputs)
    return SampleShape(tokens, supervised, sum(rows), numbers, media, source, prompts)


def assumed_shape(
    processor: Any, model: PreTrainedModel, config: RunConfig, lists: Sequence[Classes] = ()
) -> SampleShape:
    """One grey image or clip through the processor, and an assumed number of tokens beside it.

    Args:
        processor: the base model's.
        model: of `build_skeleton`.
        config: settings of the run.
        lists: the classes that tasks name; where there are none, some are assumed for a model that chooses.
    """
    (height, width), frames = ASSUMED_IMAGE, config.video.frames
    if classifies(processor):
        names = tuple(f"class {number}" for number in range(ASSUMED_CLASSES))
        classes = max(lists or [Classes(names, names, ("a photo of a {}.",))], key=lambda each: len(each.names))
        told = "named" if lists else "assumed"
        inputs = {
            "pixel_values": process_pictures(processor, [Image.new("RGB", (width, height))]),
            **tokenise(processor, classes.prompts(classes.templates[0])),
            "candidates": torch.ones(1, len(classes.names), dtype=torch.bool),
        }
        source = f"a picture among {len(classes.names)} {told} classes; the data are not there"
        return sample_shape(inputs, model.config, "image", source)._replace(supervised=1)
    media: Media = "video" if "video" in family_of(model.config).vision_layers else "image"
    if media == "video":
        what = f"clip of {frames} frames"
        grey = np.zeros((frames, height, width, 3), np.uint8)
        shown: Part = Clip(grey, tuple(range(frames)), 8.0, frames)
    else:
        what = f"{width}x{height} image"
        shown = Image.new("RGB", (width, height))
    inputs = prepare_questions(processor, [[Message("user", (shown, ""))]], torch.device("cpu"))
    source = f"assumed: a {what} and {ASSUMED_TEXT_TOKENS} tokens of text; the data are not there"
    shape = sample_shape(inputs, model.config, media, source)
    # All of the text may be answers, of several turns.
    return shape._replace(tokens=shape.tokens + ASSUMED_TEXT_TOKENS, supervised=ASSUMED_TEXT_TOKENS)


def longest_shape(
    processor: Any, model: PreTrainedModel, config: RunConfig, records: Mapping[str, list[Sample]]
) -> SampleShape:
    """The longest of the tasks' long samples: per task the longest text of a sample of records, collated."""
    collator = collator_of(processor, VideoReader(config.video, None))
    shapes = []
    for task, samples in records.items():
        drawn = [samples[i] for i in select_evenly(len(samples), 1.0, RECORDS_SAMPLED)]
        sample = max(drawn, key=lambda s: sum(len(message.text) for message in s.messages))
        source = f"{task}, record {sample.id!r}: the longest text of {RECORDS_SAMPLED} records a task"
        if sample.classes is not None:
            source = f"{task}, the task with the most text: {len(sample.classes.names)} classes"
        shapes.append(sample_shape(collator([sample]), model.config, next(iter(sample.kinds), None), source))
    longest = max(shapes, key=lambda shape: (shape.texts(1) * shape.tokens, shape.vision_tokens))
    return longest._replace(supervised=max(shape.supervised for shape in shapes))
