"""Draws the pictures of the built-in general prompts.

    python -m mllm_keeplora.recipes.general.draw_pictures --out recipes/general/images

A picture is drawn four times as large and averaged, so that edges are smooth. Letters are Pillow's built-in
bitmap font, enlarged by whole numbers: no font file and no font renderer decides about a pixel. The same
script gives the same pixels.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mllm_keeplora.command_line import OptionParser, command

SEED = 20261127  # of the two textures and of the grain in the sunset
OVERSAMPLING = 4  # drawn pixels a side for one pixel of the picture

Rgb = tuple[int, int, int]
Point = tuple[float, float]

WHITE, BLACK, GREY, SILVER = (255, 255, 255), (20, 20, 24), (128, 130, 134), (206, 208, 212)
RED, ORANGE, YELLOW, GREEN = (214, 48, 44), (240, 140, 38), (246, 212, 62), (58, 154, 72)
BLUE, NAVY, SKY, PURPLE = (50, 100, 206), (24, 38, 92), (170, 212, 242), (128, 62, 168)
PINK, BROWN, CREAM, SAND = (240, 148, 180), (128, 82, 46), (250, 243, 224), (228, 206, 158)


class Sheet:
    """A picture while it is drawn. Lengths and places are in pixels of the finished picture, from the top left."""

    def __init__(self, width: int, height: int, ground: Rgb = WHITE) -> None:
        self.large = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), ground)
        self.pen = ImageDraw.Draw(self.large)

    def area(self, points: Sequence[Point], fill: Rgb) -> None:
        """A filled polygon."""
        self.pen.polygon([_enlarged(point) for point in points], fill=fill)

    def line(self, points: Sequence[Point], fill: Rgb, width: float = 2) -> None:
        """Straight lines from point to point."""
        self.pen.line(
            [_enlarged(point) for point in points], fill=fill, width=round(width * OVERSAMPLING), joint="curve"
        )

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Rgb | None, edge: Rgb | None = None
    ) -> None:
        """A rectangle, with an edge of two pixels where `edge` is given."""
        corners = (_enlarged((left, top)), _enlarged((right, bottom)))
        self.pen.rectangle(corners, fill=fill, outline=edge, width=2 * OVERSAMPLING)

    def oval(self, x: float, y: float, wide: float, high: float, fill: Rgb | None, edge: Rgb | None = None) -> None:
        """An ellipse around (x, y) with these half axes, with an edge of two pixels where `edge` is given."""
        corners = (_enlarged((x - wide, y - high)), _enlarged((x + wide, y + high)))
        self.pen.ellipse(corners, fill=fill, outline=edge, width=2 * OVERSAMPLING)

    def disc(self, x: float, y: float, radius: float, fill: Rgb | None, edge: Rgb | None = None) -> None:
        """A circle around (x, y)."""
        self.oval(x, y, radius, radius, fill, edge)

    def arc(self, x: float, y: float, radius: float, start: float, end: float, fill: Rgb, width: float = 3) -> None:
        """A part of a circle's edge, clockwise in degrees from the right."""
        corners = (_enlarged((x - radius, y - radius)), _enlarged((x + radius, y + radius)))
        self.pen.arc(corners, start, end, fill=fill, width=round(width * OVERSAMPLING))

    def slice(self, x: float, y: float, radius: float, start: float, end: float, fill: Rgb) -> None:
        """A filled part of a circle, clockwise in degrees from the right."""
        corners = (_enlarged((x - radius, y - radius)), _enlarged((x + radius, y + radius)))
        self.pen.pieslice(corners, start, end, fill=fill)

    def word(self, x: float, y: float, text: str, fill: Rgb = BLACK, size: float = 2, left: bool = False) -> None:
        """Text around (x, y), or to the right of it; letters are 6 x 11 pixels times `size`."""
        font = ImageFont.load_default_imagefont()
        wide, high = 6 * len(text) + 1, 11
        letters = Image.new("L", (wide, high))
        ImageDraw.Draw(letters).text((-5, 0), f" {text}", fill=255, font=font)  # a first letter's serif lies left of it
        factor = round(size * OVERSAMPLING)
        mask = letters.resize((wide * factor, high * factor), Image.Resampling.NEAREST)
        column, row = _enlarged((x, y))
        self.large.paste(fill, (column - (0 if left else mask.width // 2), row - mask.height // 2), mask)

    def finished(self) -> Image.Image:
        """The picture in its own size."""
        return self.large.reduce(OVERSAMPLING)


def _enlarged(point: Point) -> tuple[int, int]:
    return round(point[0] * OVERSAMPLING), round(point[1] * OVERSAMPLING)


def _around(x: float, y: float, radius: float, degrees: float) -> Point:
    """A point on a circle; 0 degrees is up, and they grow clockwise."""
    angle = math.radians(degrees)
    return x + radius * math.sin(angle), y - radius * math.cos(angle)


def _star(x: float, y: float, radius: float, points: int = 5) -> list[Point]:
    return [_around(x, y, radius if k % 2 == 0 else radius * 0.42, 180 * k / points) for k in range(2 * points)]


def three_shapes() -> Image.Image:
    """A red circle, a blue square and a green triangle in a row."""
    sheet = Sheet(216, 96)
    sheet.disc(42, 48, 28, RED)
    sheet.box(82, 22, 134, 74, BLUE)
    sheet.area([(180, 18), (208, 74), (152, 74)], GREEN)
    return sheet.finished()


def shape_grid() -> Image.Image:
    """Nine places in three rows; the one in the middle is empty, the one below it a purple ring."""
    sheet = Sheet(168, 168, CREAM)
    sheet.box(14, 14, 50, 50, ORANGE)
    sheet.area(_star(84, 34, 22), BLUE)
    sheet.disc(136, 32, 19, GREEN)
    sheet.area([(32, 64), (52, 102), (12, 102)], RED)
    sheet.area([(136, 62), (156, 84), (136, 106), (116, 84)], BLACK)
    sheet.disc(32, 136, 19, ORANGE)
    sheet.disc(84, 136, 20, PURPLE)
    sheet.disc(84, 136, 11, CREAM)
    sheet.area(_star(136, 136, 22), RED)
    return sheet.finished()


def three_sizes() -> Image.Image:
    """Circles that grow from left to right: yellow, orange, purple."""
    sheet = Sheet(200, 104, SILVER)
    sheet.disc(24, 52, 10, YELLOW)
    sheet.disc(74, 52, 24, ORANGE)
    sheet.disc(150, 52, 42, PURPLE)
    return sheet.finished()


def overlap() -> Image.Image:
    """A blue circle that hides a corner of a pink square."""
    sheet = Sheet(128, 128)
    sheet.box(18, 18, 84, 84, PINK)
    sheet.disc(80, 80, 34, BLUE)
    return sheet.finished()


def ladybird() -> Image.Image:
    """A ladybird with seven spots on a leaf."""
    sheet = Sheet(144, 128, SKY)
    sheet.oval(72, 70, 68, 50, GREEN)
    sheet.line([(4, 70), (140, 70)], (40, 112, 52), 2)
    sheet.disc(72, 36, 14, BLACK)
    sheet.disc(72, 72, 34, RED)
    sheet.line([(72, 38), (72, 106)], BLACK, 2)
    for x, y in ((72, 48), (54, 60), (90, 60), (50, 80), (94, 80), (62, 96), (82, 96)):
        sheet.disc(x, y, 5, BLACK)
    return sheet.finished()


def flag() -> Image.Image:
    """A flag of no country: purple, white, purple, with a yellow star in the middle."""
    sheet = Sheet(176, 120, SKY)
    sheet.box(14, 6, 20, 119, BROWN)
    for top, color in ((10, PURPLE), (38, WHITE), (66, PURPLE)):
        sheet.box(20, top, 164, top + 27, color)
    sheet.area(_star(92, 53, 17), YELLOW)
    return sheet.finished()


def house() -> Image.Image:
    """A house with a red roof, a blue door and two windows; a tree on its left, the sun at the top right."""
    sheet = Sheet(192, 160, SKY)
    sheet.box(0, 126, 192, 160, GREEN)
    sheet.disc(166, 26, 16, YELLOW)
    sheet.box(74, 72, 150, 134, CREAM)
    sheet.area([(66, 74), (112, 34), (158, 74)], RED)
    sheet.box(102, 98, 122, 134, BLUE)
    sheet.disc(118, 117, 2, YELLOW)
    for left in (80, 128):
        sheet.box(left, 84, left + 16, 102, SKY, NAVY)
    sheet.box(29, 96, 39, 136, BROWN)
    sheet.disc(34, 78, 25, (38, 124, 56))
    return sheet.finished()


def apple_tree() -> Image.Image:
    """A tree with five red apples, two more in the grass, and a ladder against its stem."""
    sheet = Sheet(160, 176, SKY)
    sheet.box(0, 146, 160, 176, (112, 176, 74))
    sheet.box(72, 92, 90, 154, BROWN)
    for x, y, radius in ((81, 52, 40), (50, 66, 28), (112, 66, 28)):
        sheet.disc(x, y, radius, (46, 132, 60))
    for x, y in ((50, 62), (74, 34), (96, 48), (118, 70), (78, 72), (40, 158), (124, 162)):
        sheet.disc(x, y, 6, RED)
    sheet.line([(108, 156), (94, 96)], SAND, 3)
    sheet.line([(122, 154), (106, 92)], SAND, 3)
    for step in range(5):
        sheet.line([(107 - 3 * step, 148 - 12 * step), (120 - 3 * step, 146 - 12 * step)], SAND, 3)
    return sheet.finished()


def sailing_boat() -> Image.Image:
    """A boat with a white sail and a red flag on the sea, and three birds."""
    sheet = Sheet(192, 144, SKY)
    sheet.box(0, 96, 192, 144, BLUE)
    sheet.area([(52, 88), (142, 88), (124, 112), (70, 112)], BROWN)
    sheet.line([(96, 90), (96, 20)], BLACK, 3)
    sheet.area([(100, 26), (138, 80), (100, 80)], WHITE)
    sheet.area([(95, 18), (95, 30), (78, 24)], RED)
    for x, y in ((30, 30), (50, 44), (166, 24)):
        sheet.arc(x - 6, y, 6, 200, 350, BLACK, 1.5)
        sheet.arc(x + 6, y, 6, 190, 340, BLACK, 1.5)
    for x, y in ((14, 122), (150, 118), (102, 132)):
        sheet.line([(x, y), (x + 26, y)], SKY, 2)
    return sheet.finished()


def car() -> Image.Image:
    """A yellow car on a grey road, seen from the side, a lamp post behind it."""
    sheet = Sheet(208, 112, (232, 240, 246))
    sheet.box(0, 84, 208, 112, GREY)
    for left in range(6, 208, 40):
        sheet.box(left, 98, left + 20, 101, WHITE)
    sheet.box(174, 14, 178, 84, BLACK)
    sheet.box(158, 10, 178, 16, BLACK)
    sheet.area([(64, 52), (80, 26), (122, 26), (142, 52)], YELLOW)
    sheet.box(40, 50, 162, 78, YELLOW)
    sheet.area([(72, 50), (84, 31), (99, 31), (99, 50)], SKY)
    sheet.area([(104, 50), (104, 31), (119, 31), (132, 50)], SKY)
    for x in (68, 136):
        sheet.disc(x, 79, 13, BLACK)
        sheet.disc(x, 79, 5, SILVER)
    return sheet.finished()


def glad_face() -> Image.Image:
    """A smiling round face with glasses."""
    sheet = Sheet(128, 128, (214, 236, 214))
    sheet.disc(64, 64, 50, YELLOW, BLACK)
    for x in (45, 83):
        sheet.disc(x, 54, 4, BLACK)
        sheet.disc(x, 54, 14, None, BLACK)
    sheet.line([(58, 54), (70, 54)], BLACK, 2)
    sheet.arc(64, 66, 28, 25, 155, BLACK, 4)
    return sheet.finished()


def sad_face() -> Image.Image:
    """A sad face with a tear and a green hat."""
    sheet = Sheet(128, 144, CREAM)
    sheet.disc(64, 84, 46, (240, 200, 160), BLACK)
    sheet.box(36, 12, 92, 44, GREEN)
    sheet.box(20, 42, 108, 50, GREEN)
    for x in (48, 80):
        sheet.disc(x, 76, 5, BLACK)
    sheet.arc(64, 122, 22, 220, 320, BLACK, 4)
    sheet.area([(48, 86), (54, 100), (42, 100)], BLUE)
    sheet.disc(48, 101, 6, BLUE)
    return sheet.finished()


def cat() -> Image.Image:
    """The face of an orange cat with green eyes."""
    sheet = Sheet(136, 128, (226, 220, 240))
    for side in (-1, 1):
        sheet.area([(68 + side * 46, 14), (68 + side * 46, 60), (68 + side * 10, 36)], ORANGE)
        sheet.area([(68 + side * 41, 25), (68 + side * 41, 48), (68 + side * 22, 38)], PINK)
    sheet.oval(68, 74, 48, 42, ORANGE)
    for side in (-1, 1):
        sheet.oval(68 + side * 20, 66, 9, 11, GREEN)
        sheet.oval(68 + side * 20, 66, 3, 9, BLACK)
        sheet.arc(68 + side * 8, 88, 8, 10, 170, BLACK, 2)
        for tilt in (-6, 2, 10):
            sheet.line([(68 + side * 18, 86), (68 + side * 60, 84 + tilt)], BLACK, 1)
    sheet.area([(61, 80), (75, 80), (68, 88)], PINK)
    return sheet.finished()


def _fish(sheet: Sheet, x: float, y: float, way: int, color: Rgb) -> None:
    sheet.area([(x - way * 14, y), (x - way * 30, y - 11), (x - way * 30, y + 11)], color)
    sheet.oval(x, y, 20, 11, color)
    sheet.disc(x + way * 11, y - 3, 2.5, BLACK)


def fish() -> Image.Image:
    """Two orange fish swim left and a white one swims right; a plant grows at the right edge."""
    sheet = Sheet(184, 128, (86, 164, 216))
    sheet.box(0, 112, 184, 128, SAND)
    _fish(sheet, 52, 30, -1, ORANGE)
    _fish(sheet, 116, 56, -1, ORANGE)
    _fish(sheet, 60, 88, 1, WHITE)
    for x, top in ((152, 62), (160, 48), (168, 70)):
        sheet.line([(x, 114), (x - 5, (114 + top) / 2), (x + 2, top)], GREEN, 4)
    for y, radius in ((82, 3), (68, 4), (52, 5)):
        sheet.disc(92, y, radius, None, WHITE)
    return sheet.finished()


def _dial(hour: float, minute: float, rim: Rgb) -> Image.Image:
    sheet = Sheet(144, 144, CREAM)
    sheet.disc(72, 72, 66, rim)
    sheet.disc(72, 72, 59, WHITE)
    for number in range(1, 13):
        x, y = _around(72, 72, 46, 30 * number)
        sheet.word(x, y, str(number), size=1.5)
    sheet.line([(72, 72), _around(72, 72, 26, 30 * hour + minute / 2)], BLACK, 5)
    sheet.line([(72, 72), _around(72, 72, 40, 6 * minute)], RED, 3)
    sheet.disc(72, 72, 4, BLACK)
    return sheet.finished()


def clock_four() -> Image.Image:
    """A wall clock at four o'clock."""
    return _dial(4, 0, NAVY)


def clock_half_past_nine() -> Image.Image:
    """A wall clock at half past nine."""
    return _dial(9, 30, GREEN)


def alarm_clock() -> Image.Image:
    """A digital alarm clock: 07:45, Tuesday."""
    sheet = Sheet(176, 104, SAND)
    sheet.box(14, 14, 162, 90, (60, 62, 70))
    sheet.box(22, 22, 154, 82, BLACK)
    sheet.word(88, 46, "07:45", (120, 240, 130), 4)
    sheet.word(132, 73, "TUE", (120, 240, 130), 1.25)
    sheet.box(30, 90, 46, 98, (60, 62, 70))
    sheet.box(130, 90, 146, 98, (60, 62, 70))
    return sheet.finished()


def slow_sign() -> Image.Image:
    """A yellow road sign that says SLOW."""
    sheet = Sheet(128, 160, SKY)
    sheet.box(0, 144, 128, 160, GREEN)
    sheet.box(61, 96, 67, 150, GREY)
    sheet.area([(64, 6), (122, 64), (64, 122), (6, 64)], BLACK)
    sheet.area([(64, 12), (116, 64), (64, 116), (12, 64)], YELLOW)
    sheet.word(64, 65, "SLOW", BLACK, 3)
    return sheet.finished()


def shop_sign() -> Image.Image:
    """The sign of a bakery: open from 7 to 13, on Sundays closed."""
    sheet = Sheet(208, 128, BROWN)
    sheet.box(8, 8, 200, 120, CREAM)
    sheet.word(104, 30, "Anna's Bakery", RED, 2.25)
    sheet.line([(24, 48), (184, 48)], BROWN, 2)
    sheet.word(104, 68, "OPEN 7 - 13", BLACK, 2)
    sheet.word(104, 98, "Sunday: closed", BLACK, 1.75)
    return sheet.finished()


def shopping_list() -> Image.Image:
    """A note: milk, 6 eggs, bread, 2 lemons and soap; bread is ticked off."""
    sheet = Sheet(136, 176, (252, 246, 170))
    sheet.word(68, 18, "To buy", RED, 2)
    for index, item in enumerate(("milk", "6 eggs", "bread", "2 lemons", "soap")):
        y = 48 + 26 * index
        sheet.box(12, y - 7, 26, y + 7, WHITE, BLACK)
        sheet.word(34, y, item, NAVY, 2, left=True)
    sheet.line([(14, 98), (19, 104), (30, 90)], GREEN, 3)
    return sheet.finished()


def score_table() -> Image.Image:
    """Points of three players in two rounds."""
    sheet = Sheet(216, 132)
    sheet.box(0, 0, 216, 33, SILVER)
    rows = (("Name", "R1", "R2"), ("Mia", "12", "9"), ("Tom", "7", "15"), ("Lena", "10", "11"))
    for index, row in enumerate(rows):
        for x, cell in zip((14, 110, 166), row, strict=True):
            sheet.word(x, 17 + 33 * index, cell, BLACK, 2, left=True)
    for y in (33, 66, 99):
        sheet.line([(0, y), (216, y)], GREY, 1)
    for x in (96, 152):
        sheet.line([(x, 0), (x, 132)], GREY, 1)
    return sheet.finished()


def visitors_chart() -> Image.Image:
    """Bars: visitors of a museum, 20 on Monday, 35, 15, 50 and 40 on Friday."""
    sheet = Sheet(216, 168)
    sheet.word(112, 12, "Museum visitors", BLACK, 1.5)
    for value in range(0, 51, 10):
        y = 144 - 2.2 * value
        sheet.line([(30, y), (210, y)], SILVER, 1)
        sheet.word(16, y, str(value), GREY, 1)
    for index, (day, value) in enumerate((("Mon", 20), ("Tue", 35), ("Wed", 15), ("Thu", 50), ("Fri", 40))):
        left = 38 + 35 * index
        sheet.box(left, 144 - 2.2 * value, left + 24, 144, BLUE)
        sheet.word(left + 12, 156, day, BLACK, 1.25)
    return sheet.finished()


def pet_pie() -> Image.Image:
    """A pie chart of pets: half are dogs, a quarter cats, a quarter birds."""
    sheet = Sheet(192, 136)
    sheet.slice(68, 68, 58, 270, 450, ORANGE)
    sheet.slice(68, 68, 58, 90, 180, BLUE)
    sheet.slice(68, 68, 58, 180, 270, GREEN)
    for y, color, name in ((44, ORANGE, "dogs"), (68, BLUE, "cats"), (92, GREEN, "birds")):
        sheet.box(136, y - 6, 148, y + 6, color)
        sheet.word(154, y, name, BLACK, 1.25, left=True)
    return sheet.finished()


def temperature_line() -> Image.Image:
    """A line chart: the temperature of a day rises from 8 degrees at 6 h to 20 at 15 h and falls to 11 at 21 h."""
    sheet = Sheet(216, 152)
    sheet.word(108, 12, "Temperature (C)", BLACK, 1.5)
    for value in (5, 10, 15, 20):
        sheet.line([(32, 148 - 6 * value), (208, 148 - 6 * value)], SILVER, 1)
        sheet.word(18, 148 - 6 * value, str(value), GREY, 1)
    points = [(44 + 30 * k, 148 - 6 * value) for k, value in enumerate((8, 12, 17, 20, 16, 11))]
    sheet.line(points, RED, 2.5)
    for k, (x, y) in enumerate(points):
        sheet.disc(x, y, 4, RED)
        sheet.word(x, 138, f"{6 + 3 * k}h", BLACK, 1.25)
    return sheet.finished()


def village_map() -> Image.Image:
    """A map: a river from north to south, a school in the west, a park in the east, a bridge between them."""
    sheet = Sheet(216, 176, (236, 238, 222))
    sheet.line([(112, 0), (104, 50), (116, 100), (106, 176)], (110, 170, 226), 18)
    sheet.line([(0, 96), (216, 96)], SAND, 12)
    sheet.box(94, 88, 128, 104, BROWN)
    sheet.word(111, 76, "bridge", BLACK, 1)
    sheet.box(20, 34, 68, 68, RED)
    sheet.word(44, 51, "School", WHITE, 1.25)
    sheet.box(144, 116, 206, 164, (120, 190, 100))
    sheet.word(175, 140, "Park", BLACK, 1.5)
    sheet.box(150, 44, 186, 72, PURPLE)
    sheet.word(168, 58, "Shop", WHITE, 1.25)
    sheet.area([(26, 118), (34, 138), (26, 133), (18, 138)], BLACK)
    sheet.word(26, 148, "N", BLACK, 1.5)
    return sheet.finished()


def tram_lines() -> Image.Image:
    """Two tram lines that cross at Market: red from Zoo to Harbour, blue from Airport to Castle."""
    sheet = Sheet(216, 160)
    sheet.line([(20, 80), (196, 80)], RED, 5)
    sheet.line([(108, 20), (108, 140)], BLUE, 5)
    stops = (
        ((20, 80), (22, 98), "Zoo"), ((64, 80), (62, 66), "Mill"), ((108, 80), (136, 66), "Market"),
        ((196, 80), (186, 98), "Harbour"), ((108, 20), (144, 18), "Airport"), ((108, 140), (142, 142), "Castle"),
    )  # fmt: skip
    for (x, y), (column, row), name in stops:
        sheet.disc(x, y, 7, WHITE, BLACK)
        sheet.word(column, row, name, BLACK, 1.25)
    return sheet.finished()


def _mixed(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _grained(rows: Sequence[Sequence[Rgb]], strength: int, rng: random.Random) -> Image.Image:
    """Pixels row by row, each lighter or darker by up to `strength` steps of 255."""
    image = Image.new("RGB", (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, color in enumerate(row):
            shift = rng.randint(-strength, strength)
            red, green, blue = (min(255, max(0, value + shift)) for value in color)
            image.putpixel((x, y), (red, green, blue))
    return image


def sunset() -> Image.Image:
    """A sunset over the sea, without hard edges: violet to orange sky, a pale sun, its light on dark water."""
    rows = []
    for y in range(96):
        row = []
        for x in range(144):
            distance = math.hypot(x - 92, y - 52)
            if y < 60:
                color = _mixed((92, 62, 132), (250, 156, 70), y / 60)
                color = _mixed((255, 240, 190), color, min(1.0, max(0.0, distance - 10) / 26))
            else:
                color = _mixed((110, 66, 86), (24, 30, 64), (y - 60) / 36)
                color = _mixed((250, 190, 120), color, min(1.0, 0.35 + abs(x - 92) / 18))
            row.append(color)
        rows.append(row)
    return _grained(rows, 1, random.Random(SEED))


def wood() -> Image.Image:
    """Planks of light brown wood, seen from near: a texture."""
    rng = random.Random(SEED + 1)
    rows = []
    for y in range(96):
        joint = y % 32 == 0
        tone = 0.5 + 0.3 * math.sin(y * 1.3) + 0.2 * math.sin(y * 0.37 + y // 32)
        row = []
        for x in range(96):
            wave = 0.15 * math.sin(x * 0.06 + y * 0.9)
            color = _mixed((164, 112, 62), (206, 156, 98), min(1.0, max(0.0, tone + wave)))
            row.append((70, 44, 22) if joint else color)
        rows.append(row)
    return _grained(rows, 2, rng)


def meadow() -> Image.Image:
    """Grass from above with a few white daisies: a texture."""
    rng = random.Random(SEED + 2)
    sheet = Sheet(112, 112, (70, 138, 58))
    for _ in range(420):
        x, y = rng.randint(0, 112), rng.randint(0, 112)
        green = rng.choice(((54, 116, 46), (92, 164, 72), (110, 178, 84)))
        sheet.line([(x, y), (x + rng.randint(-4, 4), y - rng.randint(5, 11))], green, 1)
    for x, y in ((24, 30), (78, 22), (52, 64), (92, 82), (20, 92)):
        for petal in range(6):
            sheet.disc(*_around(x, y, 5, 60 * petal), 3, WHITE)
        sheet.disc(x, y, 3, YELLOW)
    return sheet.finished()


def board() -> Image.Image:
    """A board of four by four squares, black and white, with one red piece in the top right square."""
    sheet = Sheet(132, 132, BROWN)
    for index in range(16):
        row, column = divmod(index, 4)
        left, top = 6 + 30 * column, 6 + 30 * row
        sheet.box(left, top, left + 30, top + 30, WHITE if (row + column) % 2 == 0 else BLACK)
    sheet.disc(111, 21, 11, RED)
    return sheet.finished()


def dice() -> Image.Image:
    """Two dice: three on the left, five on the right."""
    sheet = Sheet(176, 96, (34, 110, 70))
    for left, spots in ((16, ((-1, -1), (0, 0), (1, 1))), (96, ((-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)))):
        sheet.box(left, 16, left + 64, 80, WHITE)
        for column, row in spots:
            sheet.disc(left + 32 + 18 * column, 48 + 18 * row, 6, BLACK)
    return sheet.finished()


def traffic_light() -> Image.Image:
    """A traffic light whose red lamp, the top one, is lit."""
    sheet = Sheet(96, 176, SKY)
    sheet.box(44, 130, 52, 176, GREY)
    sheet.box(24, 8, 72, 136, BLACK)
    sheet.disc(48, 30, 17, (255, 60, 50))
    sheet.disc(48, 72, 17, (70, 62, 24))
    sheet.disc(48, 114, 17, (22, 62, 32))
    return sheet.finished()


def thermometer() -> Image.Image:
    """A thermometer at 30 degrees, on a scale from 0 to 40."""
    sheet = Sheet(96, 192)
    sheet.box(34, 10, 54, 160, SILVER)
    sheet.disc(44, 166, 18, RED)
    sheet.box(39, 52, 49, 160, RED)
    for index, value in enumerate((0, 10, 20, 30, 40)):
        y = 142 - 30 * index
        sheet.line([(56, y), (64, y)], BLACK, 2)
        sheet.word(69, y, str(value), BLACK, 1.5, left=True)
    return sheet.finished()


def balloons() -> Image.Image:
    """Four balloons, red, yellow, green and purple; the green one flies off, its string cut."""
    sheet = Sheet(160, 176, (226, 240, 250))
    for x, y, color in ((40, 62, RED), (76, 50, YELLOW), (110, 66, PURPLE)):
        sheet.line([(x, y + 22), (78, 164)], GREY, 1.5)
        sheet.oval(x, y, 18, 23, color)
    sheet.line([(138, 46), (142, 62), (136, 76)], GREY, 1.5)
    sheet.oval(138, 24, 17, 21, GREEN)
    return sheet.finished()


def coffee() -> Image.Image:
    """A blue cup of steaming coffee on a table, a spoon on its right."""
    sheet = Sheet(160, 128, CREAM)
    sheet.box(0, 96, 160, 128, BROWN)
    sheet.disc(100, 68, 17, None, BLUE)
    sheet.disc(100, 68, 15, None, BLUE)
    sheet.area([(42, 44), (98, 44), (88, 100), (52, 100)], BLUE)
    sheet.oval(70, 44, 28, 7, (92, 52, 26))
    for x in (58, 70, 82):
        sheet.line([(x, 34), (x + 4, 26), (x - 2, 18), (x + 3, 9)], SILVER, 2)
    sheet.line([(122, 112), (146, 108)], SILVER, 4)
    sheet.oval(120, 112, 8, 5, SILVER)
    return sheet.finished()


def fruit_bowl() -> Image.Image:
    """A bowl with a red apple, a banana, and an orange."""
    sheet = Sheet(176, 120, (238, 232, 246))
    sheet.box(0, 98, 176, 120, SAND)
    sheet.disc(56, 50, 20, RED)
    sheet.line([(56, 32), (59, 22)], BROWN, 3)
    sheet.disc(122, 52, 20, ORANGE)
    sheet.arc(90, 12, 46, 50, 130, YELLOW, 13)
    sheet.slice(88, 54, 58, 0, 180, (70, 130, 150))
    sheet.box(62, 104, 114, 112, (70, 130, 150))
    return sheet.finished()


def snowman() -> Image.Image:
    """A snowman with a black hat, a carrot for a nose and three buttons; it snows."""
    sheet = Sheet(136, 184, (118, 150, 190))
    sheet.box(0, 164, 136, 184, WHITE)
    sheet.disc(68, 134, 40, WHITE)
    sheet.disc(68, 74, 28, WHITE)
    sheet.box(48, 16, 88, 46, BLACK)
    sheet.box(36, 44, 100, 50, BLACK)
    for x in (58, 78):
        sheet.disc(x, 66, 3, BLACK)
    sheet.area([(66, 72), (66, 80), (94, 78)], ORANGE)
    for y in (114, 132, 150):
        sheet.disc(68, y, 4, RED)
    for x, y in ((14, 24), (118, 18), (24, 70), (112, 84), (16, 120), (122, 130), (106, 48)):
        sheet.disc(x, y, 3, WHITE)
    return sheet.finished()


def rain() -> Image.Image:
    """Rain from a dark cloud on a red umbrella."""
    sheet = Sheet(144, 152, (198, 208, 218))
    for x, y, radius in ((48, 34, 20), (74, 26, 24), (100, 36, 18)):
        sheet.disc(x, y, radius, (92, 98, 110))
    sheet.box(48, 34, 100, 54, (92, 98, 110))
    for x, y in ((22, 76), (36, 62), (54, 70), (74, 62), (94, 70), (112, 62), (124, 80), (16, 104), (130, 110)):
        sheet.line([(x, y), (x - 4, y + 10)], BLUE, 2)
    sheet.slice(72, 122, 42, 180, 360, RED)
    sheet.line([(72, 120), (72, 142)], BLACK, 3)
    sheet.arc(66, 142, 6, 0, 180, BLACK, 3)
    return sheet.finished()


def books() -> Image.Image:
    """Four books in a pile, from the top: yellow, blue, red, green; the red one is the thickest."""
    sheet = Sheet(168, 128, CREAM)
    sheet.box(0, 112, 168, 128, BROWN)
    pile = ((52, 20, 128, 36, YELLOW), (38, 37, 132, 52, BLUE), (30, 53, 140, 88, RED), (24, 89, 146, 111, GREEN))
    for left, top, right, bottom, color in pile:
        sheet.box(left, top, right, bottom, color)
        sheet.box(right - 14, top + 3, right, bottom - 3, WHITE)
    sheet.word(78, 71, "ATLAS", WHITE, 1.75)
    return sheet.finished()


def arrows() -> Image.Image:
    """A signpost: Beach to the left, 2 km; Station to the right, 5 km."""
    sheet = Sheet(208, 152, SKY)
    sheet.box(0, 132, 208, 152, GREEN)
    sheet.box(99, 10, 109, 140, BROWN)
    sheet.area([(10, 38), (30, 20), (150, 20), (150, 56), (30, 56)], WHITE)
    sheet.word(92, 38, "Beach 2 km", BLACK, 1.75)
    sheet.area([(200, 88), (180, 70), (46, 70), (46, 106), (180, 106)], WHITE)
    sheet.word(116, 88, "Station 5 km", BLACK, 1.75)
    return sheet.finished()


def blackboard() -> Image.Image:
    """A sum on a blackboard: 18 + 24 = ?"""
    sheet = Sheet(184, 104, BROWN)
    sheet.box(7, 7, 177, 97, (34, 72, 58))
    sheet.word(92, 48, "18 + 24 = ?", WHITE, 2.25)
    sheet.box(120, 84, 140, 88, WHITE)
    return sheet.finished()


def night() -> Image.Image:
    """Two snowy mountains at night under a crescent moon on the left and six stars."""
    sheet = Sheet(200, 136, NAVY)
    sheet.disc(40, 34, 18, CREAM)
    sheet.disc(48, 30, 16, NAVY)
    for x, y in ((84, 20), (112, 40), (136, 16), (160, 46), (182, 22), (76, 52)):
        sheet.area(_star(x, y, 5, 4), WHITE)
    sheet.area([(0, 136), (64, 60), (126, 136)], (92, 96, 116))
    sheet.area([(64, 60), (48, 79), (60, 76), (68, 84), (80, 79)], WHITE)
    sheet.area([(86, 136), (150, 72), (200, 120), (200, 136)], (70, 74, 96))
    sheet.area([(150, 72), (136, 86), (148, 84), (158, 90), (166, 87)], WHITE)
    return sheet.finished()


def cake() -> Image.Image:
    """A pink birthday cake with six candles; the second from the right is out."""
    sheet = Sheet(176, 136, (220, 232, 246))
    sheet.oval(88, 114, 78, 14, WHITE)
    sheet.box(32, 66, 144, 112, PINK)
    sheet.box(32, 84, 144, 92, WHITE)
    for index in range(6):
        x = 43 + 18 * index
        sheet.box(x - 3, 38, x + 3, 66, BLUE)
        if index != 4:
            sheet.oval(x, 29, 4, 8, ORANGE)
    return sheet.finished()


def flower() -> Image.Image:
    """A flower with eight pink petals in a brown pot."""
    sheet = Sheet(120, 168, (240, 246, 236))
    sheet.line([(60, 60), (60, 130)], GREEN, 5)
    sheet.oval(76, 100, 16, 6, GREEN)
    for petal in range(8):
        sheet.disc(*_around(60, 50, 24, 45 * petal), 11, PINK)
    sheet.disc(60, 50, 15, YELLOW)
    sheet.area([(36, 128), (84, 128), (76, 162), (44, 162)], BROWN)
    return sheet.finished()


def code_window() -> Image.Image:
    """A window with three lines of Python that print 5."""
    sheet = Sheet(200, 112, (36, 40, 52))
    sheet.box(0, 0, 200, 18, (70, 76, 92))
    for x, color in ((12, RED), (28, YELLOW), (44, GREEN)):
        sheet.disc(x, 9, 5, color)
    for index, text in enumerate(("a = 2", "b = 3", "print(a + b)")):
        sheet.word(14, 38 + 26 * index, text, (200, 230, 180), 2, left=True)
    return sheet.finished()


def receipt() -> Image.Image:
    """A receipt: tea 2.50, soup 4.00, cake 3.00, together 9.50."""
    sheet = Sheet(152, 168, SILVER)
    sheet.box(8, 6, 144, 162, WHITE)
    sheet.word(76, 22, "CAFE LUNA", BLACK, 1.75)
    rows = ((52, "Tea", "2.50"), (76, "Soup", "4.00"), (100, "Cake", "3.00"), (136, "TOTAL", "9.50"))
    for y, name, price in rows:
        sheet.word(18, y, name, BLACK, 1.75, left=True)
        sheet.word(92, y, price, BLACK, 1.75, left=True)
    sheet.line([(16, 117), (136, 117)], BLACK, 1.5)
    return sheet.finished()


def plain_grey() -> Image.Image:
    """Nothing but grey."""
    return Sheet(96, 96, GREY).finished()


DRAWINGS: tuple[Callable[[], Image.Image], ...] = (
    three_shapes, shape_grid, three_sizes, overlap, ladybird, flag, house, apple_tree, sailing_boat, car, glad_face,
    sad_face, cat, fish, clock_four, clock_half_past_nine, alarm_clock, slow_sign, shop_sign, shopping_list,
    score_table, visitors_chart, pet_pie, temperature_line, village_map, tram_lines, sunset, wood, meadow, board, dice,
    traffic_light, thermometer, balloons, coffee, fruit_bowl, snowman, rain, books, arrows, blackboard, night, cake,
    flower, code_window, receipt, plain_grey,
)  # fmt: skip


def main() -> None:
    """Writes every picture as `<out>/<name>.png`."""
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, __doc__)
        parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
        out = parser.read(sys.argv[1:]).out
        out.mkdir(parents=True, exist_ok=True)
        for drawing in DRAWINGS:
            drawing().save(out / f"{drawing.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
