"""What a stream learnt and what it kept, for people: CSV, heat map, one self-contained HTML page, text table.

All of it is a pure function of the files in a run directory (`retention.json`, `config.json` and the stage
manifests): a report can be written again at any time and comes out byte for byte the same.

Units: scores are stored as fractions (value = native / native_max) and shown in percent; differences of
scores are shown in percentage points. Undefined numbers are null in the files and a dash in the report.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mllm_keeplora.errors import KeepLoRAError
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
    printable,
    render,
    shorten,
    ticks,
    write_atomically,
)
from mllm_keeplora.runs.manifests import SCHEMA_VERSION

# key in retention.json, name, unit ("%" = score, "points" = difference of scores), meaning in one line
METRICS = (
    ("last", "Last", "%", "mean score over all tasks after the last stage"),
    ("mft", "MFT", "%", "mean score on each task right after it was learnt"),
    ("maa", "MAA", "%", "mean score on the tasks learnt so far, averaged over the stages"),
    ("bwt", "BWT", "points", "change on earlier tasks since each was learnt; below 0 means lost"),
    (
        "forgetting",
        "Forgetting",
        "points",
        "drop on earlier tasks from their best to their final score; 0 is best",
    ),
    ("transfer", "Transfer", "%", "mean score on tasks before they are learnt; shows what the base brings"),
    ("average", "Average", "%", "mean score over all tasks and all stages, learnt or not"),
)
RETENTION_MEANING = "score after the last stage as a share of the untouched base's score"

TIMED_PHASES = ("weight_bases", "probe", "train", "feature_basis", "evaluation")
PHASE_COLOURS = ("#7b6fae", "#c98b3c", "#2f7fa8", "#6a9e57", "#9aa7b1", "#dde3e8")
RETENTION_KEYS = ("schema_version", "method", "tasks", "general", "rows", "metrics")
COUNTS = ("train_samples", "steps", "trainable_parameters")
MANIFEST_KEYS = ("stage", "task", "modules", "counts", "timings", "peak_memory_bytes", "loss", "packages")

LEAKAGE_BOUND = 1e-6  # what a stage promises: ||dW M||_F / ||dW||_F
LEAKAGE_FLOOR = 1e-10  # smaller values, zero included, are drawn at the foot of the logarithmic axis
LOSS_POINTS = 240  # a wider curve would only repeat pixels

HEAT = LinearSegmentedColormap.from_list("heat", ["#f7fafc", "#d7e8f1", "#a9d0e3", "#5fa8cb", "#0f4f78"])
DARK_TEXT = "#0b1720"
EVEN_LUMINANCE = 0.197  # here white and DARK_TEXT contrast equally (WCAG: (1.05 * 0.058) ** 0.5 - 0.05)
NOT_MEASURED_COLOUR = "#eeeeee"
OWN_COLOUR = "#d9541e"  # outline of the task learnt in a stage
GENERAL_GAP = 0.35  # between tasks and general benchmarks, in cells
MARKED_DEPTHS = 16  # deeper towers are drawn as lines without markers


class ReportError(KeepLoRAError, ValueError):
    """A run directory that a report cannot be written from."""


def write_report(run_dir: Path) -> None:
    """Write `accuracy_matrix.csv`, `accuracy_matrix.png` and `report.html` into a run directory.

    Each file is replaced atomically: a reader sees the old one or the new one, never a part.

    Args:
        run_dir: holds `retention.json`, `config.json` and `stages/NN-*/manifest.json`, one for each row of
            `retention.json`.

    Raises:
        ReportError: one of these files is missing, is not JSON, lacks a key or has another schema version.
        OSError: a file cannot be written (disk full, no permission); earlier versions stay as they were.
    """
    run_dir = Path(run_dir)
    retention = load_json(run_dir / "retention.json", RETENTION_KEYS)
    config = load_json(run_dir / "config.json", ())
    manifests = [load_manifest(run_dir, row) for row in retention["rows"]]
    name = run_dir.resolve().name
    write_atomically(run_dir / "accuracy_matrix.csv", matrix_csv(retention).encode())
    write_atomically(run_dir / "accuracy_matrix.png", _heat_map_png(retention, name))
    write_atomically(run_dir / "report.html", _render_html(name, retention, config, manifests).encode())


def matrix_csv(retention: Mapping[str, Any]) -> str:
    """The accuracy matrix as CSV, one line for each stage (stage 0 is the untouched base).

    Columns: `stage`, `task` (learnt in that stage, empty for the base), then one column of values (fractions)
    for each task and each general benchmark, then in the same order `NAME:stderr` (fractions), then `NAME:n`
    (samples). Null is an empty field.
    """
    names = _names(retention)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["stage", "task", *names, *(f"{name}:stderr" for name in names), *(f"{name}:n" for name in names)]
    )
    for row in retention["rows"]:
        scores = [_score(row, name) or {} for name in names]
        # csv writes None as an empty field
        numbers = [score.get(field) for field in ("value", "stderr", "n") for score in scores]
        writer.writerow([row["stage"], row["task"], *numbers])
    return buffer.getvalue()


def format_table(retention: Mapping[str, Any]) -> str:
    """The accuracy matrix and the metrics as plain text, at most `TEXT_WIDTH` columns, without final newline.

    Columns carry the names where all of them fit; otherwise T1, T2, .. and G1, .. with a legend, in several
    blocks if need be.
    """
    tasks, general, rows = retention["tasks"], retention["general"], retention["rows"]
    labels = [shorten(f"{row['stage']:>2} {row['task'] or 'base'}", 24) for row in rows]
    label_width = max(map(len, labels), default=0)
    names = [printable(name) for name in (*tasks, *general)]
    headers, legend = names, []
    if label_width + sum(_column_width(name) for name in names) > TEXT_WIDTH - 2:
        headers = [*(f"T{i + 1}" for i in range(len(tasks))), *(f"G{i + 1}" for i in range(len(general)))]
        legend = [
            f"  {short:<4} {shorten(name, TEXT_WIDTH - 8)}"
            for short, name in zip(headers, names, strict=True)
        ]
    columns = [
        _text_column(header, [_text_cell(row, name) for row in rows], bar=index == len(tasks))
        for index, (header, name) in enumerate(zip(headers, (*tasks, *general), strict=True))
    ]
    method = shorten(retention["method"], 20)
    lines = [f"Accuracy after each stage, in % (method {method}; * task learnt in that stage)"]
    for block in blocks(columns, TEXT_WIDTH - label_width):
        lines.append("")
        for index, label in enumerate(["", *labels]):
            lines.append((f"{label:<{label_width}}" + "".join(column[index] for column in block)).rstrip())
    lines += ["", *legend, ""] if legend else [""]
    if note := subset_note(retention):
        lines += [note, ""]
    return "\n".join([*lines, *_text_metrics(retention)])


def subset_note(retention: Mapping[str, Any]) -> str:
    """What the scores leave out; empty where every question was asked. Older runs do not say."""
    limits = retention.get("limits", {})
    kinds = {"task": "each task", "general": "each general benchmark"}
    parts = [f"{limits[kind]} of {name}" for kind, name in kinds.items() if limits.get(kind) is not None]
    return f"A subset: scores are of the first questions alone, {' and '.join(parts)}." if parts else ""


def _text_metrics(retention: Mapping[str, Any]) -> list[str]:
    metrics = retention["metrics"]
    lines = []
    for key, name, unit, meaning in METRICS:
        number = _metric(metrics, key)
        lines.append(f"{name:<10} {number:>7} {unit:<6} {meaning}")
    for name in retention["general"]:
        number = percent(metrics["retention"].get(name))
        meaning = f"{shorten(name, 30)}: share of the base's score kept to the end"
        lines.append(f"{'Retention':<10} {number:>7} {'%':<6} {meaning}")
    return lines


def _text_column(header: str, cells: Sequence[str], *, bar: bool) -> list[str]:
    """Header and cells padded to one width; numbers line up because a cell ends in a star or a space."""
    width = _column_width(header)
    left = " |" if bar else ""
    return [left + f"{header + ' ':>{width}}", *(left + f"{cell:>{width}}" for cell in cells)]


def _text_cell(row: Mapping[str, Any], name: str) -> str:
    return percent(_value(row, name)) + ("*" if row["task"] == name else " ")


def _column_width(header: str) -> int:
    return max(len(header) + 1, len("100.0*")) + 1


# --------------------------------------------------------------------------------------------------
# reading and writing


def load_json(path: Path, keys: Sequence[str]) -> Json:
    """A JSON object that has `keys`.

    Raises:
        ReportError: it is missing, is not JSON, lacks a key or has another schema version.
    """
    if not path.is_file():
        raise ReportError(
            f"cannot write the report: {path} is missing; run the stream on this run directory first"
        )
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ReportError(
            f"cannot write the report: {path} is not valid JSON ({error}); run the stream again"
        ) from error
    if not isinstance(content, dict):
        raise ReportError(
            f"cannot write the report: {path} holds a {type(content).__name__}, expected an object"
        )
    missing = [key for key in keys if key not in content]
    if missing:
        raise ReportError(f"cannot write the report: {path} lacks {', '.join(missing)}; has it been edited?")
    if "schema_version" in keys and content["schema_version"] != SCHEMA_VERSION:
        raise ReportError(
            f"cannot write the report: {path} has schema version {content['schema_version']}, expected "
            f"{SCHEMA_VERSION}; use the version of this project that wrote it"
        )
    return content


def load_manifest(run_dir: Path, row: Mapping[str, Any], keys: Sequence[str] = MANIFEST_KEYS) -> Json:
    """The manifest of the stage that a row of the matrix was measured after.

    Raises:
        ReportError: as `load_json`; none or several of that stage, or it is of another one.
    """
    folder, stage = run_dir / "stages", row["stage"]
    found = sorted(folder.glob(f"{stage:02d}-*/manifest.json"))
    if len(found) > 1:
        raise ReportError(
            f"cannot write the report: stage {stage} has {len(found)} manifests: {', '.join(map(str, found))}"
        )
    path = found[0] if found else folder / f"{stage:02d}-{row['task'] or 'base'}" / "manifest.json"
    manifest = load_json(path, ("schema_version", *keys))
    if (manifest["stage"], manifest["task"]) != (stage, row["task"]):
        raise ReportError(
            f"cannot write the report: {path} is of stage {manifest['stage']} ({manifest['task']}), but "
            f"retention.json expects stage {stage} ({row['task']}) there; run the stream again"
        )
    return manifest


# --------------------------------------------------------------------------------------------------
# numbers as text


def _names(retention: Mapping[str, Any]) -> list[str]:
    return [*retention["tasks"], *retention["general"]]


def _score(row: Mapping[str, Any], name: str) -> Json | None:
    """A cell of the matrix; None where it was not measured (a task appended to the stream later)."""
    score: Json | None = row["scores"].get(name)
    return score


def _value(row: Mapping[str, Any], name: str) -> float | None:
    score = _score(row, name)
    return None if score is None else score["value"]


def _metric(metrics: Mapping[str, Any], key: str) -> str:
    # BWT is a change and carries its sign; forgetting is a size.
    return points(metrics[key]) if key == "bwt" else percent(metrics[key])


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _heat_colours(value: float | None) -> tuple[str, str]:
    """Background and text colour of a cell. Scores above native_max (captions) share the darkest colour."""
    if value is None:
        return NOT_MEASURED_COLOUR, "#777777"
    background = HEAT(min(max(value, 0.0), 1.0))[:3]
    linear = [((channel + 0.055) / 1.055) ** 2.4 for channel in background]  # sRGB decoded
    luminance = sum(
        weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )
    return to_hex(background), "#ffffff" if luminance < EVEN_LUMINANCE else DARK_TEXT


# --------------------------------------------------------------------------------------------------
# heat map


def _heat_map_png(retention: Mapping[str, Any], title: str) -> bytes:
    """The matrix as PNG: base row first, own-stage cells outlined, general benchmarks set apart."""
    rows, names, count = retention["rows"], _names(retention), len(retention["tasks"])
    lefts = [index + (GENERAL_GAP if index >= count else 0.0) for index in range(len(names))]
    width, height = (lefts[-1] + 1 if lefts else 1.0), len(rows)
    with picture_style():
        figure = Figure(figsize=(0.95 * width, 0.55 * height))  # inches; labels lie outside
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-0.03, width + 0.03), ylim=(height + 0.03, -0.03))
        axes.axis("off")
        for top, row in enumerate(rows):
            for left, name in zip(lefts, names, strict=True):
                _draw_cell(axes, left, top, _value(row, name), is_own=row["task"] == name)
        _draw_labels(axes, retention, lefts, title)
        return png(figure)


def _draw_cell(axes: Axes, left: float, top: int, value: float | None, *, is_own: bool) -> None:
    background, foreground = _heat_colours(value)
    axes.add_patch(Rectangle((left, top), 1, 1, facecolor=background, edgecolor="white", linewidth=1.5))
    if is_own:  # above its neighbours' edges
        outline = Rectangle((left, top), 1, 1, fill=False, edgecolor=OWN_COLOUR, linewidth=2.6, zorder=3)
        axes.add_patch(outline)
    axes.text(left + 0.5, top + 0.5, percent(value), ha="center", va="center", fontsize=12, color=foreground)


def _draw_labels(axes: Axes, retention: Mapping[str, Any], lefts: Sequence[float], title: str) -> None:
    rows, names = retention["rows"], [shorten(name, 28) for name in _names(retention)]
    for top, row in enumerate(rows):
        label = "base" if row["task"] is None else f"{row['stage']}  {shorten(row['task'], 28)}"
        axes.text(-0.12, top + 0.5, label, ha="right", va="center", fontsize=11)
    slanted: Json = {"rotation": 35, "rotation_mode": "anchor", "ha": "left", "va": "bottom", "fontsize": 11}
    for left, name in zip(lefts, names, strict=True):
        axes.text(left + 0.4, -0.12, name, **slanted)
    # The longest slanted name decides how far up the title has to go.
    rise = 4.0 * max(map(len, names), default=0) + 25
    outside: Json = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    heading = f"{shorten(title, 40)}: score in % after each stage"
    axes.annotate(heading, (0, 1), (0, rise), fontsize=13, fontweight="bold", **outside)
    note = "outlined: the task learnt in that stage"
    if retention["general"]:
        note += "; set apart: general benchmarks"
    if any(_value(row, name) is None for row in rows for name in _names(retention)):
        note += "; -: not measured"
    axes.annotate(note, (0, 0), (0, -8), va="top", fontsize=9.5, **outside)


def _score_charts(retention: Mapping[str, Any]) -> list[Json]:
    """One curve over the stages for each task and each general benchmark."""
    rows = retention["rows"]
    values = [value for row in rows for name in _names(retention) if (value := _value(row, name)) is not None]
    y_ticks = [(0.0, "0"), (0.5, "50"), (1.0, "100")]
    if max(values, default=0.0) > 1.0:  # captions
        y_ticks = [(value, f"{100 * value:g}") for value, _ in ticks(max(values))]
    x_ticks = index_ticks(["base", *(str(row["stage"]) for row in rows[1:])])
    charts = []
    for name in _names(retention):
        own = next((i for i, row in enumerate(rows) if row["task"] == name), None)
        is_task = name in retention["tasks"]
        dots = [
            Dot(i, _value(row, name), _describe(row, name), is_hollow=is_task and (own is None or i < own))
            for i, row in enumerate(rows)
        ]
        note = (
            "general benchmark"
            if not is_task
            else "not learnt yet"
            if own is None
            else f"learnt in stage {own}"
        )
        charts.append(chart(name, [Line(dots)], x_ticks=x_ticks, y_ticks=y_ticks, note=note, mark_x=own))
    return charts


def _loss_charts(manifests: Sequence[Json]) -> list[Json]:
    curves = {
        manifest["stage"]: [point for point in manifest["loss"] if point[1] is not None]
        for manifest in manifests
    }
    # One scale for all stages, so that their heights compare.
    y_ticks = ticks(max((loss for points in curves.values() for _, loss in points), default=1.0))
    charts = []
    for manifest in manifests:
        points = curves[manifest["stage"]]
        if not points:
            continue
        dots = [Dot(step, loss, f"step {step:g}: {loss:.4g}") for step, loss in _thin(points)]
        note = f"{points[0][1]:.3g} to {points[-1][1]:.3g}"
        x_ticks = ticks(points[-1][0], integer=True)
        charts.append(
            chart(
                f"{manifest['stage']} {manifest['task']}",
                [Line(dots, has_markers=False)],
                x_ticks=x_ticks,
                y_ticks=y_ticks,
                note=note,
            )
        )
    return charts


def _thin(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """At most LOSS_POINTS points, each the mean of a run of neighbours."""
    size = math.ceil(len(points) / LOSS_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups
    ]


# --------------------------------------------------------------------------------------------------
# layers


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _protected_share(module: Json) -> float | None:
    """Share of a module's input space that its stage was not allowed to touch or that it adds to that."""
    if module["k_w"] is None or module["k_f"] is None:
        return None
    return float((module["k_w"] + module["k_f"]) / module["in_features"])


def _field(key: str) -> Callable[[Json], float | None]:
    return lambda module: module[key]


def _highest(values: Sequence[float]) -> float | None:
    return max(values, default=None)


def _count_ticks(highest: float) -> list[tuple[float, str]]:
    return ticks(highest, integer=True)


def _unit_ticks(highest: float) -> list[tuple[float, str]]:
    return [(0.0, "0"), (0.5, "0.5"), (1.0, "1")] if highest < 1 + 1e-6 else ticks(highest)


def _log_ticks(highest: float) -> list[tuple[float, str]]:
    """Powers of ten, in units of log10, from the floor to above the bound and the highest value."""
    low = round(math.log10(LEAKAGE_FLOOR))
    high = math.ceil(math.log10(max(highest, 10 * LEAKAGE_BOUND)))
    step = math.ceil((high - low) / 5)
    return [(float(e), f"1e{e}") for e in range(high - step * math.ceil((high - low) / step), high + 1, step)]


@dataclass(frozen=True)
class Panel:
    """One quantity over depth: how it is read from a module and put together over the modules of a depth."""

    title: str
    note: str
    value_of: Callable[[Json], float | None]
    ticks: Callable[[float], list[tuple[float, str]]]
    combine: Callable[[Sequence[float]], float | None] = _mean
    is_log: bool = False


PANELS = (
    Panel("k_w", "directions protected for the base's weights, mean", _field("k_w"), _count_ticks),
    Panel("k_f", "directions protected for learnt tasks, mean", _field("k_f"), _count_ticks),
    Panel("protected share", "(k_w + k_f) / in_features, mean", _protected_share, _unit_ticks),
    Panel("rank", "directions the stage could train, mean", _field("rank"), _count_ticks),
    Panel("lambda", "layer scale, mean", _field("lambda"), _unit_ticks),
    Panel(
        "max leakage",
        "||dW M|| / ||dW||, largest, log scale; dashed: the bound 1e-6",
        _field("leakage"),
        _log_ticks,
        _highest,
        is_log=True,
    ),
)


def _layer_panels(manifests: Sequence[Json], colours: Mapping[int, str]) -> list[Json]:
    """For each tower one chart for each quantity over depth, one line for each stage."""
    towers = dict.fromkeys(module["tower"] for manifest in manifests for module in manifest["modules"])
    return [
        {"tower": tower, "charts": [_layer_chart(panel, tower, manifests, colours) for panel in PANELS]}
        for tower in towers
    ]


def _layer_chart(panel: Panel, tower: str, manifests: Sequence[Json], colours: Mapping[int, str]) -> Json:
    curves = {manifest["stage"]: _over_depth(panel, tower, manifest["modules"]) for manifest in manifests}
    values = [value for curve in curves.values() for value in curve.values() if value is not None]
    depths = max((depth for curve in curves.values() for depth in curve), default=0) + 1
    lines = []
    for stage, curve in curves.items():
        dots = []
        for depth, value in curve.items():
            y = math.log10(max(value, LEAKAGE_FLOOR)) if panel.is_log and value is not None else value
            dots.append(Dot(depth, y, f"stage {stage}, depth {depth}: {_number(value)}"))
        lines.append(Line(dots, colours[stage], has_markers=depths <= MARKED_DEPTHS))
    return chart(
        panel.title,
        lines,
        x_ticks=index_ticks([str(depth) for depth in range(depths)]),
        y_ticks=panel.ticks(max(values, default=0.0)),
        note=panel.note,
        mark_y=math.log10(LEAKAGE_BOUND) if panel.is_log else None,
    )


def _over_depth(panel: Panel, tower: str, modules: Sequence[Json]) -> dict[int, float | None]:
    by_depth: dict[int, list[float]] = {}
    for module in modules:
        if module["tower"] == tower and module["depth"] is not None:
            value = panel.value_of(module)
            by_depth.setdefault(module["depth"], []).extend([] if value is None else [value])
    return {depth: panel.combine(values) for depth, values in sorted(by_depth.items())}


# --------------------------------------------------------------------------------------------------
# the page


def _render_html(name: str, retention: Json, config: Json, manifests: Sequence[Json]) -> str:
    trained = [manifest for manifest in manifests if manifest["modules"]]
    palette = matplotlib.colormaps["viridis_r"]
    colours = {
        manifest["stage"]: to_hex(palette(0.12 + 0.88 * (index + 1) / len(trained)))
        for index, manifest in enumerate(trained)
    }
    return render(
        "report.html.j2",
        run_name=name,
        method=retention["method"],
        base_model=manifests[0].get("base_model") if manifests else None,
        tasks=retention["tasks"],
        general=retention["general"],
        sentences=_summary(retention),
        tiles=_tiles(retention),
        matrix=[_matrix_row(row, retention) for row in retention["rows"]],
        metrics=_metric_rows(retention),
        retention_rows=_retention_rows(retention),
        stages=[row["stage"] for row in retention["rows"][1:]],
        score_charts=_score_charts(retention),
        loss_charts=_loss_charts(manifests),
        trained=[{**_layer_summary(manifest), "colour": colours[manifest["stage"]]} for manifest in trained],
        layer_panels=_layer_panels(trained, colours),
        counts=[_count_row(manifest) for manifest in manifests],
        timings=[_timing_row(manifest) for manifest in manifests],
        total_time=_seconds(sum(manifest["timings"].get("total") or 0.0 for manifest in manifests)),
        phases=list(zip((*TIMED_PHASES, "other"), PHASE_COLOURS, strict=True)),
        skipped=[_skipped(manifest) for manifest in manifests if manifest["counts"].get("skipped_records")],
        config=flatten(config),
        packages=_packages(manifests),
        number=_number,
        share=lambda module: percent(_protected_share(module)),
    )


def _summary(retention: Mapping[str, Any]) -> list[str]:
    """What was learnt and kept, in plain sentences; each is left out where its numbers are undefined."""
    metrics, rows, tasks = retention["metrics"], retention["rows"], retention["tasks"]
    learnt = sum(row["task"] is not None for row in rows)
    sentences = []
    if learnt < len(tasks):
        sentences.append(f"The model has learnt {learnt} of {len(tasks)} tasks so far.")
    else:
        sentences.append(
            "The model learnt " + (f"{learnt} tasks one after another." if learnt != 1 else "1 task.")
        )
    if metrics["mft"] is not None:
        base = [_value(row, name) for row in rows[:1] for name in tasks]
        known = [value for value in base if value is not None]
        number = f"{percent(metrics['mft'])} %" + (" on average" if learnt > 1 else "")
        before = (
            f", against {percent(_mean(known))} % for the untouched base" if len(known) == len(base) else ""
        )
        sentences.append(f"Right after it is learnt a task scores {number}{before}.")
    if metrics["last"] is not None and metrics["bwt"] is not None:
        sentences.append(f"At the end it scores {percent(metrics['last'])} % over all tasks.")
        sentences.append(f"On the tasks learnt earlier, {_change(metrics['bwt'])}.")
    subset = [note] if (note := subset_note(retention)) else []
    return [*sentences, *_general_sentences(retention), *_error_sentences(rows), *subset]


def _general_sentences(retention: Mapping[str, Any]) -> list[str]:
    ratios = retention["metrics"]["retention"]
    kept = {name: ratios[name] for name in retention["general"] if ratios.get(name) is not None}
    if not kept:
        return []
    mean = f"it keeps {percent(_mean(list(kept.values())))} % of the untouched base's score"
    if len(kept) == 1:
        return [f"On the general benchmark {next(iter(kept))} {mean}."]
    weakest = min(kept, key=lambda name: kept[name])
    return [
        f"Over {len(kept)} general benchmarks {mean}; on the weakest, {weakest}, {percent(kept[weakest])} %."
    ]


def _error_sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [score for row in rows for score in row["scores"].values() if score is not None]
    highest = max((score["stderr"] for score in scores if score["stderr"] is not None), default=None)
    if highest is None:
        return []
    return [
        f"Standard errors of single scores reach {percent(highest)} points; smaller differences say little."
    ]


def _change(points: float) -> str:
    if abs(points) < 0.0005:
        return "nothing was lost since each was learnt"
    return f"{percent(abs(points))} points were {'lost' if points < 0 else 'gained'} since each was learnt"


def _tiles(retention: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, number, explanation of the four headline numbers."""
    metrics = retention["metrics"]
    kept = [ratio for ratio in metrics["retention"].values() if ratio is not None]

    def shown(number: str, unit: str) -> str:
        return number if number == "-" else f"{number} {unit}"

    return [
        ("Learnt", shown(percent(metrics["mft"]), "%"), "mean score right after learning each task"),
        (
            "Kept at the end",
            shown(percent(metrics["last"]), "%"),
            "mean score over all tasks after the last stage",
        ),
        (
            "Forgotten",
            shown(percent(metrics["forgetting"]), "points"),
            "mean drop of earlier tasks from their best score",
        ),
        (
            "General ability",
            shown(percent(_mean(kept)), "%"),
            "share of the untouched base's score that is kept",
        ),
    ]


def _describe(row: Mapping[str, Any], name: str) -> str:
    score = _score(row, name)
    after = "untouched base" if row["task"] is None else f"after stage {row['stage']} ({row['task']})"
    if score is None or score["value"] is None:
        return f"{name}, {after}: not measured"
    error = "standard error undefined" if score["stderr"] is None else f"± {percent(score['stderr'])}"
    native = f"; native score {_number(score['native'])} of {_number(score['native_max'])}"
    return f"{name}, {after}: {percent(score['value'])} % {error}, n = {_number(score['n'])}{native}"


def _matrix_row(row: Mapping[str, Any], retention: Mapping[str, Any]) -> Json:
    cells = []
    for index, name in enumerate(_names(retention)):
        score = _score(row, name) or {}
        background, foreground = _heat_colours(score.get("value"))
        cells.append(
            {
                "text": percent(score.get("value")),
                "error": None if score.get("stderr") is None else percent(score["stderr"]),
                "title": _describe(row, name),
                "background": background,
                "foreground": foreground,
                "is_own": row["task"] == name,
                "is_first_general": index == len(retention["tasks"]),
            }
        )
    return {"stage": row["stage"], "task": row["task"], "cells": cells}


def _metric_rows(retention: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    metrics = retention["metrics"]
    rows = [(name, _metric(metrics, key), unit, meaning) for key, name, unit, meaning in METRICS]
    for name in retention["general"]:
        rows.append((f"Retention: {name}", percent(metrics["retention"].get(name)), "%", RETENTION_MEANING))
    return rows


def _retention_rows(retention: Mapping[str, Any]) -> list[Json]:
    """For each general benchmark: the base's score, the share kept after each stage, the final change."""
    rows = []
    for name in retention["general"]:
        values = [_value(row, name) for row in retention["rows"]]
        base, last = (values[0], values[-1]) if values else (None, None)
        shares = [None if value is None or not base else value / base for value in values[1:]]
        change = None if base is None or last is None else last - base
        rows.append(
            {
                "name": name,
                "base": percent(base),
                "shares": list(map(percent, shares)),
                "change": points(change),
            }
        )
    return rows


def _layer_summary(manifest: Json) -> Json:
    modules = manifest["modules"]

    def highest(key: str) -> str:
        return _number(max((module[key] for module in modules if module[key] is not None), default=None))

    return {
        "stage": manifest["stage"],
        "task": manifest["task"],
        "modules": modules,
        "untrained": sum(module["rank"] == 0 for module in modules),
        "saturated": sum(bool(module["saturated"]) for module in modules),
        "leakage": highest("leakage"),
        "orthonormality_error": highest("orthonormality_error"),
    }


def _count_row(manifest: Json) -> Json:
    counts = manifest["counts"]
    return {
        "stage": manifest["stage"],
        "task": manifest["task"],
        "numbers": [_number(counts.get(key)) for key in COUNTS],
        "skipped": len(counts.get("skipped_records") or []),
        "peak_memory": _bytes(manifest["peak_memory_bytes"]),
    }


def _timing_row(manifest: Json) -> Json:
    """Seconds of each phase; `other` is what the total holds beside them (loading, checks, files)."""
    timings = manifest["timings"]
    phases = [timings.get(phase) for phase in TIMED_PHASES]
    known = sum(seconds or 0.0 for seconds in phases)
    total = timings.get("total")
    other = None if total is None else max(total - known, 0.0)
    return {
        "stage": manifest["stage"],
        "task": manifest["task"],
        "texts": [_seconds(seconds) for seconds in (*phases, other, total)],
        "shares": [
            round(100 * (seconds or 0.0) / ((total or known) or 1.0), 2) for seconds in (*phases, other)
        ],
    }


def _skipped(manifest: Json) -> Json:
    records = [
        ", ".join(f"{key} {value}" for key, value in record.items())
        if isinstance(record, dict)
        else str(record)
        for record in manifest["counts"]["skipped_records"]
    ]
    return {"stage": manifest["stage"], "task": manifest["task"], "records": records}


def _packages(manifests: Sequence[Json]) -> list[tuple[str, str]]:
    """Package versions; where stages ran under different ones, all of them in order of use."""
    versions: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for package, version in manifest["packages"].items():
            versions.setdefault(package, {})[str(version)] = None
    return [(package, ", then ".join(found)) for package, found in sorted(versions.items())]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, JSON text) pairs."""
    if isinstance(value, dict) and value:
        return [
            pair
            for key, item in value.items()
            for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{prefix}[{index}]")]
    return (
        [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
        if prefix
        else []
    )
