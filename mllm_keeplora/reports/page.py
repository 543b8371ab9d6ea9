"""The page of a run: what a stream learnt and what it kept.

It is a pure function of the files in a run directory: it can be written again at any time and comes out byte
for byte the same. Prose and tables are in `report.html.j2`.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.reports import figures
from mllm_keeplora.reports.answers import OF_PICTURES, OF_QUESTIONS, Section, cut, run_sections
from mllm_keeplora.reports.intervals import Interval, interval_of, mean_of_intervals
from mllm_keeplora.reports.results import Json, Results, names_of, read_results, score_of, written
from mllm_keeplora.reports.tables import (
    duration,
    limits,
    matrix_csv,
    metric_frame,
    number,
    percent,
    points,
    shown,
    size,
    stage_label,
    subset_note,
)
from mllm_keeplora.runs.files import atomic_path, read_json
from mllm_keeplora.runs.run_directory import RunDirectory

Charts = list[tuple[str, str, Markup]]  # title, note, figure
LEAKAGE_NOTE = "||dW M|| / ||dW||, of all stages and modules of a depth; dashed: the bound"


def write_report(run: SavedRun) -> None:
    """Writes the accuracy matrix as CSV and as a picture, and the page, into a run's directory.

    Each file is replaced atomically: a reader sees the old one or the new one, never a part.

    Raises:
        ReportError: the run lacks something (see `read_results`); nothing is written.
        WriteError: a file cannot be written (disk full, no permission); earlier versions stay as they were.
    """
    results, reader = read_results(run), VideoReader(run.config.video, Path(run.config.cache_dir))
    directory, name = results.directory, results.directory.path.resolve().name
    write_atomically(directory.matrix_table, matrix_csv(results.retention).encode())
    write_atomically(directory.matrix_picture, figures.matrix_picture(results.retention, name))
    try:
        page = _page(results, name, run_sections(results, reader), run.guard_note())
    finally:
        reader.close()
    write_atomically(directory.report, page.encode(errors="replace"))


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: a reader sees the old one or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def render(template: str, **values: Any) -> str:
    """Fills a page template of this folder."""
    return template_environment().get_template(template).render(**values)


def template_environment() -> Environment:
    """What page templates are read with. Autoescape is on for the whole page: its text comes from data.

    The one script that a page may run is the filter of answers, which the page's policy names by its hash.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (percent, number, duration, shown, stage_label, limits, cut)}
    environment.filters |= {"breakable": _breakable, "interval": interval_of}
    script = (Path(__file__).parent / "filter.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": digest}
    return environment


def _breakable(name: str) -> Markup:
    """A long name may break after its underscores."""
    return Markup("_<wbr>" if len(name) > 8 else "_").join(name.split("_"))


def _page(results: Results, name: str, answers: Sequence[Section], guard_note: str) -> str:
    retention, manifests = results.retention, results.manifests
    rows, trained = retention["rows"], [manifest for manifest in manifests if manifest["modules"]]
    curves = {name: [score_of(row, name) for row in rows] for name in names_of(retention)}
    looks = figures.method_styles([retention["method"]])
    modules = {stage_label(manifest): figures.module_frame(manifest) for manifest in trained}
    seconds = _seconds(manifests)
    return render(
        "report.html.j2",
        name=name,
        retention=retention,
        manifests=manifests,
        base_score=mean_of_intervals([curves[name][0] for name in retention["tasks"]]).value,
        widest=max((h - w for c in curves.values() for _, w, h in c if w is not None and h is not None), default=0.0),
        means=[mean_of_intervals([score_of(row, name) for name in retention["general"]]) for row in rows],
        answers=answers,
        words=OF_PICTURES if results.chooses else OF_QUESTIONS,
        chooses=results.chooses,
        guard_note=guard_note,
        subset_note=subset_note(retention),
        metrics=metric_frame(retention),
        score_charts=score_charts(retention, {name: [curve] for name, curve in curves.items()}, looks),
        shares=_shares(retention),
        guards=_guards(manifests),
        energies=_energies(results.directory),
        replies=_general_replies(results),
        modules=modules,
        room=figures.ROOM,
        towers=_tower_charts(modules),
        training_charts=_training_charts(manifests),
        counts=_counts(manifests),
        phases=list(zip(seconds, figures.styles(seconds.shape[1]), strict=True)),
        time_chart=figures.time_chart(seconds),
        times=_times(manifests, seconds),
        config=written(results.config),
        packages=_packages(manifests),
    )


def score_charts(
    retention: Mapping[str, Any], curves: Mapping[str, Sequence[Sequence[Interval]]], looks: Sequence[Json]
) -> Charts:
    """A chart over the stages for each task and each general benchmark.

    Args:
        retention: what was learnt, and in which stage.
        curves: task or benchmark -> curves, each a score for each stage, the base first.
        looks: how the curves are drawn.
    """
    own_stages = {row["task"]: row["stage"] for row in retention["rows"]}
    charts = []
    for name in names_of(retention):
        own = own_stages.get(name)
        note = "not learnt yet" if own is None else f"learnt in stage {own}"
        note = "general benchmark" if name in retention["general"] else note
        charts.append((name, note, figures.score_chart(name, curves[name], own, looks)))
    return charts


def _training_charts(manifests: Sequence[Json]) -> Charts:
    """The training of each stage: loss, gradient norm and learning rate, on one scale for all stages."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for manifest in manifests:
        curves = {key: [p for p in manifest.get(key, []) if p[1] is not None] for key in figures.TRAINING}
        if any(curves.values()):
            found[stage_label(manifest)] = {key: points for key, points in curves.items() if points}
    values = {key: [v for curves in found.values() for _, v in curves.get(key, [])] for key in figures.TRAINING}
    ranges = {key: (min(found), max(found)) for key, found in values.items() if found}
    return [
        (stage, _loss_note(curves.get("loss", [])), figures.training_chart(stage, curves, ranges))
        for stage, curves in found.items()
    ]


def _loss_note(loss: Sequence[Sequence[float]]) -> str:
    return f"loss {loss[0][1]:.3g} to {loss[-1][1]:.3g}" if loss else ""


def _tower_charts(modules: Mapping[str, pd.DataFrame]) -> dict[str, Charts]:
    """What each tower's layers are used for, a chart a stage; its layer scales and largest leakage."""
    towers = pd.concat(modules, names=["stage"]).groupby("tower", sort=False) if modules else []
    charts: dict[str, Charts] = {}
    for tower, found in towers:
        charts[tower] = [
            (stage, f"room left: {_range(figures.room_left(own))} %", figures.room_chart(tower, stage, own))
            for stage, own in found.groupby("stage", sort=False)
        ]
        charts[tower] += [
            ("Layer scale", "how far a layer may move, in every stage", figures.scale_chart(tower, found)),
            ("Largest leakage", LEAKAGE_NOTE, figures.leakage_chart(tower, found)),
        ]
    return charts


def _range(shares: pd.Series) -> str:
    """The least and the largest of single modules, in %."""
    return f"{percent(shares.min())} to {percent(shares.max())}"


def _shares(retention: Mapping[str, Any]) -> pd.DataFrame:
    """For each general benchmark: the base's score, the share kept after each stage, the final change."""
    general, rows = retention["general"], retention["rows"]
    values = [[score_of(row, name).value for row in rows] for name in general]
    scores = pd.DataFrame(values, pd.Index(general, name="benchmark"), range(len(rows)), dtype=float)
    base, change = scores[0], scores.iloc[:, -1] - scores[0]
    shares = scores.drop(columns=0).div(base.where(base != 0), axis=0).map(percent).add_prefix("stage ")
    shares.insert(0, "base score, %", base.map(percent))
    return shares.assign(**{"change to the end, points": change.map(points)})


def _guards(manifests: Sequence[Json]) -> pd.DataFrame:
    """What `general.budget` did to each stage: the divergence from the base, nats a token, and each tower's factor."""
    rows = [
        {
            "stage": stage_label(manifest),
            **{f"factor of {tower}": c for tower, c in manifest["guard"]["factors"].items()},
            "divergence before": manifest["guard"]["before"],
            "after, not scaled": manifest["guard"]["unscaled"],
            "after": manifest["guard"]["after"],
        }
        for manifest in manifests
        if "guard" in manifest
    ]
    return pd.DataFrame(rows, columns=None if rows else ["stage"]).set_index("stage")


def _energies(directory: RunDirectory) -> pd.DataFrame:
    """How far the inputs of general samples are protected (G2): per module, the least held first."""
    facts = read_json(directory.general_energy) if directory.general_energy.exists() else {}
    frame = pd.DataFrame.from_dict(facts, orient="index", columns=["k_g", "held", "saturated"])
    return frame.sort_values("held", kind="stable").rename_axis("module")


def _general_replies(results: Results) -> pd.DataFrame:
    """The general prompts with the base's own replies (G1); of a CLIP pictures, and the text nearest to each."""
    file = results.directory.general_replies
    found = pd.DataFrame(read_json(file) if file.exists() else [], columns=["id", "prompt", "reply"]).set_index("id")
    if results.chooses:
        return found[["reply"]].rename(columns={"reply": "nearest text"}).rename_axis("picture")
    return found.rename_axis("sample")


def _counts(manifests: Sequence[Json]) -> pd.DataFrame:
    """What went into each stage."""
    counts = [{"stage": stage_label(manifest), **manifest["counts"]} for manifest in manifests]
    for count in counts:
        if "skipped_records" in count:
            count["skipped_records"] = len(count["skipped_records"])
    return pd.DataFrame(counts).set_index("stage").rename(columns=lambda name: name.replace("_", " "))


def _seconds(manifests: Sequence[Json]) -> pd.DataFrame:
    """Seconds by stage and phase."""
    # Columns come in the order in which they are met first: the last stage goes through every phase.
    found = pd.DataFrame([manifest["timings"] for manifest in reversed(manifests)], dtype=float)[::-1]
    stages = pd.Index(map(stage_label, manifests), name="stage")
    return found.drop(columns="total").set_axis(stages)


def _times(manifests: Sequence[Json], seconds: pd.DataFrame) -> pd.DataFrame:
    totals = [duration(manifest["timings"]["total"]) for manifest in manifests]
    memory = [size(manifest["peak_memory_bytes"]) for manifest in manifests]
    return seconds.map(duration).assign(total=totals, **{"peak memory": memory})


def _packages(manifests: Sequence[Json]) -> dict[str, str]:
    """Package versions; where stages ran under different ones, all of them in order of use."""
    found = pd.DataFrame([manifest["packages"] for manifest in manifests])
    return {name: ", then ".join(found[name].dropna().unique()) for name in sorted(found)}
