"""Adapters made of any of a run's stages: earlier states, sums without a stage, scaled ones, compact copies.

A stage's update is s B A, and the run's adapter is their sum. So any other sum can be put together from the factors
that the stages stored, without the base model. What was learnt after a stage was learnt beside it, so a sum without
it is another model than a run that never had it: evaluate it.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from mllm_keeplora.continual.learning import read_stage_factors
from mllm_keeplora.continual.saved_run import SavedRun, load_run
from mllm_keeplora.errors import KeepLoRAError, did_you_mean
from mllm_keeplora.evaluation.metrics import retention_ratios, summarize
from mllm_keeplora.evaluation.task_files import follow_move
from mllm_keeplora.linalg.compression import product_difference, truncate_factors
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.modeling.adapters import Factors
from mllm_keeplora.modeling.loading import DTYPES, load_base
from mllm_keeplora.modeling.saved_adapters import adapter_facts, read_initial_adapter
from mllm_keeplora.runs.files import (
    ArtifactError,
    check_hashes,
    read_json,
    replaced_directory,
    save_tensors,
    sha256_file,
    write_hashes,
    write_json,
    write_sealed,
)
from mllm_keeplora.runs.manifests import read_manifest
from mllm_keeplora.runs.run_directory import CARD_FILES, RunDirectory


class EditError(KeepLoRAError, ValueError):
    """An adapter that cannot be made of a run's stages."""


class CompactionError(NamedTuple):
    """||dW' - dW||_F / ||dW||_F of what is written beside the exact sum.

    Attributes:
        total: over all modules together.
        modules: of each module, 0 where it has learnt nothing.
    """

    total: float
    modules: dict[str, float]


def edit(
    run: SavedRun,
    out: Path | str,
    *,
    stage: int | str | None = None,
    only: Sequence[int | str] = (),
    drop: Sequence[int | str] = (),
    scale: Mapping[int | str, float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
) -> SavedRun:
    """Writes an adapter made of a run's stages into a folder of its own, which is used like a run.

    Its modules all have one rank, smaller ones being filled up with zeros: engines read one rank and one alpha. An
    adapter that the run began with is part of every sum.

    Args:
        run: with at least one complete stage.
        out: folder to create.
        stage: the state after this stage: what was learnt later is left out. By number (1-based) or task, as below.
        only: the stages to take; none names all.
        drop: stages to leave out.
        scale: stage -> what its update is multiplied by, in place of 1.
        rank: most directions a module may keep; None keeps all.
        dtype: of the factors, a name in `DTYPES`.

    Returns:
        The new folder, as `load_run` gives it.

    Raises:
        EditError: no such stage, nothing left, or a method whose stages are no sum.
        ArtifactError: `out` exists, or files of the run were changed.
    """
    out = Path(out)
    _check_form(out, rank, dtype)
    manifests = _checked_manifests(run)
    taken = _coefficients(run, manifests, stage, only, drop, scale or {})
    exact = _sum(run, manifests, taken)
    written = _compact(exact, rank, DTYPES[dtype])
    facts = {
        "run": str(run.directory.path.resolve()),
        "stages": [{**stage_facts(manifests[n]), "scale": c} for n, c in taken.items()],
        "rank": rank,
        "dtype": dtype,
        "error": _error(exact, written)._asdict(),
        **{key: manifests[-1][key] for key in ("base_model", "packages")},
    }
    with replaced_directory(out) as temporary:
        _write(run, RunDirectory(temporary), written)
        write_sealed(RunDirectory(temporary).edit, facts)
        write_json(RunDirectory(temporary).retention, _rows_so_far(run.retention, facts))
    follow_move(RunDirectory(out).task_files)
    return load_run(out)


def _check_form(out: Path, rank: int | None, dtype: str) -> None:
    if out.exists():
        raise ArtifactError(f"{out} exists; name a directory that does not")
    if dtype not in DTYPES:
        raise EditError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise EditError(f"rank {rank} keeps nothing; expected 1 or more, or none to keep all")


def _checked_manifests(run: SavedRun) -> list[dict[str, Any]]:
    """Of the complete stages, the base's row first; every file that they name is as it was written."""
    manifests: list[dict[str, Any]] = []
    previous = None
    for directory in run.directory.found_stages():
        manifest = read_manifest(directory, previous)
        if manifest is None:
            break
        manifests.append(manifest)
        previous = sha256_file(directory.manifest)
    if len(manifests) < 2:
        raise EditError(f"{run.directory.path} has no stage that has learnt a task; name the directory of a run")
    return manifests


def _coefficients(
    run: SavedRun,
    manifests: Sequence[Mapping[str, Any]],
    stage: int | str | None,
    only: Sequence[int | str],
    drop: Sequence[int | str],
    scale: Mapping[int | str, float],
) -> dict[int, float]:
    """Stage number -> what its update is multiplied by; those with 0 are left out."""
    named = {m["task"]: m["stage"] for m in manifests[1:]}

    def number(name: int | str) -> int:
        known = [*named, *map(str, named.values())]
        if str(name) not in known:
            raise EditError(
                f"{name!r} is no stage of {run.directory.path}: expected one of {', '.join(known)}"
                f"{did_you_mean(str(name), known)}"
            )
        return named.get(str(name)) or int(name)

    last = number(stage) if stage is not None else len(named)
    found = {n: 1.0 for n in range(1, last + 1)}
    if only:
        found = {n: c for n, c in found.items() if n in {number(name) for name in only}}
    for name in drop:
        found.pop(number(name), None)
    for name, factor in scale.items():
        if number(name) not in found:
            raise EditError(f"stage {name!r} is left out and scaled at once; do one of the two")
        if not math.isfinite(factor):
            raise EditError(f"stage {name!r}: scale is {factor}, expected a finite number")
        found[number(name)] = float(factor)
    found = {n: c for n, c in found.items() if c}
    if not found:
        raise EditError("no stage is left: that is the base model itself, which needs no adapter")
    if not load_method(run.config).adds_updates and found != dict.fromkeys(range(1, len(found) + 1), 1.0):
        raise EditError(
            f"method {run.config.method} trains one adapter on throughout, so its stages are no sum; an earlier state "
            "can be had (--stage), and a smaller copy (--rank, --dtype)"
        )
    return found


def _sum(run: SavedRun, manifests: Sequence[Mapping[str, Any]], taken: Mapping[int, float]) -> Factors:
    """The stages' updates as one pair (A, B) a module, scales absorbed in B."""
    method, initial = load_method(run.config), run.config.initial_adapter
    factors: Factors = {}
    if initial:  # its names are compared with the model's
        model, _ = load_base(run.config.model)
        factors = read_initial_adapter(model, Path(initial), run.config.model.base_model)
    for n, c in taken.items():
        scales = {m["name"]: c * m["scale"] for m in manifests[n]["modules"]}
        learnt = read_stage_factors(run.directory.stage(n, manifests[n]["task"]))
        factors = method.fold(factors, learnt, scales)
    if not any(a.any() and b.any() for a, b in factors.values()):
        raise EditError("what is left has learnt nothing: that is the base model itself, which needs no adapter")
    return factors


def _compact(factors: Factors, rank: int | None, dtype: torch.dtype) -> Factors:
    """The factors themselves where nothing is to be smaller."""
    if rank is None and dtype == torch.float32:
        return factors
    cut = {
        n: pair if rank is None or len(pair[0]) <= rank else truncate_factors(*pair, rank)
        for n, pair in factors.items()
    }
    return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in cut.items()}


def _error(exact: Factors, written: Factors) -> CompactionError:
    if exact is written:
        return CompactionError(0.0, dict.fromkeys(exact, 0.0))
    parts = {name: product_difference(exact[name], written[name]) for name in exact}
    norm = math.hypot(*(whole for _, whole in parts.values()))
    return CompactionError(
        math.hypot(*(difference for difference, _ in parts.values())) / norm,
        {name: difference / whole if whole else 0.0 for name, (difference, whole) in parts.items()},
    )


def _write(run: SavedRun, to: RunDirectory, factors: Factors) -> None:
    """The run's folder in small: its settings, its questions, and its adapter's files around other factors."""
    own = run.directory
    check_hashes(own.adapter_hashes, "start the run again, which puts its adapter together", CARD_FILES)
    shutil.copytree(run.adapter, to.adapter, ignore=shutil.ignore_patterns(*CARD_FILES))
    shutil.copytree(own.task_files, to.task_files)
    shutil.copy(own.config, to.config)
    rank, padded = with_one_rank(factors)
    config = read_json(to.adapter_config)
    if adapter_facts(own.adapter_weights).names != {*factors}:
        config["target_modules"] = sorted(factors)
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(to.adapter_config, config)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor
        for name, pair in padded.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_tensors(to.adapter_weights, tensors, {"format": "pt"})
    write_hashes(to.adapter_hashes, CARD_FILES)


def with_one_rank(factors: Factors) -> tuple[int, Factors]:
    """The largest rank, and the factors filled up to it with zeros; the products are what they were.

    Engines read one rank and one alpha of an adapter, and llama.cpp divides that alpha by each tensor's own rank.
    """
    rank = max(len(a) for a, _ in factors.values())
    return rank, {
        name: (pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - b.shape[1]))) for name, (a, b) in factors.items()
    }


def stage_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage learnt from: number, task, samples, steps, hash of the data, and what a budget scaled it by."""
    counts, task = manifest["counts"], manifest["task"]
    return {
        "stage": manifest["stage"],
        "task": task,
        "samples": counts["train_samples"],
        "steps": counts["steps"],
        "data": manifest["data"][task],
        "guard": manifest.get("guard", {}).get("factors", {}),
    }


def is_state(facts: Mapping[str, Any]) -> bool:
    """Whether an edit is a state that its run was in, and so has measured."""
    stages = [(s["stage"], s["scale"]) for s in facts["stages"]]
    exact = facts["rank"] is None and facts["dtype"] == "float32"
    return exact and stages == [(n, 1.0) for n in range(1, len(stages) + 1)]


def _rows_so_far(retention: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the adapter's scores: the run's rows where it is a state of the run, else the base's alone."""
    if is_state(facts):
        last = len(facts["stages"])
        tasks = retention["tasks"][:last]
        names = [*tasks, *retention["general"]]
        rows = [{**row, "scores": {n: row["scores"].get(n) for n in names}} for row in retention["rows"][: last + 1]]
        cells = [[_value(row, task) for task in tasks] for row in rows]
        return {**retention, "tasks": tasks, "rows": rows, "metrics": {**summarize(cells), **_kept(retention, rows)}}
    return with_row(retention, None)


def with_row(retention: Mapping[str, Any], row: Mapping[str, Any] | None) -> dict[str, Any]:
    """The base's row, and that of an adapter which is no state of the run; metrics of a stream are undefined for it.

    Args:
        retention: of the run or of the edit.
        row: of the matrix, once it was measured.
    """
    rows = [retention["rows"][0], *([row] if row else [])]
    cells = [_value(rows[-1], task) for task in retention["tasks"]] if row else []
    known = [cell for cell in cells if cell is not None]
    metrics = dict.fromkeys(retention["metrics"])
    metrics["last"] = sum(known) / len(known) if known and len(known) == len(cells) else None
    return {**retention, "rows": rows, "metrics": {**metrics, **_kept(retention, rows)}}


def _kept(retention: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    base, final = ({name: _value(row, name) for name in retention["general"]} for row in (rows[0], rows[-1]))
    return {"retention": retention_ratios(base, final if len(rows) > 1 else {})}


def _value(row: Mapping[str, Any], name: str) -> float | None:
    score = row["scores"].get(name)
    return score["value"] if score else None


def edit_label(facts: Mapping[str, Any]) -> str:
    """What an edit is made of, in a few words: `digits + 0.5 charts, rank 16, bfloat16`."""
    terms = [f"{s['scale']:g} {s['task']}" if s["scale"] != 1 else s["task"] for s in facts["stages"]]
    rank = [f"rank {facts['rank']}"] if facts["rank"] else []
    return ", ".join([" + ".join(terms), *rank, *([] if facts["dtype"] == "float32" else [facts["dtype"]])])
