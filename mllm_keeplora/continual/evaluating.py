"""Measuring a saved adapter: an edit on the tasks of its run, and any adapter on other tasks of lmms-eval."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm_keeplora.continual.edits import edit_label, is_state, with_row
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.evaluation.score import evaluate_entries, evaluate_tasks, lmms_wrapper
from mllm_keeplora.evaluation.task_files import follow_move, read_index
from mllm_keeplora.runs.files import write_json


def evaluate(
    run: SavedRun, tasks: Sequence[str] = (), *, limit: int | None = None, include_path: Path | str | None = None
) -> dict[str, Any]:
    """Measures a saved adapter on its base.

    Without `tasks`, an edit is asked all questions of its run, and gets a row beside the base's (`retention`).

    Args:
        run: as `load_run` or `edit` gives it.
        tasks: tasks or groups of lmms-eval, by its names.
        limit: first questions asked of each of `tasks`; None asks all.
        include_path: folder of lmms-eval task files of one's own.

    Returns:
        Without `tasks`, the content of `retention.json`. With them, task -> lmms-eval's name of a number -> the
        number; it is written to `lmms_eval/results.json` in the run's folder as well, beside every reply.

    Raises:
        ConfigError: no tasks for a run whose rows are measured already.
        EvaluationError: a task that lmms-eval does not have, or that fails.
        ArtifactError, AdapterError: the adapter is not there, or was changed.
    """
    settings, directory = run.config.evaluation, run.directory
    if not tasks and (run.edit is None or is_state(run.edit)):
        raise ConfigError(
            f"{directory.path}: its rows were measured by the run (retention.json); name other tasks (--tasks), or ask "
            "all questions again in a fresh process with keeplora leaderboard"
        )
    model, processor = run.model
    wrapper = partial(lmms_wrapper, model, processor, run.reader(), settings.batch_size)
    if tasks:
        found = evaluate_tasks(
            tasks,
            wrapper,
            directory.task_files if include_path is None else Path(include_path),
            directory.other_tasks,
            batch_size=settings.batch_size,
            limit=limit,
        )
        write_json(directory.other_tasks / "results.json", {"limit": limit, "tasks": found})
        return found
    if limit is not None:
        raise ConfigError("limit goes with tasks; the questions of a run are asked as the run asked them")
    follow_move(directory.task_files)
    _, entries = read_index(directory.task_files)
    scores = evaluate_entries(
        entries,
        wrapper,
        directory.task_files,
        directory.edit_replies,
        batch_size=settings.batch_size,
        limit=settings.limit,
        general_limit=settings.general_limit,
    )
    row = {"stage": None, "task": edit_label(run.edit or {}), "scores": scores}
    retention = with_row(run.retention, row)
    write_json(directory.retention, retention)
    return retention
