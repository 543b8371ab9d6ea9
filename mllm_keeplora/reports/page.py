"""What every report is made of: numbers as text, pictures as PNG, charts as coordinates, filled templates.

Scores are fractions and are shown in percent, differences of scores in percentage points; what is undefined
is None and becomes a dash.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mllm_keeplora.runs.files import atomic_path

Json = dict[str, Any]

TEXT_WIDTH = 100  # columns of a terminal that a table may use
LINE_COLOUR = "#1b6f9c"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: a reader sees the old one or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def percent(value: float | None) -> str:
    """A fraction in %, one decimal."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}".replace("+0.0", "0.0")


def printable(text: object) -> str:
    """Names come from data: no control character may reach a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def shorten(text: object, width: int) -> str:
    """At most `width` characters; the middle goes, because names of one family differ at their ends."""
    text = printable(text)
    if len(text) <= width:
        return text
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def blocks(columns: Sequence[list[str]], width: int) -> Iterable[list[list[str]]]:
    """Columns in groups that fit side by side into `width` characters."""
    block: list[list[str]] = []
    for column in columns:
        if block and sum(len(other[0]) for other in block) + len(column[0]) > width:
            yield block
            block = []
        block.append(column)
    yield block


def png(figure: Figure) -> bytes:
    """The figure as PNG, with what lies outside its axes. Equal figures give equal bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    metadata: Json = {"Software": None}  # no version of matplotlib in the file
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.2, metadata=metadata)
    return buffer.getvalue()


@contextmanager
def picture_style() -> Iterator[None]:
    """For every picture. Names are data: a dollar sign in one must not start a formula."""
    with matplotlib.rc_context({"text.parse_math": False, "font.family": "DejaVu Sans"}):
        yield


def render(template: str, **values: Any) -> str:
    """Fills a page template of this folder. Autoescape is on for the whole page: its text comes from data."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


# --------------------------------------------------------------------------------------------------
# charts: coordinates here, SVG in the template


@dataclass(frozen=True)
class Dot:
    """A point of a line in data coordinates; y None is a gap."""

    x: float
    y: float | None
    title: str
    is_hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    dots: Sequence[Dot]
    colour: str = LINE_COLOUR
    has_markers: bool = True


# Units of the SVG's view box (report.html.j2 repeats them); INSET keeps markers off the labels of the y axis.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, INSET = 300, 170, 44, 12, 10, 24, 7


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    note: str = "",
    mark_x: float | None = None,
    mark_y: float | None = None,
) -> Json:
    """Coordinates of one chart; the first and last tick of each axis are the ends of that axis."""

    def across(x: float) -> float:
        low, high = x_ticks[0][0], x_ticks[-1][0]
        share = (x - low) / (high - low) if high > low else 0.5
        return round(LEFT + INSET + share * (WIDTH - LEFT - RIGHT - 2 * INSET), 1)

    def down(y: float) -> float:
        low, high = y_ticks[0][0], y_ticks[-1][0]
        return round(TOP + (high - min(max(y, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "title": title,
        "note": note,
        "x_ticks": [(across(x), label) for x, label in x_ticks if label],
        "y_ticks": [(down(y), label) for y, label in y_ticks],
        "mark_x": None if mark_x is None else across(mark_x),
        "mark_y": None if mark_y is None else down(mark_y),
        "lines": [_line(line, across, down) for line in lines],
    }


def _line(line: Line, across: Callable[[float], float], down: Callable[[float], float]) -> Json:
    pieces: list[list[str]] = [[]]
    dots = []
    for dot in line.dots:
        if dot.y is None:
            pieces.append([])
            continue
        x, y = across(dot.x), down(dot.y)
        pieces[-1].append(f"{x},{y}")
        dots.append({"x": x, "y": y, "title": dot.title, "is_hollow": dot.is_hollow})
    # A piece of one point has no extent and is seen by its marker alone.
    return {
        "colour": line.colour,
        "pieces": [" ".join(piece) for piece in pieces if len(piece) > 1],
        "dots": dots if line.has_markers or len(dots) == 1 else [],
    }


def ticks(highest: float, *, integer: bool = False) -> list[tuple[float, str]]:
    """Round values from 0 to at least `highest`."""
    values = MaxNLocator(nbins=5, integer=integer, min_n_ticks=2).tick_values(
        0.0, max(highest, 1.0 if integer else 1e-3)
    )
    return [(float(value), f"{value:g}") for value in values if value >= 0]


def index_ticks(labels: Sequence[str]) -> list[tuple[float, str]]:
    """One tick for each index, labelled so that neighbours do not touch; both ends stay."""
    step = math.ceil(len(labels) / 10)
    last = len(labels) - 1
    kept = [i == last or (i % step == 0 and last - i >= step / 2) for i in range(len(labels))]
    return [(float(i), label if kept[i] else "") for i, label in enumerate(labels)]
