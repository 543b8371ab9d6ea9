"""What a run answered, for its page: each question with what it shows, its reference and the reply after every stage.

Questions that were right and became wrong come first. A page has room for so many texts and small pictures; the rest
is left to the files of the run, which the page links.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import escape
from PIL import Image

from mllm_keeplora.data.images import ImageError, load_image
from mllm_keeplora.data.video.reader import VideoError, VideoReader
from mllm_keeplora.evaluation.task_files import ASKED
from mllm_keeplora.reports.results import ReportError, Results, names_of
from mllm_keeplora.reports.tables import stage_label
from mllm_keeplora.runs.files import ArtifactError, read_json_lines
from mllm_keeplora.runs.run_directory import StageDirectory

# A page of 20 MB: so much of texts with their markup, so much of pictures; charts and tables take the rest.
TEXT_BYTES, PICTURE_BYTES = 7_000_000, 10_000_000
ROW_BYTES, CELL_BYTES = 330, 60  # markup of a question, and of each reply
MOST_TEXT = 300  # characters of a question, a reference or a reply
THUMBNAIL = (104, 80)  # most pixels
MOST_MEDIA, FRAMES = 4, 3  # pictures of a question, and frames of a clip
MOST_CLIPS = 200  # that are decoded for one page: each may take a second

# What became of a question over the stages, in the order of the page -> how a filter names it.
KINDS = {
    "lost": "lost",
    "never": "never right",
    "back": "lost and regained",
    "learnt": "learnt",
    "kept": "right throughout",
    "unscored": "without a score of its own",
}


class Words(NamedTuple):
    """What a page calls what was asked: the part, one of it, a reply, and what stands beside the replies."""

    heading: str
    one: str
    reply: str
    columns: tuple[str, str, str]


OF_QUESTIONS = Words("Answers", "question", "What the model said", ("shown", "question", "reference"))
OF_PICTURES = Words("Pictures", "picture", "The class that the model named", ("picture", "prompt", "class"))


class Answer(NamedTuple):
    """A reply; `right` is None where the metric gives single questions no score."""

    reply: str
    right: bool | None


@dataclass(frozen=True)
class Question:
    """What was asked, and what was answered.

    Attributes:
        text: of the last turn.
        reference: the answer that is expected.
        shown: kind and file of what the question shows.
        answers: one a column; None where it was not asked.
        kind: what a filter finds it by.
        story: what became of it, in words.
    """

    text: str
    reference: str
    shown: list[tuple[str, Path]]
    answers: list[Answer | None]
    kind: str
    story: str


@dataclass(frozen=True)
class Row:
    """A question as a page shows it; `pictures` are data addresses, or the file's address alone."""

    question: Question
    pictures: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Section:
    """The questions of one task or benchmark.

    Attributes:
        name: its name.
        columns: labels of the replies.
        rows: those on the page.
        total: of all its questions.
        kinds: what a filter offers -> its name and the number of questions.
        files: label -> address of all replies, relative to the page.
    """

    name: str
    columns: list[str]
    rows: list[Row]
    total: int
    kinds: dict[str, tuple[str, int]]
    files: dict[str, str]


# --- Reading ---


def read_replies(stage: StageDirectory, name: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The saved lines of a task or benchmark by lmms-eval's task and number; empty where nothing was saved.

    Raises:
        ReportError: the file was damaged.
    """
    path = replies_file(stage, name)
    if path is None:
        return {}
    try:
        return {(str(line["task"]), int(line["doc_id"])): line for line in read_json_lines(path)}
    except ArtifactError as error:
        raise ReportError(f"cannot write the report: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"cannot write the report: {path}: expected lines with task and doc_id ({type(error).__name__}: {error}); "
            "it was edited"
        ) from error


def replies_file(stage: StageDirectory, name: str) -> Path | None:
    """Where a stage's replies lie: those that were measured later (backfill) beside its own."""
    files = (folder / f"{name}.jsonl" for folder in (stage.backfilled_replies, stage.replies))
    return next((file for file in files if file.is_file()), None)


def as_answer(line: Mapping[str, Any] | None, most: float) -> Answer | None:
    """A saved line; right where its score is at least half of `most`, what a question can reach."""
    if line is None:
        return None
    score = line.get("score")
    return Answer(_text(line.get("reply")), None if score is None else score / most >= 0.5)


def as_question(line: Mapping[str, Any], answers: list[Answer | None], kind: str, story: str) -> Question:
    """A question of lmms-eval's record: ours says what was asked, of others we know the usual keys."""
    doc = line.get("doc")
    doc = doc if isinstance(doc, dict) else {"question": doc}
    messages = doc.get(ASKED) or []
    parts = [part for message in messages for part in message["content"]]
    shown = [(part["type"], Path(part["path"])) for part in parts if part["type"] != "text"]
    if messages:
        asked: Any = "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
    else:
        asked = next((doc[key] for key in ("question", "text", "problem", "query") if doc.get(key)), doc)
    target = line.get("target")
    reference = " | ".join(map(_text, target)) if isinstance(target, list) else _text(target)
    return Question(_text(asked), reference, shown, answers, kind, story)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def story_of(answers: Sequence[Answer | None]) -> tuple[str, str]:
    """What became of a question: its kind, and words; the first answer is the untouched base's."""
    known = [(number, answer.right) for number, answer in enumerate(answers) if answer and answer.right is not None]
    if not known:
        return "unscored", ""
    turns = [(a, b) for a, b in pairwise(known) if a[1] != b[1]]
    end = known[-1][1]
    if not turns:
        return ("kept", "right throughout") if end else ("never", "never right")
    (before, _), (after, _) = turns[-1]
    if not end:
        return "lost", f"right {f'after {before}' if before else 'for the base'}, wrong after {after}"
    if len(turns) > 1:
        return "back", f"wrong after {before}, right again after {after}"
    return "learnt", f"right from {after} on"


# --- Sections ---


def run_sections(results: Results, reader: VideoReader) -> list[Section]:
    """The answers of a run: a section for each task and benchmark of which replies were saved.

    Raises:
        ReportError: a file of replies was damaged.
    """
    rows = results.retention["rows"]
    stages = [results.directory.stage(row["stage"], row["task"]) for row in rows]
    columns = [stage_label(row) for row in rows]
    page = Pages(names_of(results.retention), reader)
    for name in names_of(results.retention):
        found = [read_replies(stage, name) for stage in stages]
        most = _most(rows, name, found)
        questions = []
        for key, line in _merged(found).items():
            answers = [as_answer(replies.get(key), most) for replies in found]
            questions.append(as_question(line, answers, *story_of(answers)))
        questions.sort(key=lambda question: [*KINDS].index(question.kind))
        by_label = dict(zip(columns, stages, strict=True))
        page.add(name, columns, questions, KINDS, _addresses(by_label, name, results.directory.path))
    return page.sections


def _most(rows: Sequence[Mapping[str, Any]], name: str, found: Iterable[Mapping[Any, Mapping[str, Any]]]) -> float:
    """What a question of a task or benchmark can reach by its own score, to be told from all saved lines.

    That is not the largest value of the benchmark's number where a right answer is 1 and the number a percentage
    (MVBench, MMVU, Video-MME) or a sum (MME).
    """
    scores = [row["scores"].get(name) for row in rows]
    native_max = next((float(score["native_max"]) for score in scores if score), 1.0)
    highest = max((line.get("score") or 0.0 for replies in found for line in replies.values()), default=0.0)
    return native_max if highest > 1 else min(native_max, 1.0)


def _merged(found: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Every question once, as it was asked first."""
    merged: dict[Any, Any] = {}
    for replies in found:
        merged = {**replies, **merged}
    return merged


def _addresses(stages: Mapping[str, StageDirectory], name: str, root: Path) -> dict[str, str]:
    files = {label: replies_file(stage, name) for label, stage in stages.items()}
    return {label: quote(str(file.relative_to(root))) for label, file in files.items() if file is not None}


def difference_sections(runs: Mapping[str, Results], reader: VideoReader) -> list[Section]:
    """Questions that runs answer differently after their last stage: right in one and wrong in another.

    Args:
        runs: short name -> one run.
        reader: of clips.
    """
    first = next(iter(runs.values()))
    page = Pages(names_of(first.retention), reader)
    for name in names_of(first.retention):
        found = {}
        for label, run in runs.items():
            last = run.retention["rows"][-1]
            found[label] = read_replies(run.directory.stage(last["stage"], last["task"]), name)
        most = _most(first.retention["rows"], name, found.values())
        asked = [key for key in _merged(found.values()) if all(key in replies for replies in found.values())]
        questions = []
        for key in asked:
            answers = [as_answer(replies[key], most) for replies in found.values()]
            right = [label for label, answer in zip(found, answers, strict=True) if answer and answer.right]
            if 0 < len(right) < len(runs):
                words = f"right with {' and '.join(right)} alone"
                questions.append(as_question(next(iter(found.values()))[key], answers, words, words))
        counts = Counter(question.kind for question in questions)
        kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))  # noqa: B023 - used at once
        questions.sort(key=lambda question: kinds.index(question.kind))  # noqa: B023
        page.add(name, [*runs], questions, {kind: kind for kind in kinds})
    return page.sections


class Pages:
    """Fills a page with sections as far as it has room; what one leaves goes to those after it."""

    def __init__(self, names: Sequence[str], reader: VideoReader) -> None:
        self.sections: list[Section] = []
        self.left, self.text = len(names), TEXT_BYTES
        self.thumbnails = Thumbnails(reader)

    def add(
        self,
        name: str,
        columns: list[str],
        questions: Sequence[Question],
        kinds: Mapping[str, str],
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Adds a section, where there are questions."""
        text, pictures = self.text // self.left, self.thumbnails.left // self.left
        self.left -= 1
        if not questions:
            return
        rows: list[Row] = []
        for question in questions:
            if (cost := _cost(question)) > text:
                break
            text, self.text = text - cost, self.text - cost
            shown, spent = self.thumbnails.of(question.shown[:MOST_MEDIA], pictures)
            pictures -= spent
            rows.append(Row(question, shown))
        counts = Counter(question.kind for question in questions)
        offered = {kind: (words, counts[kind]) for kind, words in kinds.items() if counts[kind]}
        self.sections.append(Section(name, columns, rows, len(questions), offered, dict(files or {})))


def _cost(question: Question) -> int:
    """Bytes of a question on the page."""
    texts = [question.text, question.reference, *(answer.reply for answer in question.answers if answer)]
    places = sum(3 * len(str(path)) for _, path in question.shown[:MOST_MEDIA])
    return sum(_bytes(cut(text)) for text in texts) + places + ROW_BYTES + CELL_BYTES * len(question.answers)


def _bytes(text: str) -> int:
    return len(str(escape(text)).encode(errors="replace"))


def cut(text: str) -> str:
    """A text at the length that a page has room for; whole it stands in the files."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT].rstrip()}…"


class Thumbnails:
    """Small pictures as data addresses, each made once, as long as the page has room for them."""

    def __init__(self, reader: VideoReader) -> None:
        self.reader, self.left, self.clips = reader, PICTURE_BYTES, MOST_CLIPS
        self.made: dict[Path, list[str]] = {}

    def of(self, shown: Sequence[tuple[str, Path]], room: int) -> tuple[list[tuple[str, list[str]]], int]:
        """Of each file its address and pictures, none where there is no room or no such file; and their bytes."""
        found: list[tuple[str, list[str]]] = []
        spent = 0
        for kind, path in shown:
            pictures = self._pictures(kind, path) if spent < room else []
            size = sum(map(len, pictures))
            pictures, size = (pictures, size) if spent + size <= room else ([], 0)
            spent += size
            found.append((f"file://{quote(str(path.absolute()), errors='replace')}", pictures))
        self.left -= spent
        return found, spent

    def _pictures(self, kind: str, path: Path) -> list[str]:
        if path not in self.made:
            try:
                self.made[path] = [_thumbnail(image) for image in self._images(kind, path)]
            except (ImageError, VideoError):  # gone, or replaced since: its link says where it was
                self.made[path] = []
        return self.made[path]

    def _images(self, kind: str, path: Path) -> Iterator[Image.Image]:
        if kind == "image":
            yield load_image(path)
        elif self.clips > 0:
            self.clips -= 1
            frames = self.reader.read(path).frames
            yield from (Image.fromarray(frames[(2 * i + 1) * len(frames) // (2 * FRAMES)]) for i in range(FRAMES))


def _thumbnail(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.thumbnail(THUMBNAIL)
    image.save(buffer, format="WEBP", quality=55, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
