"""Question-answer records on disk, read and checked into `Sample`s.

Four forms are read, told apart record by record by their keys; `image` may be `video` in the first three:

- LLaVA training: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`
- LLaVA test: `{"question_id", "image", "text", "answer"}`; a list of answers accepts any of them (MLLM-ACL's
  OCR), and CoIN's Grounding has its answer under `answer_bbox`
- TRL messages: `{"messages": [{"role": "user" | "assistant", "content"}, ...], "images": [path]}`
- CL-VISTA test, two files paired by position: `{"question_id", "video_name", "question"}` and `{"answer"}`

A `.json` file is one list of records, a `.jsonl` file has one record a line. Rows are counted from 1, so that
the row of a `.jsonl` record is its line number.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mllm_keeplora.data.conversation import MediaFile, Message, Sample
from mllm_keeplora.data.preflight import IMAGES_ONLY, Preflight
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.families import Media

# Where image and video go in LLaVA's own records. Samples do not carry it: the chat template places its own.
PLACEHOLDERS: dict[Media, str] = {"image": "<image>", "video": "<video>"}
RECORD_SUFFIXES = (".json", ".jsonl")
# In the order in which CL-VISTA tries them behind a video's name.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")

# Key of a `test_prompt_suffix` for the reference answers that it does not name.
OTHER_ANSWERS = "*"

_ERRORS_SHOWN = 10
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}


class RecordError(KeepLoRAError, ValueError):
    """A data file, or records in it, cannot be used; the message names file, rows and remedy."""


class _BadRecord(Exception):
    """One record is unusable; the message is the reason, without file and row."""


@dataclass(frozen=True)
class SkippedRecord:
    """A bad record, as it is named in errors and in the stage manifest."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class _ParsedRecord:
    id: object
    media: Media | None
    name: str | None  # of the image or clip, as written
    messages: list[tuple[str, str]]  # (role, text) with role in {user, assistant}


def load_records(
    path: Path,
    media_root: Path,
    *,
    answers: Path | None = None,
    prompt_suffix: str = "",
    allow_text_only: bool = False,
    on_bad_record: Literal["error", "skip"] = "error",
    checker: Preflight | None = IMAGES_ONLY,
    task: str | None = None,
) -> tuple[list[Sample], list[SkippedRecord]]:
    """Reads and checks a whole data file: its records and every image or clip they name, decoded once.

    Args:
        path: a `.json` or `.jsonl` file, see the module's docstring for the forms.
        media_root: folder that the records' image and video paths are relative to and must stay in, links
            resolved.
        answers: the file with the answers, where questions and answers lie apart.
        prompt_suffix: appended to every question as it is.
        allow_text_only: accept records without an image or video.
        on_bad_record: "error" refuses the file when any record is bad; "skip" leaves the bad ones out and
            returns them.
        checker: checks the records and what they name; None where that has been done before.
        task: the task that trains on them; None for records that evaluation asks.

    Returns:
        The samples in file order, and the skipped records in row order (none with "error").

    Raises:
        RecordError: the file cannot be read, has no usable record, or (with "error") has bad records: all of
            them are counted and the first ten named; or questions and answers differ in number.
    """
    samples, bad = read_records(
        path, media_root, answers=answers, prompt_suffix=prompt_suffix, allow_text_only=allow_text_only
    )
    if checker is not None:
        bad |= checker.records(samples, path.name, task).bad

    kept = [sample for row, sample in samples.items() if row not in bad]
    skipped = [SkippedRecord(file=str(path), row=row, reason=bad[row]) for row in sorted(bad)]
    if skipped and (on_bad_record == "error" or not kept):
        raise RecordError(_describe(path, skipped, total=len(kept) + len(skipped)))
    if not kept:
        raise RecordError(f"{path} holds no records; expected a list of at least one")
    return kept, skipped


def read_records(
    path: Path,
    media_root: Path,
    *,
    answers: Path | None = None,
    prompt_suffix: str = "",
    allow_text_only: bool = False,
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Reads a data file without opening what its records name; the arguments are those of `load_records`.

    Returns:
        Row -> sample, and row -> reason for each record that cannot be used; rows are counted from 1.

    Raises:
        RecordError: the file cannot be read; or questions and answers differ in number.
    """
    samples: dict[int, Sample] = {}
    bad: dict[int, str] = {}
    for row, value in _read_rows(path, answers):
        try:
            record = _parse_record(value)
            samples[row] = _to_sample(record, f"{path.name}:{row}", media_root, prompt_suffix, allow_text_only)
        except _BadRecord as error:
            bad[row] = str(error)
    if answers is not None:
        bad |= _find_repeated_ids(samples)
    return samples, bad


def _find_repeated_ids(samples: Mapping[int, Sample]) -> dict[int, str]:
    """Rows that ask under the id of an earlier row: paired by position, a shifted file shows itself so."""
    first: dict[str, int] = {}
    repeated = {}
    for row, sample in samples.items():
        if first.setdefault(sample.id, row) != row:
            repeated[row] = f"question_id {sample.id} is used in row {first[sample.id]} already"
    return repeated


def clean_question(text: str, prompt_suffix: str = "") -> str:
    """The question as the model is asked it: no media placeholder, no outer white space, the suffix added.

    Training and evaluation both go through here, so that a question reads the same in both.
    """
    return _without_placeholders(text).strip() + prompt_suffix


def suffix_for(suffix: str | Mapping[str, str], answer: object) -> str:
    """What is added to a question in evaluation alone; see `TaskSpec.test_prompt_suffix`."""
    if isinstance(suffix, str):
        return suffix
    return suffix.get(str(answer), suffix[OTHER_ANSWERS])


def _without_placeholders(text: str) -> str:
    for placeholder in PLACEHOLDERS.values():
        text = text.replace(placeholder, "")
    return text


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


def named_media(path: Path, media_root: Path) -> set[Path]:
    """The images and clips that a data file's records name; unusable records name none.

    Raises:
        RecordError: the file cannot be read.
    """
    names = set()
    for _, value in _read_rows(path):
        try:
            record = _parse_record(value, answered=False)
        except _BadRecord:
            continue  # load_records reports it; for the caller it has no image
        if record.name is not None and record.media is not None:
            names.add(_find_file(record.name, media_root, record.media))
    return names


def _read_rows(path: Path, answers: Path | None = None) -> list[tuple[int, object]]:
    """(row, parsed JSON value) of every record; the value is a `_BadRecord` for a line that is not JSON.

    With a file of answers, each question gets the answer of its position.
    """
    rows = _read_file(path)
    if answers is None:
        return rows
    replies = _read_file(answers)
    if len(replies) != len(rows):
        raise RecordError(
            f"{path} has {len(rows)} questions, {answers} has {len(replies)} answers; they are paired by "
            "position, so both need the same number"
        )
    return [(row, _join(value, reply)) for (row, value), (_, reply) in zip(rows, replies, strict=True)]


def _join(question: object, reply: object) -> object:
    if isinstance(question, dict) and isinstance(reply, dict):
        return {**question, "answer": reply.get("answer")}
    return question if isinstance(question, _BadRecord) else _BadRecord("the answer is no JSON object")


def _read_file(path: Path) -> list[tuple[int, object]]:
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


def _parse_record(value: object, answered: bool = True) -> _ParsedRecord:
    """One record's content; `answered` is False where its answer lies in another file that is not read."""
    if isinstance(value, _BadRecord):
        raise value
    if not isinstance(value, dict):
        raise _BadRecord(f"the record is a JSON {_kind(value)}; expected an object")
    if "conversations" in value:
        messages = _read_messages(value["conversations"], "conversations", "from", "value", _LLAVA_ROLES)
    elif "messages" in value:
        roles = {"user": "user", "assistant": "assistant"}
        messages = _read_messages(value["messages"], "messages", "role", "content", roles)
    elif "text" in value or "question" in value:
        key = "text" if "text" in value else "question"
        messages = [("user", _read_text(value[key], f"question ({key!r})"))]
        if answered:
            messages.append(("assistant", _read_answer(value)))
    else:
        raise _BadRecord(
            "no question: none of 'conversations' (LLaVA training), 'text' (LLaVA test), 'question' "
            f"(CL-VISTA test) and 'messages' is there; found {', '.join(map(repr, value)) or 'no key at all'}"
        )
    media, name = _read_media_name(value)
    return _ParsedRecord(id=value.get("id", value.get("question_id")), media=media, name=name, messages=messages)


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
    """Text of one message; TRL's content parts become one text, media parts LLaVA's placeholders."""
    if isinstance(value, list):
        value = "\n".join(_read_part(part, what) for part in value)
    if value is None:
        raise _BadRecord(f"no {what}")
    if not isinstance(value, str):
        raise _BadRecord(f"the {what} is {value!r}, a JSON {_kind(value)}; expected text in quotes")
    if not _without_placeholders(value).strip():
        raise _BadRecord(f"no {what}: it is empty")
    return value


def _read_answer(record: Mapping[str, object]) -> str:
    """The reference answer of a test record; the first one where several are accepted."""
    value = record.get("answer", record.get("answer_bbox"))
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = value[0]
    return _read_text(value, "answer")


def _read_part(part: object, what: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in PLACEHOLDERS:
        return PLACEHOLDERS[kind]
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _BadRecord(
        f'the {what} has a part {part!r}; expected {{"type": "image"}}, {{"type": "video"}} or '
        '{"type": "text", "text": "..."}'
    )


def _read_media_name(record: Mapping[str, object]) -> tuple[Media | None, str | None]:
    """What a record shows and its name; (None, None) where it shows nothing."""
    found: dict[Media, str] = {}
    for media in get_args(Media):
        for key in (media, f"{media}s", f"{media}_name"):
            name = _read_name(record.get(key), media)
            if name is not None:
                found[media] = name
    if len(found) > 1:
        raise _BadRecord("an image and a video; expected at most one of them")
    return next(iter(found.items()), (None, None))


def _read_name(value: object, media: Media) -> str | None:
    if isinstance(value, list):
        if len(value) > 1:
            raise _BadRecord(f"{len(value)} {media}s; expected at most one")
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise _BadRecord(f"the {media} is a JSON {_kind(value)}; expected the path of a file")
    if not value.strip() or "\0" in value:
        raise _BadRecord(f"the {media} path is {value!r}; expected the path of a file")
    return value


def _to_sample(
    record: _ParsedRecord, default_id: str, media_root: Path, prompt_suffix: str, allow_text_only: bool
) -> Sample:
    if record.media is None and not allow_text_only:
        raise _BadRecord(
            "no image or video; text-only records need 'allow_text_only: true' at the task in the stream YAML"
        )
    _check_placeholders(record)
    messages = [
        Message("user", (clean_question(text, prompt_suffix),))
        if role == "user"
        else Message("assistant", (text.strip(),))
        for role, text in record.messages
    ]
    if record.media is not None and record.name is not None:
        shown = MediaFile(record.media, _locate(record.name, media_root, record.media))
        messages[0] = Message("user", (shown, *messages[0].parts))
    return Sample(default_id if record.id is None else str(record.id), tuple(messages))


def _check_placeholders(record: _ParsedRecord) -> None:
    for media, placeholder in PLACEHOLDERS.items():
        counts = [text.count(placeholder) for _, text in record.messages]
        if sum(counts) > 1:
            raise _BadRecord(
                f"{sum(counts)} times {placeholder} in its text; expected one {media}, in the first question"
            )
        if sum(counts[1:]):
            raise _BadRecord(f"{placeholder} in a later message; expected it in the first question")
        if sum(counts) and record.media != media:
            raise _BadRecord(f"no {media} although the question has {placeholder}")


def _locate(name: str, media_root: Path, media: Media) -> Path:
    path = _find_file(name, media_root, media)
    # realpath on both: a data root that is itself a link is fine, a link that leads out of it is not.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(media_root)):
        raise _BadRecord(
            f"{media} {name!r} lies outside the media root {media_root} (links resolved); move the file into "
            "it, or set the task's 'media_root' in the stream YAML to a folder that holds it"
        )
    return path


def _find_file(name: str, media_root: Path, media: Media) -> Path:
    """The file of that name; a clip may be named without its suffix."""
    path = media_root / name
    if media == "image" or path.is_file():
        return path
    completed = (media_root / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES)
    return next((candidate for candidate in completed if candidate.is_file()), path)


def _describe(path: Path, bad: Sequence[SkippedRecord], total: int) -> str:
    lines = [f"{path}: {len(bad)} of {total} records cannot be used"]
    lines += [f"  row {record.row}: {record.reason}" for record in bad[:_ERRORS_SHOWN]]
    if len(bad) > _ERRORS_SHOWN:
        lines.append(f"  ... and {len(bad) - _ERRORS_SHOWN} more")
    remedy = "Correct them"
    if len(bad) < total:
        remedy += ", or, in training files, leave them out by 'on_bad_record: skip' (the manifest then names them)"
    return "\n".join([*lines, remedy + "."])


def _kind(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
