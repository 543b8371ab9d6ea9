"""A run over a stream: continue what is there, run the stages that are missing, report."""

import fcntl
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from accelerate.logging import get_logger

from mllm_keeplora.config import ConfigError, RunConfig, identity
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.stage import (
    Clock,
    accumulated_after,
    adapter_hash,
    check_ranks,
    evaluate_stage,
    peak_memory,
    run_stage,
)
from mllm_keeplora.continual.trainer import check_settings
from mllm_keeplora.data.media import MediaChecker
from mllm_keeplora.data.stream import (
    Stream,
    data_hash,
    load_stream,
    load_training_records,
)
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import (
    end_processes,
    from_main,
    is_main,
    lost_processes_explained,
    num_processes,
    start_processes,
    wait_for_everyone,
)
from mllm_keeplora.distributed.sharding import shard_base, sharding_asked
from mllm_keeplora.evaluation.metrics import retention_ratios, summarize
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import Method, load_method
from mllm_keeplora.methods.context import (
    ADAPTER,
    Stage,
    Workplace,
    attach_accumulated,
    detach,
    stage_directory,
)
from mllm_keeplora.modeling.adapters import ACCUMULATED, Factors, attach
from mllm_keeplora.modeling.loading import (
    base_model_hash,
    load_base,
    read_initial_adapter,
    resolve_device,
    resolve_model_directory,
    save_adapter,
)
from mllm_keeplora.modeling.targets import find_targets
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.reports.page import write_report
from mllm_keeplora.reports.tables import format_table
from mllm_keeplora.runs.files import (
    ArtifactError,
    WriteError,
    hash_files,
    read_json,
    remove_temporaries,
    sha256_file,
    write_json,
)
from mllm_keeplora.runs.manifests import MANIFEST, SCHEMA_VERSION, read_manifest, write_manifest

logger = get_logger(__name__)

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "lmms_eval", "mllm-keeplora")
BACKFILL = "backfill.json"


def run_stream(config: RunConfig) -> dict[str, Any]:
    """Runs, or continues, a stream; returns the content of `retention.json`.

    Complete stages are checked against their manifests and kept; the first incomplete one continues from its
    last finished phase. Under `torchrun` or `accelerate launch` all processes call it, on a run directory,
    cache and data that all of them see; a run may be continued with another number of them.

    Raises:
        ConfigError, StreamError, TargetError: settings, data or a model that cannot be used.
        ArtifactError: the run directory belongs to another config or was edited.
        StageError, TrainingError, EvaluationError, WriteError: a stage that failed; what was complete is
            kept.
    """
    start_processes(cpu=resolve_device(config.model).type == "cpu")
    method = load_method(config)
    stream = load_stream(Path(config.stream), Path(config.data_root) if config.data_root else None)
    run_dir = Path(config.run_dir)
    _check_train_settings(config, stream)
    with lost_processes_explained(), _only_run(run_dir):
        history = from_main(lambda: _History.read(config, stream, run_dir))
        from_main(lambda: _write_inputs(history))
        cells = from_main(history.missing_cells) if config.backfill else {}
        if history.missing_stages or cells or not from_main(history.has_its_adapter):
            work = _open_workplace(history, method)
            _run_missing(work, history)
            if config.backfill:
                _backfill(work, history)
        retention = from_main(lambda: _report(history))
    end_processes()
    return retention


def _write_inputs(history: "_History") -> None:
    """Also for a finished run: data or base may have moved, and other commands look for them here."""
    write_json(history.run_dir / "config.json", asdict(history.config))
    write_task_files(history.stream, history.run_dir / "eval_tasks")


def _check_train_settings(config: RunConfig, stream: Stream) -> None:
    """Settings of every task, before any of them has cost anything."""
    tasks = [task.name for task in stream.tasks]
    for name in config.train_overrides:
        if name not in tasks:
            raise ConfigError(f"train_overrides names {name!r}, no task of the stream ({', '.join(tasks)})")
    for name in tasks:
        check_settings(config.train_for(name), config.report_to, resolve_device(config.model))


@dataclass
class _History:
    """Stages of a run directory, complete and missing."""

    config: RunConfig
    stream: Stream
    run_dir: Path
    base_hash: str
    data: dict[str, str]
    manifests: list[dict[str, Any]]

    @classmethod
    def read(cls, config: RunConfig, stream: Stream, run_dir: Path) -> "_History":
        """Reads and checks the manifests that exist.

        Raises:
            ArtifactError: edited or missing manifests, another config or other data.
        """
        base_hash = base_model_hash(resolve_model_directory(config.model), Path(config.cache_dir))
        data = {spec.name: data_hash(stream, spec) for spec in stream.specs}
        history = cls(config, stream, run_dir, base_hash, data, [])
        for number in range(len(stream.tasks) + 1):
            manifest = read_manifest(history.directory(number), history.previous_hash())
            if manifest is None:
                break
            history._check(number, manifest)
            history.manifests.append(manifest)
        history._check_no_gap()
        return history

    def directory(self, number: int) -> Path:
        """Directory of stage `number`."""
        return stage_directory(self.run_dir, number, self.task_name(number))

    def task_name(self, number: int) -> str | None:
        """Task learnt in stage `number`; None for the base."""
        return self.stream.tasks[number - 1].name if number else None

    def previous_hash(self) -> str | None:
        """Hash of the last complete stage's manifest."""
        return sha256_file(self.directory(len(self.manifests) - 1) / MANIFEST) if self.manifests else None

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

    def identity(self, number: int) -> dict[str, Any]:
        """Settings and base model that a stage's result depends on; the base's path may change."""
        values = identity(self.config, self.task_name(number))
        if self.config.initial_adapter:  # its content counts, not its place
            values["initial_adapter"] = hash_files(Path(self.config.initial_adapter))
        values["model"] = {
            k: v for k, v in values["model"].items() if k not in ("base_model", "revision", "device")
        }
        return {**values, "base_model": self.base_hash}

    def scores(self, number: int) -> dict[str, Any]:
        """Scores of a stage's row, backfilled cells included."""
        later = {
            name: cell["score"]
            for name, cell in read_backfill(self.directory(number)).items()
            if cell["data"] == self.data.get(name)
        }
        return {**self.manifests[number]["scores"], **later}

    def missing_cells(self) -> dict[int, list[str]]:
        """Stage -> names of tasks and benchmarks that were not evaluated there."""
        cells = {
            n: [name for name in self.data if name not in self.scores(n)] for n in range(len(self.manifests))
        }
        return {number: names for number, names in cells.items() if names}

    def has_its_adapter(self) -> bool:
        """Whether the run's adapter is that of the last complete stage."""
        return bool(self.manifests) and adapter_hash(self.run_dir) == self.manifests[-1].get("adapter")

    def _check(self, number: int, manifest: Mapping[str, Any]) -> None:
        where = self.directory(number) / MANIFEST
        check_identity(manifest["identity"], self.identity(number), where)
        changed = [name for name, found in self.data.items() if manifest["data"].get(name, found) != found]
        if changed:
            raise ArtifactError(
                f"{where}: the data of {', '.join(changed)} has changed since this stage ran; "
                "restore it, or use another run_dir"
            )

    def _check_no_gap(self) -> None:
        """A stage directory beyond the complete ones: a manifest was removed, or a task left the stream."""
        root, expected = (
            self.run_dir / "stages",
            {self.directory(n).name for n in range(len(self.stream.tasks) + 1)},
        )
        present = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        unknown = [name for name in present if name not in expected]
        if unknown:
            raise ArtifactError(
                f"{root / unknown[0]} is not a stage of stream {self.stream.name!r} "
                f"({', '.join(sorted(expected))}): tasks may be "
                "appended to a run, not removed, renamed or reordered; use another run_dir"
            )
        beyond = [
            self.directory(n) for n in self.missing_stages[1:] if (self.directory(n) / MANIFEST).exists()
        ]
        if beyond:
            missing = self.directory(len(self.manifests)) / MANIFEST
            raise ArtifactError(
                f"{missing} is missing although {beyond[0]} is complete; restore it, or delete "
                f"{beyond[0]} and the stages after "
                "it to have them computed again"
            )


def check_identity(stored: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Compares a stage's settings with the current ones.

    Raises:
        ArtifactError: they differ; names each setting with both values.
    """
    old, new = _flatten(stored), _flatten(expected)
    different = [
        f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)
    ]
    if different:
        raise ArtifactError(
            f"{where} was written with other settings ({'; '.join(different[:5])}); use another "
            "run_dir, or the settings it was "
            "started with"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat


@contextmanager
def _only_run(run_dir: Path) -> Iterator[None]:
    """Holds the run directory, by a lock of the main process."""
    with _locked(run_dir) if is_main() else nullcontext():
        wait_for_everyone()
        yield


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds the run directory; the lock ends with the process, also when that is killed."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise WriteError(f"run_dir {run_dir} cannot be written: {error}; name another") from error
    with lock:
        try:
            # A record lock, which the workers that read images do not inherit.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ArtifactError(
                f"another process is running in {run_dir}; wait for it, or use another run_dir"
            ) from error
        yield


def _open_workplace(history: _History, method: Method) -> Workplace:
    config, stream = history.config, history.stream
    cache = Path(config.cache_dir)
    reader = VideoReader(config.video, cache)
    records = from_main(
        lambda: load_training_records(
            stream, config.on_bad_record, MediaChecker(reader, cache / "checked_media")
        )
    )
    logger.info(f"loading {config.model.base_model} ({config.model.quantization})")
    model, processor = load_base(config.model)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    patterns = {name: tower.targets for name, tower in config.towers().items()}
    media = {s.media for samples, _ in records.values() for s in samples if s.media is not None}
    targets = find_targets(model, patterns, media=media, protect_projector=config.projector == "protected")
    eps_w = {name: tower.eps_w for name, tower in config.towers().items()}
    loaded = f"{config.model.quantization}-{config.model.compute_dtype}"
    bases = cache / "weight_bases" / f"{history.base_hash[:16]}-{loaded}"
    files = weight_basis_files(model, targets, eps_w, bases) if method.protects_weights else {}
    device = resolve_device(config.model)
    work = Workplace(
        config, method, stream, records, model, processor, reader, targets, files, history.run_dir, device
    )
    from_main(lambda: check_ranks(work))
    if sharding_asked():
        logger.info(f"spreading the language layers over {num_processes()} processes (FSDP)")
        shard_base(model)  # after the weight bases, which need whole weights
    return work


def _run_missing(work: Workplace, history: _History) -> None:
    _say_other_process_count(history)
    past = _past_factors(work, history, len(history.manifests) - 1)
    for number in history.missing_stages:
        directory, header = history.directory(number), history.header(number)
        from_main(partial(_claim, directory, header))
        if number == 0:
            history.manifests.append(_base_stage(work, header, directory, past))
        else:
            logger.info(f"stage {number} of {len(work.stream.tasks)}: {header['task']}")
            earlier = [history.directory(n) for n in range(1, number)]
            stage = Stage(work, number, work.stream.tasks[number - 1], past, earlier)
            result = run_stage(stage, header)
            history.manifests.append(result.manifest)
            past = result.accumulated
        logger.info(stage_summary(history.manifests[-1]))
    if not from_main(history.has_its_adapter):  # somebody removed it, or the stages that it was written after
        logger.info("putting the adapter together from the stages' factors")
        model = attach(work.model, ACCUMULATED, past, dict.fromkeys(past, 1))
        from_main(lambda: save_adapter(work.run_dir / ADAPTER, model, work.config.model))
        detach(model)


def _say_other_process_count(history: _History) -> None:
    """It decides no identity, but the samples of a step are per_device_train_batch_size times as many."""
    before = history.manifests[-1].get("num_processes", 1) if history.manifests else num_processes()
    if before != num_processes():
        logger.warning(
            f"the stages so far ran on {before} process(es), these on {num_processes()}: with the same "
            "settings a training step now takes another number of samples"
        )


def _claim(directory: Path, header: Mapping[str, Any]) -> None:
    """Pins what an unfinished stage was started with: its finished phases are reused only under the same.

    A stage that diverged is begun anew with another learning rate; there is nothing of it to keep.
    """
    remove_temporaries(directory)
    path = directory / "inputs.json"
    inputs = {key: header[key] for key in ("identity", "previous")} | {
        "data": header["data"].get(header["task"])
    }
    if path.exists() and read_json(path) != inputs:
        logger.warning(f"{directory} was begun with other settings or data and not finished; it begins anew")
        shutil.rmtree(directory)
    write_json(path, inputs)


def _past_factors(work: Workplace, history: _History, number: int) -> Factors:
    """Accumulated factors after stage `number`; before the first, those of `initial_adapter`."""
    initial = work.config.initial_adapter
    first = read_initial_adapter(work.model, Path(initial)) if initial else {}
    return accumulated_after(work.method, first, [history.directory(n) for n in range(1, number + 1)])


def _base_stage(work: Workplace, header: dict[str, Any], directory: Path, past: Factors) -> dict[str, Any]:
    """Row 0: what the starting model can do."""
    logger.info("stage 0: measuring the starting model")
    clock = Clock()
    model = attach_accumulated(work.model, past)
    with clock.phase("evaluation"):
        scores = evaluate_stage(work, model, directory, header["data"])
    detach(model)
    measured = {"peak_memory_bytes": peak_memory(work.device), "timings": clock.total(), "scores": scores}
    manifest = {**header, "modules": [], "counts": {}, "loss": [], **measured}
    return from_main(lambda: write_manifest(directory, manifest))


def _backfill(work: Workplace, history: _History) -> None:
    """Evaluates what earlier rows lack, from the factors that the stages stored."""
    for number, names in from_main(history.missing_cells).items():
        logger.info(f"backfilling stage {number}: {', '.join(names)}")
        directory = history.directory(number)
        model = attach_accumulated(work.model, _past_factors(work, history, number))
        scores = evaluate_row(
            model,
            work.processor,
            work.stream,
            work.run_dir / "eval_tasks",
            directory / "backfill",
            reader=work.reader,
            names=names,
            batch_size=work.config.evaluation.batch_size,
            limit=work.config.evaluation.limit,
            general_limit=work.config.evaluation.general_limit,
        )
        detach(model)
        cells = {name: {"data": history.data[name], "score": score} for name, score in scores.items()}
        from_main(partial(_write_cells, directory, cells))


def _write_cells(directory: Path, cells: Mapping[str, Any]) -> None:
    write_json(directory / BACKFILL, {**read_backfill(directory), **cells})


def read_backfill(directory: Path) -> dict[str, Any]:
    """Cells of a row measured after its stage: name -> {"data": hash of what was asked, "score"}."""
    path = directory / BACKFILL
    return dict(read_json(path)) if path.exists() else {}


def stage_summary(manifest: Mapping[str, Any]) -> str:
    """One table a stage: per tower the ranks, bases and leakage, and the row of scores."""
    lines = [f"stage {manifest['stage']} ({manifest['task'] or 'base'})"]
    for tower in ("vision", "language"):
        rows = [m for m in manifest["modules"] if m["tower"] == tower]
        if rows:
            columns = [
                f"{key} {_spread([m[key] for m in rows])}" for key in ("k_w", "k_f", "k_f_added", "rank")
            ]
            leak = max(m["leakage"] for m in rows)
            lines.append(f"  {tower:8s} {len(rows):3d} modules  {'  '.join(columns)}  leakage <= {leak:.1e}")
    scores = (f"{name} {score['value']:.3f}" for name, score in manifest["scores"].items())
    lines.append("  scores   " + "  ".join(scores))
    lines.append(
        "  seconds  " + "  ".join(f"{name} {seconds:.1f}" for name, seconds in manifest["timings"].items())
    )
    return "\n".join(lines)


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)}..{median(values):g}..{max(values)}"


def _report(history: _History) -> dict[str, Any]:
    retention = build_retention(history)
    run_dir = history.run_dir
    write_json(run_dir / "retention.json", retention)
    write_report(load_run(run_dir))
    sys.stdout.write(
        format_table(retention) + f"\nreport: {run_dir / 'report.html'}\nadapter: {run_dir / ADAPTER}\n"
    )
    return retention


def build_retention(history: _History) -> dict[str, Any]:
    """The content of `retention.json`: every row of scores and the metrics of the matrix."""
    tasks = [task.name for task in history.stream.tasks]
    general = [spec.name for spec in history.stream.general]
    rows = []
    for number, manifest in enumerate(history.manifests):
        scores = history.scores(number)
        rows.append(
            {
                "stage": number,
                "task": manifest["task"],
                "scores": {name: scores.get(name) for name in (*tasks, *general)},
            }
        )
    values = [{name: score and score["value"] for name, score in row["scores"].items()} for row in rows]
    metrics: dict[str, Any] = summarize([[row[task] for task in tasks] for row in values])
    metrics["retention"] = retention_ratios(
        {g: values[0][g] for g in general}, {g: values[-1][g] for g in general}
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "method": history.config.method,
        "tasks": tasks,
        "general": general,
        "limits": history.config.evaluation.limits(),
        "rows": rows,
        "metrics": metrics,
    }
