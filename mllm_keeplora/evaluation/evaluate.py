"""One row of the accuracy matrix: every task of a stream, scored by lmms-eval in process on the live model.

A stream's own test files become lmms-eval tasks by small YAMLs in the run directory (`write_task_files`) that
include the templates of eval/tasks, so the same questions can be asked again from lmms-eval's own command
line.
"""

import functools
import gc
import json
import math
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import ImageFile
from tqdm import tqdm

from mllm_keeplora.artifacts import atomic_path, read_json, write_json
from mllm_keeplora.data.records import Sample, load_records
from mllm_keeplora.data.video import VideoReader
from mllm_keeplora.evaluation import MODEL_ID, EvaluationError
from mllm_keeplora.processes import from_main
from mllm_keeplora.streams import GeneralSpec, Stream, TaskSpec

TEMPLATES = Path(__file__).resolve().parents[2] / "eval" / "tasks"
INDEX_FILE = "tasks.json"
# lmms-eval's and our mean of the same per-sample scores differ by the order of summation only.
MEAN_TOLERANCE = 1e-9


class Score(TypedDict):
    """A task's score: value = native / native_max; stderr on the scale of value, None where undefined; n
    samples."""

    value: float
    native: float
    native_max: float
    stderr: float | None
    n: int


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
    for spec in _specs(stream):
        kind: Literal["task", "general"] = "general" if isinstance(spec, GeneralSpec) else "task"
        if isinstance(spec, GeneralSpec) and spec.lmms_eval_task is not None:
            native_max = float(spec.native_max or 1.0)
            entries.append(ScoredTask(spec.name, kind, spec.lmms_eval_task, str(spec.score), native_max))
        else:
            lmms_task = f"{MODEL_ID}_{stream.name}_{spec.name}"
            native_max = float(_metric_needs(spec).get("native_max", 1.0))
            entries.append(ScoredTask(spec.name, kind, lmms_task, str(spec.metric), native_max))
    return entries


def _specs(stream: Stream) -> tuple[TaskSpec | GeneralSpec, ...]:
    return (*stream.tasks, *stream.general)


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
    for spec, entry in zip(_specs(stream), entries, strict=True):
        test = stream.test_file(spec)
        own = TEMPLATES / "general" / f"{entry.lmms_task}.yaml"
        if test is None and own.is_file():  # a variant of a stock task, not known to lmms-eval
            _write_text(directory / own.name, yaml.safe_dump({"include": str(own), "task": own.stem}))
        if test is not None:
            task = _task_yaml(stream, spec, entry, test.resolve(), directory.resolve())
            _write_text(directory / f"{entry.lmms_task}.yaml", yaml.safe_dump(task, sort_keys=False))
    index = {"stream": stream.name, "tasks": [asdict(entry) for entry in entries]}
    write_json(directory / INDEX_FILE, index)
    return [entry.lmms_task for entry in entries]


def read_index(directory: Path) -> tuple[str, list[ScoredTask]]:
    """The stream's name and its scored tasks, as `write_task_files` left them in the directory."""
    index = read_json(directory / INDEX_FILE)
    return index["stream"], [ScoredTask(**entry) for entry in index["tasks"]]


def evaluate_row(
    model: torch.nn.Module,
    processor: Any,
    stream: Stream,
    task_directory: Path,
    output: Path,
    *,
    reader: VideoReader | None = None,
    names: Sequence[str] | None = None,
    batch_size: int,
    limit: int | None,
    general_limit: int | None = None,
) -> dict[str, Score]:
    """Scores the live model on the stream's tasks and general benchmarks.

    The model is left as found (modules' training flags, hooks), and so are the random generators of python,
    numpy and torch, which lmms-eval reseeds. In a distributed run every process takes a share of the
    questions and all return the scores.

    Args:
        model: transformers model or PeftModel.
        processor: its processor.
        stream: what to evaluate.
        task_directory: where `write_task_files` wrote this stream's tasks.
        output: folder that gets one <task>.jsonl with every question's reply and score.
        reader: decodes clips; None where no task shows any.
        names: a subset of task and benchmark names; None evaluates all.
        batch_size: questions generated together.
        limit: first questions asked of each task and benchmark, None for all.
        general_limit: the same for general benchmarks alone; None is `limit`.

    Returns:
        One score per name, in the stream's order.

    Raises:
        EvaluationError: if a task fails, a question stays unanswered, or lmms-eval returns no such score.
    """
    entries = scored_tasks(stream)
    unknown = set(names or ()) - {entry.name for entry in entries}
    if unknown:
        raise EvaluationError(f"stream {stream.name!r} has no task {', '.join(sorted(unknown))}")
    entries = [entry for entry in entries if names is None or entry.name in names]
    stock = any(spec.lmms_eval_task for spec in stream.general if names is None or spec.name in names)
    wrapper = functools.partial(_wrap, model, processor, reader, batch_size)
    row: dict[str, Score] = {}
    for most, group in _by_limit(entries, limit, general_limit or limit):
        results = _run_lmms_eval(wrapper, group, task_directory, stock, batch_size, most)
        row |= from_main(functools.partial(_read_row, results, group, output))
    return row


def _by_limit(
    entries: Sequence[ScoredTask], limit: int | None, general_limit: int | None
) -> list[tuple[int | None, list[ScoredTask]]]:
    """One evaluation where all have one limit; else tasks, then general benchmarks. Order is kept."""
    if limit == general_limit:
        return [(limit, list(entries))]
    kinds = (("task", limit), ("general", general_limit))
    groups = [(most, [entry for entry in entries if entry.kind == kind]) for kind, most in kinds]
    return [(most, group) for most, group in groups if group]


def _read_row(
    results: Mapping[str, Any] | None, entries: Sequence[ScoredTask], output: Path
) -> dict[str, Score]:
    """The scores of all entries, and their files; on the main process, where lmms-eval gathers."""
    assert results is not None
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Score] = {}
    for entry in entries:
        scores[entry.name] = read_score(results, entry)
        _write_text(output / f"{entry.name}.jsonl", _sample_lines(results, entry))
    return scores


def read_score(results: Mapping[str, Any], entry: ScoredTask) -> Score:
    """Reads one task's score from lmms-eval's results (with "samples", its per-sample records by task).

    The standard error is that of a mean. It is None for fewer than two samples, and where the score is not
    the mean of the samples' own scores (F1, or captions' corpus metrics).

    A group without a number of its own (MVBench) scores the mean of its tasks.

    Raises:
        EvaluationError: if the task, the score or samples are missing, or the score is no finite number.
    """
    found = results["results"].get(entry.lmms_task)
    if found is None:
        raise EvaluationError(
            f"{entry.name}: lmms-eval has no results of {entry.lmms_task}, only {sorted(results['results'])}"
        )
    native = _native(found, entry)
    leaves = _leaves(results, entry.lmms_task)
    if native is None and leaves != [entry.lmms_task]:  # a group that lmms-eval gives no number of its own
        numbers = [_native(results["results"].get(leaf, {}), entry) for leaf in leaves]
        native = statistics.fmean(numbers) if None not in numbers else None
    if not isinstance(native, int | float | np.number) or not math.isfinite(native):
        raise EvaluationError(
            f"{entry.name}: expected one finite number named {entry.score!r} in lmms-eval's results of "
            f"{entry.lmms_task}, found {found}"
        )
    samples = [sample for leaf in leaves for sample in results["samples"][leaf]]
    n = _count(results, entry)
    values = [_sample_score(sample, entry) for sample in samples]
    stderr = None
    numbers = [value for value in values if value is not None]
    if len(numbers) == n >= 2 and math.isclose(
        statistics.fmean(numbers), native, rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE
    ):
        stderr = statistics.stdev(numbers) / math.sqrt(n) / entry.native_max
    return Score(
        value=float(native) / entry.native_max,
        native=float(native),
        native_max=entry.native_max,
        stderr=stderr,
        n=n,
    )


def _native(found: Mapping[str, Any], entry: ScoredTask) -> Any:
    keys = [key for key in found if entry.score in (key, key.split(",")[0])]
    return found[keys[0]] if len(keys) == 1 else None


def _task_yaml(
    stream: Stream, spec: TaskSpec | GeneralSpec, entry: ScoredTask, test: Path, directory: Path
) -> dict[str, Any]:
    needs = _metric_needs(spec)
    media_root = stream.test_media_root(spec).resolve()
    answers = stream.answers_file(spec)
    if answers is not None or not _is_test_form(test):
        samples, _ = load_records(
            test, media_root, answers=answers, allow_text_only=spec.allow_text_only, checker=None
        )
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
        known = sorted(
            (path.stem for path in TEMPLATES.glob("[!_]*.yaml")), key=lambda name: ("_" in name, name)
        )
        raise EvaluationError(f"{spec.name}: no metric {spec.metric!r} in {TEMPLATES}, found {known}")
    document = yaml.load(template.read_text(encoding="utf-8"), Loader=_TemplateLoader)
    return dict(document.get("metadata", {}))


def _check_java(stream: Stream) -> None:
    """Refuses to begin where captions could not be scored at the end of the first stage."""
    own = [spec for spec in _specs(stream) if spec.metric is not None]
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
    write_json(
        path, [{**record, "references": captions[n]} for n, record in zip(numbers, records, strict=True)]
    )
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
            "question_id": sample.id if len(sample.turns) == 1 else f"{sample.id}-{number}",
            "image": None if sample.image is None else str(sample.image),
            "video": None if sample.video is None else str(sample.video),
            "text": turn.question,
            "answer": turn.answer,
        }
        for sample in samples
        for number, turn in enumerate(sample.turns)
    ]
    write_json(path, rows)
    return path


def _wrap(model: torch.nn.Module, processor: Any, reader: VideoReader | None, batch_size: int) -> Any:
    """The model as lmms-eval takes it. Imported late: lmms-eval takes seconds."""
    from mllm_keeplora.evaluation.lmms_model import KeepLoRAModel

    return KeepLoRAModel(model, processor, batch_size, reader)


def _run_lmms_eval(
    wrapper: Callable[[], Any],
    entries: Sequence[ScoredTask],
    task_directory: Path,
    stock: bool,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any] | None:
    """lmms-eval's results, None on all processes but the main one."""
    with _undisturbed():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        # As lmms-eval sets it on first import; stock tasks may count on it, our own never accept truncated
        # images.
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        # Indexing the stock tasks takes ten seconds.
        manager = TaskManager(include_path=str(task_directory), include_defaults=stock, model_name=MODEL_ID)
        missing = [entry.lmms_task for entry in entries if entry.lmms_task not in manager.all_tasks]
        if missing:
            raise EvaluationError(
                f"lmms-eval has no task {', '.join(missing)}; own test files need "
                f"write_task_files(stream, {task_directory})"
            )
        try:
            with _quiet():
                return simple_evaluate(
                    model=wrapper(),
                    tasks=[entry.lmms_task for entry in entries],
                    task_manager=manager,
                    batch_size=batch_size,
                    limit=limit,
                    # Bootstraps only what is no mean; read_score computes the standard errors of means.
                    bootstrap_iters=0,
                    process_docs_parallel=1,
                    # Use the run's own process group. The other choice makes an Accelerator, which would fix
                    # accelerate's global state before the training that follows has configured it.
                    distributed_executor_backend="torchrun",
                )
        except EvaluationError:
            raise
        # Whatever fails inside lmms-eval, no row may be written; its own retries hide the cause in a
        # RetryError.
        except Exception as error:
            cause = _cause(error)
            tasks = ", ".join(entry.name for entry in entries)
            raise EvaluationError(
                f"evaluating {tasks} failed with {type(cause).__name__}: {cause}"
            ) from error


def _cause(error: BaseException) -> BaseException:
    from tenacity import RetryError

    last = error.last_attempt.exception() if isinstance(error, RetryError) else None
    return last or error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts back what importing and running lmms-eval changes process-wide: random generators, PIL's
    truncation flag. What the process holds by then is kept out of the full collection that ends every
    evaluation of lmms-eval's: a tenth of a row on a small model."""
    accept_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            ImageFile.LOAD_TRUNCATED_IMAGES = accept_truncated


class _NoBar(tqdm):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the bars that lmms-eval and datasets draw per task, also into log files; ours shows the
    generation."""
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with mock.patch("lmms_eval.evaluator.tqdm", _NoBar), mock.patch("lmms_eval.api.task.tqdm", _NoBar):
            yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks with samples of their own under a task or group."""
    subtasks = results["group_subtasks"].get(task)
    return [leaf for subtask in subtasks for leaf in _leaves(results, subtask)] if subtasks else [task]


def _count(results: Mapping[str, Any], entry: ScoredTask) -> int:
    """Number of samples scored; documents are told apart by doc_id (lmms-eval's doc_hash repeats)."""
    n = 0
    for leaf in _leaves(results, entry.lmms_task):
        answered = len({sample["doc_id"] for sample in results["samples"].get(leaf, [])})
        expected = results["n-samples"][leaf]["effective"]
        if answered != expected:
            raise EvaluationError(f"{entry.name}: {answered} of {expected} documents of {leaf} were scored")
        n += answered
    return n


def _sample_score(sample: Mapping[str, Any], entry: ScoredTask) -> float | None:
    """A sample's own score, where the task has one: a number, or lmms-eval's {"score": number}."""
    value = sample.get(entry.score.split(",")[0])
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None


def _sample_lines(results: Mapping[str, Any], entry: ScoredTask) -> str:
    lines = []
    for leaf in _leaves(results, entry.lmms_task):
        for sample in sorted(results["samples"][leaf], key=lambda sample: int(sample["doc_id"])):
            line = {
                "task": leaf,
                "doc_id": sample["doc_id"],
                "doc": sample["doc"],
                "target": sample["target"],
                "reply": sample["filtered_resps"][0],
                "score": _sample_score(sample, entry),
            }
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
