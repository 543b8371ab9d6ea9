"""Finished runs over one stream side by side, from their directories: one page, one picture, one table.

Runs with one label (their method) and different seeds become one line: mean and standard error over the
seeds. A label with one run keeps that run's numbers, with the 95 % interval that its test questions give;
changes and ratios (BWT, forgetting, retention) compare two answers to the same question and have none there.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.metrics import Estimate, mean_over_seeds
from mllm_keeplora.reports.answers import OF_PICTURES, OF_QUESTIONS, Section, difference_sections
from mllm_keeplora.reports.figures import chart_style, method_styles, picture_style, plot_intervals, png, svg
from mllm_keeplora.reports.intervals import Interval, around, mean_of_intervals
from mllm_keeplora.reports.page import Charts, render, score_charts, write_atomically
from mllm_keeplora.reports.results import ReportError, Results, names_of, read_results, score_of, written
from mllm_keeplora.reports.tables import METRICS, TEXT_WIDTH, points, shorten, with_error, with_limits

PAGE, PICTURE = "comparison.html", "comparison.png"
COMPARED = ("mft", "last", "bwt", "forgetting")
LEARNT, GENERAL = "tasks learnt so far", "general benchmarks"  # curves beside those of each task
ERRORS = """Several runs: mean ± standard error over their seeds.
One run: in brackets the 95 % interval that its tests give, where there is one."""
LABEL_WIDTH = 48  # characters of a label in the picture
# Decide no number, or are compared otherwise (seeds are averaged over, data by their hashes).
NOT_COMPARED = {"run_dir", "cache_dir", "report_to", "seed", "stream", "data_root"}
NOT_COMPARED |= {"backfill", "on_bad_record"}


class Run(NamedTuple):
    """One finished run: what it is called, its seed, its accuracy matrix with the metrics."""

    label: str
    seed: int
    retention: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The runs of one label.

    The limits of an `Interval` are those of 95 % where there is one run, and of one standard error over the seeds
    otherwise.

    Attributes:
        label: what they are called.
        method: their method.
        seeds: one a run.
        metrics: those of `COMPARED`, and `kept`, the mean of the next.
        kept: general benchmark -> share of the base's score that is left at the end.
        curves: LEARNT, GENERAL, and each task and benchmark -> score after each stage, the base first.
    """

    label: str
    method: str
    seeds: tuple[int, ...]
    metrics: dict[str, Interval]
    kept: dict[str, Interval]
    curves: dict[str, list[Interval]]

    def shown(self, interval: Interval, *, signed: bool = False) -> str:
        """A number of this group in % or points, with its limits."""
        if len(self.seeds) == 1:
            return points(interval.value) if signed else with_limits(interval)
        error = None if None in interval else interval.high - interval.value  # type: ignore[operator]
        return with_error(Estimate(interval.value, error), signed=signed)


# --------------------------------------------------------------------------------------------------
# runs to groups


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of one label as one group, in the order in which the labels come.

    Raises:
        ReportError: runs that do not compare (see `check_comparable`), or two of one label and seed.
    """
    check_comparable({f"{run.label}, seed {run.seed}": run.retention for run in runs})
    labels = dict.fromkeys(run.label for run in runs)
    return [_over_seeds([_alone(run) for run in runs if run.label == label]) for label in labels]


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
                f"cannot compare: {name} is at stage {done} of {wanted}; run the same command again to finish it"
            )


def _alone(run: Run) -> Group:
    """One run, with the intervals that its questions give to means of scores."""
    tasks, general, rows = run.retention["tasks"], run.retention["general"], run.retention["rows"]
    curves = {name: [score_of(row, name) for row in rows] for name in (*tasks, *general)}
    curves[LEARNT] = [mean_of_intervals([curves[name][j] for name in tasks[:j]]) for j in range(len(rows))]
    curves[GENERAL] = [mean_of_intervals([curves[name][j] for name in general]) for j in range(len(rows))]
    values = run.retention["metrics"]
    kept = {name: Interval(values["retention"].get(name), None, None) for name in general}
    metrics = {key: Interval(values[key], None, None) for key in COMPARED}
    metrics["mft"] = mean_of_intervals([curves[name][i] for i, name in enumerate(tasks, start=1)])
    metrics["last"] = mean_of_intervals([curves[name][-1] for name in tasks])
    metrics["kept"] = mean_of_intervals(list(kept.values()))
    return Group(run.label, run.retention["method"], (run.seed,), metrics, kept, curves)


def _over_seeds(runs: Sequence[Group]) -> Group:
    label, seeds = runs[0].label, tuple(seed for run in runs for seed in run.seeds)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ReportError(
            f"cannot compare: two runs are {label!r} with seed {twice[0]}; a mean over seeds would count one "
            "twice: leave one out"
        )
    if len(runs) == 1:
        return runs[0]
    metrics = {key: _mean([run.metrics[key] for run in runs]) for key in runs[0].metrics}
    kept = {name: _mean([run.kept[name] for run in runs]) for name in runs[0].kept}
    curves = {
        name: [_mean(stage) for stage in zip(*(run.curves[name] for run in runs), strict=True)]
        for name in runs[0].curves
    }
    return Group(label, runs[0].method, seeds, metrics, kept, curves)


def _mean(runs: Sequence[Interval]) -> Interval:
    return around(mean_over_seeds([Estimate(run.value, None) for run in runs]))


# --------------------------------------------------------------------------------------------------
# saved runs


def compare_runs(directories: Sequence[Path], out: Path) -> list[Group]:
    """Writes `comparison.html` and `comparison.png` to `out`, each whole or not at all; returns the groups.

    Raises:
        ArtifactError: a directory that is none of a run.
        ReportError: a run that is damaged or unfinished, runs over different streams or data, or two runs
            that differ in nothing.
    """
    found = [read_results(load_run(directory)) for directory in directories]
    check_comparable({str(results.directory.path): results.retention for results in found})
    check_data(found)
    labelled = list(zip(labels_of(found), found, strict=True))
    groups = grouped([Run(label, seed_of(results), results.retention) for label, results in labelled])
    answers = _differences(groups, labelled)
    write_atomically(out / PICTURE, draw_comparison(groups))
    write_atomically(out / PAGE, _page(groups, labelled, answers).encode(errors="replace"))
    return groups


def check_data(runs: Sequence[Results]) -> None:
    """Refuses runs that were trained or asked on other data than the first.

    Raises:
        ReportError: names the runs and the data.
    """
    first, expected = runs[0].directory.path, runs[0].manifests[-1]["data"]
    for run in runs[1:]:
        found = run.manifests[-1]["data"]
        if names := [name for name in expected if found.get(name) != expected[name]]:
            raise ReportError(
                f"cannot compare: {', '.join(names)}: {run.directory.path} was trained or asked on other "
                f"data than {first} (the hashes in their manifests differ); compare runs on one"
            )


def seed_of(run: Results) -> int:
    """The run's one seed."""
    return int(run.manifests[-1]["seeds"]["run"])


def differing_settings(runs: Sequence[Results]) -> pd.DataFrame:
    """The settings (columns) that are not the same in all runs (rows); a dash where a run lacks one."""
    found = []
    for manifest in (run.manifests[-1] for run in runs):  # as the last stage was trained
        settings = written({k: value for k, value in manifest["config"].items() if k not in NOT_COMPARED})
        packages = {f"package {name}": str(version) for name, version in manifest["packages"].items()}
        found.append({**settings, "base model's content": manifest["base_model"]["hash"][:12], **packages})
    frame = pd.DataFrame(found).fillna("-")
    return frame.loc[:, frame.nunique() > 1]


def labels_of(runs: Sequence[Results]) -> list[str]:
    """A run's method; where runs of one method differ in more than the seed, with what differs."""
    labels = []
    for run in runs:
        method = run.retention["method"]
        same = [other for other in runs if other.retention["method"] == method]
        apart = differing_settings(same).iloc[same.index(run)]
        details = ", ".join(f"{name} {value}" for name, value in apart.items())
        labels.append(f"{method}: {details}" if details else method)
    return labels


# --------------------------------------------------------------------------------------------------
# picture


def plot_over_stages(axes: Axes, groups: Sequence[Group], curve: str) -> None:
    """One line a group with its standard errors: LEARNT or GENERAL over the stages."""
    names = ["base", *(f"{i} {shorten(name, 14)}" for i, name in enumerate(groups[0].curves, start=1))]
    stages = range(curve == LEARNT, len(groups[0].curves[curve]))  # nothing is learnt before stage 1
    for group, style, label in zip(groups, looks(groups), picture_labels(groups), strict=True):
        found = group.curves[curve][stages.start :]
        plot_intervals(axes, stages, found, label=label, clip_on=False, **style)
    axes.set_xticks(stages, [names[i] for i in stages], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylabel("mean score, %")
    _whole(axes.set_ylim, axes.get_ylim())


def plot_plasticity_retention(axes: Axes, groups: Sequence[Group]) -> None:
    """What a method can learn (MFT) against what it keeps of the base; better is right and up."""
    for group, style, label in zip(groups, looks(groups), picture_labels(groups), strict=True):
        both = np.array([group.metrics["mft"], group.metrics["kept"]], dtype=float)  # None becomes NaN
        (x, x_low, x_high), (y, y_low, y_high) = 100 * both
        errors: dict[str, Any] = {"xerr": [[x - x_low], [x_high - x]], "yerr": [[y - y_low], [y_high - y]]}
        axes.errorbar([x], [y], **errors, label=label, capsize=2, clip_on=False, **style)
    axes.set(xlabel="MFT: score right after learning, %", ylabel="general ability kept, %")
    _whole(axes.set_ylim, axes.get_ylim())
    _whole(axes.set_xlim, axes.get_xlim())


def _whole(set_limits: Callable[[float, float], object], drawn: tuple[float, float]) -> None:
    """An axis from 0 to 100 %, or above where scores are: a part of it would make small differences look large."""
    set_limits(0, 100 if drawn[1] < 110 else drawn[1])


def picture_labels(groups: Sequence[Group]) -> list[str]:
    """What the legend of the picture says: short names with the beginning of what differs, each once."""
    labels = [name + (f": {more}" if more else "") for name, more in told_apart(groups).items()]
    return [textwrap.shorten(label, LABEL_WIDTH, placeholder=" ..") for label in labels]


def looks(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """How each group is drawn: a method has its own colour."""
    return method_styles([group.method for group in groups])


def _panels(groups: Sequence[Group]) -> Mapping[str, Callable[[Axes], None]]:
    """Title -> what draws it; without general benchmarks the first alone."""
    learnt = {f"Accuracy on the {LEARNT}": partial(plot_over_stages, groups=groups, curve=LEARNT)}
    general = {
        f"Accuracy on the {GENERAL}": partial(plot_over_stages, groups=groups, curve=GENERAL),
        "Learning against keeping": partial(plot_plasticity_retention, groups=groups),
    }
    return learnt | general if groups[0].kept else learnt


@picture_style()
def draw_comparison(groups: Sequence[Group]) -> bytes:
    """The panels as one PNG."""
    panels = _panels(groups)
    columns = min(len(groups), 2 * len(panels))
    height = 4.0 + 0.25 * math.ceil(len(groups) / columns)  # inches; the legend stands below the plots
    figure = Figure(figsize=(5.0 * len(panels), height), layout="constrained")
    for place, (title, draw) in enumerate(panels.items(), start=1):
        draw(figure.add_subplot(1, len(panels), place, title=title))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return png(figure)


@chart_style()
def panel_charts(groups: Sequence[Group]) -> Charts:
    """The panels for the page; its legend stands above them."""
    charts = []
    for title, draw in _panels(groups).items():
        axes = Figure(figsize=(3.6, 2.6), layout="constrained").add_subplot()  # inches
        draw(axes)
        charts.append((title, "", svg(axes, title)))
    return charts


# --------------------------------------------------------------------------------------------------
# table and page


def format_comparison(groups: Sequence[Group]) -> str:
    """The metrics of every group as plain text, at most `TEXT_WIDTH` columns; below it what tells the groups apart."""
    table = metric_table(groups).rename(index=partial(shorten, width=36)).rename_axis(None)
    apart = [
        textwrap.fill(f"{name}: {more}", TEXT_WIDTH, subsequent_indent="  ")
        for name, more in told_apart(groups).items()
        if more
    ]
    title = "Runs side by side, in % and points"
    return "\n".join([title, "", table.to_string(line_width=TEXT_WIDTH), "", *apart, *[""] * bool(apart), ERRORS])


def metric_table(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each group: number of runs, metrics, retention of each general benchmark."""
    rows = []
    for name, group in zip(told_apart(groups), groups, strict=True):
        row = {"method": name, "runs": str(len(group.seeds))}
        for key in COMPARED:
            row[METRICS[key][0]] = group.shown(group.metrics[key], signed=key == "bwt")
        rows.append(row | {f"{shorten(n, 40)} kept": group.shown(kept) for n, kept in group.kept.items()})
    return pd.DataFrame(rows).set_index("method")


def told_apart(groups: Sequence[Group]) -> dict[str, str]:
    """Short name -> what differs from the other groups of the method; empty where the method has one group.

    The short name is the method, numbered where several groups have it. Settings come from files: no control
    character may pass.
    """
    methods = [group.label.split(": ")[0] for group in groups]
    found = {}
    for place, (method, group) in enumerate(zip(methods, groups, strict=True)):
        several = methods.count(method) > 1
        name = f"{method} {methods[: place + 1].count(method)}" if several else method
        found[name] = shorten(group.label.removeprefix(method).removeprefix(": "), 2000)
    return found


def _differences(groups: Sequence[Group], labelled: Sequence[tuple[str, Results]]) -> list[Section]:
    """Questions that the first runs of the groups answer differently in the end."""
    by_label: dict[str, Results] = {}
    for label, results in labelled:
        by_label.setdefault(label, results)
    runs = {short: by_label[group.label] for short, group in zip(told_apart(groups), groups, strict=True)}
    config = load_run(next(iter(runs.values())).directory.path).config
    reader = VideoReader(config.video, Path(config.cache_dir))
    try:
        return difference_sections(runs, reader)
    finally:
        reader.close()


def _page(groups: Sequence[Group], runs: Sequence[tuple[str, Results]], answers: Sequence[Section]) -> str:
    labels, results = zip(*runs, strict=True)
    retention = results[0].retention
    curves = {name: [group.curves[name] for group in groups] for name in names_of(retention)}
    apart = told_apart(groups)
    short = dict(zip((group.label for group in groups), apart, strict=True))
    scores = [
        {"task": name, "method": method} | {f"stage {i}": group.shown(e) for i, e in enumerate(curve)}
        for name, found in curves.items()
        for method, group, curve in zip(apart, groups, found, strict=True)
    ]
    settings = differing_settings(results).set_axis([short[label] for label in labels])
    places = [(short[label], str(seed_of(run)), str(run.directory.path)) for label, run in runs]
    return render(
        "comparison.html.j2",
        retention=retention,
        styles=looks(groups),
        metrics=metric_table(groups),
        meanings=[METRICS[key] for key in COMPARED],
        errors=ERRORS,
        panels=panel_charts(groups),
        score_charts=score_charts(retention, curves, looks(groups)),
        apart=apart,
        answers=answers,
        words=OF_PICTURES if results[0].chooses else OF_QUESTIONS,
        scores=pd.DataFrame(scores).set_index("task"),
        # Runs of one label differ in no setting.
        settings=settings[~settings.index.duplicated()].T.rename_axis("setting"),
        runs=pd.DataFrame(places, columns=["method", "seed", "directory"]).set_index("method"),
    )
