"""Evaluates a run from its saved files, through lmms-eval's own command line, and ranks it.

The 4-bit base and the run's adapter are loaded by lmms-eval's model id `keeplora`. Every question of the
run's tasks and general benchmarks is asked again, and the scores are compared with the last row of its
matrix.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.continual.saved_run import SavedRun, load_run
from mllm_keeplora.evaluation.entry_point import MODEL_ID
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.score import Score, check_logins, quiet, read_score
from mllm_keeplora.evaluation.task_files import ScoredTask, follow_move, read_index
from mllm_keeplora.modeling.loading import (
    base_model_hash,
    read_model_config,
    resolve_device,
    resolve_model_directory,
)
from mllm_keeplora.reports.intervals import interval_of
from mllm_keeplora.runs.files import ArtifactError, atomic_path, check_hashes, read_json, write_json
from mllm_keeplora.runs.run_directory import CARD_FILES

SCHEMA_VERSION = 1
# Scores that pass through JSON text come back bit for bit; this allows for another order of summation.
SCORE_TOLERANCE = 1e-9
# Share of replies that may differ where a model in 16 bits, or on a GPU, is asked in batches of other sizes or on other
# processes; docs/benchmarks.md has what was counted, at most half of it.
FLIPPED = 0.02
STANDARD_ERRORS = 3.0
# How clips become frames; decoded frames are not kept in a fresh process.
VIDEO_SETTINGS = ("frames", "fps", "backend", "timeout")


@dataclass(frozen=True)
class CompleteRun:
    """A run at its end, whose tasks and benchmarks were all asked whole.

    Attributes:
        saved: the run.
        stream: the stream's name.
        entries: its tasks and benchmarks, as lmms-eval knows them.
        scores: the row that the run measured after its last stage.
    """

    saved: SavedRun
    stream: str
    entries: list[ScoredTask]
    scores: dict[str, Score]


def read_run(directory: Path) -> CompleteRun:
    """Reads a run that can be ranked.

    Raises:
        EvaluationError: the run is not at its end, or was evaluated on a subset of the questions.
        ArtifactError: one of its files is missing or damaged.
    """
    saved = load_run(directory)
    retention = saved.retention
    for name in ("limit", "general_limit"):
        limit = getattr(saved.config.evaluation, name)
        if limit is not None:
            raise EvaluationError(
                f"{directory} was evaluated on the first {limit} questions (evaluation.{name}); the "
                "leaderboard ranks full evaluations only. Run it again in another directory without the limit"
            )
    last = retention["rows"][-1]
    if last["stage"] != len(retention["tasks"]):
        raise EvaluationError(
            f"{directory} is at stage {last['stage']} of {len(retention['tasks'])}; run the same command "
            "again to complete it"
        )
    stream, entries = read_index(saved.directory.task_files)
    names = [*retention["tasks"], *retention["general"]]
    missing = [name for name in names if last["scores"].get(name) is None]
    if missing or [entry.name for entry in entries] != names:
        raise EvaluationError(
            f"{directory}: expected scores of {[entry.name for entry in entries]} (eval_tasks) in the last "
            f"row of retention.json, found {[name for name in names if name not in missing]}"
        )
    return CompleteRun(saved, stream, entries, last["scores"])


def evaluate_saved(run: CompleteRun, limit: int | None) -> dict[str, Score]:
    """Scores the run's adapter on its base through lmms-eval's command line, in this process.

    Args:
        run: what is evaluated; lmms-eval's own result files go to its `leaderboard` folder.
        limit: first questions asked of each task; None asks all.

    Raises:
        EvaluationError: if our model id is not registered, a benchmark needs a login, or lmms-eval left no results
            (it prints why and exits with 0).
        ArtifactError, ConfigError: adapter or base are not there, or not those of the run.
    """
    _check_model(run.saved)
    from lmms_eval.cli.dispatch import main as lmms_eval_main
    from lmms_eval.models import list_available_models

    if MODEL_ID not in list_available_models():
        raise EvaluationError(
            f"lmms-eval does not know the model {MODEL_ID!r}: the installed package does not register it; "
            "install it again"
        )
    stock = [e.lmms_task for e in run.entries if not e.lmms_task.startswith(f"{MODEL_ID}_")]
    check_logins(stock, run.saved.directory.task_files)
    follow_move(run.saved.directory.task_files)
    output = run.saved.directory.leaderboard
    before = set(output.rglob("*_results.json"))
    sys.argv = ["lmms-eval", *lmms_eval_arguments(run, output, limit)]
    with quiet():
        lmms_eval_main()
    written = sorted(set(output.rglob("*_results.json")) - before)
    if len(written) != 1:
        raise EvaluationError(
            f"lmms-eval wrote {len(written)} result files in {output}, expected one; its error is above"
        )
    return read_results(written[0], run.entries)


def _check_model(run: SavedRun) -> None:
    """What would fail only after lmms-eval has read its tasks, or would score another model under the run's name."""
    run.adapter  # noqa: B018 - says where there is none
    if not run.directory.adapter_weights.is_file():
        raise ArtifactError(f"{run.directory.adapter_weights} is missing; start the run again, which puts it together")
    if run.directory.adapter_hashes.exists():
        check_hashes(run.directory.adapter_hashes, "start the run again, which puts its adapter together", CARD_FILES)
    model = run.config.model
    read_model_config(model)
    expected = [manifest["base_model"]["hash"] for manifest in run.manifests[-1:]]
    found = base_model_hash(resolve_model_directory(model), Path(run.config.cache_dir)) if expected else None
    if expected and found != expected[0]:
        raise ArtifactError(
            f"{run.directory.path} was trained on another base model than {model.base_model} is now: expected content "
            f"{expected[0][:12]}, found {str(found)[:12]}; put that model back"
        )


def lmms_eval_arguments(run: CompleteRun, output: Path, limit: int | None) -> list[str]:
    """The command line: what a person would type after `lmms-eval`.

    Raises:
        EvaluationError: for a path or name with a character that separates lmms-eval's arguments.
    """
    config = run.saved.config
    model = {**asdict(config.model), "adapter": run.saved.directory.adapter.resolve()}
    model |= {f"video_{name}": getattr(config.video, name) for name in VIDEO_SETTINGS}
    model = {name: value for name, value in model.items() if value is not None}
    for value in (*map(str, model.values()), str(output)):
        if set(value) & set(",'\"{}[]"):
            raise EvaluationError(
                f"lmms-eval's command line cannot take {value!r}: a comma, quote or bracket separates its "
                "arguments; rename it"
            )
    arguments = {
        "--model": MODEL_ID,
        "--model_args": ",".join(f"{key}={value}" for key, value in model.items()),
        "--include_path": str(run.saved.directory.task_files),
        "--tasks": ",".join(entry.lmms_task for entry in run.entries),
        "--batch_size": str(config.evaluation.batch_size),
        "--output_path": str(output),
        # Score replies as they are, as inside the run; by default <think> blocks are cut out first.
        "--reasoning_tags": "none",
        "--timezone": "UTC",
        "--verbosity": "WARNING",
    }
    if limit is not None:
        arguments["--limit"] = str(limit)
    return [*(word for pair in arguments.items() for word in pair), "--log_samples"]


def read_results(path: Path, entries: Sequence[ScoredTask]) -> dict[str, Score]:
    """Scores from lmms-eval's result file and the sample files beside it."""
    results = read_json(path)
    prefix = path.name.removesuffix("results.json") + "samples_"
    results["samples"] = {
        file.name.removeprefix(prefix).removesuffix(".jsonl"): [
            # Not splitlines(): U+2028 and its like stand inside lines of JSON.
            json.loads(line)
            for line in file.read_text(encoding="utf-8").split("\n")
            if line
        ]
        for file in path.parent.glob(f"{prefix}*.jsonl")
    }
    return {entry.name: read_score(results, entry) for entry in entries}


def replies_may_flip(model: ModelConfig) -> bool:
    """Whether replies may depend on what else is in a batch: not in fp32 on a CPU."""
    return model.compute_dtype != "float32" or resolve_device(model).type != "cpu"


def allowed_difference(score: Score, flips: bool) -> float:
    """Most by which a score of the same model may differ, on the scale of `native`.

    Where replies may flip, a share `FLIPPED` of n questions moves by one of them up or down: a standard error of
    sqrt(FLIPPED / n).
    """
    slack = STANDARD_ERRORS * math.sqrt(FLIPPED / max(1, score["n"])) if flips else 0.0
    return SCORE_TOLERANCE + slack * score["native_max"]


def find_differences(inside: Mapping[str, Score], fresh: Mapping[str, Score], flips: bool = False) -> list[str]:
    """One line per task whose score in the fresh process is not that of the run.

    Args:
        inside: the run's.
        fresh: of the fresh process.
        flips: whether differing batches explain small differences, see `allowed_difference`.
    """
    return [
        f"{name}: {inside[name]['native']!r} in the run (n = {inside[name]['n']}), "
        f"{score['native']!r} here (n = {score['n']})"
        + (f", more than the {allowed_difference(score, flips):.2g} that differing batches explain" if flips else "")
        for name, score in fresh.items()
        if abs(score["native"] - inside[name]["native"]) > allowed_difference(score, flips)
        or score["n"] != inside[name]["n"]
    ]


def build_row(run: CompleteRun, scores: Mapping[str, Score], equal: bool) -> dict[str, Any]:
    """A leaderboard row: scores of the fresh process; `mean` is over the tasks without general benchmarks."""
    tasks = {entry.name: scores[entry.name] for entry in run.entries if entry.kind == "task"}
    path = run.saved.directory.path.resolve()
    return {
        "run": path.name,
        "directory": str(path),
        "stream": run.stream,
        "method": run.saved.retention["method"],
        "base": run.saved.config.model.base_model,
        "tasks": tasks,
        "general": {entry.name: scores[entry.name] for entry in run.entries if entry.kind == "general"},
        "mean": sum(score["value"] for score in tasks.values()) / len(tasks),
        "equal_to_run": equal,
    }


def add_row(table: Path, row: dict[str, Any]) -> None:
    """Adds a row to leaderboard.json in the directory `table`, in place of the earlier row of the run in that folder.

    leaderboard.md is written anew from all rows.

    Raises:
        ArtifactError: the table holds something else.
    """
    path = table / "leaderboard.json"
    rows = _read_rows(path) if path.exists() else []
    rows = [other for other in rows if not _same_run(other, row)] + [row]
    rows.sort(key=lambda other: (other["stream"], -other["mean"]))
    write_json(path, {"schema_version": SCHEMA_VERSION, "rows": rows})
    with atomic_path(table / "leaderboard.md") as temporary:
        temporary.write_text(format_leaderboard(rows), encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    keys = {"run", "stream", "method", "base", "tasks", "general", "mean", "equal_to_run"}
    table = read_json(path)
    rows = table.get("rows") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise ArtifactError(f"{path} is no leaderboard; name another --table, or remove the file")
    return rows


def _same_run(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Runs of one name in two folders are two; rows of earlier versions do not say where theirs lies."""
    where = other.get("directory", row["directory"])
    return (other["stream"], other["run"], where) == (row["stream"], row["run"], row["directory"])


def format_leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table per stream and set of tasks, best mean first; runs of one name by their folders."""
    tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        tables[row["stream"], *row["tasks"], "/", *row["general"]].append(row)
    lines = [
        "# Leaderboard",
        "",
        "Scores of runs after their last task, 0 to 1 with 95 % interval, measured by lmms-eval in",
        "a fresh process (`keeplora leaderboard RUN`). Ranked by the mean over the stream's tasks; general",
        "benchmarks stand in italics. `equal`: the run's own evaluation agrees, exactly or within what differing",
        "batches explain.",
    ]
    for group in tables.values():
        tasks, general = list(group[0]["tasks"]), list(group[0]["general"])
        names = [*tasks, *(f"*{name}*" for name in general)]
        header = ["rank", "run", "method", "base", *names, "mean", "equal"]
        lines += ["", f"## {group[0]['stream']}", "", _line(header), _line(["---"] * len(header))]
        named = Counter(row["run"] for row in group)
        for rank, row in enumerate(sorted(group, key=lambda row: -row["mean"]), start=1):
            scores = [row["tasks"][name] for name in tasks] + [row["general"][name] for name in general]
            run = row["run"] if named[row["run"]] == 1 else row.get("directory", row["run"])
            left = [str(rank), run, row["method"], row["base"]]
            right = [f"{row['mean']:.3f}", "yes" if row["equal_to_run"] else "no"]
            lines.append(_line([*left, *map(format_score, scores), *right]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def format_score(score: Score) -> str:
    """The value, and its 95 % interval where there is one."""
    value, low, high = interval_of(score)
    return f"{value:.3f}" + ("" if None in (low, high) else f" ({low:.3f}\N{EN DASH}{high:.3f})")
