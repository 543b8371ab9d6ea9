"""Pictures with a class, for the small default of image classification: each domain draws a picture and its class."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.draw import COLORS, GRID, GROUNDS, NUMBERS, SHAPES, SIZE


class Domain(NamedTuple):
    """What a task classifies: its classes' names, a prompt with `{}` in their place, and the question of `draw` whose
    answer is the class."""

    names: tuple[str, ...]
    template: str
    kind: str


SCENES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
SCENE_TEMPLATE = "a picture of a {}."
DOMAINS = {
    "digits": Domain(NUMBERS[:10], "a picture of the digit {}.", "name"),
    "charts": Domain(tuple(COLORS), "a chart with the tallest bar in {}.", "tallest"),
    "clocks": Domain(NUMBERS[1:], "a clock that shows {}.", "hour"),
    "grounds": Domain(tuple(GROUNDS), "a ground of {}.", "name"),
}
DRAWN: dict[str, Callable[[np.random.Generator], draw.Drawing]] = {
    "charts": draw.chart,
    "clocks": draw.clock,
    "grounds": draw.ground,
}


def classed(domain: str, drawing: draw.Drawing) -> tuple[Image.Image, str]:
    """A picture and its class in a domain."""
    kind = DOMAINS[domain].kind
    return drawing.image, next(question.answer for question in drawing.questions if question.kind == kind)


def scene(rng: np.random.Generator, name: str | None = None) -> tuple[Image.Image, str]:
    """One coloured shape on grey, at any place, and its class; of the class that is named, if one is."""
    name = name or SCENES[int(rng.integers(len(SCENES)))]
    color, shape = name.split()
    image = Image.new("RGB", (SIZE, SIZE), (int(rng.integers(20, 240)),) * 3)
    item = draw.SceneObject(color, shape, int(rng.integers(GRID)), int(rng.integers(GRID)))
    draw.draw_object(ImageDraw.Draw(image), rng, item)
    return draw.speckle(image, rng, 4), name
