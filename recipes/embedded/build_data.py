"""Writes the embedded stream: PNG images and JSON in the LLaVA layout of the published streams.

    python recipes/embedded/build_data.py --out data/embedded

    <out>/{digits,charts,clocks,grounds}/{train.json,test.json,images/{train,test}/*.png}
    <out>/scenes/{test.json,images/test/*.png}                    the general benchmark has no training half

Training records are conversations of several turns about one image; test records are single questions,
balanced over the kinds of question. The same seed writes the same bytes. The folder appears in one rename, so
it is whole or absent.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draw
import numpy as np
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from tqdm import tqdm

SEED = 2026
TRAIN_IMAGES = 1200  # a task; digits has 1797 scans in all
TEST_QUESTIONS = 200  # a task
GENERAL_QUESTIONS = 300

Draw = Callable[[np.random.Generator, int], draw.Drawing]  # a generator and the image's number in its half


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/embedded"), help="folder to write; must not exist"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of all drawings and questions")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.seed)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"wrote {arguments.out}")


def build(out: Path, seed: int = SEED) -> None:
    """Writes the stream's data into the new folder `out`.

    Args:
        out: folder to create. Parents are created as needed.
        seed: seed of all drawings and questions.

    Raises:
        FileExistsError: `out` is already there; nothing is touched.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; remove it to have the embedded data written again")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        _write_all(staging, seed)
        staging.chmod(0o755)  # mkdtemp's folder is private
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # nothing is left there after a successful rename


def _write_all(root: Path, seed: int) -> None:
    halves: list[tuple[str, str, Draw, int]] = [
        ("scenes", "test", _unnumbered(lambda rng: draw.scene(rng)[0]), GENERAL_QUESTIONS),
        ("digits", "train", _digit_drawer(seed, offset=0), TRAIN_IMAGES),
        ("digits", "test", _digit_drawer(seed, offset=TRAIN_IMAGES), TEST_QUESTIONS),
    ]
    domains: dict[str, Callable[[np.random.Generator], draw.Drawing]] = {
        "charts": draw.chart,
        "clocks": draw.clock,
        "grounds": draw.ground,
    }
    for name, function in domains.items():
        drawer = _unnumbered(function)
        halves += [(name, "train", drawer, TRAIN_IMAGES), (name, "test", drawer, TEST_QUESTIONS)]
    progress = tqdm(total=sum(count for *_, count in halves), desc="drawing", unit="image", disable=None)
    with progress:
        for task, half, drawer, count in halves:
            _write_half(root / task, half, drawer, count, _generator(seed, f"{task}/{half}"), progress)


def _generator(seed: int, label: str) -> np.random.Generator:
    """Random numbers of their own per label, so that one domain's size does not change the others."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(label.encode()).digest()[:8])])


def _unnumbered(function: Callable[[np.random.Generator], draw.Drawing]) -> Draw:
    return lambda rng, _: function(rng)


def _digit_drawer(seed: int, offset: int) -> Draw:
    """Draws the scans from `offset` on of one fixed shuffle: halves with other offsets share no scan."""
    scans: Bunch = load_digits()
    order = _generator(seed, "digits").permutation(len(scans.target))[offset:]
    return lambda rng, index: draw.digit(rng, scans.images[order[index]], int(scans.target[order[index]]))


def _write_half(
    folder: Path, half: str, drawer: Draw, count: int, rng: np.random.Generator, progress: "tqdm[Any]"
) -> None:
    images = Path("images") / half
    (folder / images).mkdir(parents=True)
    records: list[dict[str, object]] = []
    for index in range(count):
        drawing = drawer(rng, index)
        path = images / f"{index:05d}.png"
        drawing.image.save(folder / path, compress_level=1)
        if half == "train":
            records.append(_train_record(f"{folder.name}-{index:05d}", path, drawing.questions))
        else:
            records.append(_test_record(index, path, drawing.questions))
        progress.update()
    (folder / f"{half}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _train_record(name: str, image: Path, questions: list[draw.Question]) -> dict[str, object]:
    turns: list[dict[str, str]] = []
    for question in questions:
        placeholder = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": placeholder + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": name, "image": image.as_posix(), "conversations": turns}


def _test_record(index: int, image: Path, questions: list[draw.Question]) -> dict[str, object]:
    """Asks one question about the image, the kinds in turn over `index`, so that they are balanced."""
    kinds = sorted({question.kind for question in questions})
    question = next(question for question in questions if question.kind == kinds[index % len(kinds)])
    return {"question_id": index, "image": image.as_posix(), "text": question.text, "answer": question.answer}


if __name__ == "__main__":
    main()
