"""Pictures, by matplotlib: PNG files, and SVG that a page carries inside it.

An SVG takes its colours for text, lines and background from the page, so that it is readable in light and in
dark mode; the colours of its curves are legible on both. Equal input gives equal bytes.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from mllm_keeplora.continual.stage import LEAKAGE_TOLERANCE
from mllm_keeplora.reports.intervals import Interval
from mllm_keeplora.reports.results import Json, names_of, score_of
from mllm_keeplora.reports.tables import percent, shorten, stage_label

# Legible on white and on black; neighbours differ in lightness too.
COLOURS = ("#1f77b4", "#d07c00", "#c22d76", "#29a297", "#3f7d20", "#9182f5", "#8a5a2b")
MARKERS = "osD^vPX*<>hp8d"
OWN_COLOUR = "#d9541e"  # the task learnt in a stage
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7fafc", "#d7e8f1", "#a9d0e3", "#5fa8cb"])
GENERAL_GAP = 0.35  # between tasks and general benchmarks, in cells
MARKED_DEPTHS = 16  # deeper towers are drawn as lines without markers
LOSS_POINTS = 240  # a wider curve would only repeat pixels
# Curves of a training, where the run has them.
TRAINING = {"loss": "loss", "grad_norm": "gradient norm before clipping", "learning_rate": "learning rate"}
LOGARITHMIC = ("loss", "grad_norm")
NARROW = 50.0  # largest by least value of a logarithmic axis that powers of 10 would give a line or two
LEAST_SHARE = 1e-6  # of the largest value: what is smaller, zero included, is drawn at the foot of a logarithmic axis
# Owners of the colours, in the order of `styles`.
METHODS = ("keeplora", "lora", "inflora", "olora", "gpm", "replay", "ewc", "loda", "joint", "zero_shot")
LEAKAGE_FLOOR = 1e-10  # smaller values, zero included, are drawn at the foot of the logarithmic axis

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # names are data: a dollar sign in one must not start a formula
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8896a0",
    "grid.alpha": 0.3,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}
CHART = STYLE | {"font.size": 8, "axes.grid.axis": "y"}
CHART |= dict.fromkeys(("axes.spines.left", "axes.spines.bottom", "xtick.bottom", "ytick.left"), False)

# For pictures that become files, and for charts of a page: `with picture_style():` or `@picture_style()`.
picture_style = partial(matplotlib.rc_context, STYLE)
chart_style = partial(matplotlib.rc_context, CHART)


def png(figure: Figure) -> bytes:
    """The figure as PNG, with what lies outside its axes."""
    buffer = io.BytesIO()
    metadata: Json = {"Software": None}  # no version of matplotlib in the file
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.2, metadata=metadata)
    return buffer.getvalue()


def svg(axes: Axes, label: str) -> Markup:
    """The figure of `axes` as an element of a page; `label` describes it to who cannot see it.

    The page's style sheet colours its text; white becomes the page's background.
    """
    figure, buffer = cast(Figure, axes.figure), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids are made of it, and differ between figures
        figure.savefig(buffer, format="svg", transparent=True)
    # Groups have the same ids in every figure, and nobody reads the indentation.
    text = re.sub(r' id="[^"]*_\d+"|(?<=\n) +', "", buffer.getvalue())
    text = text.replace("#ffffff", "var(--paper)")
    body = text[text.index("</defs>") + len("</defs>") :]  # after the prolog, the date, a style for everything
    width, height = 72 * figure.get_size_inches()
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{body}')


def styles(number: int) -> list[Json]:
    """How each of so many curves is drawn; hollow and dashed where colours repeat."""
    found = []
    for index in range(number):
        colour, repeats = COLOURS[index % len(COLOURS)], index >= len(COLOURS)
        face, line = ("white", "--") if repeats else (colour, "-")
        marker = MARKERS[index % len(MARKERS)]
        found.append({"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": line})
    return found


def method_styles(methods: Sequence[str]) -> list[Json]:
    """How curves are drawn that belong to methods: a method has its own colour on every page.

    Of several curves of one method (other settings) the first has it; the others have those of methods that are not
    there.
    """
    owned = {method: METHODS.index(method) for method in methods if method in METHODS}
    taken = frozenset(owned.values())
    free = (place for place in count() if place not in taken)
    places = [owned.pop(method) if method in owned else None for method in methods]
    found = [next(free) if place is None else place for place in places]
    looks = styles(1 + max(found))
    return [looks[place] for place in found]


def plot_intervals(axes: Axes, xs: Iterable[float], intervals: Sequence[Interval], **style: Any) -> None:
    """A curve in % with the limits of its values; it breaks where a value is undefined."""
    values, lows, highs = 100 * np.array(list(intervals), dtype=float).T  # None becomes NaN
    errors = np.array([values - lows, highs - values])
    axes.errorbar(list(xs), values, yerr=errors, capsize=2, elinewidth=1, **style)


def start_at_zero(axes: Axes, least: float = 0.0) -> None:
    """Sets the vertical axis from 0 to above what is drawn, and to `least` at least."""
    axes.set_ylim(0, max(least, 1.03 * axes.get_ylim()[1]))


@picture_style()
def matrix_picture(retention: Mapping[str, Any], title: str) -> bytes:
    """The accuracy matrix as PNG: base row first, own-stage cells outlined, general benchmarks set apart."""
    rows, names, tasks = retention["rows"], names_of(retention), len(retention["tasks"])
    lefts = {name: i + (GENERAL_GAP if i >= tasks else 0.0) for i, name in enumerate(names)}
    width, height = max(lefts.values()) + 1, len(rows)
    figure = Figure(figsize=(0.95 * width, 0.55 * height))  # inches; labels lie outside
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
    axes.set(xlim=(-0.03, width + 0.03), ylim=(height + 0.03, -0.03))
    axes.grid(False)
    for top, row in enumerate(rows):
        for name, left in lefts.items():
            value, is_own = score_of(row, name).value, row["task"] == name
            edge: Json = {"ec": OWN_COLOUR, "lw": 2.6, "zorder": 2} if is_own else {"ec": "white", "lw": 1.5}
            colour = "#eeeeee" if value is None else HEAT(value)  # above 1 (captions) as 1
            axes.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, **edge))
            axes.text(left + 0.5, top + 0.5, percent(value), ha="center", va="center", fontsize=12)
    axes.tick_params(length=0, labelsize=11, labeltop=True, labelbottom=False)
    slanted: Json = {"rotation": 35, "rotation_mode": "anchor", "ha": "left"}
    axes.set_xticks([left + 0.4 for left in lefts.values()], [shorten(name, 28) for name in names], **slanted)
    axes.set_yticks([top + 0.5 for top in range(height)], [shorten(stage_label(row), 28) for row in rows])
    heading = f"{shorten(title, 40)}: score in % after each stage"
    axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=12)
    note = "outlined: the task learnt in that stage; -: not measured"
    note += "; set apart: general benchmarks" if retention["general"] else ""
    axes.annotate(note, (0, 0), (0, -8), "axes fraction", "offset points", va="top", fontsize=9.5)
    return png(figure)


def _chart(xlabel: str) -> Axes:
    # Room for the labels of ticks and axis: looking for it takes as long as the drawing, and a page has many charts.
    axes = Figure(figsize=(3.6, 1.9)).add_axes((0.14, 0.22, 0.84, 0.73), xlabel=xlabel)  # inches; shares of them
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return axes


@chart_style()
def score_chart(
    name: str, curves: Sequence[Sequence[Interval]], own: int | None, looks: Sequence[Json] | None = None
) -> Markup:
    """Scores over the stages with their limits, one curve a run.

    Args:
        name: what the scores are of.
        curves: a score for each stage, the base first.
        looks: how the curves are drawn, of `method_styles`.
        own: the stage in which the task is learnt, marked by a line.
    """
    axes = _chart("after stage")
    for curve, style in zip(curves, looks or styles(len(curves)), strict=True):
        plot_intervals(axes, range(len(curve)), curve, markersize=4, clip_on=False, **style)
    axes.set_xlim(-0.25, len(curves[0]) - 0.75)  # whole, though the base was not measured
    if own is not None:
        axes.axvline(own, color=OWN_COLOUR, linestyle="--", linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: "base" if x == 0 else f"{x:g}")
    start_at_zero(axes, 100.0)  # captions score above 100
    return svg(axes, f"score on {name}")


@chart_style()
def training_chart(stage: str, curves: Mapping[str, Sequence[Sequence[float]]], ranges: Mapping[str, Any]) -> Markup:
    """Training loss, gradient norm and learning rate over the steps, each on an axis of its own.

    Args:
        stage: its label.
        curves: key of `TRAINING` -> points [step, value]; those that are there are drawn.
        ranges: key -> least and largest value over all stages, so that stages compare.
    """
    height = 0.28 + 1.25 * len(curves)  # inches, as all of these
    figure = Figure(figsize=(3.6, height))
    tops = [(height - 1.25 * (number + 1) + 0.1) / height for number in range(len(curves))]
    found = [figure.add_axes((0.15, top, 0.83, 0.9 / height)) for top in tops]
    for axes, (key, points) in zip(found, curves.items(), strict=True):
        steps, values = thinned(points).T
        low, high = ranges[key]
        if key in LOGARITHMIC:
            floor = max(low, high * LEAST_SHARE)
            axes.plot(steps, values.clip(floor), color=COLOURS[0])
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < NARROW * floor else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(floor / 1.5, high * 1.5)
        else:
            axes.plot(steps, values, color=COLOURS[0])
            axes.set_ylim(0, 1.08 * high or 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(TRAINING[key], loc="left", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelbottom=axes is found[-1])
    found[-1].set_xlabel("step")
    return svg(found[-1], f"{', '.join(TRAINING[key] for key in curves)} of stage {stage}")


def thinned(curve: Sequence[Sequence[float]]) -> np.ndarray:
    """At most LOSS_POINTS rows, each the mean of neighbouring ones."""
    pieces = np.array_split(np.array(curve, dtype=float), min(len(curve), LOSS_POINTS))
    return np.array([piece.mean(axis=0) for piece in pieces])


@chart_style()
def time_chart(seconds: pd.DataFrame) -> Markup:
    """Seconds of each phase (columns), one bar a stage (index)."""
    figure = Figure(figsize=(3.6, 0.9 + 0.2 * len(seconds)), layout="constrained")  # inches; names have any length
    axes = figure.add_subplot(xlabel="seconds")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    stages, ends = [shorten(stage, 20) for stage in seconds.index], seconds.cumsum(axis=1)
    for phase, style in zip(seconds, styles(seconds.shape[1]), strict=True):
        axes.barh(stages, seconds[phase], 0.7, ends[phase] - seconds[phase], color=style["color"])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    return svg(axes, "seconds of each phase in each stage")


# What the input directions of a layer are used for: column of `module_frame` -> words and colour.
ROOM = {
    "k_w": ("base protected", COLOURS[0]),
    "k_g": ("general inputs protected", COLOURS[3]),
    "k_f": ("past tasks protected", COLOURS[5]),
    "rank": ("learnt here", OWN_COLOUR),
}


def module_frame(manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The modules of a stage by name, with the share of its inputs that each one must not answer."""
    modules = pd.DataFrame(manifest["modules"]).set_index("name").rename_axis("module")
    numbers = ["depth", "k_w", "k_g", "k_f", "rank", "lambda", "leakage", "orthonormality_error"]
    modules[numbers] = modules[numbers].astype(float)  # None becomes NaN
    return modules.assign(protected=modules[["k_w", "k_g", "k_f"]].sum(axis=1) / modules["in_features"])


def room_left(modules: pd.DataFrame) -> pd.Series:
    """The share of each module's input directions that is neither protected nor learnt in the stage."""
    return 1 - modules[[*ROOM]].sum(axis=1) / modules["in_features"]


@chart_style()
def room_chart(tower: str, stage: str, modules: pd.DataFrame) -> Markup:
    """What the input directions of a tower's layers are used for in one stage, in % over the depth.

    Modules of one depth are averaged; those without a depth are left out.
    """
    axes, shares = _chart("depth"), modules[[*ROOM]].div(modules["in_features"], axis=0)
    by_depth = 100 * shares.groupby(modules["depth"]).mean()
    bottom = np.zeros(len(by_depth))
    for column, (_, colour) in ROOM.items():
        axes.bar(by_depth.index, by_depth[column], 0.8, bottom, color=colour)
        bottom = bottom + by_depth[column].to_numpy()
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:g}%")
    return svg(axes, f"use of the input directions of the {tower} tower in stage {stage}")


@chart_style()
def scale_chart(tower: str, modules: pd.DataFrame) -> Markup:
    """The layer scale (E5) over the depth of a tower; it is the same in every stage."""
    axes, scales = _chart("depth"), modules.groupby("depth")["lambda"].mean()
    axes.plot(scales.index, scales, color=COLOURS[0], marker="o", markersize=_marker(scales), clip_on=False)
    start_at_zero(axes, 1.0)
    return svg(axes, f"layer scale over the depth of the {tower} tower")


@chart_style()
def leakage_chart(tower: str, modules: pd.DataFrame) -> Markup:
    """How far updates reach what is protected: the largest of all stages and modules of a depth."""
    axes = _chart("depth")
    largest = modules.groupby("depth")["leakage"].max().clip(lower=LEAKAGE_FLOOR)
    axes.axhline(LEAKAGE_TOLERANCE, color=OWN_COLOUR, linestyle="--", linewidth=1)
    axes.plot(largest.index, largest, color=COLOURS[0], marker="o", markersize=_marker(largest), clip_on=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.set_ylim(LEAKAGE_FLOOR, max(10 * LEAKAGE_TOLERANCE, axes.get_ylim()[1]))
    return svg(axes, f"largest leakage over the depth of the {tower} tower")


def _marker(curve: pd.Series) -> int:
    return 4 if len(curve) <= MARKED_DEPTHS else 0
