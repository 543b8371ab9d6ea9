"""Pictures with a class: the folder a class and the JSON form, the classes' names and prompts, and batches of them.

A task of this kind has `classes` in the stream's YAML, or the name of a YAML beside it that holds them:

    classes:
      templates: ['a photo of a {}.']      # training takes the first, evaluation the mean of all
      names: {n01: tench, n02: goldfish}   # folder or record's class: name; or a list of names; optional for folders

`train` and `test` are folders with one folder a class (torchvision's ImageFolder), or files of records
{"image": "a.jpg", "class": "n01"} whose paths are relative to `media_root`.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPProcessor

from mllm_keeplora.data.chat_template import ProcessorError
from mllm_keeplora.data.conversation import Classes, Sample
from mllm_keeplora.data.images import ImageError, load_image
from mllm_keeplora.data.record_files import BadRecord, RecordError, class_folders, is_folder, visible
from mllm_keeplora.data.record_forms import Parsed, Said, Slot, read_name
from mllm_keeplora.errors import ConfigError, did_you_mean
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.resources import is_there
from mllm_keeplora.settings import shown
from mllm_keeplora.yaml_files import read_yaml

_KEYS = {"image", "class", "id"}
_BLANK = "___"  # stands for the name in the question that reports show


def build_classes(entry: Mapping[str, Any], source: Path | None) -> Classes:
    """The classes of a task.

    Args:
        entry: `classes` of the stream's YAML.
        source: folder that names them where the entry does not; None where there is none.

    Raises:
        ConfigError: an entry of another form, a template without a place for the name, or one name for two classes.
        RecordError: the folder cannot be read.
    """
    if unknown := [key for key in entry if key not in ("templates", "names")]:
        raise ConfigError(f"unknown key {shown(unknown[0])}; known keys: templates, names")
    templates: Any = entry.get("templates")
    names: Any = entry.get("names")
    if not _are_texts(templates) or any(template.count("{}") != 1 for template in templates):
        raise ConfigError(f"templates is {shown(templates)}; expected a list of texts, each with one {{}} for the name")
    if names is None:
        if source is None:
            raise ConfigError("names is missing; only folders of pictures name the classes themselves")
        keys = [path.name for path in class_folders(source)]
        names = {key: key.replace("_", " ") for key in keys}
        if blank := [key for key, name in names.items() if not name.strip()]:
            raise ConfigError(f"the folder {blank[0]!r} names no class; rename it, or give names")
    if isinstance(names, list) and _are_texts(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"two classes have the name {twice[0]!r}; give each its own")
        names = {name: name for name in names}
    if not isinstance(names, Mapping) or not _are_texts([*names, *names.values()]):
        raise ConfigError(f"names is {shown(names)}; expected 'class: name' lines, or a list of names, all texts")
    _check_different(names)
    return Classes(tuple(names), tuple(names.values()), tuple(templates))


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


def _check_different(names: Mapping[str, str]) -> None:
    """As a CLIP reads them: letters composed (NFC), without case, and any white space as one blank."""
    first: dict[str, str] = {}
    for key, name in names.items():
        other = first.setdefault(" ".join(unicodedata.normalize("NFC", name).lower().split()), key)
        if other != key:
            raise ConfigError(
                f"classes {other!r} and {key!r} have the names {names[other]!a} and {name!a}, which are one to a CLIP: "
                "case, blanks and how letters are composed do not count. Give each its own"
            )
    if len(names) < 2:
        raise ConfigError(f"one class alone, {next(iter(names))!r}; there is nothing to choose from: add another")


def read_reference(file: Path, root: Path) -> tuple[Path, Classes]:
    """Pictures that a CLIP is to see as it did, and the texts that it compares them with (general samples).

    They stand in a YAML:

        pictures: train                                # folder of pictures, or of one folder a class; or records
        classes: {templates: ['a photo of a {}.']}     # as a task has them; free texts are names under '{}'

    Args:
        file: the YAML.
        root: folder that `pictures`, and the paths in records, are relative to.

    Returns:
        Where the pictures lie, whose own classes are not read, and the texts: the first template with every name.

    Raises:
        ConfigError: a file of another form.
        RecordError: the folder that names the classes cannot be read.
    """
    try:
        return _read_reference(file, root)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read_reference(file: Path, root: Path) -> tuple[Path, Classes]:
    entry: Any = read_yaml(file)
    if not isinstance(entry, dict) or entry.keys() != {"pictures", "classes"}:
        raise ConfigError(f"found {shown(entry)}; expected the lines 'pictures: FOLDER' and 'classes: ..'")
    pictures, classes = entry["pictures"], entry["classes"]
    if not isinstance(pictures, str) or not pictures:
        raise ConfigError(f"pictures is {shown(pictures)}; expected a folder, or a file of records")
    source = root / pictures
    if not is_there(source):
        raise ConfigError(f"pictures: {source} is not there; name a folder, or a file of records")
    names = source if is_folder(source) and any(path.is_dir() for path in visible(source)) else None
    try:
        classes = read_yaml(file.parent / classes) if isinstance(classes, str) else classes
        if not isinstance(classes, dict):
            raise ConfigError(f"found {shown(classes)}; expected templates and names, or a YAML of them")
        return source, build_classes(classes, names)
    except ConfigError as error:
        said = f"{entry['classes']}: {error}" if isinstance(entry["classes"], str) else error
        raise ConfigError(f"classes: {said}") from error


def parse_classified(value: object, classes: Classes, answered: bool = True) -> Parsed:
    """A record {"image", "class"} as question and answer; the question's words are for readers alone.

    Not `answered`, it is a question alone, and its class is not read.

    Raises:
        BadRecord: another form, or a class that is not among them.
    """
    if isinstance(value, BadRecord):
        raise value
    wanted = {"image", "class"} if answered else {"image"}
    if not isinstance(value, dict) or not wanted <= value.keys() <= _KEYS:
        expected = '{"image": PATH, "class": CLASS}, and "id"' if answered else '{"image": PATH}, and "class" and "id"'
        raise BadRecord(f"{shown(value)}; expected {expected} at most")
    question: list[str | Slot] = [Slot("image", read_name(value["image"], "image"))]
    question.append(classes.templates[0].replace("{}", _BLANK))
    answer = [Said("assistant", [_name(value["class"], classes)])] if answered else []
    return Parsed(value.get("id", value["image"]), [Said("user", question), *answer])


def _name(key: object, classes: Classes) -> str:
    if key not in classes.keys:
        known = f"none of the {len(classes.keys)} classes{did_you_mean(str(key), classes.keys)}"
        raise BadRecord(f"the class {shown(key)} is {known}; add it to `classes`, or correct the record")
    return classes.names[classes.keys.index(key)]


def check_every_class(samples: Iterable[Sample], classes: Classes, source: object) -> None:
    """Raises RecordError for a class that no training sample shows."""
    seen = {sample.answers[0] for sample in samples}
    unseen = [key for key, name in zip(classes.keys, classes.names, strict=True) if name not in seen]
    if unseen:
        raise RecordError(
            f"{source}: {len(unseen)} of {len(classes.keys)} classes have no picture to learn from, {unseen[0]!r} "
            "first; add some, or take it out of `classes`"
        )


class ClassCollator:
    """Collates pictures with a class to a batch of `CLIPClassifier`.

    Each picture is chosen among the classes of its own task, also where a batch mixes tasks. Pictures are read at every
    access, prompts tokenised once.

    Args:
        processor: of a CLIP.
    """

    def __init__(self, processor: CLIPProcessor) -> None:
        self.processor = processor
        self._tokens: dict[tuple[Classes, ...], dict[str, Tensor]] = {}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Makes one batch.

        Returns:
            pixel_values [B, 3, H, W]; input_ids and attention_mask [C, T] int64, a prompt of every class of the tasks
            in the batch; candidates [B, C] bool; labels [B, 2] int64, of which the second is the class where the
            sample has an answer.

        Raises:
            ImageError: a picture that cannot be decoded.
            ProcessorError: a prompt that is too long for the model.
        """
        lists = tuple(dict.fromkeys(_classes(sample) for sample in samples))
        if lists not in self._tokens:
            prompts = [prompt for classes in lists for prompt in classes.prompts(classes.templates[0])]
            self._tokens[lists] = tokenise(self.processor, prompts)
        begins, total = {}, 0
        for classes in lists:
            begins[classes], total = total, total + len(classes.names)
        candidates = torch.zeros(len(samples), total, dtype=torch.bool)
        labels = torch.full((len(samples), 2), IGNORED_LABEL)
        for row, sample in enumerate(samples):
            classes = _classes(sample)
            begin = begins[classes]
            candidates[row, begin : begin + len(classes.names)] = True
            if sample.answers:
                labels[row, 1] = begin + classes.names.index(sample.answers[0])
        pixels = process_pictures(self.processor, [_picture(sample) for sample in samples])
        return {"pixel_values": pixels, **self._tokens[lists], "candidates": candidates, "labels": labels}


def _classes(sample: Sample) -> Classes:
    if sample.classes is None:
        raise ProcessorError(f"sample {sample.id!r} has no classes to choose from, and a CLIP writes no answers")
    return sample.classes


def _picture(sample: Sample) -> Any:
    try:
        return load_image(sample.media[0].path)
    except ImageError as error:
        raise ImageError(f"sample {sample.id!r}: {error}") from error


def process_pictures(processor: CLIPProcessor, pictures: Sequence[Any]) -> Tensor:
    """pixel_values [pictures, 3, height, width] fp32 of decoded pictures."""
    pixels: Tensor = processor.image_processor(
        images=list(pictures), return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    return pixels


def check_prompts(processor: CLIPProcessor, classes: Classes) -> None:
    """Raises ProcessorError for a prompt that is too long, or that is another class's too, to the tokenizer."""
    for template in classes.templates:
        prompts = classes.prompts(template)
        first: dict[tuple[int, ...], int] = {}
        for row, tokens in enumerate(tokenise(processor, prompts)["input_ids"].tolist()):
            other = first.setdefault(tuple(tokens), row)
            if other != row:
                raise ProcessorError(
                    f"the prompts {shown(prompts[other])} and {shown(prompts[row])} are the same tokens: the model's "
                    "tokenizer does not know letters in them, or tells them not apart. Give the classes other names"
                )


def tokenise(processor: CLIPProcessor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [prompts, tokens] int64, padded on the right.

    Raises:
        ProcessorError: a prompt of more tokens than the model has places for.
    """
    most = processor.tokenizer.model_max_length
    tokens = processor.tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="pt", verbose=False)
    lengths = tokens["attention_mask"].sum(1)
    if int(lengths.max()) > most:
        row = int(lengths.argmax())
        raise ProcessorError(
            f"the prompt {shown(prompts[row])} has {int(lengths[row])} tokens, the model takes at most {most}; shorten "
            "the template, or the class's name"
        )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
