"""Drawings and questions of the small default: one kind of general image and four new domains.

Every function is pure: what it returns depends on its arguments and on the numpy generator it is given. An
image is 64x64 RGB. Objects sit in the cells of a 4x4 grid because the small model's vision tower reads
patches of 16x16 pixels.

The domains look different from the scenes and from each other, but share answer words with them (colours,
counts, places, yes and no), so that a model trained on scenes alone starts above zero on them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64  # pixels a side
CELL = 16  # pixels a side of one grid cell, the patch size of the small model
GRID = SIZE // CELL

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
GROUNDS = {
    "grass": "green",
    "carpet": "green",
    "sand": "yellow",
    "wood": "yellow",
    "brick": "red",
    "gravel": "red",
    "water": "blue",
    "tiles": "blue",
}
GROUND_TINTS = {  # what a texture's brightness is multiplied by, in red, green and blue
    "green": (0.7, 1.0, 0.6),
    "yellow": (1.0, 0.9, 0.6),
    "red": (1.0, 0.7, 0.6),
    "blue": (0.6, 0.8, 1.0),
}
DIRECTIONS = ("top", "right", "bottom", "left")

Rgb = tuple[int, int, int]


class Question(NamedTuple):
    """One question about an image, its answer, and the kind by which test sets are balanced."""

    kind: str
    text: str
    answer: str


class SceneObject(NamedTuple):
    """One object of a scene: its colour and shape by name, its grid cell by row and column."""

    color: str
    shape: str
    row: int
    column: int


class Drawing(NamedTuple):
    """An image and the questions that can be asked about it."""

    image: Image.Image
    questions: list[Question]


def scene(rng: np.random.Generator) -> tuple[Drawing, list[SceneObject]]:
    """Draws one to five coloured shapes on grey: the general data.

    At least one object has a colour of its own and one a shape of its own, so that every kind of question can
    be asked.

    Returns:
        The drawing with six questions in random order (every kind at least once), and the objects drawn.
    """
    objects = _scene_objects(rng)
    image = Image.new("RGB", (SIZE, SIZE), (int(rng.integers(20, 240)),) * 3)
    draw = ImageDraw.Draw(image)
    for item in objects:
        draw_object(draw, rng, item)
    kinds = [*_SCENE_QUESTIONS, str(rng.choice(list(_SCENE_QUESTIONS)))]
    asked: dict[str, Question] = {}
    for kind in kinds:
        question = _SCENE_QUESTIONS[kind](rng, objects)
        while question.text in asked:  # a repeated question would give its answer away
            question = _presence_question(rng, objects)
        asked[question.text] = question
    return Drawing(speckle(image, rng, 4), _shuffled(rng, list(asked.values()))), objects


def digit(rng: np.random.Generator, pixels: NDArray[np.floating], label: int) -> Drawing:
    """Renders one handwritten digit, white on black.

    Args:
        rng: chooses the order of the questions.
        pixels: the scan [8, 8], ink from 0 to 16 (scikit-learn's `load_digits`).
        label: the digit, 0 to 9.
    """
    scan = Image.fromarray((np.asarray(pixels) * (255 / 16)).astype(np.uint8), mode="L")
    image = scan.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")
    questions = [
        Question("name", "Which digit is written here?", NUMBERS[label]),
        Question("parity", "Is the digit even or odd?", "odd" if label % 2 else "even"),
        Question("size", "Is the digit larger than four?", _yes(label > 4)),
    ]
    return Drawing(image, _shuffled(rng, questions))


def chart(rng: np.random.Generator) -> Drawing:
    """Draws a bar chart of two to four bars, each of its own colour and height, on white paper."""
    count = int(rng.integers(2, GRID + 1))
    colors = [str(color) for color in rng.permutation(list(COLORS))]
    bars, absent = colors[:count], colors[count]
    heights = rng.permutation(np.arange(1, 7))[:count] * 8 + 4
    columns = np.sort(rng.permutation(GRID)[:count])
    image = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for y in range(SIZE - 1, 0, -8):
        draw.line((0, y, SIZE, y), fill=(215, 215, 215))
    for color, height, column in zip(bars, heights, columns, strict=True):
        left = int(column) * CELL + 2
        box = (left, SIZE - 1 - int(height), left + 11, SIZE - 1)
        draw.rectangle(box, fill=COLORS[color], outline=(20, 20, 20))
    order = np.argsort(heights)
    shown = bool(rng.integers(2))
    questions = [
        Question("tallest", "What color is the tallest bar?", bars[order[-1]]),
        Question("shortest", "What color is the shortest bar?", bars[order[0]]),
        Question("count", "How many bars are there?", NUMBERS[count]),
        Question("presence", f"Is there a {rng.choice(bars) if shown else absent} bar?", _yes(shown)),
    ]
    return Drawing(image, _shuffled(rng, questions))


def clock(rng: np.random.Generator) -> Drawing:
    """Draws a clock face: a stepping hour hand in the rim's colour and a thin minute hand on a quarter."""
    hour, quarter = int(rng.integers(1, 13)), int(rng.integers(4))
    color = str(rng.choice(list(COLORS)))
    image = Image.new("RGB", (SIZE, SIZE), (25, 30, 45))
    draw = ImageDraw.Draw(image)
    draw.ellipse((2, 2, SIZE - 3, SIZE - 3), fill=(235, 230, 215), outline=COLORS[color], width=4)
    for mark in range(12):
        draw.line((_on_dial(mark / 12, 23), _on_dial(mark / 12, 25)), fill=(120, 120, 120))
    draw.line((_on_dial(0, 0), _on_dial(quarter / 4, 25)), fill=(20, 20, 20), width=3)
    draw.line((_on_dial(0, 0), _on_dial(hour / 12, 19)), fill=COLORS[color], width=7)
    questions = [
        Question("hour", "Which hour does the clock show?", NUMBERS[hour]),
        Question("minute", "Where does the long hand point?", DIRECTIONS[quarter]),
        Question("color", "What color is the clock?", color),
    ]
    return Drawing(image, _shuffled(rng, questions))


def ground(rng: np.random.Generator) -> Drawing:
    """Fills the image with one ground texture in bright or dim light; two textures share each colour."""
    name = str(rng.choice(list(GROUNDS)))
    texture = _GROUND_TEXTURES[name](rng)
    light = bool(rng.integers(2))
    low = rng.uniform(90, 120) if light else rng.uniform(15, 45)
    high = rng.uniform(200, 240) if light else rng.uniform(100, 140)
    color = GROUNDS[name]
    tint = np.array(GROUND_TINTS[color]) * rng.uniform(0.9, 1.0, size=3)
    pixels = (low + (high - low) * texture)[..., None] * tint + rng.normal(0, 6, (SIZE, SIZE, 1))
    questions = [
        Question("name", "What is the ground made of?", name),
        Question("light", "Is the ground light or dark?", "light" if light else "dark"),
        Question("color", "What color is the ground?", color),
    ]
    return Drawing(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), _shuffled(rng, questions))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _shuffled(rng: np.random.Generator, questions: list[Question]) -> list[Question]:
    return [questions[index] for index in rng.permutation(len(questions))]


def speckle(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Adds Gaussian noise of standard deviation `strength` (of 255)."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + strength * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _scene_objects(rng: np.random.Generator) -> list[SceneObject]:
    while True:
        cells = rng.permutation(GRID * GRID)[: rng.integers(1, 6)]
        objects = [
            SceneObject(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)), *divmod(int(cell), GRID))
            for cell in cells
        ]
        if _unique(objects, "color") and _unique(objects, "shape"):
            return objects


def _unique(objects: list[SceneObject], attribute: str) -> list[SceneObject]:
    """The objects whose colour (or shape) no other object of the scene has."""
    values = [getattr(item, attribute) for item in objects]
    return [item for item, value in zip(objects, values, strict=True) if values.count(value) == 1]


def draw_object(draw: ImageDraw.ImageDraw, rng: np.random.Generator, item: SceneObject) -> None:
    """Draws one object, of any size, somewhere in its cell."""
    size = int(rng.integers(10, 14))
    left = item.column * CELL + int(rng.integers(1, CELL - size))
    top = item.row * CELL + int(rng.integers(1, CELL - size))
    right, bottom, fill = left + size - 1, top + size - 1, COLORS[item.color]
    if item.shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif item.shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif item.shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)
    elif item.shape == "cross":
        draw.line((left, top, right, bottom), fill=fill, width=3)
        draw.line((left, bottom, right, top), fill=fill, width=3)
    else:
        draw.ellipse((left, top, right, bottom), outline=fill, width=3)


def _color_question(rng: np.random.Generator, objects: list[SceneObject]) -> Question:
    item = _pick(rng, _unique(objects, "shape"))
    return Question("color", f"What color is the {item.shape}?", item.color)


def _shape_question(rng: np.random.Generator, objects: list[SceneObject]) -> Question:
    item = _pick(rng, _unique(objects, "color"))
    return Question("shape", f"What shape is {item.color}?", item.shape)


def _count_question(rng: np.random.Generator, objects: list[SceneObject]) -> Question:
    if rng.integers(2):
        return Question("count", "How many objects are there?", NUMBERS[len(objects)])
    color = _pick(rng, objects).color if rng.integers(4) else str(rng.choice(list(COLORS)))
    count = sum(item.color == color for item in objects)
    return Question("count", f"How many {color} objects are there?", NUMBERS[count])


def _position_question(rng: np.random.Generator, objects: list[SceneObject]) -> Question:
    item = _pick(rng, _unique(objects, "shape"))
    place = f"{'top' if item.row < GRID // 2 else 'bottom'} {'left' if item.column < GRID // 2 else 'right'}"
    return Question("position", f"Where is the {item.shape}?", place)


def _presence_question(rng: np.random.Generator, objects: list[SceneObject]) -> Question:
    present = {(item.color, item.shape) for item in objects}
    absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    shown = bool(rng.integers(2))
    pairs = sorted(present) if shown else absent
    color, shape = pairs[int(rng.integers(len(pairs)))]
    return Question("presence", f"Is there a {color} {shape}?", _yes(shown))


def _pick(rng: np.random.Generator, objects: list[SceneObject]) -> SceneObject:
    return objects[int(rng.integers(len(objects)))]


_SCENE_QUESTIONS: dict[str, Callable[[np.random.Generator, list[SceneObject]], Question]] = {
    "color": _color_question,
    "shape": _shape_question,
    "count": _count_question,
    "position": _position_question,
    "presence": _presence_question,
}


def _on_dial(turn: float, radius: float) -> tuple[float, float]:
    """The point at `radius` pixels from the dial's centre, `turn` of a full turn clockwise from the top."""
    angle = 2 * math.pi * turn
    centre = SIZE / 2 - 0.5
    return centre + radius * math.sin(angle), centre - radius * math.cos(angle)


# Ground textures: [SIZE, SIZE] float64 in 0..1, a few pixels off at random so that images of one kind differ.


def _coordinates(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    shift_y, shift_x = rng.integers(0, 4, size=2)
    return y + shift_y, x + shift_x


def _stretched_noise(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """White noise of `height` x `width` samples stretched over the image."""
    noise = Image.fromarray(rng.random((height, width), dtype=np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)


def _grass(rng: np.random.Generator) -> NDArray[np.float64]:
    return _stretched_noise(rng, 10, SIZE)


def _sand(rng: np.random.Generator) -> NDArray[np.float64]:
    return 0.6 + 0.4 * rng.random((SIZE, SIZE))


def _brick(rng: np.random.Generator) -> NDArray[np.float64]:
    y, x = _coordinates(rng)
    shifted = x + 8 * (y // 8 % 2)
    return np.where((y % 8 < 2) | (shifted % 16 < 2), 1.0, 0.25)


def _water(rng: np.random.Generator) -> NDArray[np.float64]:
    y, x = _coordinates(rng)
    return 0.5 + 0.5 * np.sin(2 * math.pi * (y + 2 * np.sin(2 * math.pi * x / 32)) / 10)


def _gravel(rng: np.random.Generator) -> NDArray[np.float64]:
    return (_stretched_noise(rng, 14, 14) > 0.5).astype(np.float64)


def _tiles(rng: np.random.Generator) -> NDArray[np.float64]:
    y, x = _coordinates(rng)
    return (y // 8 + x // 8) % 2


def _wood(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.broadcast_to(_stretched_noise(rng, 1, 20), (SIZE, SIZE)) * 0.8 + 0.1


def _carpet(rng: np.random.Generator) -> NDArray[np.float64]:
    y, x = _coordinates(rng)
    return 0.5 + 0.5 * np.sin(2 * math.pi * (x + y) / 8)


_GROUND_TEXTURES: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "grass": _grass,
    "sand": _sand,
    "brick": _brick,
    "water": _water,
    "gravel": _gravel,
    "tiles": _tiles,
    "wood": _wood,
    "carpet": _carpet,
}
