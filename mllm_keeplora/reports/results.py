"""What a run has measured, read from its directory and checked: reports are written from this alone.

Scores are fractions (value = native / native_max). What is undefined is None.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.config import flatten
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.task_files import has_classes
from mllm_keeplora.reports.intervals import Interval, interval_of
from mllm_keeplora.runs.files import ArtifactError, read_json
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.runs.run_directory import RunDirectory

Json = dict[str, Any]

RETENTION_KEYS = {"method", "tasks", "general", "rows", "metrics"}
MANIFEST_KEYS = {"config", "seeds", "data", "packages", "base_model"}
MANIFEST_KEYS |= {"modules", "counts", "timings", "peak_memory_bytes", "loss"}


class ReportError(KeepLoRAError, ValueError):
    """Runs that a report cannot be written from."""


@dataclass(frozen=True)
class Results:
    """A run's results.

    Attributes:
        directory: the run's files.
        config: its settings.
        retention: the accuracy matrix and its metrics.
        manifests: of the stages, one for each row of the matrix.
    """

    directory: RunDirectory
    config: Json
    retention: Json
    manifests: list[Json]

    @property
    def chooses(self) -> bool:
        """Whether the model names the classes of pictures, and writes no text."""
        return has_classes(self.directory.task_files)


def read_results(run: SavedRun) -> Results:
    """Reads and checks what reports need.

    Raises:
        ReportError: an edited adapter; a file is missing, is not JSON, lacks a key, has another schema version or is of
            another stage than its place says.
    """
    if run.edit is not None:
        raise ReportError(f"{run.directory.path} holds what `keeplora edit` made, which has no stages: name a run")
    retention = _read(run.directory.retention, RETENTION_KEYS)
    manifests = []
    for row in retention["rows"]:
        stage = {"stage": row["stage"], "task": row["task"]}
        path = run.directory.stage(row["stage"], row["task"]).manifest
        manifests.append(_read(path, MANIFEST_KEYS, **stage))
    if not manifests:
        raise ReportError(f"cannot write the report: {run.directory.retention} has no rows; run the stream again")
    try:
        run.retention  # noqa: B018 - compares its scores with those of the stages
    except ArtifactError as error:
        raise ReportError(f"cannot write the report: {error}") from error
    _check_metrics(run.directory.retention, retention["metrics"])
    return Results(run.directory, asdict(run.config), retention, manifests)


def _check_metrics(path: Path, metrics: Any) -> None:
    """They are numbers, or null; those of `retention` by the benchmark's name."""
    kept = metrics.get("retention") if isinstance(metrics, dict) else None
    if not isinstance(kept, dict):
        raise ReportError(f"cannot write the report: {path}: its metrics are no object; run the stream again")
    for name, value in {**metrics, **kept, "retention": None}.items():
        if value is not None and type(value) not in (int, float):
            raise ReportError(
                f"cannot write the report: {path}: {name} is {str(value)[:80]}, expected a number; run the stream again"
            )


def _read(path: Path, keys: set[str], **expected: Any) -> Json:
    try:
        content = read_json(path)
    except ArtifactError as error:
        raise ReportError(f"cannot write the report: {error}; run the stream again") from error
    if not isinstance(content, dict):
        raise ReportError(f"cannot write the report: {path} holds a {type(content).__name__}, not an object")
    expected["schema_version"] = SCHEMA_VERSION
    if missing := (keys | set(expected)) - set(content):
        raise ReportError(f"cannot write the report: {path} lacks {', '.join(sorted(missing))}; was it edited?")
    for key, value in expected.items():
        if content[key] != value:
            raise ReportError(
                f"cannot write the report: {path} has {key} {content[key]}, expected {value}; run the stream "
                "again, or use the version of this package that wrote it"
            )
    return content


def names_of(retention: Mapping[str, Any]) -> list[str]:
    """The columns of the accuracy matrix: the tasks, then the general benchmarks."""
    return [*retention["tasks"], *retention["general"]]


def score_of(row: Mapping[str, Any], name: str) -> Interval:
    """A cell of the matrix; undefined where it was not measured (a task appended to the stream later)."""
    score = row["scores"].get(name)
    return Interval(None, None, None) if score is None else interval_of(score)


def written(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by their dotted names, as text: JSON where the value is not text itself."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in flatten(settings).items()
    }
