"""A stream's test files as lmms-eval tasks.

Evaluation reads the run's own copy of a test file, written by the reader of training. lmms-eval reads data through the
datasets library, which infers types: dates become timestamps, and lists do not go with texts. So the copy has one
column of text, one question a row as JSON, which eval/tasks/utils.py decodes.
"""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mllm_keeplora.data.conversation import Classes, MediaFile, Message, Sample
from mllm_keeplora.data.record_files import HubTable, RecordError, is_folder
from mllm_keeplora.data.records import Record, SkippedRecord, bad_records, each_record, suffix_for, with_suffix
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec
from mllm_keeplora.errors import did_you_mean
from mllm_keeplora.evaluation.entry_point import MODEL_ID
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.resources import shipped
from mllm_keeplora.runs.files import ArtifactError, atomic_path, read_json, sha256_json, write_json

TEMPLATES = shipped("eval/tasks")
INDEX_FILE = "tasks.json"
# Of the copy of a test file; eval/tasks/utils.py reads it.
COPY_COLUMN = "record"
# Of a task that is answered by the name of a class: the generation setting that names the file of names and prompts.
CLASSES, CLASSES_SUFFIX = "classes", ".classes.json"
# Keys of a question's messages, and of the name of its score.
ASKED, SCORED_BY = "asked", "scored_by"

Document = dict[str, Any]


@dataclass(frozen=True)
class ScoredTask:
    """Where a stream's task is found in lmms-eval's results.

    Args:
        name: its name in the stream, which keys its score.
        kind: a task of the stream, or a general benchmark.
        lmms_task: its name in lmms-eval.
        score: the number to read, lmms-eval's metric name (or "metric,filter").
        native_max: what that number is divided by.
    """

    name: str
    kind: Literal["task", "general"]
    lmms_task: str
    score: str
    native_max: float


def scored_tasks(stream: Stream) -> list[ScoredTask]:
    """The stream's tasks, then its general benchmarks, with their names in lmms-eval.

    Own files are prefixed: where two tasks share a name, lmms-eval takes its stock one without a word.

    Raises:
        EvaluationError: for a metric that eval/tasks does not have.
    """
    entries: list[ScoredTask] = []
    for spec in stream.specs:
        kind: Literal["task", "general"] = "general" if isinstance(spec, GeneralSpec) else "task"
        if isinstance(spec, GeneralSpec) and spec.lmms_eval_task is not None:
            native_max = float(spec.native_max or 1.0)
            entries.append(ScoredTask(spec.name, kind, spec.lmms_eval_task, str(spec.score), native_max))
        else:
            lmms_task = f"{MODEL_ID}_{stream.name}_{spec.name}"
            native_max = float(_metric_needs(spec).get("native_max", 1.0))
            entries.append(ScoredTask(spec.name, kind, lmms_task, str(spec.metric), native_max))
    return entries


def write_task_files(stream: Stream, directory: Path) -> list[str]:
    """Writes one lmms-eval task YAML per own test file, and tasks.json, which says what is read from the
    results.

    Beside each YAML lies the run's copy of the test file (`COPY_COLUMN`), one question a row (`Sample.questions`). Its
    name holds the hash of its content: datasets remembers files by path and time, and would give older questions.

    Args:
        stream: stock lmms-eval tasks among its general benchmarks need no file.
        directory: where to; made if missing, existing files are replaced.

    Returns:
        lmms-eval's names of the stream's tasks, then of its general benchmarks.

    Raises:
        EvaluationError: for a metric that eval/tasks does not have, or that finds less here than it needs:
            Java, reference captions, a key of the test records.
        RecordError: for a test record that cannot be used.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = scored_tasks(stream)
    _check_java(stream)
    for spec, entry in zip(stream.specs, entries, strict=True):
        test = stream.test_file(spec)
        own = TEMPLATES / "general" / f"{entry.lmms_task}.yaml"
        if test is None and own.is_file():  # a variant of a stock task, not known to lmms-eval
            write_text(directory / own.name, yaml.safe_dump({"include": str(own), "task": own.stem}))
        if test is not None:
            task = _task_yaml(stream, spec, entry, test, directory.resolve())
            write_text(directory / f"{entry.lmms_task}.yaml", yaml.safe_dump(task, sort_keys=False))
    index = {"stream": stream.name, "tasks": [asdict(entry) for entry in entries]}
    write_json(directory / INDEX_FILE, index)
    return [entry.lmms_task for entry in entries]


def read_index(directory: Path) -> tuple[str, list[ScoredTask]]:
    """The stream's name and its scored tasks, as `write_task_files` left them in the directory.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    index = read_json(directory / INDEX_FILE)
    try:
        entries = [ScoredTask(**entry) for entry in index["tasks"]]
        if not all(isinstance(text, str) for text in (index["stream"], *(e.name for e in entries))):
            raise TypeError("a name is no text")
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{directory / INDEX_FILE} is not what a run writes ({type(error).__name__}: {error}); start the run "
            "again, which writes it"
        ) from error
    return index["stream"], entries


def has_classes(directory: Path) -> bool:
    """Whether the replies to a run's tasks are names of classes; its model then writes no text."""
    return any(directory.glob(f"*{CLASSES_SUFFIX}"))


def read_classes(file: Path) -> Classes:
    """Names and prompts of classes, as `write_task_files` left them.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    known = read_json(file)
    try:
        return Classes(tuple(known["names"]), tuple(known["names"]), tuple(known["templates"]))
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{file} is not what a run writes; start the run again, which writes it") from error


def classes_of(directory: Path, task: str | None) -> Classes:
    """The classes of a task or benchmark; of None, of the only one.

    Raises:
        EvaluationError: no such task, or several.
        ArtifactError: a file of the run is missing or damaged.
    """
    entries = read_index(directory)[1]
    found = [entry for entry in entries if task in (None, entry.name)]
    if len(found) != 1:
        wrong = "a picture needs the classes of one task" if task is None else f"the run has no task {task!r}"
        raise EvaluationError(f"{wrong}; name {', '.join(entry.name for entry in entries)}")
    return read_classes(directory / f"{found[0].lmms_task}{CLASSES_SUFFIX}")


def follow_move(directory: Path) -> None:
    """Corrects the copies' paths in the task files of a run that was moved to another folder."""
    for file in directory.glob("*.yaml"):
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        named = [(task.get("dataset_kwargs", {}).get("data_files"), "test"), (task.get("generation_kwargs"), CLASSES)]
        moved = False
        for files, key in named:
            here = str(directory.resolve() / Path(files[key]).name) if key in (files or ()) else None
            if here is not None and files[key] != here:
                files[key], moved = here, True
        if moved:
            write_text(file, yaml.safe_dump(task, sort_keys=False))


def _task_yaml(
    stream: Stream, spec: TaskSpec | GeneralSpec, entry: ScoredTask, test: Path | HubTable, directory: Path
) -> dict[str, Any]:
    needs = _metric_needs(spec)
    rows, documents = _read_documents(stream, spec, test)
    references = _references_file(stream, spec, needs.get("references"))
    if references is not None:
        add = _add_answers if needs["references"] == "answers" else _add_references
        add(spec, documents, references, test)
    _check_record_keys(spec, rows, documents, test, needs.get("record_keys", []))
    if "answers" not in needs.get("record_keys", []):
        _check_one_answer(spec, rows, documents, test)
    copy = _write_copy(documents, directory, entry.lmms_task)
    settings: dict[str, Any] = {"max_new_tokens": spec.max_new_tokens, "do_sample": False, "until": []}
    classes = stream.classes(spec)
    if classes is not None:  # in a file of their own: lmms-eval copies the settings with every question
        file = directory / f"{entry.lmms_task}{CLASSES_SUFFIX}"
        write_json(file, {"names": classes.names, "templates": classes.templates})
        settings[CLASSES] = str(file)
    return {
        "include": str(TEMPLATES / f"{spec.metric}.yaml"),
        "task": entry.lmms_task,
        "dataset_kwargs": {"data_files": {"test": str(copy)}},
        "generation_kwargs": settings,
    }


# --- The run's copy of a test file ---


def _read_documents(
    stream: Stream, spec: TaskSpec | GeneralSpec, test: Path | HubTable
) -> tuple[list[int], list[Document]]:
    """Of each question its record's row, and what a scoring function is given: the user's record, and what
    `_documents` adds. A record of several turns gives several."""
    rows: list[int] = []
    documents: list[Document] = []
    bad: list[SkippedRecord] = []
    total = 0
    for record in each_record(
        test,
        stream.test_media_root(spec).resolve(),
        answers=stream.answers_file(spec),
        allow_text_only=spec.allow_text_only,
        extracted=stream.extracted,
        classes=stream.classes(spec),
    ):
        total += 1
        if record.sample is None:
            bad.append(SkippedRecord(str(test), record.row, record.problem))
        else:
            found = list(_documents(spec, record, record.sample))
            documents += found
            rows += [record.row] * len(found)
    if bad:
        raise bad_records(test, bad, total)
    if not documents:
        raise RecordError(f"{test} holds no records; expected a list of at least one")
    if isinstance(test, Path) and is_folder(test):
        order = _in_turn([document["class"] for document in documents])
        rows, documents = [rows[place] for place in order], [documents[place] for place in order]
    return rows, documents


def _in_turn(classes: Sequence[str]) -> list[int]:
    """Places in an order that takes the classes in turn, of which `evaluation.limit` asks the first."""
    seen: Counter[str] = Counter()
    turns = []
    for place, name in enumerate(classes):
        turns.append((seen[name], place))
        seen[name] += 1
    return [place for _, place in sorted(turns)]


def _documents(spec: TaskSpec | GeneralSpec, record: Record, sample: Sample) -> Iterator[Document]:
    """One for each question: `asked` is what the model is given, suffixes included, `scored_by` its metric.

    `question_id`, `text`, `answer`, `image` and `video` are LLaVA's test form, in which rules are written; a record of
    that form keeps its own, but what is written as parts or as a list of media.
    """
    several = len(sample.questions) > 1
    media = {
        kind: next((str(file.path) for file in sample.media if file.kind == kind), None) for kind in get_args(Media)
    }
    kept = {key: value for key, value in record.value.items() if _is_kept(key, value)} if record.is_test_form else {}
    for number, (prompt, answer) in enumerate(sample.questions):
        ours = {
            "question_id": f"{sample.id}-{number}" if several else sample.id,
            **media,
            "text": prompt[-1].text,
            "answer": [answer.text, *answer.accepted] if answer.accepted else answer.text,
        }
        document = {**record.value, **{key: value for key, value in ours.items() if kept.get(key) is None}}
        asked = [with_suffix(message, spec.prompt_suffix) if message.role == "user" else message for message in prompt]
        reference = answer.text if isinstance(document["answer"], list) else document["answer"]
        test_suffix = suffix_for(spec.test_prompt_suffix, reference) if isinstance(spec, TaskSpec) else ""
        asked[-1] = with_suffix(asked[-1], test_suffix)
        yield {**document, ASKED: [_message(message) for message in asked], SCORED_BY: spec.metric}


def _is_kept(key: str, value: Any) -> bool:
    several = key == "answer" and isinstance(value, list) and all(isinstance(text, str) for text in value)
    return several or not isinstance(value, list | dict)


def accepted_answers(document: Document) -> list[str]:
    """The record's answer, or its answers where it lists several (MLLM-ACL's OCR)."""
    answer = document.get("answer", document.get("answer_bbox"))  # the latter in CoIN's Grounding
    return [str(text) for text in answer] if isinstance(answer, list) else [str(answer)]


def _message(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": [
            {"type": part.kind, "path": str(part.path)}
            if isinstance(part, MediaFile)
            else {"type": "text", "text": part}
            for part in message.parts
        ],
    }


def _write_copy(documents: Sequence[Document], directory: Path, name: str) -> Path:
    """Writes the copy, in place of what an earlier state of the test file left."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.dumps(document, ensure_ascii=False, allow_nan=False) for document in documents]
    digest = sha256_json(rows)[:16]
    path = directory / f"{name}-{digest}.parquet"
    for old in directory.glob("*.parquet"):
        if old != path and re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{16}}\.parquet", old.name):
            old.unlink()
    with atomic_path(path) as temporary:
        pq.write_table(pa.table({COPY_COLUMN: pa.array(rows, pa.string())}), temporary)
    return path


class _TemplateLoader(yaml.SafeLoader):
    """Reads a template as lmms-eval does, but leaves its functions alone."""


_TemplateLoader.add_constructor("!function", lambda loader, node: None)


def _metric_needs(spec: TaskSpec | GeneralSpec) -> dict[str, Any]:
    """The template's `metadata`: native_max, and references, record_keys and java where the metric needs
    them."""
    template = TEMPLATES / f"{spec.metric}.yaml"
    if not template.is_file():
        # Those of one benchmark, which carry its name, last.
        known = sorted((path.stem for path in TEMPLATES.glob("[!_]*.yaml")), key=lambda name: ("_" in name, name))
        raise EvaluationError(
            f"{spec.name}: no metric {spec.metric!r}{did_you_mean(str(spec.metric), known)}; known are "
            f"{', '.join(known)}"
        )
    document = yaml.load(template.read_text(encoding="utf-8"), Loader=_TemplateLoader)
    return dict(document.get("metadata", {}))


def _check_java(stream: Stream) -> None:
    """Refuses to begin where captions could not be scored at the end of the first stage."""
    own = [spec for spec in stream.specs if spec.metric is not None]
    names = [spec.name for spec in own if _metric_needs(spec).get("java")]
    if not names:
        return
    try:
        # macOS has a `java` that only says where to get one.
        works = subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        works = False
    if not works:
        raise EvaluationError(
            f"{', '.join(names)}: METEOR and the tokenizer of captions' scores are Java programs, but "
            "`java -version` does not run here; install Java 8 or newer (Debian: apt-get install "
            "default-jre-headless)"
        )


def _check_record_keys(
    spec: TaskSpec | GeneralSpec, rows: Sequence[int], documents: Sequence[Document], test: object, keys: Sequence[str]
) -> None:
    for row, document in zip(rows, documents, strict=True):
        missing = [key for key in keys if document.get(key) is None]
        if missing:
            raise EvaluationError(
                f"{spec.name}: metric {spec.metric!r} reads {', '.join(keys)} from every test record, but "
                f"row {row} of {test} has no {', '.join(missing)}; add it"
            )


def _check_one_answer(
    spec: TaskSpec | GeneralSpec, rows: Sequence[int], documents: Sequence[Document], test: object
) -> None:
    for row, document in zip(rows, documents, strict=True):
        answer, more = document["answer"], document.get("answers")
        counted = answer if isinstance(answer, list) else [answer]
        left = [text for text in more if text not in counted] if isinstance(more, list) else []
        if left:
            raise EvaluationError(
                f"{spec.name}: row {row} of {test} has 'answers' beside 'answer', and metric {spec.metric!r} reads the "
                f"latter alone: {str(left[0])[:80]!r} would count as wrong. Write all that are right as a list under "
                "'answer', or remove 'answers'"
            )


def _references_file(stream: Stream, spec: TaskSpec | GeneralSpec, kind: object) -> Path | None:
    """The reference captions of a task whose metric needs them (kind True); or the file of accepted answers
    that it may name in place of `answers` in the records (kind "answers")."""
    references = stream.references_file(spec)
    if kind is True and references is None:
        raise EvaluationError(
            f"{spec.name}: metric {spec.metric!r} compares with reference captions, but the stream names "
            "none; give their COCO file as 'references' of this entry"
        )
    if references is not None and not kind:
        raise EvaluationError(
            f"{spec.name}: metric {spec.metric!r} reads no reference captions; leave 'references' out"
        )
    return references


def _add_references(
    spec: TaskSpec | GeneralSpec, documents: Sequence[Document], references: Path, test: object
) -> None:
    """Gives every question its captions: lmms-eval hands a scoring function the record alone."""
    captions = _read_captions(spec, references)
    numbers = list(range(1, len(documents) + 1))
    if sorted(captions) != numbers:
        raise EvaluationError(
            f"{spec.name}: {test} has {len(documents)} records, so {references} has to caption the images "
            f"1..{len(documents)}; found captions of {len(captions)} images, not of "
            f"{sorted(set(numbers) - set(captions))[:5]}, but of {sorted(set(captions) - set(numbers))[:5]}"
        )
    for number, document in zip(numbers, documents, strict=True):
        document["references"] = captions[number]


def _add_answers(spec: TaskSpec | GeneralSpec, documents: Sequence[Document], references: Path, test: object) -> None:
    """Gives every question the accepted `answers` that TextVQA's annotations have under its question_id."""
    try:
        entries = json.loads(references.read_text(encoding="utf-8"))["data"]
        answers = {str(entry["question_id"]): entry["answers"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{spec.name}: {references} is no TextVQA annotation file ({type(error).__name__}: {error}); "
            'expected {"data": [{"question_id": 1, "answers": ["...", ...]}, ...]}'
        ) from error
    missing = [name for name in (str(document["question_id"]) for document in documents) if name not in answers]
    if missing:
        raise EvaluationError(
            f"{spec.name}: {references} has no answers to {len(missing)} of the {len(documents)} questions of "
            f"{test}, the first with question_id {missing[0]}; it belongs to another split"
        )
    for document in documents:
        document["answers"] = answers[str(document["question_id"])]


def _read_captions(spec: TaskSpec | GeneralSpec, references: Path) -> dict[int, list[str]]:
    """Image number -> its captions, from a COCO captions file."""
    captions: dict[int, list[str]] = {}
    try:
        for annotation in json.loads(references.read_text(encoding="utf-8"))["annotations"]:
            captions.setdefault(int(annotation["image_id"]), []).append(str(annotation["caption"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{spec.name}: {references} is no COCO captions file ({type(error).__name__}: {error}); expected "
            '{"annotations": [{"image_id": 1, "caption": "..."}, ...]}'
        ) from error
    return captions


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
