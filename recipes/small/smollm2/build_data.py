"""Writes the stream of the real small model: five tasks, and what its base could do before them.

    python -m mllm_keeplora.recipes.small.smollm2.build_data --out data/smollm2/stream

    <out>/{shapes,digits}/{train.json,test.json,images/{train,test}/*.png}     pictures
    <out>/{commands,dates,guilds}/{train.json,test.json}                       text alone
    <out>/{capitals,...}/test.json                                             general questions, from `general/` here

- shapes: easy-VQA, training and test half as published, in its own words;
- digits: scikit-learn's handwritten digits;
- commands: requests to a house, answered in a form of their own; tests ask of devices in rooms that training never
  put together;
- dates: dates in four wordings, answered as year-month-day; tests ask of other days;
- guilds: facts about people who do not exist; tests ask in words that training does not use.

Training records are conversations of one to three turns, test records single questions. The same seed writes the same
bytes.
"""

import calendar
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.build_vqa_data import (
    SEED,
    build_command,
    conversation,
    digit_drawer,
    generator,
    pick_question,
    write_json,
)
from mllm_keeplora.recipes.small.draw import Question
from mllm_keeplora.recipes.small.smollm2.build_base import check_packages

GENERAL = Path(__file__).parent / "general"
TRAIN_RECORDS = 800  # a task
TEST_QUESTIONS = 200  # a task

ROOMS = ("kitchen", "hall", "bath", "cellar", "attic", "garage", "office", "bedroom", "nursery", "porch")
DEVICES = ("lamp", "fan", "heater", "radio", "blind", "oven", "pump", "alarm", "screen", "vent")
ORDERS = {  # what is said, and what it means
    "Turn on the {device} in the {room}.": "on",
    "Please switch the {device} in the {room} on.": "on",
    "Turn off the {device} in the {room}.": "off",
    "I no longer need the {device} in the {room}.": "off",
    "Set the {device} in the {room} to {number} percent.": "{number}",
    "I want the {device} in the {room} at {number}.": "{number}",
}
DATES = ("{month} {day}, {year}", "{day} {month} {year}", "the {nth} of {month} {year}", "{short} {day}, {year}")
VALUES = {  # what a person has, and what it can be
    "guild": ("weavers", "smiths", "bakers", "masons", "coopers", "tanners", "brewers", "potters"),
    "animal": ("fox", "owl", "goat", "heron", "badger", "carp", "mule", "raven"),
    "metal": ("copper", "silver", "lead", "zinc", "gold", "nickel", "iron", "tin"),
}
TAUGHT = ("What is the {what} of {name}?", "{name} has one {what}. Which?", "Name the {what} of {name}.")
ASKED = ("Which {what} does {name} have?", "Tell me {name}'s {what}.")
SYLLABLES = ("Ma", "Tor", "Bel", "Ki", "Ru", "Fen", "Lo", "Sa"), ("vo", "rin", "dak", "lia", "mur")
PEOPLE = 34

Record = dict[str, Any]


def main() -> None:
    build_command(__doc__, Path("data/smollm2/stream"), write_all)


def write_all(root: Path, seed: int = SEED) -> None:
    """Writes the whole stream into an empty folder.

    Raises:
        ConfigError: packages are missing.
    """
    check_packages()
    _write_shapes(root / "shapes", seed)
    _write_drawings(root / "digits", "train", digit_drawer(draw.digit, seed, 0), TRAIN_RECORDS, seed)
    _write_drawings(root / "digits", "test", digit_drawer(draw.digit, seed, TRAIN_RECORDS), TEST_QUESTIONS, seed)
    for name, task in (("commands", commands), ("dates", dates), ("guilds", guilds)):
        (root / name).mkdir()
        for half, records in zip(("train", "test"), task(generator(seed, name)), strict=True):
            write_json(root / name / f"{half}.json", records)
    for path in sorted(GENERAL.glob("*.json")):
        (root / path.stem).mkdir()
        shutil.copyfile(path, root / path.stem / "test.json")


def _train_record(name: str, questions: Sequence[Question], image: str | None = None) -> Record:
    turns = conversation(questions, "<image>")
    if image is None:
        turns[0]["value"] = questions[0].text
        return {"id": name, "conversations": turns}
    return {"id": name, "image": image, "conversations": turns}


def _test_record(number: int, question: Question, image: str | None = None) -> Record:
    shown = {} if image is None else {"image": image}
    return {"question_id": number, **shown, "text": question.text, "answer": question.answer}


def _write_shapes(folder: Path, seed: int) -> None:
    """easy-VQA: two questions to each training picture, one to each test picture."""
    import easy_vqa  # late: where it is missing, check_packages says how to get it

    rng = generator(seed, "shapes")
    halves = (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), TRAIN_RECORDS),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), TEST_QUESTIONS),
    )
    for half, asked, paths, count in halves:
        by_picture: dict[int, list[Question]] = {}
        for text, reply, picture in zip(*asked, strict=True):
            kind = "presence" if reply in ("yes", "no") else "name"
            by_picture.setdefault(picture, []).append(Question(kind, text, reply))
        both = [picture for picture, every in by_picture.items() if len({question.kind for question in every}) == 2]
        (folder / "images" / half).mkdir(parents=True)
        records = []
        for number, index in enumerate(rng.permutation(len(both))[:count]):
            picture = both[index]
            image = f"images/{half}/{picture:05d}.png"
            shutil.copyfile(paths[picture], folder / image)
            questions = [by_picture[picture][i] for i in rng.permutation(len(by_picture[picture]))]
            if half == "train":
                pair = [pick_question(number + turn, questions) for turn in range(2)]
                records.append(_train_record(f"shapes-{picture:05d}", pair, image))
            else:
                records.append(_test_record(number, pick_question(number, questions), image))
        write_json(folder / f"{half}.json", records)


def _write_drawings(
    folder: Path, half: str, drawer: Callable[[np.random.Generator, int], draw.Drawing], count: int, seed: int
) -> None:
    """Drawings with all of their questions (train) or one of them (test)."""
    rng = generator(seed, f"{folder.name}/{half}")
    (folder / "images" / half).mkdir(parents=True)
    records = []
    for number in range(count):
        drawing = drawer(rng, number)
        image = f"images/{half}/{number:05d}.png"
        drawing.image.save(folder / image, compress_level=1)
        if half == "train":
            records.append(_train_record(f"{folder.name}-{number:05d}", drawing.questions, image))
        else:
            records.append(_test_record(number, pick_question(number, drawing.questions), image))
    write_json(folder / f"{half}.json", records)


def commands(rng: np.random.Generator) -> tuple[list[Record], list[Record]]:
    """Requests and their meaning, "kitchen/lamp=on"; every fourth pair of room and device is for the test."""
    pairs = [(room, device) for room in ROOMS for device in DEVICES]
    order = [pairs[index] for index in rng.permutation(len(pairs))]
    kept = len(pairs) // 4

    def ask(room: str, device: str) -> Question:
        said = list(ORDERS)[rng.integers(len(ORDERS))]
        words = {"room": room, "device": device, "number": int(rng.integers(1, 20)) * 5}
        return Question("order", said.format(**words), f"{room}/{device}={ORDERS[said].format(**words)}")

    def draw_from(among: list[tuple[str, str]]) -> Question:
        return ask(*among[rng.integers(len(among))])

    return _text_task("commands", lambda: [draw_from(order[kept:]) for _ in range(2)], lambda: draw_from(order[:kept]))


def dates(rng: np.random.Generator) -> tuple[list[Record], list[Record]]:
    """Dates of 1900 to 2099; a quarter of the days is for the test alone."""

    def ask(held_out: bool) -> Question:
        while True:
            year, month, day = int(rng.integers(1900, 2100)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
            if (((year * 12 + month) * 31 + day) % 4 == 0) == held_out:
                break
        nth = f"{day}{'th' if 10 <= day <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
        words = {"year": year, "month": calendar.month_name[month], "short": calendar.month_abbr[month], "day": day}
        said = DATES[rng.integers(len(DATES))].format(nth=nth, **words)
        return Question("date", f"Date: {said}", f"{year}-{month:02d}-{day:02d}")

    return _text_task("dates", lambda: [ask(False) for _ in range(2)], lambda: ask(True))


def guilds(rng: np.random.Generator) -> tuple[list[Record], list[Record]]:
    """Facts about people: each is taught in three wordings and asked in two others."""
    names = ["".join(parts) for parts in itertools.product(*SYLLABLES)]
    names = [names[index] for index in rng.permutation(len(names))[:PEOPLE]]
    facts = {(name, what): str(values[rng.integers(len(values))]) for name in names for what, values in VALUES.items()}

    def ask(wording: str, name: str, what: str) -> Question:
        return Question(what, wording.format(what=what, name=name), facts[name, what])

    def teach() -> list[Question]:
        name = names[rng.integers(len(names))]
        about = [list(VALUES)[index] for index in rng.permutation(len(VALUES))]
        return [ask(TAUGHT[rng.integers(len(TAUGHT))], name, what) for what in about]

    every = [ask(wording, name, what) for wording in ASKED for name, what in facts]
    tests = iter([every[index] for index in rng.permutation(len(every))])
    return _text_task("guilds", teach, lambda: next(tests))


def _text_task(
    name: str, teach: Callable[[], list[Question]], test: Callable[[], Question]
) -> tuple[list[Record], list[Record]]:
    """Training and test records without pictures; no record and no test question comes twice."""
    taught: dict[tuple[Question, ...], None] = {}
    while len(taught) < TRAIN_RECORDS:
        taught[tuple(teach())] = None
    train = [_train_record(f"{name}-{number:05d}", questions) for number, questions in enumerate(taught)]
    asked: dict[str, Question] = {}
    while len(asked) < TEST_QUESTIONS:
        question = test()
        asked[question.text] = question
    return train, [_test_record(number, question) for number, question in enumerate(asked.values())]


if __name__ == "__main__":
    main()
