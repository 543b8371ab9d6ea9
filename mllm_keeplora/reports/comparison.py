"""Finished runs over one stream side by side, from their directories: one page, one picture, one table.

    keeplora compare runs/vqa_small runs/lora --out runs/comparison

Runs with one label (their method) and different seeds become one line: mean and standard error over the
seeds. A label with one run keeps that run's numbers, with the standard error that its test questions give;
changes and ratios (BWT, forgetting, retention) compare two answers to the same question and have none there.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm_keeplora.evaluation.metrics import Cell, Estimate, mean_of_scores, mean_over_seeds
from mllm_keeplora.reports.page import (
    TEXT_WIDTH,
    Dot,
    Json,
    Line,
    blocks,
    chart,
    index_ticks,
    percent,
    picture_style,
    png,
    points,
    render,
    shorten,
    ticks,
    write_atomically,
)
from mllm_keeplora.reports.report import (
    MANIFEST_KEYS,
    METRICS,
    RETENTION_KEYS,
    ReportError,
    flatten,
    load_json,
    load_manifest,
)

PAGE, PICTURE = "comparison.html", "comparison.png"
COMPARED_METRICS = ("mft", "last", "bwt", "forgetting")
MARKERS = "osD^vPX*<>hp8d"
COLOURS = ("#14213d", "#e69f00", "#b3246b", "#66c2e8", "#3f7d20", "#9b8cff", "#8a5a2b")
LABEL_WIDTH = 36  # characters of a label in the table and in the picture
# Decide no number, or are compared otherwise (seeds are averaged over, data by their hashes).
NOT_COMPARED = (
    "run_dir",
    "cache_dir",
    "report_to",
    "seed",
    "stream",
    "data_root",
    "backfill",
    "on_bad_record",
)

Over = Literal["learnt", "general"]


class Run(NamedTuple):
    """One finished run: what it is called, its seed, the content of its `retention.json`."""

    label: str
    seed: int
    retention: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The runs of one label.

    Attributes:
        label: what they are called.
        seeds: one a run.
        metrics: mft, last, bwt, forgetting; and kept, the mean of `retention`.
        retention: general benchmark -> share of the base's score that is left at the end.
        scores: task or benchmark -> its score after each stage, the base first.
        learnt: mean score on the tasks learnt so far, after stages 1..T.
        general: mean score on the general benchmarks, the base first; None without any.
    """

    label: str
    seeds: tuple[int, ...]
    metrics: dict[str, Estimate]
    retention: dict[str, Estimate]
    scores: dict[str, list[Estimate]]
    learnt: list[Estimate]
    general: list[Estimate]


@dataclass(frozen=True)
class FoundRun:
    """A run directory: where it is, what it measured, and the settings that may set it apart."""

    directory: Path
    retention: Json
    method: str
    seed: int
    settings: dict[str, str]
    data: dict[str, str]


# --------------------------------------------------------------------------------------------------
# runs to groups


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of one label as one group, in the order in which the labels come.

    Raises:
        ReportError: runs that do not compare (see `check_comparable`), or two of one label and seed.
    """
    check_comparable({f"{run.label}, seed {run.seed}": run.retention for run in runs})
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for label, seed, retention in runs:
        same = by_label.setdefault(label, {})
        if seed in same:
            raise ReportError(
                f"cannot compare: two runs are {label!r} with seed {seed}; a mean over seeds would count one "
                "twice: leave one out"
            )
        same[seed] = retention
    return [_group(label, same) for label, same in by_label.items()]


def check_comparable(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs of different streams, and unfinished ones.

    Args:
        runs: name of a run -> its retention.

    Raises:
        ReportError: names the run and what it lacks.
    """
    if not runs:
        raise ReportError("cannot compare: no run was given; name at least one run directory")
    first, reference = next(iter(runs.items()))
    for name, retention in runs.items():
        for key in ("tasks", "general"):
            if retention[key] != reference[key]:
                raise ReportError(
                    f"cannot compare: {name} has {key} {', '.join(retention[key]) or 'none'}, but {first} "
                    f"has {', '.join(reference[key]) or 'none'}; compare runs over one stream"
                )
        done, wanted = len(retention["rows"]) - 1, len(retention["tasks"])
        if done < wanted:
            raise ReportError(
                f"cannot compare: {name} is at stage {done} of {wanted}; run the same command again to "
                "finish it"
            )


def _group(label: str, runs: Mapping[int, Mapping[str, Any]]) -> Group:
    alone = [_alone(label, seed, retention) for seed, retention in runs.items()]

    def by_name(read: Callable[[Group], Mapping[str, Estimate]]) -> dict[str, Estimate]:
        return {name: mean_over_seeds([read(run)[name] for run in alone]) for name in read(alone[0])}

    def by_stage(curves: Sequence[Sequence[Estimate]]) -> list[Estimate]:
        return [mean_over_seeds(stage) for stage in zip(*curves, strict=True)]

    return Group(
        label,
        tuple(runs),
        by_name(lambda run: run.metrics),
        by_name(lambda run: run.retention),
        {name: by_stage([run.scores[name] for run in alone]) for name in alone[0].scores},
        by_stage([run.learnt for run in alone]),
        by_stage([run.general for run in alone]),
    )


def _alone(label: str, seed: int, retention: Mapping[str, Any]) -> Group:
    """One run, with the standard errors that its questions give."""
    tasks, general, rows = retention["tasks"], retention["general"], retention["rows"]
    scores = {name: [_cell(row, name) for row in rows] for name in (*tasks, *general)}
    values, ratios = retention["metrics"], retention["metrics"]["retention"]
    shares = {name: Estimate(ratios.get(name), None) for name in general}
    metrics = {key: Estimate(values[key], None) for key in COMPARED_METRICS}
    metrics["mft"] = mean_of_scores([scores[name][i + 1] for i, name in enumerate(tasks)])
    metrics["last"] = mean_of_scores([scores[name][-1] for name in tasks])
    metrics["kept"] = mean_of_scores(list(shares.values()))
    return Group(
        label,
        (seed,),
        metrics,
        shares,
        scores,
        [mean_of_scores([scores[name][j] for name in tasks[:j]]) for j in range(1, len(rows))],
        [mean_of_scores([scores[name][j] for name in general]) for j in range(len(rows)) if general],
    )


def _cell(row: Mapping[str, Any], name: str) -> Estimate:
    score = row["scores"].get(name)
    return Estimate(None, None) if score is None else Estimate(score["value"], score["stderr"])


# --------------------------------------------------------------------------------------------------
# run directories


def compare_runs(directories: Sequence[Path], out: Path) -> list[Group]:
    """Writes `comparison.html` and `comparison.png` to `out`, each whole or not at all; returns the groups.

    Raises:
        ReportError: a run that is missing, damaged or unfinished, runs over different streams or data, or two
            runs that differ in nothing.
    """
    found = [read_run(directory) for directory in directories]
    check_comparable({str(run.directory): run.retention for run in found})
    _check_data(found)
    labels = labels_of(found)
    runs = [Run(label, run.seed, run.retention) for label, run in zip(labels, found, strict=True)]
    groups = grouped(runs)
    picture = draw_comparison(groups)
    write_atomically(out / PICTURE, picture)
    write_atomically(out / PAGE, _render(groups, found, labels, picture).encode())
    return groups


def read_run(directory: Path) -> FoundRun:
    """A run from its `retention.json` and the manifest of its last stage.

    Raises:
        ReportError: a file is missing, damaged or of another schema version.
    """
    retention = load_json(directory / "retention.json", RETENTION_KEYS)
    if not retention["rows"]:
        raise ReportError(f"cannot compare: {directory / 'retention.json'} has no rows; run the stream again")
    keys = (*MANIFEST_KEYS, "config", "seeds", "data", "base_model")
    manifest = load_manifest(directory, retention["rows"][-1], keys)
    config = {key: value for key, value in manifest["config"].items() if key not in NOT_COMPARED}
    settings = dict(flatten(config))
    settings["base model's content"] = str(manifest["base_model"]["hash"])[:12]
    settings |= {f"package {name}": str(version) for name, version in manifest["packages"].items()}
    return FoundRun(
        directory, retention, retention["method"], manifest["seeds"]["run"], settings, manifest["data"]
    )


def _check_data(runs: Sequence[FoundRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        names = [name for name, found in first.data.items() if run.data.get(name) != found]
        if names:
            raise ReportError(
                f"cannot compare: {', '.join(names)}: {run.directory} was trained or asked on other data "
                f"than {first.directory} (the hashes in their manifests differ); compare runs on one"
            )


def differing_settings(runs: Sequence[FoundRun]) -> list[str]:
    """Names of the settings that are not the same in all runs; a setting that a run lacks differs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def labels_of(runs: Sequence[FoundRun]) -> list[str]:
    """A run's method; where runs of one method differ in more than the seed, with what differs."""
    labels = []
    for run in runs:
        same_method = [other for other in runs if other.method == run.method]
        apart = [f"{name} {run.settings.get(name, '-')}" for name in differing_settings(same_method)]
        labels.append(f"{run.method}: {', '.join(apart)}" if apart else run.method)
    return labels


# --------------------------------------------------------------------------------------------------
# picture


def plot_over_stages(axes: Axes, groups: Sequence[Group], over: Over) -> None:
    """One line a group with its standard errors: the tasks learnt so far, or the general benchmarks."""
    names = ["base", *(next(iter(groups)).scores)]
    first = 1 if over == "learnt" else 0
    for style, group in zip(styles(groups), groups, strict=True):
        curve = group.learnt if over == "learnt" else group.general
        stages = [first + i for i, estimate in enumerate(curve) if estimate.value is not None]
        known = [estimate for estimate in curve if estimate.value is not None]
        values, errors = zip(*map(_in_percent, known), strict=True) if known else ((), ())
        axes.errorbar(stages, values, yerr=errors, label=shorten(group.label, LABEL_WIDTH), **style)
    last = len(groups[0].learnt)
    labels = [names[0] if i == 0 else f"{i} {shorten(names[i], 14)}" for i in range(first, last + 1)]
    axes.set_xticks(range(first, last + 1), labels, rotation=30, ha="right", rotation_mode="anchor")
    what = "tasks learnt so far" if over == "learnt" else "general benchmarks"
    axes.set(title=f"Accuracy on the {what}", ylabel="mean score, %", ylim=(0, None))
    _tidy(axes)


def plot_plasticity_retention(axes: Axes, groups: Sequence[Group]) -> None:
    """What a method can learn (MFT) against what it keeps of the base; better is right and up."""
    for style, group in zip(styles(groups), groups, strict=True):
        mft, kept = group.metrics["mft"], group.metrics["kept"]
        if mft.value is not None and kept.value is not None:
            (x, x_error), (y, y_error) = _in_percent(mft), _in_percent(kept)
            label = shorten(group.label, LABEL_WIDTH)
            axes.errorbar([x], [y], xerr=[x_error], yerr=[y_error], label=label, **{**style, "markersize": 9})
    axes.set(
        title="Learning against keeping",
        xlabel="MFT: score right after learning, %",
        ylabel="general ability kept, %",
        ylim=(0, None),
    )
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=6)
    _tidy(axes)


def draw_comparison(groups: Sequence[Group]) -> bytes:
    """The three plots as PNG; without general benchmarks the first alone."""
    panels: list[Callable[[Axes], None]] = [lambda axes: plot_over_stages(axes, groups, "learnt")]
    if groups[0].general:
        panels.append(lambda axes: plot_over_stages(axes, groups, "general"))
        panels.append(lambda axes: plot_plasticity_retention(axes, groups))
    with picture_style():
        columns = min(len(groups), 2 * len(panels))
        height = 4.0 + 0.25 * math.ceil(len(groups) / columns)  # inches; the legend stands below the plots
        figure = Figure(figsize=(5.0 * len(panels), height), layout="constrained")
        for index, panel in enumerate(panels):
            panel(figure.add_subplot(1, len(panels), index + 1))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        return png(figure)


def styles(groups: Sequence[Group]) -> list[Json]:
    """How each group is drawn: colours that differ in lightness too; hollow and dashed when they repeat."""
    return [
        {
            "color": colour,
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 6,
            "markerfacecolor": "white" if hollow else colour,
            "linestyle": "--" if hollow else "-",
            "linewidth": 2,
            "capsize": 3,
            "elinewidth": 1.2,
        }
        for index, (colour, hollow) in enumerate(_colours(len(groups)))
    ]


def _colours(count: int) -> list[tuple[str, bool]]:
    """Colour, and whether it repeats one."""
    return [(COLOURS[index % len(COLOURS)], index >= len(COLOURS)) for index in range(count)]


def _in_percent(estimate: Estimate) -> tuple[float, float]:
    """Value and error bar; an unknown error draws none."""
    return 100 * (estimate.value or 0.0), math.nan if estimate.stderr is None else 100 * estimate.stderr


def _tidy(axes: Axes) -> None:
    axes.grid(color="#d9e0e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# --------------------------------------------------------------------------------------------------
# table and page


def format_comparison(groups: Sequence[Group]) -> str:
    """The metrics of every group as plain text, at most `TEXT_WIDTH` columns, without final newline."""
    labels = [shorten(group.label, LABEL_WIDTH) for group in groups]
    width = max(map(len, labels))
    columns = [
        [f"  {text:>{size}}" for text in column]
        for column in _columns(groups)
        for size in [max(map(len, column))]
    ]
    lines = ["Runs side by side, in % and points, ± standard error"]
    for block in blocks(columns, TEXT_WIDTH - width):
        lines.append("")
        for index, label in enumerate(["", *labels]):
            lines.append((f"{label:<{width}}" + "".join(column[index] for column in block)).rstrip())
    return "\n".join([*lines, "", *error_sentences(groups)])


def error_sentences(groups: Sequence[Group]) -> list[str]:
    """Where the standard errors come from."""
    several = any(len(group.seeds) > 1 for group in groups)
    single = any(len(group.seeds) == 1 for group in groups)
    return [
        *(["Several runs: mean and standard error over their seeds."] if several else []),
        *(["One run: the standard error of its test questions, where there is one."] if single else []),
    ]


def _columns(groups: Sequence[Group]) -> list[list[str]]:
    """Header and one cell for each group: number of runs, metrics, retention of each general benchmark."""
    names = {key: name for key, name, _, _ in METRICS}
    columns = [["runs", *(str(len(group.seeds)) for group in groups)]]
    for key in COMPARED_METRICS:
        shown = points if key == "bwt" else percent
        columns.append([names[key], *(_text(group.metrics[key], shown) for group in groups)])
    for name in groups[0].retention:
        header = f"{shorten(name, 16)} kept"
        columns.append([header, *(_text(group.retention[name], percent) for group in groups)])
    return columns


def _text(estimate: Estimate, shown: Callable[[Cell], str]) -> str:
    error = "" if estimate.stderr is None else f" ± {percent(estimate.stderr)}"
    return shown(estimate.value) + error


def _score_charts(groups: Sequence[Group]) -> list[Json]:
    """Each task and benchmark over the stages, one line for each group."""
    stages, colours = len(groups[0].learnt), _colours(len(groups))
    x_ticks = index_ticks(["base", *map(str, range(1, stages + 1))])
    charts = []
    for index, name in enumerate(groups[0].scores):
        curves = [group.scores[name] for group in groups]
        highest = max((e.value for curve in curves for e in curve if e.value is not None), default=1.0)
        y_ticks = [(value, f"{100 * value:g}") for value, _ in ticks(max(highest, 1.0))]
        lines = [
            Line(
                [
                    Dot(j, e.value, f"{group.label}, stage {j}: {_text(e, percent)} %", hollow)
                    for j, e in enumerate(curve)
                ],
                colour,
            )
            for group, curve, (colour, hollow) in zip(groups, curves, colours, strict=True)
        ]
        own = index + 1 if index < stages else None
        note = "general benchmark" if own is None else f"learnt in stage {own}"
        charts.append(chart(name, lines, x_ticks=x_ticks, y_ticks=y_ticks, note=note, mark_x=own))
    return charts


def _render(groups: Sequence[Group], runs: Sequence[FoundRun], labels: Sequence[str], picture: bytes) -> str:
    header, *rows = zip(*_columns(groups), strict=True)
    first = {label: run for label, run in reversed(list(zip(labels, runs, strict=True)))}
    return render(
        "comparison.html.j2",
        tasks=runs[0].retention["tasks"],
        general=runs[0].retention["general"],
        runs=list(zip(labels, runs, strict=True)),
        legend=[(g.label, *c) for g, c in zip(groups, _colours(len(groups)), strict=True)],
        header=header,
        rows=[(group.label, row) for group, row in zip(groups, rows, strict=True)],
        meanings=[(name, meaning) for key in COMPARED_METRICS for k, name, _, meaning in METRICS if k == key],
        sentences=error_sentences(groups),
        picture=base64.b64encode(picture).decode(),
        score_charts=_score_charts(groups),
        settings=[
            (name, [first[group.label].settings.get(name, "-") for group in groups])
            for name in differing_settings(runs)
        ],
    )
