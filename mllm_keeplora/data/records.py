"""Question-answer records on disk, read and checked into `Sample`s.

Three forms are read, told apart record by record by their keys:

- LLaVA training: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`
- LLaVA test: `{"question_id", "image", "text", "answer"}`
- TRL messages: `{"messages": [{"role": "user" | "assistant", "content"}, ...], "images": [path]}`

A `.json` file is one list of records, a `.jsonl` file has one record a line. Rows are counted from 1, so that
the row of a `.jsonl` record is its line number.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageFile
from tqdm import tqdm

from mllm_keeplora.errors import KeepLoRAError

# Where the image goes in LLaVA's own records. Samples do not carry it: the chat template places its own.
IMAGE_PLACEHOLDER = "<image>"
RECORD_SUFFIXES = (".json", ".jsonl")

# Everything Pillow's decoders raise on damaged files; it has no common base class.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_DECODE_THREADS = 8  # decoding releases the GIL; more threads than this only contend for the disk
_ERRORS_SHOWN = 10
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}


class RecordError(KeepLoRAError, ValueError):
    """A data file, or records in it, cannot be used; the message names file, rows and remedy."""


class ImageError(KeepLoRAError, ValueError):
    """An image file that is missing, empty or does not decode."""


class _BadRecord(Exception):
    """One record is unusable; the message is the reason, without file and row."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer, as plain text: no image placeholder, prompt suffix included."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One conversation about at most one image, which belongs to the first question.

    Attributes:
        id: the record's `id` or `question_id`, or `<file>:<row>` where it has neither.
        image: path of the image file, None for a text-only sample.
        turns: at least one.
    """

    id: str
    image: Path | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class SkippedRecord:
    """A bad record, as it is named in errors and in the stage manifest."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class _ParsedRecord:
    id: object
    image: str | None
    messages: list[tuple[str, str]]  # (role, text) with role in {user, assistant}


def load_records(
    path: Path,
    image_root: Path,
    *,
    prompt_suffix: str = "",
    allow_text_only: bool = False,
    on_bad_record: Literal["error", "skip"] = "error",
) -> tuple[list[Sample], list[SkippedRecord]]:
    """Reads and checks a whole data file: its records and every image they name, which is decoded once.

    Args:
        path: a `.json` or `.jsonl` file, see the module's docstring for the forms.
        image_root: folder that the records' image paths are relative to and must stay in, links resolved.
        prompt_suffix: appended to every question as it is.
        allow_text_only: accept records without an image.
        on_bad_record: "error" refuses the file when any record is bad; "skip" leaves the bad ones out and
            returns them.

    Returns:
        The samples in file order, and the skipped records in row order (none with "error").

    Raises:
        RecordError: the file cannot be read, has no usable record, or (with "error") has bad records: all of
            them are counted and the first ten named.
    """
    samples: dict[int, Sample] = {}
    bad: dict[int, str] = {}
    for row, value in _read_rows(path):
        try:
            record = _parse_record(value)
            samples[row] = _to_sample(
                record, f"{path.name}:{row}", image_root, prompt_suffix, allow_text_only
            )
        except _BadRecord as error:
            bad[row] = str(error)

    problems = _find_image_problems(
        {sample.image for sample in samples.values() if sample.image is not None}, path.name
    )
    for row, sample in list(samples.items()):
        if sample.image in problems:
            bad[row] = problems[sample.image]
            del samples[row]

    skipped = [SkippedRecord(file=str(path), row=row, reason=bad[row]) for row in sorted(bad)]
    if skipped and (on_bad_record == "error" or not samples):
        raise RecordError(_describe(path, skipped, total=len(samples) + len(skipped)))
    if not samples:
        raise RecordError(f"{path} holds no records; expected a list of at least one")
    return list(samples.values()), skipped


def clean_question(text: str, prompt_suffix: str = "") -> str:
    """The question as the model is asked it: no image placeholder, no outer white space, the suffix added.

    Training and evaluation both go through here, so that a question reads the same in both.
    """
    return text.replace(IMAGE_PLACEHOLDER, "").strip() + prompt_suffix


def select_evenly(n: int, fraction: float, cap: int | None = None) -> list[int]:
    """Evenly spaced indices: min(cap, round(n * fraction)) of them, at least one, starting at 0.

    Args:
        n: number of items to choose from, >= 1.
        fraction: share of the items wanted, in (0, 1].
        cap: most indices wanted, >= 1; None for no limit.

    Returns:
        Strictly increasing indices in [0, n). The same arguments always give the same indices.

    Raises:
        ValueError: an argument is outside its range.
    """
    if n < 1:
        raise ValueError(f"cannot select from {n} items; expected at least 1")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a number in (0, 1]")
    if cap is not None and cap < 1:
        raise ValueError(f"cap is {cap}; expected at least 1, or null for no limit")
    count = max(1, round(n * fraction))
    if cap is not None:
        count = min(count, cap)
    return [index * n // count for index in range(count)]


def named_images(path: Path) -> set[str]:
    """The image paths that a data file's records name, as written there; unusable records name none.

    Raises:
        RecordError: the file cannot be read.
    """
    names = set()
    for _, value in _read_rows(path):
        try:
            name = _parse_record(value).image
        except _BadRecord:
            continue  # load_records reports it; for the caller it has no image
        if name is not None:
            names.add(name)
    return names


@contextmanager
def refuse_truncated_images() -> Iterator[None]:
    """Makes Pillow raise on truncated files inside the block.

    lmms-eval sets `ImageFile.LOAD_TRUNCATED_IMAGES` for the whole process when it is imported, and from then
    on Pillow fills the missing part with grey and says nothing. The flag is global: enter the block outside
    any thread pool.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_image(path: Path) -> Image.Image:
    """Reads an image file completely, as RGB. Call inside `refuse_truncated_images`.

    Raises:
        ImageError: the file is missing, empty, truncated or no image that Pillow can read.
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"image {path} is empty (0 bytes)")
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"image {path} does not decode ({type(error).__name__}: {error})") from error


def _read_rows(path: Path) -> list[tuple[int, object]]:
    """(row, parsed JSON value) of every record; the value is a `_BadRecord` for a line that is not JSON."""
    if path.suffix not in RECORD_SUFFIXES:
        raise RecordError(f"{path}: unknown kind of data file; expected one of {', '.join(RECORD_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: editors on Windows write a byte order mark
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends in JSONL.
        lines = enumerate(text.split("\n"), start=1)
        return [(row, _parse_line(line)) for row, line in lines if line.strip()]
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise RecordError(
            f"{path} holds a JSON {_kind(records)}; expected a list of records (one a line: name it .jsonl)"
        )
    return list(enumerate(records, start=1))


def _parse_line(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return _BadRecord(f"the line is not valid JSON: {error}")


def _parse_record(value: object) -> _ParsedRecord:
    if isinstance(value, _BadRecord):
        raise value
    if not isinstance(value, dict):
        raise _BadRecord(f"the record is a JSON {_kind(value)}; expected an object")
    if "conversations" in value:
        messages = _read_messages(value["conversations"], "conversations", "from", "value", _LLAVA_ROLES)
    elif "messages" in value:
        roles = {"user": "user", "assistant": "assistant"}
        messages = _read_messages(value["messages"], "messages", "role", "content", roles)
    elif "text" in value:
        question = _read_text(value["text"], "question ('text')")
        messages = [("user", question), ("assistant", _read_text(value.get("answer"), "answer"))]
    else:
        raise _BadRecord(
            "no question: none of 'conversations' (LLaVA training), 'text' (LLaVA test) and 'messages' is "
            f"there; found {', '.join(map(repr, value)) or 'no key at all'}"
        )
    return _ParsedRecord(
        id=value.get("id", value.get("question_id")), image=_read_image_name(value), messages=messages
    )


def _read_messages(
    value: object, key: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Reads a list of alternating questions and answers; the last one has to be an answer."""
    if not isinstance(value, list) or not value:
        raise _BadRecord(f"no question: {key!r} is empty or no list; expected a list of messages")
    expected = list(roles)
    messages = []
    for index, message in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise _BadRecord(
                f"{where} is a JSON {_kind(message)}; expected an object with {role_key!r} and {text_key!r}"
            )
        role = expected[index % 2]
        if message.get(role_key) != role:
            raise _BadRecord(
                f"{where} has {role_key!r} {message.get(role_key)!r}; expected {role!r} "
                f"({expected[0]!r} and {expected[1]!r} in turn, beginning with {expected[0]!r})"
            )
        what = f"{'question' if index % 2 == 0 else 'answer'} ({where}[{text_key!r}])"
        messages.append((roles[role], _read_text(message.get(text_key), what)))
    if len(messages) % 2:
        raise _BadRecord(f"no answer: {key!r} ends with a question ({expected[0]!r})")
    return messages


def _read_text(value: object, what: str) -> str:
    """Text of one message; TRL's content parts become one text, an image part LLaVA's placeholder."""
    if isinstance(value, list):
        value = "\n".join(_read_part(part, what) for part in value)
    if value is None:
        raise _BadRecord(f"no {what}")
    if not isinstance(value, str):
        raise _BadRecord(f"the {what} is {value!r}, a JSON {_kind(value)}; expected text in quotes")
    if not value.replace(IMAGE_PLACEHOLDER, "").strip():
        raise _BadRecord(f"no {what}: it is empty")
    return value


def _read_part(part: object, what: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "image":
        return IMAGE_PLACEHOLDER
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _BadRecord(
        f'the {what} has a part {part!r}; expected {{"type": "image"}} or {{"type": "text", "text": "..."}}'
    )


def _read_image_name(record: Mapping[str, object]) -> str | None:
    value = record.get("image", record.get("images"))
    if isinstance(value, list):
        if len(value) > 1:
            raise _BadRecord(f"{len(value)} images; expected at most one")
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise _BadRecord(f"the image is a JSON {_kind(value)}; expected the path of a file")
    if not value.strip() or "\0" in value:
        raise _BadRecord(f"the image path is {value!r}; expected the path of a file")
    return value


def _to_sample(
    record: _ParsedRecord, default_id: str, image_root: Path, prompt_suffix: str, allow_text_only: bool
) -> Sample:
    if record.image is None and not allow_text_only:
        raise _BadRecord(
            "no image; text-only records need 'allow_text_only: true' at the task in the stream YAML"
        )
    _check_placeholders(record)
    texts = [text for _, text in record.messages]
    turns = tuple(
        Turn(question=clean_question(question, prompt_suffix), answer=answer.strip())
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    )
    image = None if record.image is None else _locate_image(record.image, image_root)
    return Sample(id=default_id if record.id is None else str(record.id), image=image, turns=turns)


def _check_placeholders(record: _ParsedRecord) -> None:
    counts = [text.count(IMAGE_PLACEHOLDER) for _, text in record.messages]
    if sum(counts) > 1:
        raise _BadRecord(
            f"{sum(counts)} times {IMAGE_PLACEHOLDER} in its text; expected one image, in the first question"
        )
    if sum(counts[1:]):
        raise _BadRecord(f"{IMAGE_PLACEHOLDER} in a later message; expected it in the first question")
    if sum(counts) and record.image is None:
        raise _BadRecord(f"no image although the question has {IMAGE_PLACEHOLDER}")


def _locate_image(name: str, image_root: Path) -> Path:
    path = image_root / name
    # realpath on both: a data root that is itself a link is fine, a link that leads out of it is not.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(image_root)):
        raise _BadRecord(
            f"image {name!r} lies outside the image root {image_root} (links resolved); move the file into "
            "it, or set the task's 'image_root' in the stream YAML to a folder that holds it"
        )
    return path


def _find_image_problems(paths: set[Path], label: str) -> dict[Path | None, str]:
    """Decodes every image, in threads; returns the reason for each that fails. Reads all images once."""
    ordered = sorted(paths)
    with refuse_truncated_images(), ThreadPoolExecutor(_DECODE_THREADS) as pool:
        reasons = tqdm(
            pool.map(_find_image_problem, ordered),
            total=len(ordered),
            desc=f"checking images of {label}",
            unit="image",
            disable=None,  # no bar where the output is not a terminal,
            delay=2.0,  # nor for data that are checked in less than two seconds
        )
        return {path: reason for path, reason in zip(ordered, reasons, strict=True) if reason is not None}


def _find_image_problem(path: Path) -> str | None:
    try:
        decode_image(path)
    except ImageError as error:
        return str(error)
    return None


def _describe(path: Path, bad: Sequence[SkippedRecord], total: int) -> str:
    lines = [f"{path}: {len(bad)} of {total} records cannot be used"]
    lines += [f"  row {record.row}: {record.reason}" for record in bad[:_ERRORS_SHOWN]]
    if len(bad) > _ERRORS_SHOWN:
        lines.append(f"  ... and {len(bad) - _ERRORS_SHOWN} more")
    remedy = "Correct them"
    if len(bad) < total:
        remedy += (
            ", or, in training files, leave them out by 'on_bad_record: skip' (the manifest then names them)"
        )
    return "\n".join([*lines, remedy + "."])


def _kind(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
