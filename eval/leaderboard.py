"""Evaluates a finished run from its saved files, through lmms-eval's own command line, and ranks it on the
leaderboard.

    python eval/leaderboard.py runs/vqa_small

The fresh process loads the 4-bit base and the run's adapter by lmms-eval's model id `keeplora`, answers every
question of the run's tasks and general benchmarks again, and compares the scores with the last row of the
run's retention.json. lmms-eval's own result files stay in <run>/leaderboard. A row is added to
leaderboard.json and leaderboard.md; a run that is evaluated again replaces its row. Exit status 1 if the
scores are not those of the run.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# First: prepares the environment for lmms-eval's imports (which is why its stock command cannot be called
# directly).
import mllm_keeplora  # noqa: F401
from mllm_keeplora.config import ModelConfig
from mllm_keeplora.evaluation.entry_point import MODEL_ID
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.score import Score, read_score
from mllm_keeplora.evaluation.task_files import ScoredTask, read_index
from mllm_keeplora.runs.files import ArtifactError, atomic_path, read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
# Scores that pass through JSON text come back bit for bit; this allows for another order of summation.
SCORE_TOLERANCE = 1e-9
MODEL_SETTINGS = tuple(field.name for field in fields(ModelConfig))
# How clips become frames; decoded frames are not kept in a fresh process.
VIDEO_SETTINGS = ("frames", "fps", "backend", "timeout")


@dataclass(frozen=True)
class FinishedRun:
    """What the leaderboard needs of a run directory."""

    directory: Path
    config: dict[str, Any]
    method: str
    stream: str
    entries: list[ScoredTask]
    scores: dict[str, Score]  # the in-process row after the last stage


def read_run(directory: Path) -> FinishedRun:
    """Reads a finished run.

    Raises:
        EvaluationError: if the run is unfinished, or was evaluated on a subset of the questions.
        ArtifactError: if one of its files is missing or damaged.
    """
    config, retention = read_json(directory / "config.json"), read_json(directory / "retention.json")
    for name in ("limit", "general_limit"):
        limit = config["evaluation"].get(name)
        if limit is not None:
            raise EvaluationError(
                f"{directory} was evaluated on the first {limit} questions (evaluation.{name}); the "
                "leaderboard ranks full evaluations only. Run it again in another directory without the limit"
            )
    last = retention["rows"][-1]
    if last["stage"] != len(retention["tasks"]):
        raise EvaluationError(
            f"{directory} is at stage {last['stage']} of {len(retention['tasks'])}; run the same command "
            "again to finish it"
        )
    stream, entries = read_index(directory / "eval_tasks")
    names = [*retention["tasks"], *retention["general"]]
    missing = [name for name in names if last["scores"].get(name) is None]
    if missing or [entry.name for entry in entries] != names:
        raise EvaluationError(
            f"{directory}: expected scores of {[entry.name for entry in entries]} (eval_tasks) in the last "
            f"row of retention.json, found {[name for name in names if name not in missing]}"
        )
    return FinishedRun(directory, config, retention["method"], stream, entries, last["scores"])


def evaluate_saved(run: FinishedRun, limit: int | None) -> dict[str, Score]:
    """Scores the run's adapter on its base through lmms-eval's command line, in this process.

    Raises:
        EvaluationError: if our model id is not registered, or lmms-eval left no results (it prints why and
            exits with 0).
    """
    from lmms_eval.cli.dispatch import main as lmms_eval_main
    from lmms_eval.models import list_available_models

    if MODEL_ID not in list_available_models():
        raise EvaluationError(
            f"lmms-eval does not know the model {MODEL_ID!r}: the installed package does not register it; "
            "run pip install --no-deps -e . in the repository"
        )
    output = run.directory / "leaderboard"
    before = set(output.rglob("*_results.json"))
    sys.argv = ["lmms-eval", *lmms_eval_arguments(run, output, limit)]
    lmms_eval_main()
    written = sorted(set(output.rglob("*_results.json")) - before)
    if len(written) != 1:
        raise EvaluationError(
            f"lmms-eval wrote {len(written)} result files in {output}, expected one; its error is above"
        )
    return read_results(written[0], run.entries)


def lmms_eval_arguments(run: FinishedRun, output: Path, limit: int | None) -> list[str]:
    """The command line: what a person would type after `lmms-eval`.

    Raises:
        EvaluationError: for a path or name with a character that separates lmms-eval's arguments.
    """
    model = {key: run.config["model"][key] for key in MODEL_SETTINGS if run.config["model"][key] is not None}
    model["adapter"] = (run.directory / "adapter").resolve()
    video = {f"video_{key}": run.config["video"][key] for key in VIDEO_SETTINGS}
    model |= {key: value for key, value in video.items() if value is not None}
    for value in (*map(str, model.values()), str(output)):
        if set(value) & set(",'\"{}[]"):
            raise EvaluationError(
                f"lmms-eval's command line cannot take {value!r}: a comma, quote or bracket separates its "
                "arguments; rename it"
            )
    arguments = {
        "--model": MODEL_ID,
        "--model_args": ",".join(f"{key}={value}" for key, value in model.items()),
        "--include_path": str(run.directory / "eval_tasks"),
        "--tasks": ",".join(entry.lmms_task for entry in run.entries),
        "--batch_size": str(run.config["evaluation"]["batch_size"]),
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
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in path.parent.glob(f"{prefix}*.jsonl")
    }
    return {entry.name: read_score(results, entry) for entry in entries}


def find_differences(inside: Mapping[str, Score], fresh: Mapping[str, Score]) -> list[str]:
    """One line per task whose score in the fresh process is not that of the run."""
    return [
        f"{name}: {inside[name]['native']!r} in the run (n = {inside[name]['n']}), "
        f"{score['native']!r} here (n = {score['n']})"
        for name, score in fresh.items()
        if abs(score["native"] - inside[name]["native"]) > SCORE_TOLERANCE or score["n"] != inside[name]["n"]
    ]


def build_row(run: FinishedRun, scores: Mapping[str, Score], equal: bool) -> dict[str, Any]:
    """A leaderboard row: scores of the fresh process; `mean` is over the stream's tasks, not its
    benchmarks."""
    tasks = {entry.name: scores[entry.name] for entry in run.entries if entry.kind == "task"}
    return {
        "run": run.directory.resolve().name,
        "stream": run.stream,
        "method": run.method,
        "base": run.config["model"]["base_model"],
        "tasks": tasks,
        "general": {entry.name: scores[entry.name] for entry in run.entries if entry.kind == "general"},
        "mean": sum(score["value"] for score in tasks.values()) / len(tasks),
        "equal_to_run": equal,
    }


def add_row(table: Path, row: dict[str, Any]) -> None:
    """Adds a row to leaderboard.json in the directory `table`, in place of the run's earlier one; rewrites
    leaderboard.md."""
    path = table / "leaderboard.json"
    rows = read_json(path)["rows"] if path.exists() else []
    rows = [other for other in rows if (other["stream"], other["run"]) != (row["stream"], row["run"])] + [row]
    rows.sort(key=lambda other: (other["stream"], -other["mean"]))
    write_json(path, {"schema_version": SCHEMA_VERSION, "rows": rows})
    with atomic_path(table / "leaderboard.md") as temporary:
        temporary.write_text(format_leaderboard(rows), encoding="utf-8")


def format_leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table per stream and set of tasks, best mean first."""
    tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        tables[row["stream"], *row["tasks"], "/", *row["general"]].append(row)
    lines = [
        "# Leaderboard",
        "",
        "Scores of finished runs after their last task, 0 to 1 with standard error, measured by lmms-eval in",
        "a fresh process (`bash scripts/evaluate_leaderboard.sh runs/<run>`). Ranked by the mean over the",
        "stream's tasks; general benchmarks stand in italics. `equal`: the run's own evaluation agrees.",
    ]
    for group in tables.values():
        tasks, general = list(group[0]["tasks"]), list(group[0]["general"])
        names = [*tasks, *(f"*{name}*" for name in general)]
        header = ["rank", "run", "method", "base", *names, "mean", "equal"]
        lines += ["", f"## {group[0]['stream']}", "", _line(header), _line(["---"] * len(header))]
        for rank, row in enumerate(sorted(group, key=lambda row: -row["mean"]), start=1):
            scores = [row["tasks"][name] for name in tasks] + [row["general"][name] for name in general]
            left = [str(rank), row["run"], row["method"], row["base"]]
            right = [f"{row['mean']:.3f}", "yes" if row["equal_to_run"] else "no"]
            lines.append(_line([*left, *map(_cell, scores), *right]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _cell(score: Score) -> str:
    return f"{score['value']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Evaluate a finished run afresh through lmms-eval's command line, and rank it."
    )
    parser.add_argument("run", type=Path, help="run directory, e.g. runs/vqa_small")
    parser.add_argument(
        "--limit", type=int, help="first N questions per task only: a quick look, no comparison, no row"
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=REPOSITORY / "leaderboard",
        help="directory of the leaderboard (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        run = read_run(arguments.run)
        scores = evaluate_saved(run, arguments.limit)
    except (ArtifactError, EvaluationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.limit is not None:
        for name, score in scores.items():
            print(f"{name}: {_cell(score)} (first {score['n']} questions)")
        return 0
    differences = find_differences(run.scores, scores)
    add_row(arguments.table, build_row(run, scores, equal=not differences))
    if differences:
        print("\n".join(["Scores differ from the run's own evaluation:", *differences]))
    else:
        print(f"All {len(scores)} scores equal those of the run's own evaluation.")
    print(f"Leaderboard: {arguments.table / 'leaderboard.md'}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
