"""Writes the small stream of image classification: PNG pictures in folders, one a class (torchvision's ImageFolder).

    python -m mllm_keeplora.recipes.small.build_classification_data --out data/small_classification

    <out>/{digits,charts,clocks,grounds}/{train,test}/CLASS/*.png
    <out>/scenes/test/CLASS/*.png                    the benchmark that no task trains has no training half
    <out>/scenes/{general.yaml,general/CLASS/*.png}  general samples: other scenes, for `general.samples`

The digits are scikit-learn's scans. The same seed writes the same bytes. The folder appears in one rename, so it is
whole or absent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from mllm_keeplora.recipes.small import draw, draw_classes
from mllm_keeplora.recipes.small.build_vqa_data import (
    SEED,
    TEST_QUESTIONS,
    TRAIN_IMAGES,
    Draw,
    build_command,
    digit_drawer,
    generator,
    progress_bar,
)

GENERAL_PICTURES = 300
GENERAL_SAMPLES = 300

Classed = tuple[Image.Image, str]


def main() -> None:
    build_command(__doc__, Path("data/small_classification"), write_all)


def write_all(root: Path, seed: int = SEED) -> None:
    """Writes the whole stream into an empty folder."""
    halves: list[tuple[str, str, Draw[Classed], int]] = [("scenes", "test", _scene, GENERAL_PICTURES)]
    halves.append(("scenes", "general", _scene, GENERAL_SAMPLES))
    for name in draw_classes.DOMAINS:
        for half, offset, count in (("train", 0, TRAIN_IMAGES), ("test", TRAIN_IMAGES, TEST_QUESTIONS)):
            halves.append((name, half, _drawer(name, seed, offset), count))
    with progress_bar(sum(count for *_, count in halves), "image") as progress:
        for name, half, drawer, count in halves:
            _write_half(root / name / half, drawer, count, generator(seed, f"{name}/{half}"), progress)
    reference = {"pictures": "general", "classes": {"templates": [draw_classes.SCENE_TEMPLATE]}}
    (root / "scenes/general.yaml").write_text(yaml.safe_dump(reference, sort_keys=False))


def _scene(rng: np.random.Generator, index: int) -> Classed:
    return draw_classes.scene(rng, draw_classes.SCENES[index % len(draw_classes.SCENES)])


def _drawer(name: str, seed: int, offset: int) -> Draw[Classed]:
    if name == "digits":
        scans = digit_drawer(draw.digit, seed, offset)
        return lambda rng, index: draw_classes.classed(name, scans(rng, index))
    return lambda rng, _: draw_classes.classed(name, draw_classes.DRAWN[name](rng))


def _write_half(
    folder: Path, drawer: Draw[Classed], count: int, rng: np.random.Generator, progress: "tqdm[Any]"
) -> None:
    for index in range(count):
        image, name = drawer(rng, index)
        path = folder / name.replace(" ", "_") / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, compress_level=1)
        progress.update()


if __name__ == "__main__":
    main()
