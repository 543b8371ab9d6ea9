"""Clips and questions of the small video default: one kind of general clip and four new domains.

Every function is pure: what it returns depends on its arguments and on the numpy generator it is given. A
clip is `FRAMES` frames of 64x64 RGB; readers take the `SAMPLED` ones, so all events happen in slots of two
frames and every slot is sampled once. Whatever moves leaves at one edge and returns at the opposite one.

No answer of a domain can be read off a single frame. Positions start uniformly on the wrapped picture, so at
every frame they are uniform whatever the ways and the speed; a light that is lit n times starts and ends in
opposite states, and its negative is as likely as itself, so it is lit with probability one half at every
frame for every n.

The domains look different from the scenes and from each other, but share answer words with them (colours,
ways, counts, yes and no), so that a model trained on scenes alone starts above zero on them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.draw import COLORS, NUMBERS, SHAPES, Question

SIZE = draw.SIZE  # pixels a side
FRAMES = 16  # of a clip
SLOTS = 8  # of two frames each
SAMPLED = np.linspace(0, FRAMES - 1, SLOTS).astype(np.int64)  # the frames that a reader takes, one a slot
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows and columns a step
SIDES = {"left": "right", "right": "left", "up": "bottom", "down": "top"}  # where what moves that way is from
OBJECT = 13  # pixels a side of one thing of a scene

Pixels = NDArray[np.uint8]  # frames [n, SIZE, SIZE, 3]
Frames = NDArray[np.int64]  # which frames of the clip to draw


class Thing(NamedTuple):
    """One thing of a scene.

    Attributes:
        color, shape: by name.
        act: one of the WAYS, or "still", "appear", "disappear", "flash".
        row, column: pixels of its centre at frame 0.
        step: pixels it moves a slot.
        shown: whether it is visible, [SLOTS].
    """

    color: str
    shape: str
    act: str
    row: int
    column: int
    step: float
    shown: NDArray[np.bool_]

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"

    def centres(self, frames: Frames) -> NDArray[np.int64]:
        """Row and column of its centre at the frames, [n, 2]."""
        return _path(self.row, self.column, self.act, self.step, frames)


class Clip(NamedTuple):
    """Frames [n, SIZE, SIZE, 3] and the questions that can be asked about them."""

    frames: Pixels
    questions: list[Question]


def _path(row: int, column: int, way: str, step: float, frames: Frames) -> NDArray[np.int64]:
    """Wrapped row and column of what moves `step` pixels a slot, [n, 2]."""
    moved = np.round(step * frames / 2).astype(np.int64)[:, None] * np.array(WAYS.get(way, (0, 0)))
    return (np.array([row, column]) + moved) % SIZE


# The general clips.


SCENE_KINDS = ("direction", "mover", "change", "order", "flashes", "count", "motion", "color")


def scene(rng: np.random.Generator, frames: Frames | None = None) -> tuple[Clip, list[Thing]]:
    """Draws two or three coloured shapes on grey that move, stay, appear, disappear or flash.

    Args:
        rng: makes every choice.
        frames: which frames to draw; all of them by default.

    Returns:
        The clip with six different questions in random order, kinds as evenly as the scene allows, and the
        things drawn.
    """
    frames = np.arange(FRAMES) if frames is None else frames
    while True:
        things = _things(rng)
        questions = scene_questions(rng, things)
        if len(questions) == 6:
            return Clip(render_scene(rng, things, frames), questions), things


def asked_scene(rng: np.random.Generator, index: int) -> Clip:
    """Draws a scene and asks one question about it, the kinds in turn over `index`: tests are balanced."""
    kind = SCENE_KINDS[index % len(SCENE_KINDS)]
    while True:
        things = _things(rng)
        fitting = [question for pool in _question_pools(things) for question in pool if question.kind == kind]
        if fitting:
            question = fitting[int(rng.integers(len(fitting)))]
            return Clip(render_scene(rng, things, np.arange(FRAMES)), [question])


def render_scene(rng: np.random.Generator, things: list[Thing], frames: Frames) -> Pixels:
    """The frames [n, SIZE, SIZE, 3] of a scene on a grey ground with a grain that does not move."""
    grain = rng.normal(rng.uniform(20, 235), 4, (SIZE, SIZE, 3))
    pixels = np.repeat(grain.clip(0, 255).astype(np.uint8)[None], len(frames), 0)
    for thing in things:
        rows, columns = np.nonzero(_MASKS[thing.shape])
        for index, (row, column) in enumerate(thing.centres(frames)):
            if thing.shown[frames[index] // 2]:
                place = (row + rows - OBJECT // 2) % SIZE, (column + columns - OBJECT // 2) % SIZE
                pixels[index, place[0], place[1]] = COLORS[thing.color]
    return pixels


def _things(rng: np.random.Generator) -> list[Thing]:
    """Two or three things, each of its own colour and shape, apart from each other at first."""
    count = int(rng.integers(2, 4))
    acts = [str(act) for act in rng.choice(_ACTS, count, p=_ACT_SHARES)]
    if rng.random() < 0.25:  # an order question needs two that appear
        acts[:2] = ["appear", "appear"]
    colors, shapes = rng.permutation(list(COLORS)), rng.permutation(SHAPES)
    starts = rng.permutation(np.arange(2, SLOTS - 1))  # different for all, so that one is first
    things = []
    for index, (row, column) in enumerate(_apart(rng, acts)):
        act, step = acts[index], rng.uniform(5, 9)
        shown = _visibility(rng, act, int(starts[index]))
        things.append(Thing(str(colors[index]), str(shapes[index]), act, row, column, step, shown))
    return things


def _apart(rng: np.random.Generator, acts: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and columns at frame 0: whole inside the picture, but anywhere along the axis of motion."""
    moving = np.array([WAYS.get(act, (0, 0)) for act in acts], dtype=np.bool_)
    margin = OBJECT // 2
    while True:
        inside = rng.integers(margin, SIZE - margin, size=moving.shape)
        places = np.where(moving, rng.integers(SIZE, size=moving.shape), inside)
        gaps = abs(places[:, None] - places[None])
        gaps = np.minimum(gaps, SIZE - gaps).max(-1) + SIZE * np.eye(len(places), dtype=np.int64)
        if gaps.min() > OBJECT + 2:
            return [(int(row), int(column)) for row, column in places]


_ACTS = (*WAYS, "still", "appear", "disappear", "flash")
_ACT_SHARES = (0.1, 0.1, 0.1, 0.1, 0.2, 0.12, 0.12, 0.16)


def _visibility(rng: np.random.Generator, act: str, start: int) -> NDArray[np.bool_]:
    """Whether a thing of this act is visible in each slot, [SLOTS]."""
    slots = np.arange(SLOTS)
    if act == "appear":
        return slots >= start
    if act == "disappear":
        return slots < start
    if act == "flash":  # hidden at both ends: one flash is then neither an appearance nor a disappearance
        return runs(rng, int(rng.integers(1, 4)), first=False, last=False)
    return np.ones(SLOTS, dtype=np.bool_)


def runs(rng: np.random.Generator, count: int, first: bool, last: bool) -> NDArray[np.bool_]:
    """A random on-off pattern over the slots with `count` runs of on, [SLOTS].

    Args:
        rng: places the changes.
        count: how many times the pattern is on.
        first: whether it starts on.
        last: whether it ends on.
    """
    changes = 2 * count - int(first) - int(last)
    at = np.sort(rng.permutation(SLOTS - 1)[:changes])  # a change after each of these slots
    return (np.searchsorted(at, np.arange(SLOTS), side="left") + int(first)) % 2 == 1


def scene_questions(rng: np.random.Generator, things: list[Thing]) -> list[Question]:
    """Up to six different questions, the kinds taken in turn in a random order."""
    pools = [[pool[int(i)] for i in rng.permutation(len(pool))] for pool in _question_pools(things) if pool]
    pools = [pools[int(i)] for i in rng.permutation(len(pools))]
    asked: list[Question] = []
    while len(asked) < 6 and any(pools):
        asked += [pool.pop() for pool in pools if pool]
    return [asked[:6][int(i)] for i in rng.permutation(min(6, len(asked)))]


def _question_pools(things: list[Thing]) -> list[list[Question]]:
    """Everything that can be asked about a scene, by kind."""
    return [
        [
            Question("direction", f"Which way does the {thing.name} move?", thing.act)
            for thing in things
            if thing.act in WAYS
        ],
        _mover_questions(things),
        [
            Question("change", f"What {act}s?", thing.name)
            for act in ("appear", "disappear")
            for thing in _only(things, act)
        ],
        _order_questions(things),
        [
            Question("flashes", f"How many times does the {thing.name} flash?", NUMBERS[_count_runs(thing.shown)])
            for thing in things
            if thing.act == "flash"
        ],
        [Question("count", "How many things move?", NUMBERS[sum(thing.act in WAYS for thing in things)])],
        [
            Question("motion", f"Does the {thing.name} move?", _yes(thing.act in WAYS))
            for thing in things
            if thing.act in (*WAYS, "still")
        ],
        [Question("color", f"What color is the {thing.shape}?", thing.color) for thing in things],
    ]


def _mover_questions(things: list[Thing]) -> list[Question]:
    movers = [thing for thing in things if thing.act in WAYS]
    questions = [Question("mover", f"What moves {way}?", thing.name) for way in WAYS for thing in _only(movers, way)]
    if len(movers) == 1:
        questions.append(Question("mover", "What moves?", movers[0].name))
    return questions + [Question("mover", "What stays still?", thing.name) for thing in _only(things, "still")]


def _order_questions(things: list[Thing]) -> list[Question]:
    appearing = sorted((thing for thing in things if thing.act == "appear"), key=lambda t: -t.shown.sum())
    if len(appearing) < 2:
        return []
    return [
        Question("order", "What appears first?", appearing[0].name),
        Question("order", "What appears last?", appearing[-1].name),
    ]


def _only(things: list[Thing], act: str) -> list[Thing]:
    """The thing of this act if it is the only one."""
    found = [thing for thing in things if thing.act == act]
    return found if len(found) == 1 else []


def _count_runs(shown: NDArray[np.bool_]) -> int:
    return int(shown[0]) + int((np.diff(shown.astype(np.int8)) == 1).sum())


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _shape_masks() -> dict[str, NDArray[np.bool_]]:
    """Which pixels of an OBJECT x OBJECT square each shape fills."""
    half = OBJECT // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    radius = np.hypot(y, x)
    return {
        "circle": radius <= half - 0.7,
        "square": radius >= 0,
        "triangle": 2 * abs(x) <= y + half,
        "cross": (abs(y - x) < 2) | (abs(y + x) < 2),
        "ring": (radius <= half + 0.3) & (radius > half - 2),
    }


_MASKS = _shape_masks()


# The domains. Each draws all frames of a clip and asks one question of every kind.


def drift(rng: np.random.Generator, pixels: NDArray[np.floating], label: int) -> Clip:
    """Lets a handwritten digit in coloured ink drift over a dark ground.

    Args:
        rng: makes every choice.
        pixels: the scan [8, 8], ink from 0 to 16 (scikit-learn's `load_digits`).
        label: the digit, not asked for: any frame would show it.
    """
    del label
    way = str(rng.choice(list(WAYS)))
    ground = np.asarray(draw.ground(rng).image, dtype=np.float64) * 0.35
    scan = Image.fromarray((np.asarray(pixels) * (255 / 10)).clip(0, 255).astype(np.uint8))  # a broad pen
    ink = np.zeros((SIZE, SIZE))
    ink[:24, :24] = np.asarray(scan.resize((24, 24), Image.Resampling.BILINEAR)) / 255
    row, column = (int(start) for start in rng.integers(SIZE, size=2))
    path = _path(row, column, way, rng.uniform(6, 10), np.arange(FRAMES))
    covers = np.stack([np.roll(ink, tuple(place), (0, 1)) for place in path])[..., None]
    questions = [
        Question("way", _word(rng, "Which way does the digit drift?", "Where is the digit heading?"), way),
        Question("side", _word(rng, "From which side does the digit come?", "What side is it from?"), SIDES[way]),
        Question(
            "axis",
            _word(rng, "Does the digit follow a row or a column?", "Is its track a row or a column?"),
            "column" if way in ("up", "down") else "row",
        ),
    ]
    color = np.array(COLORS[str(rng.choice(list(COLORS)))])
    return Clip((ground * (1 - covers) + color * covers).astype(np.uint8), _shuffled(rng, questions))


def lamps(rng: np.random.Generator) -> Clip:
    """Lets a light run over a panel of 8x8 lamps, a lamp a slot, one way and in mid-clip another."""
    ways = [str(way) for way in rng.permutation(list(WAYS))[:2]]
    turn = int(rng.integers(3, 5))  # steps before the turn, of seven
    steps = np.array([WAYS[ways[0]]] * turn + [WAYS[ways[1]]] * (SLOTS - 1 - turn))
    path = (rng.integers(8, size=2) + np.concatenate([[[0, 0]], np.cumsum(steps, 0)])) % 8 * 8 + 3.5
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    lamp = np.hypot(y % 8 - 3.5, x % 8 - 3.5) <= 2.5
    pixels = np.empty((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:] = np.where(lamp[..., None], (25, 85, 60), (15, 50, 35))
    color = COLORS[str(rng.choice(list(COLORS)))]
    for frame in range(FRAMES):
        gaps = abs(np.stack([y, x], -1) - path[frame // 2])
        near = np.hypot(*np.moveaxis(np.minimum(gaps, SIZE - gaps), -1, 0))
        pixels[frame, near <= 7] = color
        pixels[frame, near <= 2.5] = 255
    subject = _word(rng, "does the light", "does the lamp", "do the lights")
    questions = [
        Question("first", f"Which way {subject} run first?", ways[0]),
        Question("last", f"Which way {subject} run last?", ways[1]),
        Question("after", _word(rng, f"Which way follows {ways[0]}?", f"What is next after {ways[0]}?"), ways[1]),
        Question(
            "before",
            _word(rng, f"Which way precedes {ways[1]}?", f"What is before {ways[1]}?"),
            ways[0],
        ),
    ]
    return Clip(pixels, _shuffled(rng, questions))


def beacons(rng: np.random.Generator) -> Clip:
    """Lets the lights of two towers, left and right, shine one to three times each over a night sea."""
    colors = [str(color) for color in rng.permutation(list(COLORS))[:2]]
    counts = [int(count) for count in rng.integers(1, 4, 2)]
    sky = np.linspace(70, 20, SIZE)[:, None, None] * np.array([0.3, 0.4, 1.0]) + 5
    pixels = np.broadcast_to(sky, (FRAMES, SIZE, SIZE, 3)).astype(np.uint8)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    for place, (color, count) in enumerate(zip(colors, counts, strict=True)):
        lit = _blinks(rng, count)[np.arange(FRAMES) // 2]
        across = abs(x - 15.5 - 32 * place)
        tower = (across <= 5) & (y > 26)
        pixels[:, tower & (y // 6 % 2 == 0)] = 225
        pixels[:, tower & (y // 6 % 2 == 1)] = 130
        lantern = np.hypot(across, y - 15) <= 8
        pixels[:, lantern] = 60
        pixels[lit[:, None, None] & lantern] = COLORS[color]
    questions = [
        Question(
            side,
            _word(rng, f"How many times does the {color} tower shine?", f"How often is {color} lit?"),
            NUMBERS[count],
        )
        for side, color, count in zip(("left", "right"), colors, counts, strict=True)
    ]
    both = _word(rng, "Do both towers shine equally often?", "Are both lit the same number of times?")
    questions.append(Question("equal", both, _yes(counts[0] == counts[1])))
    if counts[0] != counts[1]:
        more = colors[int(counts[1] > counts[0])]
        questions.append(
            Question(
                "more",
                _word(rng, "Which tower shines more often?", "Which one is lit more often?"),
                more,
            )
        )
    return Clip(pixels, _shuffled(rng, questions))


def _blinks(rng: np.random.Generator, count: int) -> NDArray[np.bool_]:
    """A steady pattern over the slots [SLOTS], `count` times on, from either state into the other."""
    pause = (7, 2, 1)[count - 1]  # slots between changes
    changes = np.arange(2 * count - 1) * pause
    changes += rng.integers(SLOTS - 1 - changes[-1])  # a change after each of these slots
    return (np.searchsorted(changes, np.arange(SLOTS), side="left") + rng.integers(2)) % 2 == 1


def race(rng: np.random.Generator) -> Clip:
    """Lets two runners pass on a clay track, one fast and one slow, each to either side."""
    colors = [str(color) for color in rng.permutation(["blue", "green", "purple", "yellow"])[:2]]
    speeds = rng.permutation([rng.uniform(1.5, 3), rng.uniform(7, 10)])
    ways = [str(way) for way in rng.choice(["left", "right"], 2)]
    pixels = np.empty((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:] = (185, 95, 65)
    pixels[:, [2, 3, 31, 32, 60, 61]] = 240
    for lane, (color, speed, way) in enumerate(zip(colors, speeds, ways, strict=True)):
        path = _path(10 + 29 * lane, int(rng.integers(SIZE)), way, float(speed), np.arange(FRAMES))
        for frame, (row, column) in enumerate(path):
            columns = (column + np.arange(-5, 5)) % SIZE
            pixels[frame, row + 5 : row + 17, columns] = COLORS[color]
            pixels[frame, row - 3 : row + 4, columns[2:8]] = (35, 25, 20)
    fast, slow = colors[int(speeds.argmax())], colors[int(speeds.argmin())]
    questions = [
        Question("faster", _word(rng, "Which runner is faster?", "Who wins the race?"), fast),
        Question("slower", _word(rng, "Which runner is slower?", "Who falls behind?"), slow),
    ]
    questions += [
        Question(
            place,
            _word(rng, f"Which way does {color} run?", f"In which direction is {color} running?"),
            way,
        )
        for place, color, way in zip(("upper", "lower"), colors, ways, strict=True)
    ]
    return Clip(pixels, _shuffled(rng, questions))


DOMAINS: dict[str, Callable[[np.random.Generator], Clip]] = {"lamps": lamps, "beacons": beacons, "race": race}


def _word(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _shuffled(rng: np.random.Generator, questions: Sequence[Question]) -> list[Question]:
    return [questions[int(index)] for index in rng.permutation(len(questions))]
