"""One row of the accuracy matrix: every task of a stream, scored by lmms-eval in process on the live model.

A stream's own test files become lmms-eval tasks. `write_task_files` writes a small YAML for each into the run
directory, which includes a template of eval/tasks. So lmms-eval's own command line can ask the same questions again.
"""

import functools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict
from unittest import mock

import numpy as np
import torch
from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import ImageFile
from tqdm import tqdm

from mllm_keeplora.data.stream import Stream
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import from_main
from mllm_keeplora.errors import did_you_mean
from mllm_keeplora.evaluation.entry_point import MODEL_ID, name_hub_home
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.task_files import ScoredTask, scored_tasks, write_text

# lmms-eval's and our mean of the same per-sample scores differ by the order of summation only.
MEAN_TOLERANCE = 1e-9
_OFFLINE = (
    ". Without a network, evaluate once where there is one, and copy its folder HF_HOME to here; or take the "
    "benchmarks whose data are missing out of `general` in the stream"
)


class Score(TypedDict):
    """A task's score: value = native / native_max; stderr on the scale of value, None where undefined; n
    samples."""

    value: float
    native: float
    native_max: float
    stderr: float | None
    n: int


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

    The model is left as found (modules' training flags, hooks). So are the random generators of python, numpy and
    torch, which lmms-eval reseeds. In a distributed run every process takes a share of the questions, and all return
    the scores.

    Args:
        model: transformers model or PeftModel.
        processor: its processor.
        stream: what to evaluate.
        task_directory: where `write_task_files` wrote this stream's tasks.
        output: folder that gets one `<task>.jsonl` with every question's reply and score.
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
    wrapper = functools.partial(lmms_wrapper, model, processor, reader, batch_size)
    return evaluate_entries(
        entries, wrapper, task_directory, output, batch_size=batch_size, limit=limit, general_limit=general_limit
    )


def evaluate_entries(
    entries: Sequence[ScoredTask],
    wrapper: Callable[[], Any],
    task_directory: Path,
    output: Path,
    *,
    batch_size: int,
    limit: int | None,
    general_limit: int | None = None,
) -> dict[str, Score]:
    """`evaluate_row` of what `read_index` gives: the stream and its test files are not asked for.

    Args:
        entries: what to evaluate.
        wrapper: makes the model as lmms-eval takes it, as `lmms_wrapper` does.
        task_directory: see `evaluate_row`, and so for the others.
        output: folder of the replies.
        batch_size: questions generated together.
        limit: first questions asked.
        general_limit: the same for general benchmarks.

    Raises:
        EvaluationError: see `evaluate_row`.
    """
    stock = any(not entry.lmms_task.startswith(f"{MODEL_ID}_") for entry in entries)
    row: dict[str, Score] = {}
    for most, group in _by_limit(entries, limit, general_limit or limit):
        results = _run_lmms_eval(wrapper, group, task_directory, stock, batch_size, most)
        row |= from_main(functools.partial(_read_row, results, group, output))
    return row


def evaluate_tasks(
    names: Sequence[str],
    wrapper: Callable[[], Any],
    task_directory: Path,
    output: Path,
    *,
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """Any tasks or groups of lmms-eval, with every number that it gives for them.

    Args:
        names: of the tasks, as lmms-eval calls them.
        wrapper: see `evaluate_entries`.
        task_directory: of lmms-eval task files beside its own.
        output: folder that gets one `<task>.jsonl` with every question and reply.
        batch_size: questions generated together.
        limit: first questions asked of each task, None for all.

    Returns:
        Task, and every member of a group -> lmms-eval's name of a number -> the number.

    Raises:
        EvaluationError: no such task, a task that fails, or a login to the hub that is missing.
    """
    stock = not set(names) <= _own_tasks(task_directory)
    if stock:
        check_logins(names, task_directory)
    entries = [ScoredTask(name, "general", name, "", 1.0) for name in names]
    results = _run_lmms_eval(wrapper, entries, task_directory, stock, batch_size, limit)
    if results is None:
        raise EvaluationError("only the main process evaluates other tasks; start one process")
    output.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        _count(results, entry)  # every question was answered
        write_text(output / f"{entry.name}.jsonl", _sample_lines(results, entry))
    found = {
        task: {key.removesuffix(",none"): float(value) for key, value in numbers.items() if _is_number(value)}
        for task, numbers in results["results"].items()
    }
    return {task: numbers for task, numbers in found.items() if numbers}


def _own_tasks(task_directory: Path) -> set[str]:
    """Names of the tasks in a folder; lmms-eval's own are not indexed for this."""
    with _undisturbed():
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(task_directory), include_defaults=False, model_name=MODEL_ID)
        return set(manager.all_tasks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_logins(tasks: Sequence[str], task_directory: Path) -> None:
    """Says before anything is loaded that a benchmark's data would ask for a login to the hub.

    lmms-eval has `token: True` for many of its data sets, public ones too, and then the hub's client wants a token.
    Data that an earlier evaluation has fetched are taken from the cache without.

    Args:
        tasks: names of lmms-eval's own tasks or groups.
        task_directory: where `write_task_files` wrote the stream's tasks.

    Raises:
        EvaluationError: naming the benchmarks, and how to log in.
    """
    import datasets

    if not tasks or is_offline_mode() or datasets.config.HF_DATASETS_OFFLINE or get_token() is not None:
        return
    with _undisturbed():
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(task_directory), include_defaults=True, model_name=MODEL_ID)
        asking = [task for task in tasks if any(map(_asks_for_token, _configs(manager, task)))]
    if asking:
        raise EvaluationError(
            f"{', '.join(asking)}: lmms-eval fetches the data with a login to the Hugging Face hub, and there is none "
            "here. Log in by `hf auth login`, or set HF_TOKEN (a token that may read is enough); or leave "
            "them out: of `general` in the stream, or of --tasks"
        )


def _configs(manager: Any, task: str | Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The YAMLs of a task, or of the tasks of a group or tag; what they name is not imported.

    Args:
        manager: lmms-eval's `TaskManager`.
        task: a name; or, among the members of a group, a group or a changed task as it stands in its YAML.
    """
    from lmms_eval.utils import load_yaml_config

    if isinstance(task, str):
        if task not in manager.task_index:
            return  # said where it is asked
        entry = manager.task_index[task]
        # A tag, and a group that is one as well, has no YAML of its own (BLINK, MMLU).
        config = entry if entry["yaml_path"] == -1 else load_yaml_config(str(entry["yaml_path"]), mode="simple")
    else:
        config = task
    yield config
    members = config.get("task", [])
    if isinstance(members, str):  # in the YAML of a task its own name
        members = [members] if config is task else []
    for member in members:
        yield from _configs(manager, member)


def _asks_for_token(config: Mapping[str, Any]) -> bool:
    from datasets.load import CachedDatasetModuleFactory
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    if not (config.get("dataset_kwargs") or {}).get("token"):
        return False
    try:
        CachedDatasetModuleFactory(str(config["dataset_path"]), cache_dir=_resolve_hf_datasets_cache_dir()).get_module()
    except FileNotFoundError:
        return True
    return False


def _by_limit(
    entries: Sequence[ScoredTask], limit: int | None, general_limit: int | None
) -> list[tuple[int | None, list[ScoredTask]]]:
    """One evaluation where all have one limit; else tasks, then general benchmarks. Order is kept."""
    if limit == general_limit:
        return [(limit, list(entries))]
    kinds = (("task", limit), ("general", general_limit))
    groups = [(most, [entry for entry in entries if entry.kind == kind]) for kind, most in kinds]
    return [(most, group) for most, group in groups if group]


def _read_row(results: Mapping[str, Any] | None, entries: Sequence[ScoredTask], output: Path) -> dict[str, Score]:
    """The scores of all entries, and their files; on the main process, where lmms-eval gathers."""
    if results is None:
        names = ", ".join(entry.name for entry in entries)
        raise EvaluationError(
            f"lmms-eval gave the main process no results for {names}: it took another process for the main "
            "one. Start all processes by accelerate launch or by torchrun"
        )
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Score] = {}
    for entry in entries:
        scores[entry.name] = read_score(results, entry)
        write_text(output / f"{entry.name}.jsonl", _sample_lines(results, entry))
    return scores


def read_score(results: Mapping[str, Any], entry: ScoredTask) -> Score:
    """Reads one task's score from lmms-eval's results (with "samples", its per-sample records by task).

    The standard error is that of a mean. It is None for fewer than two samples, and where the score is not
    the mean of the samples' own scores (F1, or captions' corpus metrics), in its own unit or, as in MVBench, in
    percent of samples that are 1 or 0.

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
    if len(numbers) == n >= 2:
        mean, value = statistics.fmean(numbers), native / entry.native_max
        most = next((most for most in (entry.native_max, 1.0) if _is_mean(mean / most, value)), None)
        stderr = None if most is None else statistics.stdev(numbers) / math.sqrt(n) / most
    return Score(
        value=float(native) / entry.native_max,
        native=float(native),
        native_max=entry.native_max,
        stderr=stderr,
        n=n,
    )


def _is_mean(mean: float, value: float) -> bool:
    return math.isclose(mean, value, rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE)


def _native(found: Mapping[str, Any], entry: ScoredTask) -> Any:
    keys = [key for key in found if entry.score in (key, key.split(",")[0])]
    return found[keys[0]] if len(keys) == 1 else None


def lmms_wrapper(model: torch.nn.Module, processor: Any, reader: VideoReader | None, batch_size: int) -> Any:
    """The model as lmms-eval takes it, for one evaluation. Imported late: lmms-eval takes seconds."""
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
    name_hub_home()
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
                f"lmms-eval has no task {', '.join(missing)}{did_you_mean(missing[0], manager.all_tasks)}; own test "
                "files need "
                f"write_task_files(stream, {task_directory})"
            )
        for entry in entries:
            found = manager.task_index[entry.lmms_task]
            if found["type"] == "tag":
                raise EvaluationError(
                    f"{entry.name}: {entry.lmms_task} is a tag, of which lmms-eval gives no number; name its tasks, "
                    f"each by itself: {', '.join(sorted(found['task']))}"
                )
        try:
            with quiet():
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
            remedy = _OFFLINE if isinstance(cause, ConnectionError | LocalEntryNotFoundError) else ""
            raise EvaluationError(f"evaluating {tasks} failed with {type(cause).__name__}: {cause}{remedy}") from error


def _cause(error: BaseException) -> BaseException:
    from tenacity import RetryError

    last = error.last_attempt.exception() if isinstance(error, RetryError) else None
    return last or error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts back what lmms-eval changes in the whole process: random generators, and PIL's truncation flag."""
    accept_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            ImageFile.LOAD_TRUNCATED_IMAGES = accept_truncated


class _NoBar(tqdm):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def quiet() -> Iterator[None]:
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
