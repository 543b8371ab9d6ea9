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

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mllm_keeplora.config import ConfigError, Tower
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.data.stream import Stream, data_hash, load_stream
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.metrics import Estimate, mean_of_scores
from mllm_keeplora.evaluation.score import Score, evaluate_row
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.linalg.subspace import project_to_residual, smallest_rank
from mllm_keeplora.modeling.loading import base_model_hash, load_dense, resolve_model_directory
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.reports.page import percent, picture_style, png, write_atomically
from mllm_keeplora.reports.report import flatten
from mllm_keeplora.runs.files import (
    ArtifactError,
    hash_files,
    load_tensors,
    read_json,
    remove_temporaries,
    write_json,
)
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.studies.analysis_config import AnalysisConfig

RESULTS, PICTURE = "analysis.json", "analysis.png"

Subspace = Literal["principal", "residual"]
Towers = Literal["vision", "language", "both"]
Depth = Literal["shallow", "middle", "deep", "all"]
SUBSPACES: tuple[Subspace, ...] = get_args(Subspace)
TOWERS: tuple[Towers, ...] = get_args(Towers)
DEPTHS: tuple[Depth, ...] = get_args(Depth)
KINDS = ("general", "tasks")

COLOURS: dict[Subspace, str] = {"principal": "#12456b", "residual": "#f0a13a"}  # dark and light
LINES: dict[Towers, str] = {"both": "-", "vision": "--", "language": ":"}
BAR = 0.38  # width; two stand in a group of width 1


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


UNCHANGED = "unchanged"


def third_of(target: Target) -> Depth:
    """The third of its tower in which a layer lies; where L is no multiple of 3, the shallow ones are
    larger."""
    return DEPTHS[3 * target.depth // target.num_layers]


def cells_of(config: AnalysisConfig) -> list[Cell]:
    """All measurements beside the unchanged model: both towers over eps first, each once."""
    towers = sorted(TOWERS, key=lambda tower: tower != "both")
    over_energy = [
        Cell(subspace, energy, tower, "all")
        for tower in towers
        for energy in sorted(config.energies)
        for subspace in SUBSPACES
    ]
    over_depth = [
        Cell(subspace, config.depth_energy, tower, depth)
        for tower in towers
        for depth in DEPTHS
        for subspace in SUBSPACES
    ]
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
    model: nn.Module, targets: Sequence[Target], cell: Cell, files: Mapping[str, Path]
) -> Iterator[dict[str, float]]:
    """The model with the cell's layers rebuilt, inside the block; afterwards every bit is as before.

    Side effect: a copy of the replaced weights stays in the CPU's memory meanwhile.

    Args:
        model: with plain linear layers.
        targets: all layers that can be replaced.
        cell: which of them, and how.
        files: module name -> file with `basis` for at least the cell's energy.

    Yields:
        Module name -> k / in, the share of directions in the principal part, of the replaced layers.
    """
    shares: dict[str, float] = {}
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for target in filter(cell.selects, targets):
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
    stream = load_stream(Path(config.stream), Path(config.data_root) if config.data_root else None)
    results = _open_results(out / RESULTS, _identity(config, stream), stream)
    cells = {cell.name: cell for cell in cells_of(config)}
    missing = [name for name in (UNCHANGED, *cells) if name not in results["cells"]]
    if missing:
        remove_temporaries(out)
        write_task_files(stream, out / "eval_tasks")
        bench = _open_bench(config, stream)
        for name in tqdm(missing, desc="analysis", unit="cell", disable=None):
            results["cells"][name] = bench.measure(cells.get(name))
            write_json(out / RESULTS, results)
        shutil.rmtree(out / "bases")  # as large as the weights; what follows needs the scores alone
    write_atomically(out / PICTURE, draw_analysis(config, results))
    return results


def _identity(config: AnalysisConfig, stream: Stream) -> dict[str, Any]:
    """What all cells have in common: those of another model or other questions are no neighbours of these."""
    adapter = None
    if config.run is not None:
        adapter = hash_files(load_run(config.run).adapter)
    free = ("base_model", "revision", "device", "trust_remote_code")
    return {
        "base_model": base_model_hash(resolve_model_directory(config.model), Path(config.cache_dir)),
        "adapter": adapter,
        "model": {key: value for key, value in asdict(config.model).items() if key not in free},
        "video": {"frames": config.video.frames, "fps": config.video.fps},
        "limit": config.limit,
        "data": {spec.name: data_hash(stream, spec) for spec in stream.specs},
    }


def _open_results(path: Path, identity: Mapping[str, Any], stream: Stream) -> dict[str, Any]:
    """The cells measured so far; none where nothing was measured yet."""
    if not path.exists():
        return {
            "schema_version": SCHEMA_VERSION,
            "identity": identity,
            "tasks": [task.name for task in stream.tasks],
            "general": [spec.name for spec in stream.general],
            "cells": {},
        }
    results: dict[str, Any] = read_json(path)
    found, expected = dict(flatten(results["identity"])), dict(flatten(dict(identity)))
    other = [
        f"{key}: {found.get(key)} there, {expected.get(key)} now"
        for key in {**found, **expected}
        if found.get(key) != expected.get(key)
    ]
    if other:
        raise ArtifactError(
            f"{path} is the analysis of something else ({'; '.join(other[:3])}); name another directory with "
            "--out, or the settings it was begun with"
        )
    return results


@dataclass
class _Bench:
    """The loaded model with everything that a cell needs."""

    config: AnalysisConfig
    stream: Stream
    model: Any
    processor: Any
    targets: list[Target]
    files: dict[str, Path]
    reader: VideoReader

    def measure(self, cell: Cell | None) -> dict[str, Any]:
        """A cell's facts and its row of scores; None is the unchanged model."""
        if cell is None:
            return {"modules": 0, "directions": None, "scores": self._row(UNCHANGED)}
        with rebuilt(self.model, self.targets, cell, self.files) as shares:
            return {
                **cell._asdict(),
                "modules": len(shares),
                "directions": sum(shares.values()) / len(shares),
                "scores": self._row(cell.name),
            }

    def _row(self, name: str) -> dict[str, Score]:
        out = Path(self.config.out)
        return evaluate_row(
            self.model,
            self.processor,
            self.stream,
            out / "eval_tasks",
            out / "replies" / name,
            reader=self.reader,
            batch_size=self.config.batch_size,
            limit=self.config.limit,
        )


def _open_bench(config: AnalysisConfig, stream: Stream) -> _Bench:
    adapter = None if config.run is None else load_run(config.run).adapter
    model, processor = load_dense(config.model, adapter)
    targets = find_targets(model, {"vision": ["all-linear"], "language": ["all-linear"]})
    for target in targets:
        if target.num_layers < 3:
            raise ConfigError(
                f"the {target.tower} tower has {target.num_layers} layer(s) that take part in the result, "
                "thirds of its depth need at least 3; this model is too small for the analysis"
            )
    highest = max(*config.energies, config.depth_energy)
    energy: dict[Tower, float] = {"vision": highest, "language": highest}
    files = weight_basis_files(model, targets, energy, Path(config.out) / "bases")
    reader = VideoReader(config.video, Path(config.cache_dir))
    return _Bench(config, stream, model, processor, targets, files, reader)


# --------------------------------------------------------------------------------------------------
# showing


def accuracy(results: Mapping[str, Any], name: str, kind: str) -> Estimate:
    """A cell's mean score over the tasks, or over the general benchmarks, with its standard error."""
    scores = results["cells"][name]["scores"]
    return mean_of_scores([Estimate(scores[n]["value"], scores[n]["stderr"]) for n in results[kind]])


def format_analysis(config: AnalysisConfig, results: Mapping[str, Any]) -> str:
    """Every cell as plain text, without final newline."""
    asked = results["cells"][UNCHANGED]["scores"].values()
    title = [
        "Accuracy in %, ± standard error, with weights rebuilt from their principal or residual directions.",
        f"general: mean over {', '.join(results['general']) or 'nothing'}; tasks: mean over "
        f"{', '.join(results['tasks'])}; {sum(score['n'] for score in asked)} questions a row and side.",
        "kept: share of the input directions that the principal part has; residual has the others.",
    ]
    header = (
        f"{'':31}{'kept':>6}{'principal: general':>20}{'tasks':>13}{'residual: general':>20}{'tasks':>13}"
    )
    whole = [_cell_text(accuracy(results, UNCHANGED, kind)) for kind in KINDS]
    lines = [*title, "", header, f"{'unchanged':31}{'':6}{whole[0]:>20}{whole[1]:>13}"]
    for _, energy, tower, depth in (cell for cell in cells_of(config) if cell.subspace == "principal"):
        pair = [Cell(subspace, energy, tower, depth).name for subspace in SUBSPACES]
        texts = [_cell_text(accuracy(results, name, kind)) for name in pair for kind in KINDS]
        kept = percent(results["cells"][pair[0]]["directions"])
        where = f"{tower:9} {depth:8} eps {energy:g}"
        lines.append(f"{where:31}{kept:>6}{texts[0]:>20}{texts[1]:>13}{texts[2]:>20}{texts[3]:>13}")
    return "\n".join(lines)


def _cell_text(estimate: Estimate) -> str:
    error = "" if estimate.stderr is None else f" ± {percent(estimate.stderr)}"
    return percent(estimate.value) + error


def draw_analysis(config: AnalysisConfig, results: Mapping[str, Any]) -> bytes:
    """The picture as PNG: general benchmarks above, tasks below; over eps left, over depth right."""
    kinds = [kind for kind in KINDS if results[kind]]
    with picture_style():
        figure = Figure(figsize=(13.0, 3.9 * len(kinds)), layout="constrained")
        for row, kind in enumerate(kinds):
            over_energy = figure.add_subplot(len(kinds), 2, 2 * row + 1)
            over_depth = figure.add_subplot(len(kinds), 2, 2 * row + 2, sharey=over_energy)
            plot_over_energy(over_energy, config, results, kind)
            plot_over_depth(over_depth, config, results, kind)
            for axes in (over_energy, over_depth):
                _finish(axes, accuracy(results, UNCHANGED, kind))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return png(figure)


def plot_over_energy(axes: Axes, config: AnalysisConfig, results: Mapping[str, Any], kind: str) -> None:
    """The intra-layer picture: one line per subspace and tower, at evenly spaced eps."""
    energies = sorted(set(config.energies))
    for tower, line in LINES.items():
        for subspace, colour in COLOURS.items():
            names = [Cell(subspace, energy, tower, "all").name for energy in energies]
            values, errors = _bars(results, names, kind)
            label = f"{subspace}, {'both towers' if tower == 'both' else tower}"
            axes.errorbar(
                range(len(energies)), values, yerr=errors, label=label, color=colour, linestyle=line,
                linewidth=2.2 if tower == "both" else 1.6, marker="o" if subspace == "principal" else "s",
                markersize=5, capsize=2, elinewidth=1,
            )  # fmt: skip
    directions = [results["cells"][Cell("principal", e, "both", "all").name]["directions"] for e in energies]
    labels = [f"{e:g}\n{100 * d:.0f} %" for e, d in zip(energies, directions, strict=True)]
    axes.set_xticks(range(len(energies)), labels)
    what = "general benchmarks" if kind == "general" else "the stream's tasks"
    axes.set_title(f"{what}: part of every layer", fontsize=11)
    axes.set_xlabel("eps: energy in the principal part; below, its share of the directions (both towers)")


def plot_over_depth(axes: Axes, config: AnalysisConfig, results: Mapping[str, Any], kind: str) -> None:
    """The inter-layer picture: two bars for each third of each tower, at one eps."""
    groups = [(tower, depth) for tower in TOWERS for depth in DEPTHS]
    places = [index + 0.5 * (index // len(DEPTHS)) for index in range(len(groups))]
    for side, subspace in zip((-0.5, 0.5), SUBSPACES, strict=True):
        names = [Cell(subspace, config.depth_energy, tower, depth).name for tower, depth in groups]
        values, errors = _bars(results, names, kind)
        axes.bar(
            [place + side * BAR for place in places], values, BAR, yerr=errors, color=COLOURS[subspace],
            edgecolor="#16242e", linewidth=0.5, capsize=2, error_kw={"elinewidth": 1},
        )  # fmt: skip
    axes.set_xticks(places, [depth for _, depth in groups], fontsize=8)
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    for index, tower in enumerate(TOWERS):  # under the middle of its group
        centre = sum(places[index * len(DEPTHS) : (index + 1) * len(DEPTHS)]) / len(DEPTHS)
        name = "both towers" if tower == "both" else tower
        axes.text(centre, -0.12, name, transform=axes.get_xaxis_transform(), ha="center", va="center")
    what = "general benchmarks" if kind == "general" else "the stream's tasks"
    axes.set_title(f"{what}: part of one third of the layers, eps {config.depth_energy:g}", fontsize=11)
    axes.set_xlabel("third of the depth, and tower, that is rebuilt", labelpad=16)


def _bars(results: Mapping[str, Any], names: Sequence[str], kind: str) -> tuple[list[float], list[float]]:
    """Values and error bars in %; an unknown error draws none."""
    estimates = [accuracy(results, name, kind) for name in names]
    values = [math.nan if e.value is None else 100 * e.value for e in estimates]
    return values, [math.nan if e.stderr is None else 100 * e.stderr for e in estimates]


def _finish(axes: Axes, unchanged: Estimate) -> None:
    if unchanged.value is not None:
        axes.axhline(
            100 * unchanged.value, color="#566672", linewidth=1.2, linestyle="-.", label="unchanged model"
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean score, %")
    axes.grid(axis="y", color="#d9e0e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
