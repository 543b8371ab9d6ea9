"""Every record as a run is going to read it, before the run is paid for: files decoded, texts collated."""

import copy
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image
from torch.utils.data import DataLoader

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data.classification import check_prompts
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.data.conversation import MediaFile, Sample
from mllm_keeplora.data.images import ImageError, load_image
from mllm_keeplora.data.video.reader import Clip, VideoError, VideoReader
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.runs.files import ArtifactError, file_state, hash_files, read_json, sha256_json, write_json
from mllm_keeplora.units import format_count

logger = logging.getLogger(__name__)

# Enters what is remembered: raise it when a file that was sound, or a number of tokens, may no longer be so.
MEMORY_VERSION = 2
LONGEST_SHOWN = 3

_STAT_THREADS = 16  # network file systems answer many questions at once, one at a time slowly
_MOST_WORKERS = 32
_WRITE_SECONDS = 10.0  # what is found is written this often: a killed check loses no more
_ALONE_SECONDS = 1.0  # what is done by then needs no workers: to start them takes as long
# Items that a worker takes at once; fewer than two such shares are not worth starting workers.
_SHARES = {"image": 32, "video": 2, "record": 64}
# What a token that a processor puts beside a picture may reach into; words of some languages do not end.
_LAST_WORD, _BLANKS = re.compile(r"\S{0,32}\s*\Z"), re.compile(r"\A\s*")

# What processors and chat templates raise at input that they were not made for; it has no common base class.
_REFUSALS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, TemplateError)

Shape = tuple[Any, ...]


class PreflightError(KeepLoRAError, RuntimeError):
    """The check itself could not be carried out."""


class Length(NamedTuple):
    """Tokens of one sample, media tokens included, and how many of them are supervised."""

    tokens: int
    supervised: int


@dataclass(frozen=True)
class Findings:
    """What became of the records of one file.

    Attributes:
        bad: row -> why a run would refuse the record.
        lengths: row -> length of every other one; empty where no processor was given.
    """

    bad: dict[int, str] = field(default_factory=dict)
    lengths: dict[int, Length] = field(default_factory=dict)


@dataclass(frozen=True)
class Preflight:
    """Decodes every image and clip once, and collates every record, in worker processes.

    Records go through `ChatCollator` itself. Each is given pictures of the sizes that its files have, and the
    processor works on every combination of sizes once: how many tokens a picture takes, and whether it is taken at
    all, hangs on its size alone. What was found sound is remembered: files by path, size and time of change, records
    by their texts, the sizes that they show and the processor's files.

    Attributes:
        reader: decodes clips; None refuses every clip.
        memory: folder that remembers what was sound; None remembers it as long as this object lives.
        processor: the base model's; None checks files alone.
        max_lengths: task -> most tokens of a training sample; None, or a task that is not there, for no limit.
        text_trains: whether what is trained sees a record that shows nothing.
        trained: task -> what it trains on, in lines; filled by `records`.
    """

    reader: VideoReader | None = None
    memory: Path | None = None
    processor: Any = None
    max_lengths: Mapping[str, int | None] = field(default_factory=dict)
    text_trains: bool = True
    trained: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, config: RunConfig, tasks: Sequence[str], processor: Any, reader: VideoReader) -> "Preflight":
        """The check that the settings of a run ask for."""
        return cls(
            reader,
            Path(config.cache_dir) / "preflight",
            processor,
            {task: config.train_for(task).max_length for task in tasks},
            config.language.adapt,
        )

    def media(self, files: Collection[MediaFile], label: str) -> dict[Path, str]:
        """The reason for each file that cannot be used. Each is decoded once.

        Args:
            files: images and clips.
            label: what the progress bar calls them.
        """
        found = self._shapes(files, label)
        return {file.path: shape for file, shape in found.items() if isinstance(shape, str)}

    def records(self, samples: Mapping[int, Sample], label: str, task: str | None) -> Findings:
        """Checks the records of one file, and the files that they name.

        Args:
            samples: row -> sample.
            label: what the progress bar calls them.
            task: the task that trains on them; None for records that evaluation asks, of whose answers the model is
                given those alone that stand before a question as its context.

        Raises:
            ProcessorError: classes whose prompts are too long for a CLIP, or the same to it.
        """
        shapes = self._shapes({file for sample in samples.values() for file in sample.media}, label)
        bad: dict[int, str] = {}
        for row, sample in samples.items():
            reasons = [shape for file in sample.media if isinstance(shape := shapes[file], str)]
            if reasons:
                bad[row] = reasons[0]
            elif task is not None and not sample.media and not self.text_trains:
                bad[row] = (
                    "it shows nothing, and language.adapt is false: no adapted layer sees it. Set language.adapt: true"
                )
        if self.processor is None:
            return Findings(bad)
        if classifies(self.processor):  # a picture of any size becomes one of one size, and a name is one answer
            self._check_prompts(samples.values(), task)
            return Findings(bad)
        sound = {row: sample for row, sample in samples.items() if row not in bad}
        asked = {row: sample if task else _as_asked(sample) for row, sample in sound.items()}
        lengths: dict[int, Length] = {}
        for row, found in self._collate(asked, shapes, label).items():
            reason = found if isinstance(found, str) else self._refused(asked[row], found, task)
            if reason is None and not isinstance(found, str):
                lengths[row] = found
            else:
                bad[row] = str(reason)
        if task is not None:
            self.trained[task] = describe_lengths(samples, lengths, self.max_lengths.get(task))
        return Findings(bad, lengths)

    def _check_prompts(self, samples: Collection[Sample], task: str | None) -> None:
        """Raises ProcessorError for classes that the model cannot be asked for."""
        lists = dict.fromkeys(sample.classes for sample in samples if sample.classes is not None)
        for classes in lists:
            check_prompts(self.processor, classes)
        if task is not None and samples:
            self.trained[task] = [f"{len(samples)} pictures of {sum(len(each.names) for each in lists)} classes"]

    def _refused(self, sample: Sample, length: Length, task: str | None) -> str | None:
        """Why training refuses a sample that can be collated."""
        if task is None:
            return None
        if length.supervised == 0:
            return "none of its tokens is supervised: there is nothing to learn. Supervise one of its answers"
        try:
            ChatCollator(self.processor, self.max_lengths.get(task)).check_length(sample, length.tokens)
        except KeepLoRAError as error:
            return str(error)
        return None

    @cached_property
    def _known(self) -> "_Memory":
        return _Memory(self.memory)

    @cached_property
    def _processor_hash(self) -> str:
        """Of all files that it would be saved as, a chat template of the settings among them."""
        with tempfile.TemporaryDirectory() as folder:
            self.processor.save_pretrained(folder)
            return sha256_json([MEMORY_VERSION, transformers.__version__, hash_files(Path(folder))])

    def _shapes(self, files: Collection[MediaFile], label: str) -> dict[MediaFile, Shape | str]:
        """What each file decodes to; a text says why it does not."""
        ordered = sorted(set(files), key=lambda file: (file.kind, file.path))
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            keys = dict(zip(ordered, pool.map(self._media_key, ordered), strict=True))
        for kind, what in (("image", "images"), ("video", "clips")):
            new = {keys[file]: file for file in ordered if file.kind == kind and keys[file] not in self._known}
            decode = _Decode(self.reader)
            self._known.fill(new, decode, f"checking {what} of {label}", kind)
        return {file: _as_shape(self._known[keys[file]]) for file in ordered}

    def _media_key(self, file: MediaFile) -> str:
        sampling = None
        if file.kind == "video" and self.reader is not None:
            config = self.reader.config
            # Some backends refuse what others decode. `timeout` is left out: most raise it, for one clip that was late.
            sampling = [config.frames, config.fps, config.backend]
        state = [os.path.realpath(file.path), file_state(file.path)]
        return sha256_json([MEMORY_VERSION, file.kind, state, sampling, self.reader is None])

    def _collate(
        self, samples: Mapping[int, Sample], shapes: Mapping[MediaFile, Shape | str], label: str
    ) -> dict[int, Length | str]:
        keys = {row: self._record_key(sample, shapes) for row, sample in samples.items()}
        # Of records that differ in nothing that matters here one is collated. Those of one size come together: each
        # worker processes every size that it meets.
        ordered = sorted(samples, key=lambda row: str([shapes[file] for file in samples[row].media]))
        new = {keys[row]: samples[row] for row in ordered if keys[row] not in self._known}
        self._known.fill(new, _Count(self.processor, shapes), f"checking records of {label}", "record")
        found = {row: self._known[key] for row, key in keys.items()}
        return {row: value if isinstance(value, str) else Length(*value) for row, value in found.items()}

    def _record_key(self, sample: Sample, shapes: Mapping[MediaFile, Shape | str]) -> str:
        messages = [
            [
                message.role,
                message.supervised,
                [[part.kind, shapes[part]] if isinstance(part, MediaFile) else part for part in message.parts],
            ]
            for message in sample.messages
        ]
        return sha256_json([self._processor_hash, messages])


# Decodes images, refuses clips, remembers nothing for long.
IMAGES_ONLY = Preflight()


def describe_lengths(samples: Mapping[int, Sample], lengths: Mapping[int, Length], max_length: int | None) -> list[str]:
    """What a stage trains on, in lines: its tokens, and its longest samples with row and id.

    Args:
        samples: row -> sample.
        lengths: row -> length; rows that are not there were refused.
        max_length: of the task.
    """
    if not lengths:
        return []
    tokens, supervised = (sum(column) for column in zip(*lengths.values(), strict=True))
    limit = "no limit" if max_length is None else f"at most {max_length}"
    longest = sorted(lengths, key=lambda row: (-lengths[row].tokens, row))[:LONGEST_SHOWN]
    return [
        f"{len(lengths)} samples of {format_count(tokens)} tokens, {format_count(supervised)} of them supervised",
        f"longest ({limit}): "
        + ", ".join(f"{lengths[row].tokens} tokens in row {row} (id {samples[row].id})" for row in longest),
    ]


def _as_asked(sample: Sample) -> Sample:
    """What evaluation shows of a record: any word stands for the answers that the model is not given."""
    given = {message for prompt, _ in sample.questions for message in prompt}
    messages = (m if m.role != "assistant" or m in given else replace(m, parts=("yes",)) for m in sample.messages)
    return replace(sample, messages=tuple(messages))


def _as_shape(value: Any) -> Shape | str:
    """Lists as tuples, which JSON does not know."""
    return tuple(map(_as_shape, value)) if isinstance(value, list | tuple) else value


class _Memory:
    """Outcomes by key: those of this process, and those that were written below a folder.

    Each writing is a file of its own, named by the hash of what it holds. So processes that share the folder never
    touch each other's files, and a damaged file is not believed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._values: dict[str, Any] = {}
        self._unwritten: dict[str, Any] = {}
        for file in sorted(folder.glob("*.json")) if folder is not None else ():
            try:
                values = read_json(file)
            except ArtifactError:
                continue
            if isinstance(values, dict) and sha256_json(values) == file.stem:
                self._values |= values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def fill(self, items: Mapping[str, Any], compute: Callable[[Any], Any], label: str, kind: str) -> None:
        """Computes the outcomes of items in worker processes.

        A text is a reason for refusing the item: it is not written, as what is wrong may be put right.
        """
        last = time.monotonic()
        try:
            for key, value in zip(items, _in_workers(compute, list(items.values()), label, kind), strict=True):
                self._values[key] = value
                if not isinstance(value, str):
                    self._unwritten[key] = value
                if time.monotonic() - last > _WRITE_SECONDS:
                    self._write()
                    last = time.monotonic()
        finally:
            self._write()

    def _write(self) -> None:
        if self._folder is not None and self._unwritten:
            values = json.loads(json.dumps(self._unwritten))
            write_json(self._folder / f"{sha256_json(values)}.json", values)
        self._unwritten = {}


def _in_workers(compute: Callable[[Any], Any], items: Sequence[Any], label: str, kind: str) -> Iterator[Any]:
    """Outcomes in the order of the items, with a progress bar; workers are started where this process needs long."""
    with progress(label, {"video": "clips"}.get(kind, f"{kind}s"), total=len(items)) as bar:
        end, done = time.monotonic() + _ALONE_SECONDS, 0
        while done < len(items) and (time.monotonic() < end or len(items) - done < 2 * _SHARES[kind]):
            yield compute(items[done])
            done += 1
            bar.update()
        try:
            for outcomes in _by_workers(compute, items[done:], _SHARES[kind]) if done < len(items) else ():
                yield from outcomes
                bar.update(len(outcomes))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise PreflightError(
                f"{label}: a worker process has ended ({error}); was there too little memory? The same command goes "
                "on where it stopped"
            ) from error


def _by_workers(compute: Callable[[Any], Any], items: Sequence[Any], share: int) -> Iterable[list[Any]]:
    return DataLoader(
        _Items(compute, items),
        batch_size=share,
        generator=torch.Generator(),  # the run's own is left where it is
        num_workers=min(_cores(), _MOST_WORKERS),
        collate_fn=list,
    )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Items(torch.utils.data.Dataset[Any]):
    """Items, computed where they are asked for."""

    def __init__(self, compute: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._compute, self._items = compute, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._compute(self._items[index])


class _Decode:
    """What a file decodes to, as JSON: the sides of an image; of a clip its shape and all that it says of itself."""

    def __init__(self, reader: VideoReader | None) -> None:
        self._reader = reader

    def __call__(self, file: MediaFile) -> list[Any] | str:
        try:
            if file.kind == "image":
                return list(load_image(file.path).size)
            if self._reader is None:
                return f"{file.path}: a video, but nothing here reads videos"
            clip = self._reader.read(file.path)
        except (ImageError, VideoError) as error:
            return str(error)
        facts = [getattr(clip, item.name) for item in fields(clip) if item.name != "frames"]
        return [list(clip.frames.shape), *(list(fact) if isinstance(fact, tuple) else fact for fact in facts)]


class _Count:
    """How many tokens a sample has, from the collator that a run uses."""

    def __init__(self, processor: Any, shapes: Mapping[MediaFile, Shape | str]) -> None:
        self._collator = _ShapeCollator(_once_per_shape(processor), shapes)

    def __call__(self, sample: Sample) -> list[int] | str:
        try:
            batch = self._collator([sample])
        except KeepLoRAError as error:
            # Records that differ in nothing but their id share the reason.
            return str(error).removeprefix(f"sample {sample.id!r}: ")
        except _REFUSALS as error:
            return f"its processor or chat template refuses it ({type(error).__name__}: {error})"
        return [int(batch["attention_mask"].sum()), int((batch["labels"] != IGNORED_LABEL).sum())]


class _ShapeCollator(ChatCollator):
    """Gives the processor blank pictures of the sizes that the files have."""

    def __init__(self, processor: Any, shapes: Mapping[MediaFile, Shape | str]) -> None:
        super().__init__(processor)
        self._shapes = shapes

    def _read_images(self, samples: Sequence[Sample]) -> list[list[Image.Image]]:
        shown = [message.media for sample in samples for message in sample.messages]
        return [
            [Image.new("RGB", self._shapes[file]) for file in files if file.kind == "image"]  # type: ignore[arg-type]
            for files in shown
        ]

    def _read_clips(self, samples: Sequence[Sample]) -> list[Clip]:
        found = (self._shapes[file] for sample in samples for file in sample.media if file.kind == "video")
        return [Clip(np.zeros(shape, np.uint8), *facts) for shape, *facts in found]  # type: ignore[arg-type,str-unpack]


def _once_per_shape(processor: Any) -> Any:
    """The processor, all else unchanged, that works once on each combination of sizes."""
    copied = copy.copy(processor)
    copied.__class__ = type(type(processor).__name__, (_OncePerShape, type(processor)), {})
    copied.counted = {}
    return copied


class _OncePerShape:
    """Counts how many tokens pictures and clips add to the prompts that show them, once for each combination of sizes.

    Some processors put words or line breaks beside a picture or frame (Gemma 3, InternVL, Qwen3-VL), of which a
    tokenizer may make one token with what stands there in the prompt: so that is part of a combination.

    Of prompts it gives the right number of tokens, and in place of what pictures become no more than their number.
    """

    counted: dict[Any, list[int]]

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: Sequence[str] | None = None,
        videos: Sequence[np.ndarray[Any, Any]] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        processor: Any = self
        if text is None:
            return {}
        plain = [len(ids) for ids in processor.tokenizer(list(text))["input_ids"]]
        tokens = [getattr(processor, name, None) for name in ("image_token", "video_token")]
        placed = [_places(prompt, [token for token in tokens if token]) for prompt in text]
        sizes = [_sizes(images or ()), [clip.shape for clip in videos or ()]]
        key = json.dumps([sizes, settings.get("video_metadata"), placed])
        if key not in self.counted:
            given = {"images": images, "text": list(text), **({"videos": videos} if videos else {})}
            inputs = super().__call__(**given, **settings)  # type: ignore[misc]
            whole = inputs["attention_mask"].sum(dim=1).tolist()
            self.counted[key] = [many - few for many, few in zip(whole, plain, strict=True)]
        lengths = [few + more for few, more in zip(plain, self.counted[key], strict=True)]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"input_ids": torch.zeros_like(mask, dtype=torch.long), "attention_mask": mask.long()}


def _places(prompt: str, tokens: Sequence[str]) -> list[list[str]]:
    """Each of the tokens in a prompt between the end of the last word before it and the blanks behind it."""
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", prompt)
    return [
        [_LAST_WORD.findall(before)[0], token, _BLANKS.findall(behind)[0]]
        for before, token, behind in zip(pieces[::2], pieces[1::2], pieces[2::2], strict=False)
    ]


def _sizes(images: Sequence[Any]) -> list[Any]:
    """Of images, or of lists of images that are shown together."""
    return [_sizes(image) if isinstance(image, Sequence) else image.size for image in images]
