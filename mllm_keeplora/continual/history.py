"""The stages of a run directory: which are complete, what they scored, and whether they fit the settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from mllm_keeplora.config import FREED_SETTINGS, RunConfig, differences, flatten, identity
from mllm_keeplora.continual.general import prompts, prompts_hash
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.stream import Stream, data_hash
from mllm_keeplora.distributed.processes import num_processes
from mllm_keeplora.evaluation.metrics import retention_ratios, summarize
from mllm_keeplora.modeling.loading import base_model_hash, read_chat_template, resolve_model_directory
from mllm_keeplora.runs.files import (
    ArtifactError,
    check_hashes,
    found_hash,
    hash_files,
    read_sealed,
    sha256_file,
    sha256_json,
    write_sealed,
)
from mllm_keeplora.runs.manifests import SCHEMA_VERSION, read_manifest
from mllm_keeplora.runs.run_directory import CARD_FILES, RunDirectory, StageDirectory

logger = get_logger(__name__)

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "lmms_eval", "mllm-keeplora")


@dataclass
class History:
    """What has happened in a run directory so far.

    Attributes:
        config, stream, directory: of the run.
        base_hash: content hash of the base model.
        data: name of every task and benchmark -> hash of its data.
        manifests: of the complete stages, in order.
    """

    config: RunConfig
    stream: Stream
    directory: RunDirectory
    base_hash: str
    data: dict[str, str]
    manifests: list[dict[str, Any]]

    @classmethod
    def read(cls, config: RunConfig, stream: Stream, directory: RunDirectory) -> "History":
        """Reads and checks the manifests that exist.

        Raises:
            ArtifactError: edited or missing manifests, another config or other data.
        """
        base_hash = base_model_hash(resolve_model_directory(config.model), Path(config.cache_dir))
        data = {spec.name: data_hash(stream, spec) for spec in stream.specs}
        history = cls(config, stream, directory, base_hash, data, [])
        for number in range(len(stream.tasks) + 1):
            manifest = read_manifest(history.stage(number), history.previous_hash())
            if manifest is None:
                break
            history._check(number, manifest)
            history.manifests.append(manifest)
        history._check_no_gap()
        return history

    def stage(self, number: int) -> StageDirectory:
        """Where stage `number` lies."""
        return self.directory.stage(number, self.task_name(number))

    def task_name(self, number: int) -> str | None:
        """Task learnt in stage `number`; None for the base."""
        return self.stream.tasks[number - 1].name if number else None

    def previous_hash(self) -> str | None:
        """Hash of the last complete stage's manifest."""
        return sha256_file(self.stage(len(self.manifests) - 1).manifest) if self.manifests else None

    @property
    def missing_stages(self) -> range:
        """Numbers of the stages still to run."""
        return range(len(self.manifests), len(self.stream.tasks) + 1)

    def header(self, number: int) -> dict[str, Any]:
        """What a manifest says before anything is computed."""
        task = self.task_name(number)
        return {
            "stage": number,
            "task": task,
            "previous": self.previous_hash(),
            "method": self.config.method,
            "identity": self.identity(number),
            "config": asdict(self.config),
            "data": self.data,
            "seeds": {"run": self.config.seed, "stage": self.config.seed + number},
            "base_model": {"name": self.config.model.base_model, "hash": self.base_hash},
            "packages": {name: version(name) for name in PACKAGES},
            "num_processes": num_processes(),
        }

    def inputs(self, number: int) -> dict[str, Any]:
        """What the finished phases of an unfinished stage depend on."""
        task = self.task_name(number)
        data = self.data[task] if task else None
        return {"identity": self.identity(number), "previous": self.previous_hash(), "data": data}

    def identity(self, number: int) -> dict[str, Any]:
        """Settings and base model that a stage's result depends on; the base's path may change."""
        values = identity(self.config, self.task_name(number))
        if self.config.initial_adapter:  # its content counts, not its place
            values["initial_adapter"] = hash_files(Path(self.config.initial_adapter), CARD_FILES)
        if "general" in values and self.config.general.given:
            values["general"] |= {"samples": self.general_hash, "media_root": None}
        template = read_chat_template(self.config.model)
        if template is not None:  # likewise
            values["model"] = {**values["model"], "chat_template": sha256_json(template)}
        places = ("base_model", "revision", "device")
        values["model"] = {key: value for key, value in values["model"].items() if key not in places}
        return {**values, "base_model": self.base_hash}

    @cached_property
    def general_hash(self) -> str:
        """Of the general prompts and what they show: their content counts, not their place."""
        return prompts_hash(self.prompts)

    @cached_property
    def prompts(self) -> list[Sample]:
        """The general prompts, read once."""
        return prompts(self.config.general)

    def scores(self, number: int) -> dict[str, Any]:
        """Scores of a stage's row, backfilled cells included."""
        cells = read_backfill(self.stage(number))
        later = {name: cell["score"] for name, cell in cells.items() if cell["data"] == self.data.get(name)}
        return {**self.manifests[number]["scores"], **later}

    def missing_cells(self) -> dict[int, list[str]]:
        """Stage -> names of tasks and benchmarks that were not evaluated there."""
        cells = {n: [name for name in self.data if name not in self.scores(n)] for n in range(len(self.manifests))}
        return {number: names for number, names in cells.items() if names}

    def has_its_adapter(self) -> bool:
        """Whether the run's adapter is that of the last complete stage, and every file of it as it was written."""
        if not self.manifests or adapter_hash(self.directory) != self.manifests[-1].get("adapter"):
            return False
        if not self.directory.adapter.exists():  # before the first stage has learnt
            return True
        try:
            check_hashes(self.directory.adapter_hashes, "it is written again", CARD_FILES)
        except ArtifactError as error:
            logger.warning(str(error))
            return False
        return True

    def matrix(self) -> dict[str, Any]:
        """The rows of scores so far, and what their columns are."""
        tasks = [task.name for task in self.stream.tasks]
        general = [spec.name for spec in self.stream.general]
        rows = []
        for number, manifest in enumerate(self.manifests):
            scores = self.scores(number)
            row = {name: scores.get(name) for name in (*tasks, *general)}
            rows.append({"stage": number, "task": manifest["task"], "scores": row})
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.config.method,
            "tasks": tasks,
            "general": general,
            "limits": self.config.evaluation.limits(),
            "rows": rows,
        }

    def retention(self) -> dict[str, Any]:
        """The content of `retention.json`: every row of scores and the metrics of the matrix."""
        matrix = self.matrix()
        rows = [{name: score and score["value"] for name, score in row["scores"].items()} for row in matrix["rows"]]
        first, last = ({name: row[name] for name in matrix["general"]} for row in (rows[0], rows[-1]))
        metrics = {
            **summarize([[row[task] for task in matrix["tasks"]] for row in rows]),
            "retention": retention_ratios(first, last),
        }
        return {**matrix, "metrics": metrics}

    def _check(self, number: int, manifest: Mapping[str, Any]) -> None:
        where = self.stage(number).manifest
        there = {name: v for name, v in flatten(manifest["identity"]).items() if name not in FREED_SETTINGS}
        different = differences(there, self.identity(number))
        if different:
            raise ArtifactError(
                f"{where} was written with other settings ({'; '.join(different[:5])}); use another run_dir, or the "
                "settings it was started with"
            )
        changed = [name for name, found in self.data.items() if manifest["data"].get(name, found) != found]
        if changed:
            raise ArtifactError(
                f"{where}: the data of {', '.join(changed)} has changed since this stage ran; "
                "restore it, or use another run_dir"
            )

    def _check_no_gap(self) -> None:
        """A stage directory beyond the complete ones: a manifest was removed, or a task left the stream."""
        expected = {self.stage(n).path.name for n in range(len(self.stream.tasks) + 1)}
        unknown = [stage.path for stage in self.directory.found_stages() if stage.path.name not in expected]
        if unknown:
            raise ArtifactError(
                f"{unknown[0]} is not a stage of stream {self.stream.name!r} ({', '.join(sorted(expected))}): tasks "
                "may be appended to a run, not removed, renamed or reordered; use another run_dir"
            )
        beyond = [self.stage(n).path for n in self.missing_stages[1:] if self.stage(n).manifest.exists()]
        if beyond:
            raise ArtifactError(
                f"{self.stage(len(self.manifests)).manifest} is missing although {beyond[0]} is complete; restore it, "
                f"or delete {beyond[0]} and the stages after it to have them computed again"
            )


def adapter_hash(directory: RunDirectory) -> str | None:
    """sha256 of the accumulated adapter's tensors, which lie outside the stages; None without an adapter."""
    return found_hash(directory.adapter_weights)


def read_backfill(stage: StageDirectory) -> dict[str, Any]:
    """Cells of a row measured after its stage: name -> {"data": hash of what was asked, "score", "replies": hash}.

    Raises:
        ArtifactError: the file, or the replies behind a cell, were changed.
    """
    if not stage.backfill.exists():
        return {}
    remedy = f"restore it, or delete {stage.backfill} and run with backfill: true"
    cells: dict[str, Any] = read_sealed(stage.backfill, remedy)["cells"]
    for name, cell in cells.items():
        replies = _backfilled_replies(stage, name)
        if found_hash(replies) != cell["replies"]:
            raise ArtifactError(f"{replies} is not what the backfill wrote; {remedy}")
    return cells


def add_backfill(stage: StageDirectory, cells: Mapping[str, Any]) -> None:
    """Adds cells to those of `read_backfill`, each with the hash of its replies."""
    new = {name: {**cell, "replies": sha256_file(_backfilled_replies(stage, name))} for name, cell in cells.items()}
    write_sealed(stage.backfill, {"cells": {**read_backfill(stage), **new}})


def _backfilled_replies(stage: StageDirectory, name: str) -> Path:
    return stage.backfilled_replies / f"{name}.jsonl"
