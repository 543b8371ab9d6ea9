"""Where a model's knowledge lies: its accuracy with weights rebuilt from a part of their directions alone.

The question behind KeepLoRA (arXiv 2601.19659) and KeepLoRA++ (2606.16256). With W = U S V^T and V_k the
leading right singular directions that hold a share eps of the energy ||W||_F^2 (E1), a linear layer computes
with

    principal:  W V_k V_k^T            or            residual:  W (I - V_k V_k^T)

and every benchmark is asked again. Over eps and per tower this is the intra-layer picture, per third of the
depth the inter-layer one. On a run W is the base's weight plus the run's update, decomposed as one.

Replacing needs weights that can be written: a 4-bit base is dequantised to its compute dtype first, which
gives the numbers that it computes with.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mllm_keeplora import load_run
from mllm_keeplora.config import ConfigError, differences
from mllm_keeplora.data.stream import Stream, data_hash, load_stream
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.metrics import Estimate, mean_of_scores
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.linalg.subspace import project_to_residual, smallest_rank
from mllm_keeplora.modeling.loading import base_model_hash, load_dense, resolve_model_directory
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.reports.figures import picture_style, plot_intervals, png, start_at_zero
from mllm_keeplora.reports.intervals import around
from mllm_keeplora.reports.tables import percent, with_error
from mllm_keeplora.runs.files import (
    ArtifactError,
    atomic_path,
    hash_files,
    load_tensors,
    read_json,
    remove_temporaries,
    write_json,
)
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.runs.run_directory import CARD_FILES
from mllm_keeplora.studies.analysis_config import AnalysisConfig

RESULTS, PICTURE = "analysis.json", "analysis.png"
UNCHANGED = "unchanged"  # the model as it is, among the cells of the results

Subspace = Literal["principal", "residual"]
Towers = Literal["both", "vision", "language"]
Depth = Literal["shallow", "middle", "deep", "all"]
SUBSPACES: tuple[Subspace, ...] = get_args(Subspace)
TOWERS: tuple[Towers, ...] = get_args(Towers)
DEPTHS: tuple[Depth, ...] = get_args(Depth)
KINDS = {"general": "general benchmarks", "tasks": "the stream's tasks"}


class Cell(NamedTuple):
    """One measurement: which layers compute with which part of their weights."""

    subspace: Subspace
    energy: float
    tower: Towers
    depth: Depth

    @property
    def name(self) -> str:
        """Its key in the results, and the folder of its replies."""
        return f"{self.subspace}-{self.energy:g}-{self.tower}-{self.depth}"

    def selects(self, target: Target) -> bool:
        """Whether the layer is rebuilt."""
        return self.tower in ("both", target.tower) and self.depth in ("all", third_of(target))


def third_of(target: Target) -> Depth:
    """The third of its tower that holds a layer; the shallow ones are larger where L is no multiple of 3."""
    return DEPTHS[3 * target.depth // target.num_layers]


def cells_of(config: AnalysisConfig) -> list[Cell]:
    """All measurements beside the unchanged model: both towers over eps first, each once."""
    energies, eps = sorted(config.energies), config.depth_energy
    over_energy = [Cell(part, e, tower, "all") for tower, e, part in product(TOWERS, energies, SUBSPACES)]
    over_depth = [Cell(part, eps, tower, depth) for tower, depth, part in product(TOWERS, DEPTHS, SUBSPACES)]
    return list(dict.fromkeys([*over_energy, *over_depth]))


# --------------------------------------------------------------------------------------------------
# weights


def leading_directions(weight: Tensor, basis: Tensor, energy: float) -> Tensor:
    """The first columns of a principal basis, as many as hold `energy` of the weight (E1).

    One decomposition serves every eps: the energy along a direction v is ||W v||^2. All energy takes all
    directions: within E1's tolerance on energies some could be left out, a thousandth of the weight's norm.

    Args:
        weight: W, [out, in] fp32.
        basis: [in, k], leading direction first, for at least this energy.
        energy: eps, fraction in (0, 1].

    Returns:
        [in, k'], k' <= k; [in, in] for energy 1.
    """
    if energy == 1.0:
        return torch.eye(weight.shape[1], device=weight.device)
    energies = (weight @ basis).double().square().sum(0)
    return basis[:, : smallest_rank(energies, energy * float(weight.double().square().sum()))]


def rebuild(weight: Tensor, directions: Tensor, subspace: Subspace) -> Tensor:
    """W V V^T (principal) or W (I - V V^T) (residual), [out, in] fp32; the two sum to W.

    Args:
        weight: W, [out, in] fp32.
        directions: V, [in, k], orthonormal columns.
        subspace: which part.
    """
    residual = project_to_residual(weight, directions)
    return residual if subspace == "residual" else weight - residual


@contextmanager
@torch.no_grad()
def rebuilt(
    model: nn.Module, targets: Sequence[Target], cell: Cell | None, files: Mapping[str, Path]
) -> Iterator[dict[str, float]]:
    """The model with the cell's layers rebuilt, inside the block; afterwards every bit is as before.

    Side effect: a copy of the replaced weights stays in the CPU's memory meanwhile.

    Args:
        model: with plain linear layers.
        targets: all layers that can be replaced.
        cell: which of them, and how; None for none.
        files: module name -> file with `basis` for at least the cell's energy.

    Yields:
        Module name -> k / in, the share of directions in the principal part, of the replaced layers.
    """
    shares: dict[str, float] = {}
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for target in targets:
            if cell is None or not cell.selects(target):
                continue
            layer: Any = model.get_submodule(target.name)
            parameter = layer.weight.data
            basis = load_tensors(files[target.name])["basis"].to(parameter.device)
            weight = parameter.float()
            directions = leading_directions(weight, basis, cell.energy)
            part = rebuild(weight, directions, cell.subspace)
            saved.append((parameter, parameter.to("cpu", copy=True)))
            parameter.copy_(part)
            shares[target.name] = directions.shape[1] / target.in_features
        yield shares
    finally:
        for parameter, original in saved:
            parameter.copy_(original)


# --------------------------------------------------------------------------------------------------
# measuring


def analyze(config: AnalysisConfig) -> dict[str, Any]:
    """Measures what is missing, cell by cell: `analysis.json` after each, `analysis.png` at the end.

    Returns:
        The content of `analysis.json`.

    Raises:
        ConfigError, TargetError, StreamError: settings, a model or data that cannot be used; a tower of fewer
            than three layers.
        ArtifactError: no such run, or `out` holds the analysis of something else.
        EvaluationError: a cell that cannot be measured; those before it are kept.
    """
    out = Path(config.out)
    root = Path(config.data_root) if config.data_root else None
    stream = load_stream(Path(config.stream), root, cache_dir=config.cache_dir)
    results = _open_results(config, stream)
    cells = {UNCHANGED: None, **{cell.name: cell for cell in cells_of(config)}}
    missing = {name: cell for name, cell in cells.items() if name not in results["cells"]}
    for name, found in _measure(config, stream, missing) if missing else ():
        results["cells"][name] = found
        write_json(out / RESULTS, results)
    with atomic_path(out / PICTURE) as temporary:
        temporary.write_bytes(draw_analysis(config, results))
    return results


def _open_results(config: AnalysisConfig, stream: Stream) -> dict[str, Any]:
    """The results so far; without a cell where nothing was measured yet.

    All cells share one identity: those of another model or of other questions do not compare with these.
    """
    path, adapter = Path(config.out) / RESULTS, _adapter(config)
    free = ("base_model", "revision", "device", "trust_remote_code")
    identity = {
        "base_model": base_model_hash(resolve_model_directory(config.model), Path(config.cache_dir)),
        "adapter": None if adapter is None else hash_files(adapter, CARD_FILES),
        "model": {key: value for key, value in asdict(config.model).items() if key not in free},
        "video": {"frames": config.video.frames, "fps": config.video.fps},
        "limit": config.limit,
        "data": {spec.name: data_hash(stream, spec) for spec in stream.specs},
    }
    names = {"tasks": [s.name for s in stream.tasks], "general": [s.name for s in stream.general]}
    if not path.exists():
        return {"schema_version": SCHEMA_VERSION, "identity": identity, **names, "cells": {}}
    results: dict[str, Any] = read_json(path)
    for name in CARD_FILES:  # earlier versions compared the card
        (results["identity"]["adapter"] or {}).pop(name, None)
    if other := differences(results["identity"], identity):
        raise ArtifactError(
            f"{path} is the analysis of something else ({'; '.join(other[:3])}); name another directory with "
            "--out, or the settings it was begun with"
        )
    return results


def _measure(
    config: AnalysisConfig, stream: Stream, cells: Mapping[str, Cell | None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each cell's facts and its row of scores; None stands for the unchanged model."""
    out = Path(config.out)
    tasks, bases = out / "eval_tasks", out / "bases"
    remove_temporaries(out)
    write_task_files(stream, tasks)
    model, processor = load_dense(config.model, _adapter(config))
    targets = find_targets(model, {"vision": ["all-linear"], "language": ["all-linear"]})
    _check_thirds(targets)
    highest = max(*config.energies, config.depth_energy)
    files = weight_basis_files(model, targets, {"vision": highest, "language": highest}, bases)
    reader = VideoReader(config.video, Path(config.cache_dir))
    ask = partial(evaluate_row, reader=reader, batch_size=config.batch_size, limit=config.limit)
    for name, cell in tqdm(cells.items(), desc="analysis", unit="cell", disable=None):
        with rebuilt(model, targets, cell, files) as shares:
            scores = ask(model, processor, stream, tasks, out / "replies" / name)
        mean = sum(shares.values()) / len(shares) if shares else None
        facts = {} if cell is None else cell._asdict()
        yield name, {**facts, "modules": len(shares), "directions": mean, "scores": scores}
    shutil.rmtree(bases)  # as large as the weights; what follows needs the scores alone


def _adapter(config: AnalysisConfig) -> Path | None:
    return None if config.run is None else load_run(config.run).adapter


def _check_thirds(targets: Sequence[Target]) -> None:
    for target in targets:
        if target.num_layers < 3:
            raise ConfigError(
                f"the {target.tower} tower has {target.num_layers} layer(s) that take part in the result, "
                "thirds of its depth need at least 3; this model is too small for the analysis"
            )


# --------------------------------------------------------------------------------------------------
# showing


def accuracy(results: Mapping[str, Any], name: str, kind: str) -> Estimate:
    """A cell's mean score over the tasks, or over the general benchmarks, with its standard error."""
    scores = [results["cells"][name]["scores"][asked] for asked in results[kind]]
    return mean_of_scores([Estimate(score["value"], score["stderr"]) for score in scores])


def format_analysis(config: AnalysisConfig, results: Mapping[str, Any]) -> str:
    """Every cell as plain text, without final newline."""

    def shown(name: str) -> list[str]:
        return [with_error(accuracy(results, name, kind)) for kind in KINDS]

    rows = {UNCHANGED: ["", *shown(UNCHANGED), "", ""]}
    for cell in cells_of(config):
        if cell.subspace == "principal":
            kept = percent(results["cells"][cell.name]["directions"])
            residual = cell._replace(subspace="residual")
            place = f"{cell.tower:9} {cell.depth:8} eps {cell.energy:g}"
            rows[place] = [kept, *shown(cell.name), *shown(residual.name)]
    heads = ["kept", *(f"{subspace}: {kind}" for subspace in SUBSPACES for kind in KINDS)]
    asked = sum(score["n"] for score in results["cells"][UNCHANGED]["scores"].values())
    return (
        "Accuracy in %, ± standard error, with weights rebuilt from their principal or residual directions.\n"
        f"general: mean over {', '.join(results['general']) or 'nothing'}; tasks: mean over "
        f"{', '.join(results['tasks'])}; {asked} test samples a row and side.\n"
        "kept: share of the input directions that the principal part has; residual has the others.\n\n"
        + pd.DataFrame.from_dict(rows, orient="index", columns=heads).to_string()
    )


@picture_style()
def draw_analysis(config: AnalysisConfig, results: Mapping[str, Any]) -> bytes:
    """The picture as PNG: general benchmarks above, tasks below; over eps left, over depth right."""
    kinds = [kind for kind in KINDS if results[kind]]
    energies, eps = sorted(set(config.energies)), config.depth_energy
    kept = [results["cells"][Cell("principal", e, "both", "all").name]["directions"] for e in energies]
    shares = [f"{energy:g}\n{share:.0%}" for energy, share in zip(energies, kept, strict=True)]
    figure = Figure(figsize=(13.0, 3.9 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, sharey="row", squeeze=False)
    for kind, (left, right) in zip(kinds, axes, strict=True):
        _plot(left, results, kind, [(energy, "all") for energy in energies])
        left.set_xticks(range(len(shares)), shares)
        left.set_title(f"{KINDS[kind]}: part of every layer", fontsize=11)
        left.set_xlabel("eps: energy in the principal part; below, its share of the directions")
        _plot(right, results, kind, [(eps, depth) for depth in DEPTHS])
        right.set_xticks(range(len(DEPTHS)), DEPTHS)
        right.set_title(f"{KINDS[kind]}: part of one third of the layers, eps {eps:g}", fontsize=11)
        right.set_xlabel("third of the depth that is rebuilt; last, all of it")
        left.set_ylabel("mean score, %")
        start_at_zero(left)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def _plot(axes: Axes, results: Mapping[str, Any], kind: str, along: Sequence[tuple[float, Depth]]) -> None:
    """Mean scores with each part of each tower, one point for every eps and depth."""
    for tower, line in zip(TOWERS, ("-", "--", ":"), strict=True):
        for subspace, colour, marker in zip(SUBSPACES, ("#12456b", "#f0a13a"), "os", strict=True):
            cells = [Cell(subspace, energy, tower, depth) for energy, depth in along]
            scores = [accuracy(results, cell.name, kind) for cell in cells]
            label = f"{subspace} part, {'both towers' if tower == 'both' else tower}"
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}
            plot_intervals(axes, range(len(scores)), [*map(around, scores)], label=label, **style)
    unchanged = Estimate(accuracy(results, UNCHANGED, kind).value, None)
    style = {"color": "#566672", "linestyle": "-.", "label": "unchanged model"}
    plot_intervals(axes, range(len(along)), [around(unchanged)] * len(along), **style)
