"""What a study found: its runs collected, the arms tested against the reference, a table and a picture."""

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from mllm_keeplora.continual.history import PACKAGES
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.evaluation.metrics import Estimate, mean_over_seeds
from mllm_keeplora.reports.comparison import Run, draw_comparison, grouped
from mllm_keeplora.reports.figures import picture_style, png, styles
from mllm_keeplora.reports.tables import with_error
from mllm_keeplora.runs.files import atomic_path, write_json
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.studies.methods import (
    Job,
    Study,
    choice_name,
    choices,
    complete_run,
    run_directory,
    tuning_directory,
)

STREAM_METRICS = {"mft": "MFT", "last": "Last", "bwt": "BWT", "transfer": "Transfer", "average": "Average"}
METRICS = {**STREAM_METRICS, "general": "general, at the end"}
SCORE_ROUNDING = 1e-9  # of differences of scores, which are fractions of questions
TESTED = {"last": "Last", "bwt": "BWT", "general": "general"}  # the p-values that the table shows


def write_results(study: Study) -> str:
    """Writes `results.json`, `table.md` and a picture; returns the table.

    The picture is `fronts.png` of a study over rates, else `methods.png` without the ablations.
    """
    results = collect(study)
    folder = Path(study.results)
    write_json(folder / "results.json", results)
    table = format_results(results)
    (folder / "table.md").write_text(table)
    runs = [
        Run(arm, seed, run.retention)
        for arm in [*study.default, *study.further]
        for seed, run in _complete_runs(study, arm).items()
    ]
    if study.rates:
        with atomic_path(folder / "fronts.png") as temporary:
            temporary.write_bytes(draw_fronts(fronts(study, results["arms"])))
    elif runs:
        with atomic_path(folder / "methods.png") as temporary:
            temporary.write_bytes(draw_comparison(grouped(runs)))
    return table


def collect(study: Study) -> dict[str, Any]:
    """All complete runs of a study with their statistics: the content of `results.json`.

    Runs that are not there are left out, never filled in.
    """
    arms: dict[str, Any] = {}
    for name, settings in study.arms.items():
        if runs := _complete_runs(study, name):
            kind = "ablation" if name in study.ablations else "method"
            seeds = {str(seed): _facts(run) for seed, run in runs.items()}
            arms[name] = {"kind": kind, "settings": settings, "tuning": _scores(study, name), "seeds": seeds}
    add_statistics(arms, study.reference)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": asdict(study),
        "reference": study.reference,
        "arms": arms,
        "environment": environment(),
    }


def fronts(study: Study, arms: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each method and rate that has runs: `method`, `rate`, and the means over seeds, in %."""
    rows = [
        {"method": name, "rate": rate} | {m: arm["summary"][m]["mean"] for m in METRICS}
        for name in [*study.methods, *study.more_methods]
        for rate in sorted(study.rates)
        if (arm := arms.get(f"{name}, {rate:g}")) is not None
    ]
    frame = pd.DataFrame(rows, columns=["method", "rate", *METRICS]).astype(dict.fromkeys(METRICS, float))
    return frame.assign(**{metric: 100 * frame[metric] for metric in METRICS})


@picture_style()
def draw_fronts(frame: pd.DataFrame) -> bytes:
    """What each method keeps of general ability beside what it learns and what it ends with; a point a rate."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")  # inches
    methods = frame.groupby("method", sort=False)
    for place, (metric, title) in enumerate({"last": "Last, %", "mft": "MFT, %"}.items(), start=1):
        axes = figure.add_subplot(1, 2, place, xlabel="general ability at the end, %", ylabel=title)
        for (name, points), style in zip(methods, styles(len(methods)), strict=True):
            axes.plot(points["general"], points[metric], label=name, **style)
            end = points.iloc[-1]
            axes.annotate(f"{end['rate']:g}", (end["general"], end[metric]), (4, 4), textcoords="offset points")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def _complete_runs(study: Study, arm: str) -> dict[int, SavedRun]:
    seeds = dict.fromkeys([*study.seeds, *study.more_seeds])
    found = {seed: complete_run(run_directory(study, Job(arm, seed))) for seed in seeds}
    return {seed: run for seed, run in found.items() if run is not None}


def _facts(run: SavedRun) -> dict[str, Any]:
    """One run's numbers, scores as fractions; `general` is the benchmarks' mean after the last stage."""
    retention, stages = run.retention, run.manifests
    rows = [{name: score["value"] for name, score in row["scores"].items()} for row in retention["rows"]]
    general = [rows[-1][name] for name in retention["general"]]
    seconds = {k: sum(stage["timings"].get(k, 0.0) for stage in stages) for k in ("train", "total")}
    return {
        "learning_rate": run.config.train.learning_rate,
        "rows": rows,
        "tasks": retention["tasks"],
        "general_tasks": retention["general"],
        **{metric: retention["metrics"][metric] for metric in STREAM_METRICS},
        "general": fmean(general) if general else None,
        "seconds": seconds,
        "feature_directions": sum(m.get("k_f_added", 0) for stage in stages for m in stage["modules"]),
    }


def _scores(study: Study, arm: str) -> dict[str, float]:
    """Choice -> Last on the held-out split, of the tuning runs that are there; an ablation has none."""
    if arm in study.ablations:
        return {}
    rates, candidates = choices(study, arm)
    found = {choice_name(c): complete_run(tuning_directory(study, arm, c)) for c in [*rates, *candidates]}
    return {name: run.retention["metrics"]["last"] for name, run in found.items() if run is not None}


def add_statistics(arms: Mapping[str, Any], reference: str) -> None:
    """Adds `summary` to every arm, and `against_reference` to all others where the reference has runs.

    Methods are one family of tests and ablations another, for each metric: Holm corrects within a family.

    Args:
        arms: name -> {"kind", "seeds": {seed: {metric: value}}}.
        reference: the arm that the others are tested against.
    """
    runs = pd.DataFrame(
        [
            {"arm": name, "seed": seed, **{metric: facts[metric] for metric in METRICS}}
            for name, arm in arms.items()
            for seed, facts in arm["seeds"].items()
        ],
        columns=["arm", "seed", *METRICS],
    ).astype(dict.fromkeys(METRICS, float))
    for name, own in runs.groupby("arm"):
        arms[name]["summary"] = {metric: summary(list(own[metric].dropna())) for metric in METRICS}
    for metric in METRICS if reference in arms else ():
        by_seed = runs.pivot(index="seed", columns="arm", values=metric)
        for kind in ("method", "ablation"):
            others = [name for name, arm in arms.items() if arm["kind"] == kind and name != reference]
            tests = {name: paired_test(by_seed[reference], by_seed[name]) for name in others}
            corrected = holm({name: test["p"] for name, test in tests.items()})
            for name, test in tests.items():
                test["p_holm"] = corrected.get(name)
                arms[name].setdefault("against_reference", {})[metric] = test


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over the seeds, its standard error from their spread, and their number; None where undefined."""
    mean, error = mean_over_seeds([Estimate(value, None) for value in values])
    return {"mean": mean, "standard_error": error, "n": len(values)}


def paired_test(first: pd.Series, second: pd.Series) -> dict[str, Any]:
    """Two-sided paired t-test over the seeds that both series have.

    Returns:
        {"n", "difference": mean of first - second, "p"}; None where it is undefined: under two pairs, or
        differences that are all equal up to rounding.
    """
    differences = list((first - second).dropna())
    differ = bool(differences) and max(differences) - min(differences) > SCORE_ROUNDING
    p = stats.ttest_1samp(differences, 0.0).pvalue if differ else None
    mean = fmean(differences) if differences else None
    return {"n": len(differences), "difference": mean, "p": None if p is None else float(p)}


def holm(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Holm's step-down correction (1979): adjusted p-values, at most 1; what is undefined is left out."""
    rising = pd.Series(p_values, dtype=float).dropna().sort_values()
    left = range(len(rising), 0, -1)  # hypotheses that are not yet rejected
    adjusted: dict[str, float] = (rising * left).cummax().clip(upper=1.0).to_dict()
    return adjusted


def format_results(results: Mapping[str, Any]) -> str:
    """A table in Markdown: means and standard errors in percent and points, p-values by Holm."""
    heads = ["seeds", "rate", *METRICS.values(), *(f"p: {name}" for name in TESTED.values())]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name, arm in results["arms"].items():
        rates = sorted({f"{run['learning_rate']:g}" for run in arm["seeds"].values()})
        summaries = [arm["summary"][metric] for metric in METRICS]
        means = [with_error(Estimate(s["mean"], s["standard_error"])) for s in summaries]
        tests = arm.get("against_reference", {})
        ps = [_p(tests.get(metric, {}).get("p_holm")) for metric in TESTED]
        lines.append("| " + " | ".join([name, str(len(arm["seeds"])), "/".join(rates), *means, *ps]) + " |")
    return "\n".join(lines) + "\n"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def environment() -> dict[str, Any]:
    """What the runs ran on, as far as the collecting process sees it; None for what is not there."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": processor(),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    """What git says of the working directory; empty outside a repository, and where there is no git."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.machine()
