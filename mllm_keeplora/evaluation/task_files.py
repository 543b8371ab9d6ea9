"""A stream's test files as lmms-eval tasks."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.records import load_records
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec
from mllm_keeplora.evaluation.entry_point import MODEL_ID
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.resources import shipped
from mllm_keeplora.runs.files import atomic_path, read_json, write_json

TEMPLATES = shipped("eval/tasks")


INDEX_FILE = "tasks.json"


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

    Test files in LLaVA's test form are used where they are. Other forms (conversations, `messages` lines,
    CL-VISTA's questions and answers) are copied to the directory in that form, one question per turn, each
    asked on its own. So are test files with reference captions, which every question then carries.

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
            task = _task_yaml(stream, spec, entry, test.resolve(), directory.resolve())
            write_text(directory / f"{entry.lmms_task}.yaml", yaml.safe_dump(task, sort_keys=False))
    index = {"stream": stream.name, "tasks": [asdict(entry) for entry in entries]}
    write_json(directory / INDEX_FILE, index)
    return [entry.lmms_task for entry in entries]


def read_index(directory: Path) -> tuple[str, list[ScoredTask]]:
    """The stream's name and its scored tasks, as `write_task_files` left them in the directory."""
    index = read_json(directory / INDEX_FILE)
    return index["stream"], [ScoredTask(**entry) for entry in index["tasks"]]


def _task_yaml(
    stream: Stream, spec: TaskSpec | GeneralSpec, entry: ScoredTask, test: Path, directory: Path
) -> dict[str, Any]:
    needs = _metric_needs(spec)
    media_root = stream.test_media_root(spec).resolve()
    answers = stream.answers_file(spec)
    if answers is not None or not _is_test_form(test):
        samples, _ = load_records(test, media_root, answers=answers, allow_text_only=spec.allow_text_only, checker=None)
        test = _write_test_form(samples, directory / f"{entry.lmms_task}.json")
    references = _references_file(stream, spec, needs.get("references"))
    if references is not None:
        write = _write_with_answers if needs["references"] == "answers" else _write_with_references
        test = write(spec, test, references, directory / f"{entry.lmms_task}.json")
    _check_record_keys(spec, test, needs.get("record_keys", []))
    return {
        "include": str(TEMPLATES / f"{spec.metric}.yaml"),
        "task": entry.lmms_task,
        "dataset_kwargs": {"data_files": {"test": str(test)}},
        "generation_kwargs": {"max_new_tokens": spec.max_new_tokens, "do_sample": False, "until": []},
        "lmms_eval_specific_kwargs": {
            "default": {
                "media_root": str(media_root),
                "prompt_suffix": spec.prompt_suffix,
                "test_prompt_suffix": _test_prompt_suffix(spec),
            }
        },
    }


def _test_prompt_suffix(spec: TaskSpec | GeneralSpec) -> str | dict[str, str]:
    suffix = spec.test_prompt_suffix if isinstance(spec, TaskSpec) else ""
    return suffix if isinstance(suffix, str) else dict(suffix)


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
        raise EvaluationError(f"{spec.name}: no metric {spec.metric!r} in {TEMPLATES}, found {known}")
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


def _check_record_keys(spec: TaskSpec | GeneralSpec, test: Path, keys: Sequence[str]) -> None:
    if not keys:
        return
    for row, record in enumerate(json.loads(test.read_text(encoding="utf-8")), start=1):
        missing = [key for key in keys if record.get(key) is None]
        if missing:
            raise EvaluationError(
                f"{spec.name}: metric {spec.metric!r} reads {', '.join(keys)} from every test record, but "
                f"row {row} of {test} has no {', '.join(missing)}; add it (in records of LLaVA's test form)"
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


def _write_with_references(spec: TaskSpec | GeneralSpec, test: Path, references: Path, path: Path) -> Path:
    """The test file, every record with its captions: lmms-eval hands a scoring function the record alone."""
    records = json.loads(test.read_text(encoding="utf-8"))
    captions = _read_captions(spec, references)
    numbers = list(range(1, len(records) + 1))
    if sorted(captions) != numbers:
        raise EvaluationError(
            f"{spec.name}: {test} has {len(records)} records, so {references} has to caption the images "
            f"1..{len(records)}; found captions of {len(captions)} images, not of "
            f"{sorted(set(numbers) - set(captions))[:5]}, but of {sorted(set(captions) - set(numbers))[:5]}"
        )
    write_json(path, [{**record, "references": captions[n]} for n, record in zip(numbers, records, strict=True)])
    return path


def _write_with_answers(spec: TaskSpec | GeneralSpec, test: Path, references: Path, path: Path) -> Path:
    """The test file, every record with the accepted `answers` that TextVQA's annotations have under its
    question_id."""
    records = json.loads(test.read_text(encoding="utf-8"))
    try:
        entries = json.loads(references.read_text(encoding="utf-8"))["data"]
        answers = {str(entry["question_id"]): entry["answers"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{spec.name}: {references} is no TextVQA annotation file ({type(error).__name__}: {error}); "
            'expected {"data": [{"question_id": 1, "answers": ["...", ...]}, ...]}'
        ) from error
    missing = [str(record.get("question_id")) for record in records]
    missing = [name for name in missing if name not in answers]
    if missing:
        raise EvaluationError(
            f"{spec.name}: {references} has no answers to {len(missing)} of the {len(records)} questions of "
            f"{test}, the first with question_id {missing[0]}; it belongs to another split"
        )
    write_json(path, [{**record, "answers": answers[str(record["question_id"])]} for record in records])
    return path


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


def _is_test_form(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    records = json.loads(path.read_text(encoding="utf-8"))
    return all("text" in record and not {"conversations", "messages"} & record.keys() for record in records)


def _write_test_form(samples: Sequence[Sample], path: Path) -> Path:
    """One row a question. The prompt suffix is added by the task itself, as for files in test form."""
    rows = [
        {
            "question_id": sample.id if len(sample.answers) == 1 else f"{sample.id}-{number}",
            "image": next((str(file.path) for file in sample.media if file.kind == "image"), None),
            "video": next((str(file.path) for file in sample.media if file.kind == "video"), None),
            "text": question.text,
            "answer": answer.text,
        }
        for sample in samples
        for number, (question, answer) in enumerate(zip(sample.messages[::2], sample.messages[1::2], strict=True))
    ]
    write_json(path, rows)
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
