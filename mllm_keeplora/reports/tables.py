"""Numbers as text: single ones, and the accuracy matrix for a terminal and for a spreadsheet.

Scores are fractions and are shown in percent, differences of scores in percentage points. What is undefined
(None or NaN) is shown as a dash, and is an empty field in CSV.
"""

import math
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd

from mllm_keeplora.evaluation.metrics import Estimate
from mllm_keeplora.reports.intervals import Interval
from mllm_keeplora.reports.results import names_of, score_of
from mllm_keeplora.units import format_bytes

TEXT_WIDTH = 100  # columns of a terminal that a table may use

# key in the retention -> name, unit ("%" = score, "points" = difference of scores), meaning in one line
METRICS = {
    "last": ("Last", "%", "mean score over all tasks after the last stage"),
    "mft": ("MFT", "%", "mean score on each task right after it was learnt"),
    "maa": ("MAA", "%", "mean score on the tasks learnt so far, averaged over the stages"),
    "bwt": ("BWT", "points", "change on earlier tasks since each was learnt; below 0 means lost"),
    "forgetting": ("Forgetting", "points", "drop on earlier tasks from best to final score; 0 is best"),
    "transfer": ("Transfer", "%", "mean score on tasks before they are learnt; shows what the base brings"),
    "average": ("Average", "%", "mean score over all tasks and all stages, learnt or not"),
}


def _dashed(written: Callable[[float], str]) -> Callable[[float | None], str]:
    """Gives a function that writes a number a dash for what is undefined: None and NaN."""

    @wraps(written)
    def dashed(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else written(value)

    return dashed


@_dashed
def percent(value: float) -> str:
    """A fraction in %, one decimal."""
    return f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0


@_dashed
def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("+0.0", "0.0")


@_dashed
def number(value: float) -> str:
    """A count or a quantity of any size."""
    if abs(value) >= 1e9 or 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{round(value):,}" if value == round(value) else f"{value:.4g}"


@_dashed
def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


size = _dashed(format_bytes)


def shown(cell: str | float | None) -> str:
    """A number, or what was made of one, as the cell of a page's table."""
    if isinstance(cell, bool | np.bool):
        return "yes" if cell else ""
    if isinstance(cell, str):  # breaks nowhere but before a standard error or limits
        return re.sub("\N{NO-BREAK SPACE}(?=[±(])", " ", cell.replace(" ", "\N{NO-BREAK SPACE}"))
    return number(cell)


def with_error(estimate: Estimate, *, signed: bool = False) -> str:
    """An estimate in %, with its standard error where that is known."""
    error = "" if estimate.stderr is None else f" ± {percent(estimate.stderr)}"
    return (points if signed else percent)(estimate.value) + error


def limits(interval: Interval) -> str:
    """The limits of an interval in %; where they are more than 2 points apart in whole numbers, rounded outward.

    Empty where they are not known.
    """
    if interval.low is None or interval.high is None:
        return ""
    low, high = 100 * interval.low, 100 * interval.high
    if high - low > 2:
        return f"{math.floor(low + 1e-9)}\N{EN DASH}{math.ceil(high - 1e-9)}"
    return f"{low:.1f}\N{EN DASH}{high:.1f}".replace("100.0", "100")


def with_limits(interval: Interval) -> str:
    """A number in % with its limits, where they are known."""
    return f"{percent(interval.value)} ({limits(interval)})" if limits(interval) else percent(interval.value)


def shorten(text: object, width: int) -> str:
    """Text that a terminal or a picture can take, at most `width` characters.

    Names come from data: no control character may pass. Where a name is too long its middle goes, because
    names of one family differ at their ends.
    """
    shown = "".join(character if character.isprintable() else "?" for character in str(text))
    if len(shown) <= width:
        return shown
    head = (width - 2) // 2
    return f"{shown[:head]}..{shown[len(shown) - (width - 2 - head) :]}"


def stage_label(row: Mapping[str, Any]) -> str:
    """A stage by its number and its task; the untouched base is stage 0, and what `edit` has made is of no stage."""
    if row["task"] is None:
        return "base"
    return str(row["task"]) if row["stage"] is None else f"{row['stage']} {row['task']}"


def matrix_csv(retention: Mapping[str, Any]) -> str:
    """The accuracy matrix as CSV, one line for each stage (stage 0 is the untouched base).

    Columns: `stage`, `task` (learnt in that stage, empty for the base), then one column of values (fractions)
    for each task and each general benchmark, then in the same order `NAME:stderr` (fractions), then `NAME:n`
    (samples).
    """
    names, suffixes = names_of(retention), {"value": "", "stderr": ":stderr", "n": ":n"}
    header = ["stage", "task", *(name + suffix for suffix in suffixes.values() for name in names)]
    lines = []
    for row in retention["rows"]:
        scores = [row["scores"].get(name) or {} for name in names]
        lines.append([row["stage"], row["task"], *(s.get(field) for field in suffixes for s in scores)])
    return pd.DataFrame(lines, columns=header, dtype=object).to_csv(index=False, lineterminator="\n")


def format_table(retention: Mapping[str, Any], note: str = "") -> str:
    """The accuracy matrix and the metrics as plain text, at most `TEXT_WIDTH` columns; then a note.

    Columns carry the names where all of them fit; otherwise T1, T2, .. and G1, .. with a legend.
    """
    tasks, general, rows = retention["tasks"], retention["general"], retention["rows"]
    frame = pd.DataFrame(index=[shorten(stage_label(row), 24 if row["stage"] is not None else 48) for row in rows])
    for name in names_of(retention):  # a cell ends in a star or a space, so that numbers line up
        cells = [percent(score_of(row, name).value) + ("*" if row["task"] == name else " ") for row in rows]
        frame[f"{shorten(name, TEXT_WIDTH - 8)} "] = cells
    codes = [*(f"T{i + 1} " for i in range(len(tasks))), *(f"G{i + 1} " for i in range(len(general)))]
    coded = dict(zip(frame.columns, codes, strict=True))
    if general:
        frame.insert(len(tasks), "|", "|")
    text, legend = frame.to_string(), ""
    if len(text.splitlines()[0]) > TEXT_WIDTH:
        text = frame.rename(columns=coded).to_string(line_width=TEXT_WIDTH)
        legend = "\n".join(f"  {code:<4} {name}" for name, code in coded.items())
    method = shorten(retention["method"], 20)
    title = f"Accuracy after each stage, in % (method {method}; * task learnt in that stage)"
    metrics = "\n".join("{:<10} {:>7} {:<6} {}".format(*row) for row in metric_frame(retention).itertuples())
    parts = filter(None, [title, text, legend, subset_note(retention), metrics, textwrap.fill(note, TEXT_WIDTH)])
    return "\n".join(map(str.rstrip, "\n\n".join(parts).splitlines()))


def metric_frame(retention: Mapping[str, Any]) -> pd.DataFrame:
    """Value, unit and meaning of each metric, and of the retention of each general benchmark.

    Where the last row is an edited adapter's, metrics that ask for rows of a run's stages are left out.
    """
    metrics, rows = retention["metrics"], []
    is_sum = any(row["stage"] is None for row in retention["rows"][-1:])
    for key, (name, unit, meaning) in METRICS.items():
        if is_sum and metrics[key] is None:
            continue
        written = points if key == "bwt" else percent  # a change carries its sign; forgetting is a size
        rows.append((name, written(metrics[key]), unit, meaning))
    for name in retention["general"]:
        meaning = f"{shorten(name, 30)}: share of the base's score kept to the end"
        rows.append(("Retention", percent(metrics["retention"].get(name)), "%", meaning))
    return pd.DataFrame(rows, columns=["metric", "value", "unit", "meaning"]).set_index("metric")


def subset_note(retention: Mapping[str, Any]) -> str:
    """What the scores leave out; empty where all was asked after every stage. Older runs do not say."""
    limits = retention.get("limits", {})
    kinds = {"task": "each task", "general": "each general benchmark"}
    parts = [f"{limits[kind]} of {name}" for kind, name in kinds.items() if limits.get(kind) is not None]
    notes = [f"A subset: scores are of the first {' and the first '.join(parts)} alone."] if parts else []
    rows = retention.get("rows", [])
    appended = [n for n in names_of(retention) if any(score_of(row, n).value is None for row in rows)] if rows else []
    if appended:
        notes.append(
            f"Not measured after every stage: {shorten(', '.join(appended), 60)}; nor is what needs it (-). The same "
            "command with --backfill true measures it."
        )
    return " ".join(notes)


def format_numbers(found: Mapping[str, Mapping[str, float]]) -> str:
    """What lmms-eval gives for each task, as plain text: a line for each number, in lmms-eval's own unit."""
    rows = [(task, name, number(value)) for task, numbers in found.items() for name, value in numbers.items()]
    return pd.DataFrame(rows, columns=["task", "", "value"]).to_string(index=False)
