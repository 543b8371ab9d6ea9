"""Writes the small stream: PNG images and JSON in the LLaVA layout of the published streams.

    python -m mllm_keeplora.recipes.small.build_vqa_data --out data/small_vqa

    <out>/{digits,charts,clocks,grounds}/{train.json,test.json,images/{train,test}/*.png}
    <out>/scenes/{test.json,images/test/*.png}                    the general benchmark has no training half
    <out>/scenes/{general.json,images/general/*.png}              general samples: other scenes, for `general.samples`

Training records are conversations of several turns about one image; test records are single questions,
balanced over the kinds of question. The same seed writes the same bytes. The folder appears in one rename, so
it is whole or absent.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from tqdm import tqdm

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.folders import whole_folder

SEED = 2026
TRAIN_IMAGES = 1200  # a task; digits has 1797 scans in all
TEST_QUESTIONS = 200  # a task
GENERAL_QUESTIONS = 300
GENERAL_SAMPLES = 256

T = TypeVar("T")
Draw = Callable[[np.random.Generator, int], T]  # draws from a generator the item of this number in its half


def main() -> None:
    build_command(__doc__, Path("data/small_vqa"), write_all)


# What build_video_data.py shares.


def build_command(doc: str, out: Path, write_all: Callable[[Path, int], None]) -> None:
    """The command line of a script that writes a stream's data.

    Args:
        doc: the script's docstring.
        out: default of `--out`.
        write_all: writes everything into a folder, from a seed.
    """
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, doc)
        parser.add_argument("--out", type=Path, default=out, help="folder to create (default: %(default)s)")
        parser.add_argument("--seed", type=int, default=SEED, help="seed of all drawings (default: %(default)s)")
        given = parser.read(sys.argv[1:])
        try:
            with whole_folder(given.out) as staging:
                write_all(staging, given.seed)
        except FileExistsError as error:
            raise ConfigError(str(error)) from error
        print(f"wrote {given.out}")


def generator(seed: int, label: str) -> np.random.Generator:
    """Random numbers of their own per label, so that one domain's size does not change the others."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(label.encode()).digest()[:8])])


def unnumbered(function: Callable[[np.random.Generator], T]) -> Draw[T]:
    """A drawer that does not ask for the item's number."""
    return lambda rng, _: function(rng)


def digit_drawer(
    function: Callable[[np.random.Generator, NDArray[np.floating], int], T], seed: int, offset: int
) -> Draw[T]:
    """Draws the scans from `offset` on of one fixed shuffle: halves with other offsets share no scan."""
    scans: Bunch = load_digits()
    order = generator(seed, "digits").permutation(len(scans.target))[offset:]
    return lambda rng, index: function(rng, scans.images[order[index]], int(scans.target[order[index]]))


def progress_bar(total: int, unit: str) -> "tqdm[Any]":
    """Counts what is drawn, quiet when not a terminal."""
    return tqdm(total=total, desc="drawing", unit=unit, disable=None)


def conversation(questions: Sequence[draw.Question], placeholder: str) -> list[dict[str, str]]:
    """The questions as turns in the LLaVA form, the medium's placeholder before the first."""
    turns: list[dict[str, str]] = []
    for question in questions:
        medium = "" if turns else f"{placeholder}\n"
        turns.append({"from": "human", "value": medium + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def pick_question(index: int, questions: Sequence[draw.Question]) -> draw.Question:
    """One of the questions, the kinds in turn over `index`, so that they are balanced."""
    kinds = sorted({question.kind for question in questions})
    return next(question for question in questions if question.kind == kinds[index % len(kinds)])


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records as an indented list."""
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


# The images.


def write_all(root: Path, seed: int = SEED) -> None:
    """Writes the whole stream into an empty folder."""
    halves: list[tuple[str, str, Draw[draw.Drawing], int]] = [
        ("scenes", "test", unnumbered(lambda rng: draw.scene(rng)[0]), GENERAL_QUESTIONS),
        ("scenes", "general", unnumbered(lambda rng: draw.scene(rng)[0]), GENERAL_SAMPLES),
        ("digits", "train", digit_drawer(draw.digit, seed, offset=0), TRAIN_IMAGES),
        ("digits", "test", digit_drawer(draw.digit, seed, offset=TRAIN_IMAGES), TEST_QUESTIONS),
    ]
    domains: dict[str, Callable[[np.random.Generator], draw.Drawing]] = {
        "charts": draw.chart,
        "clocks": draw.clock,
        "grounds": draw.ground,
    }
    for name, function in domains.items():
        drawer = unnumbered(function)
        halves += [(name, "train", drawer, TRAIN_IMAGES), (name, "test", drawer, TEST_QUESTIONS)]
    with progress_bar(sum(count for *_, count in halves), "image") as progress:
        for task, half, drawer, count in halves:
            _write_half(root / task, half, drawer, count, generator(seed, f"{task}/{half}"), progress)


def _write_half(
    folder: Path,
    half: str,
    drawer: Draw[draw.Drawing],
    count: int,
    rng: np.random.Generator,
    progress: "tqdm[Any]",
) -> None:
    images = Path("images") / half
    (folder / images).mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for index in range(count):
        drawing = drawer(rng, index)
        path = images / f"{index:05d}.png"
        drawing.image.save(folder / path, compress_level=1)
        if half == "train":
            turns = conversation(drawing.questions, "<image>")
            name = f"{folder.name}-{index:05d}"
            records.append({"id": name, "image": path.as_posix(), "conversations": turns})
        else:
            asked = pick_question(index, drawing.questions)
            record = {"question_id": index, "image": path.as_posix()}
            records.append({**record, "text": asked.text, "answer": asked.answer})
        progress.update()
    write_json(folder / f"{half}.json", records)


if __name__ == "__main__":
    main()
