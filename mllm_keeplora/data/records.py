"""Question-answer records, read and checked into `Sample`s: the one reader of training, tests, checks and plans.

Where records lie: `record_files`. In which forms: `record_forms`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mllm_keeplora.data.chat_template import ProcessorError
from mllm_keeplora.data.classification import check_every_class, parse_classified
from mllm_keeplora.data.conversation import Classes, MediaFile, Message, Part, Sample
from mllm_keeplora.data.preflight import IMAGES_ONLY, Preflight
from mllm_keeplora.data.record_files import EXTRACTED, BadRecord, HubTable, Rows, is_folder, read_rows
from mllm_keeplora.data.record_files import RecordError as RecordError
from mllm_keeplora.data.record_forms import PLACEHOLDERS, Parsed, Said, Slot, parse_record
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.runs.files import file_state

# In the order in which CL-VISTA tries them behind a video's name.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")

# Key of a `test_prompt_suffix` for the reference answers that it does not name.
OTHER_ANSWERS = "*"

_ERRORS_SHOWN = 10
_EXTRACTED = Path("cache").absolute() / EXTRACTED


@dataclass(frozen=True)
class SkippedRecord:
    """A bad record, as it is named in errors and in the stage manifest."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class Record:
    """One record that was read.

    Attributes:
        row: counted from 1.
        value: as the user wrote it; of a table's media, the paths.
        sample: what it means; None where it cannot be used.
        problem: why it cannot be used.
        is_test_form: LLaVA's test form, whose `text` and `answer` a scoring function is given as they are.
    """

    row: int
    value: Any
    sample: Sample | None = None
    problem: str = ""
    is_test_form: bool = False


def load_records(
    path: Path | HubTable,
    media_root: Path,
    *,
    answers: Path | HubTable | None = None,
    prompt_suffix: str = "",
    allow_text_only: bool = False,
    answered: bool = True,
    on_bad_record: Literal["error", "skip"] = "error",
    checker: Preflight | None = IMAGES_ONLY,
    task: str | None = None,
    extracted: Path = _EXTRACTED,
    classes: Classes | None = None,
) -> tuple[list[Sample], list[SkippedRecord]]:
    """Reads and checks a whole data file: its records and every image or clip they name, decoded once.

    Args:
        path: a file (`RECORD_SUFFIXES`) or a dataset.
        media_root: folder that the records' image and video paths are relative to and must stay in, links
            resolved. Paths of a folder of pictures are relative to that one; its links may lead to this.
        answers: the file with the answers, where questions and answers lie apart.
        prompt_suffix: appended to every question as it is.
        allow_text_only: accept records without an image or video.
        answered: False where records may end with a question, and a folder may hold pictures without a class.
        on_bad_record: "error" refuses the file when any record is bad; "skip" leaves the bad ones out and
            returns them.
        checker: checks the records and what they name; None where that has been done before.
        task: the task that trains on them; None for records that evaluation asks.
        extracted: folder for the media that lie inside a table.
        classes: of pictures that are classified; None for records with answers in words.

    Returns:
        The samples in file order, and the skipped records in row order (none with "error").

    Raises:
        RecordError: the file cannot be read, has no usable record, or (with "error") has bad records: all of
            them are counted and the first ten named; or questions and answers differ in number; or classes that
            the model cannot be asked for.
    """
    samples, bad = read_records(
        path,
        media_root,
        answers=answers,
        prompt_suffix=prompt_suffix,
        allow_text_only=allow_text_only,
        answered=answered,
        extracted=extracted,
        classes=classes,
    )
    if checker is not None:
        try:
            bad |= checker.records(samples, path.name, task).bad
        except ProcessorError as error:
            raise RecordError(f"{path}: classes: {error}") from error

    kept = [sample for row, sample in samples.items() if row not in bad]
    skipped = [SkippedRecord(file=str(path), row=row, reason=bad[row]) for row in sorted(bad)]
    if skipped and (on_bad_record == "error" or not kept):
        raise bad_records(path, skipped, total=len(kept) + len(skipped))
    if not kept:
        raise RecordError(f"{path} holds no records; expected a list of at least one")
    if classes is not None and task is not None:
        check_every_class(kept, classes, path)
    return kept, skipped


def read_records(
    path: Path | HubTable,
    media_root: Path,
    *,
    answers: Path | HubTable | None = None,
    prompt_suffix: str = "",
    allow_text_only: bool = False,
    answered: bool = True,
    extracted: Path = _EXTRACTED,
    classes: Classes | None = None,
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Reads a data file without opening what its records name; the arguments are those of `load_records`.

    Returns:
        Row -> sample, and row -> reason for each record that cannot be used; rows are counted from 1.

    Raises:
        RecordError: the file cannot be read; or questions and answers differ in number.
    """
    samples: dict[int, Sample] = {}
    bad: dict[int, str] = {}
    settings: dict[str, Any] = {"allow_text_only": allow_text_only, "answered": answered, "extracted": extracted}
    for record in each_record(path, media_root, answers=answers, classes=classes, **settings):
        if record.sample is None:
            bad[record.row] = record.problem
        else:
            samples[record.row] = with_suffixes(record.sample, prompt_suffix)
    if answers is not None:
        bad |= _find_repeated_ids(samples)
    return samples, bad


def each_record(
    path: Path | HubTable,
    media_root: Path,
    *,
    answers: Path | HubTable | None = None,
    allow_text_only: bool = False,
    answered: bool = True,
    extracted: Path = _EXTRACTED,
    classes: Classes | None = None,
) -> Iterator[Record]:
    """Reads record by record; the arguments are those of `load_records`.

    Args:
        answered: False where a record's answer lies in another file that is not read.

    Raises:
        RecordError: the file cannot be read; or questions and answers differ in number.
    """
    folder = path if isinstance(path, Path) and is_folder(path) else media_root
    places = _Places(folder, media_root, tuple(os.path.realpath(root) for root in (folder, media_root, extracted)))
    name = path.name
    for row, value in _read_pairs(path, answers, answered, extracted):
        try:
            parsed = parse_record(value, answered) if classes is None else parse_classified(value, classes, answered)
            sample = _to_sample(parsed, f"{name}:{row}", places, allow_text_only, classes)
            yield Record(row, value, sample, is_test_form=parsed.is_test_form)
        except BadRecord as error:
            yield Record(row, value, problem=str(error))


def _find_repeated_ids(samples: Mapping[int, Sample]) -> dict[int, str]:
    """Rows that ask under the id of an earlier row: paired by position, a shifted file shows itself so."""
    first: dict[str, int] = {}
    repeated = {}
    for row, sample in samples.items():
        if first.setdefault(sample.id, row) != row:
            repeated[row] = f"question_id {sample.id} is used in row {first[sample.id]} already"
    return repeated


def clean_question(text: str) -> str:
    """A test record's question without media placeholders and outer white space."""
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return text.strip()


def with_suffix(message: Message, suffix: str) -> Message:
    """A question with a text behind its words. Training and evaluation both go through here."""
    if not suffix:
        return message
    last = max(index for index, part in enumerate(message.parts) if isinstance(part, str))
    parts = (*message.parts[:last], f"{message.parts[last]}{suffix}", *message.parts[last + 1 :])
    return replace(message, parts=parts)


def with_suffixes(sample: Sample, suffix: str) -> Sample:
    """A record with a text behind every question."""
    if not suffix:
        return sample
    messages = (with_suffix(m, suffix) if m.role == "user" else m for m in sample.messages)
    return replace(sample, messages=tuple(messages))


def suffix_for(suffix: str | Mapping[str, str], answer: object | None = None) -> str:
    """What is added to a question in evaluation alone; see `TaskSpec.test_prompt_suffix`. None: no known answer."""
    if isinstance(suffix, str):
        return suffix
    other = suffix[OTHER_ANSWERS]
    return other if answer is None else suffix.get(str(answer), other)


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


def named_media(
    path: Path | HubTable, media_root: Path, extracted: Path = _EXTRACTED, classes: Classes | None = None
) -> set[Path]:
    """The images and clips that a data file's records name; unusable records name none.

    Raises:
        RecordError: the file cannot be read.
    """
    # Of an unusable record load_records speaks; for the caller it has no image.
    records = each_record(path, media_root, allow_text_only=True, answered=False, extracted=extracted, classes=classes)
    return {file.path for record in records if record.sample is not None for file in record.sample.media}


def _read_pairs(path: Path | HubTable, answers: Path | HubTable | None, answered: bool, extracted: Path) -> Rows:
    """(row, value) of every record. With a file of answers, each question gets the answer of its position."""
    rows = read_rows(path, extracted, classed=answered)
    if answers is None:
        return rows
    replies = read_rows(answers, extracted)
    if len(replies) != len(rows):
        raise RecordError(
            f"{path} has {len(rows)} questions, {answers} has {len(replies)} answers; they are paired by "
            "position, so both need the same number"
        )
    return [(row, _join(value, reply)) for (row, value), (_, reply) in zip(rows, replies, strict=True)]


def _join(question: object, reply: object) -> object:
    if isinstance(question, dict) and isinstance(reply, dict):
        return {**question, "answer": reply.get("answer")}
    return question if isinstance(question, BadRecord) else BadRecord("the answer is no JSON object")


class _Places(NamedTuple):
    """Where media lie.

    Attributes:
        folder: what names are relative to, as written: the media root, or a folder of pictures.
        media_root: as written.
        roots: real paths of the folders that files may lie in. A data root that is itself a link is fine, a link that
            leads out of it is not.
    """

    folder: Path
    media_root: Path
    roots: tuple[str, ...]


def _to_sample(
    parsed: Parsed, default_id: str, places: _Places, allow_text_only: bool, classes: Classes | None
) -> Sample:
    messages = tuple(_to_message(said, places) for said in parsed.messages)
    sample = Sample(default_id if parsed.id is None else str(parsed.id), messages, classes)
    if not sample.media and not allow_text_only:
        raise BadRecord(
            "no image or video; text-only records need 'allow_text_only: true' at the task in the stream YAML"
        )
    return sample


def _to_message(said: Said, places: _Places) -> Message:
    parts: list[Part] = [_locate(part, places) if isinstance(part, Slot) else part for part in said.parts]
    return Message(said.role, tuple(parts), said.supervised, said.accepted)


def _locate(slot: Slot, places: _Places) -> MediaFile:
    """The file of a name that is known; it has to lie in the media root, or among the media of tables."""
    name = str(slot.name)
    path = _find_file(name, places.folder, slot.kind)
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in places.roots):
        raise BadRecord(
            f"{slot.kind} {name!r} lies outside the media root {places.media_root} (links resolved); move the file "
            "into it, or set the task's 'media_root' in the stream YAML to a folder that holds it"
        )
    return MediaFile(slot.kind, path)


def _find_file(name: str, media_root: Path, media: Media) -> Path:
    """The file of that name; a clip may be named without its suffix."""
    path = media_root / name
    if media == "image" or file_state(path) is not None:
        return path
    completed = (media_root / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES)
    return next((candidate for candidate in completed if file_state(candidate) is not None), path)


def bad_records(path: Path | HubTable, bad: Sequence[SkippedRecord], total: int) -> RecordError:
    """The error that counts the bad records of a file and names the first ten."""
    lines = [f"{path}: {len(bad)} of {total} records cannot be used"]
    lines += [f"  row {record.row}: {record.reason}" for record in bad[:_ERRORS_SHOWN]]
    if len(bad) > _ERRORS_SHOWN:
        lines.append(f"  ... and {len(bad) - _ERRORS_SHOWN} more (keeplora check --all shows every one)")
    remedy = "Correct them"
    if len(bad) < total:
        remedy += ", or, in training files, leave them out by 'on_bad_record: skip' (the manifest then names them)"
    return RecordError("\n".join([*lines, remedy + "."]))
