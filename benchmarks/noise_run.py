"""A run on noise: generated images or clips, and a base model of random weights. Nothing is downloaded."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import av
import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from shapes import PATCH, SPECIAL, Shape, llava_config, settings_for, video_llava_config
from tokenizers import Tokenizer, models, pre_tokenizers

from mllm_keeplora.config import (
    EvaluationConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    VideoConfig,
)
from mllm_keeplora.continual.history import History
from mllm_keeplora.continual.run import Run
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.data.conversation import MediaFile, Message, Sample
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.stream import load_stream, load_training_records
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import start_processes
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import RunContext
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.modeling.targets import find_targets
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.runs.run_directory import RunDirectory

TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<' + c['type'] + '>\n' }}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ANSWER = " ".join(f"w{n}" for n in range(15))
BASE, STREAM = "base", "stream.yaml"  # what `Noise.write` leaves


@dataclass(frozen=True)
class Family:
    """What a sample of a family's 7B model is.

    Attributes:
        config: of its model.
        media: what a record shows, the key of its file.
        suffix: of that file.
        image_size: pixels a side of an image or frame.
        length: tokens of a sample, those of its image or clip included.
    """

    config: Callable[[Shape], Any]
    media: Media
    suffix: str
    image_size: int
    length: int


FAMILIES = {
    "llava": Family(llava_config, "image", ".png", 336, 640),
    "video_llava": Family(video_llava_config, "video", ".mp4", 224, 2304),  # 8 frames of 257 tokens
}


@dataclass(frozen=True)
class Noise:
    """A stream whose images and texts mean nothing.

    Attributes:
        shape: of the model.
        length: tokens of a sample, those of its image or clip included.
        samples: of every task.
        questions: of every task.
        tasks: which all have the same samples.
        family: a name in `FAMILIES`.
    """

    shape: Shape
    length: int
    samples: int
    questions: int
    tasks: int = 1
    family: str = "llava"

    def write(self, root: Path) -> None:
        """Writes the stream, and a base model's folder with config and processor but without weights."""
        family = FAMILIES[self.family]
        processor = make_processor(family, self.shape.image_size)
        processor.save_pretrained(root / BASE)
        family.config(self.shape).save_pretrained(root / BASE)
        generator = np.random.default_rng(0)
        files = [f"{n}{family.suffix}" for n in range(self.samples)]
        for file in files:
            write_media(root / file, generator, self.shape.image_size)
        question = _question(processor, root / files[0], self.length)
        self._write_records(root, files, question)
        task = {"train": "train.json", "test": "test.json", "metric": "exact", "max_new_tokens": 8}
        tasks = [{"name": f"noise{n}", **task} for n in range(1, self.tasks + 1)]
        stream = {"name": "noise", "data_root": str(root), "tasks": tasks}
        (root / STREAM).write_text(yaml.safe_dump(stream))

    def _write_records(self, root: Path, files: list[str], question: str) -> None:
        media = FAMILIES[self.family].media
        said = (("human", f"<{media}>\n{question}"), ("gpt", ANSWER))
        turns = [{"from": speaker, "value": text} for speaker, text in said]
        asked = {"text": question, "answer": "w0"}
        records = {
            "train.json": [{"id": n, media: f, "conversations": turns} for n, f in enumerate(files)],
            "test.json": [{"question_id": n, media: f, **asked} for n, f in enumerate(files[: self.questions])],
        }
        for name, content in records.items():
            (root / name).write_text(json.dumps(content))


def make_processor(family: Family, image_size: int) -> Any:
    """The family's image and video processing, and a tokenizer of a few words."""
    words = [*SPECIAL, *(f"w{n}" for n in range(100))]
    vocabulary = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    side = {"height": image_size, "width": image_size}
    crop: dict[str, Any] = {"size": {"shortest_edge": image_size}, "crop_size": side}
    settings = {
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>", "<video>"],
        ),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }
    if family.media == "image":
        images = transformers.CLIPImageProcessor(**crop)
        return transformers.LlavaProcessor(image_processor=images, image_token="<image>", **settings)
    return transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**crop),
        video_processor=transformers.VideoLlavaVideoProcessor(**crop),
        **settings,
    )


def write_media(file: Path, generator: np.random.Generator, side: int) -> None:
    """Noise: an image, or a clip of 16 frames."""
    if file.suffix == ".png":
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
        return
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for picture in generator.integers(0, 256, (16, side, side, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _question(processor: Any, file: Path, length: int) -> str:
    """As many words as fill a sample up to `length` tokens."""
    collator = ChatCollator(processor, None, VideoReader(VideoConfig(), None))

    def tokens(words: int) -> int:
        shown = MediaFile("image" if file.suffix == ".png" else "video", file)
        asked = Message("user", (shown, " ".join(f"w{n % 100}" for n in range(words))))
        return int(collator([Sample("0", (asked, Message("assistant", (ANSWER,))))])["input_ids"].shape[1])

    words = 1 + length - tokens(1)
    if words < 1 or tokens(words) != length:
        raise SystemExit(f"--length {length} is too short: media, answer and template take {tokens(1)} tokens")
    return " ".join(f"w{n % 100}" for n in range(words))


def noise_config(
    root: Path, batch: int, rank: int, device: torch.device, probe_batches: int = 2, **settings: Any
) -> RunConfig:
    """Settings of a run on what `Noise.write` left.

    Args:
        root: where it was written.
        batch: samples of a batch, in probe and evaluation alike.
        rank: of both towers.
        device: the model computes in the dtype that is usual there.
        probe_batches: of a pass over the probe sample.
        settings: other fields of `RunConfig`.
    """
    tower = TowerConfig(rank=rank)
    return RunConfig(
        stream=str(root / STREAM),
        model=replace(settings_for(device), base_model=str(root / BASE)),
        language=tower,
        vision=tower,
        probe=ProbeConfig(fraction=1.0, max_samples=probe_batches * batch, batch_size=batch),
        evaluation=EvaluationConfig(batch_size=batch),
        report_to=[],
        **settings,
    )


class NoiseRun(Run):
    """A run on noise, whose context is put together from a model that has no files.

    Its stages are run by `run_stage`. It cannot be continued: the hashes of its data and model say nothing.
    """

    def __init__(self, config: RunConfig) -> None:
        """Reads the data; a model is given by `take`."""
        start_processes(cpu=resolve_device(config.model).type == "cpu")
        stream = load_stream(Path(config.stream))
        directory = RunDirectory(Path(config.run_dir))
        data = {spec.name: "noise" for spec in stream.specs}
        history = History(config, stream, directory, base_hash="random weights", data=data, manifests=[])
        super().__init__(config, stream, load_method(config), history)
        write_task_files(stream, directory.task_files)
        self.reader = VideoReader(config.video, None)
        self.records = load_training_records(stream, checker=Preflight(self.reader))
        self.processor = transformers.AutoProcessor.from_pretrained(config.model.base_model)

    def take(self, model: transformers.PreTrainedModel) -> None:
        """Makes `context` of a model, as `random_model` returns it; computes its weight bases."""
        config, towers = self.config, self.config.towers()
        if config.train.activation_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        targets = find_targets(model, {name: tower.targets for name, tower in towers.items()})
        eps_w = {name: tower.eps_w for name, tower in towers.items()}
        self.context = RunContext(
            config=config,
            stream=self.stream,
            directory=self.directory,
            records=self.records,
            model=model,
            processor=self.processor,
            reader=self.reader,
            targets=targets,
            weight_files=weight_basis_files(model, targets, eps_w, Path(config.cache_dir)),
            device=resolve_device(config.model),
        )
