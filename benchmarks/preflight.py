"""Seconds of the check of a run's records before its first stage: new, and remembered.

    python benchmarks/preflight.py                          2000 records, each with a VGA JPEG of its own
    python benchmarks/preflight.py --sizes 500              as many different sizes about VGA
    python benchmarks/preflight.py --processor llava_next   tiles of 336 pixels, as LLaVA-NeXT cuts them

JPEGs of a drawn scene with grain are written first, and a file of records with one question each. Then the file is
loaded as a run loads it, twice with one memory. Wall time, and CPU time of this process and its workers, are scaled
in proportion to 30 thousand records. On a busy machine the CPU time is what counts: half of it is the wall time of
two free cores.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mllm_keeplora  # noqa: F401, E402  # prepares the environment for transformers
from mllm_keeplora.config import ModelConfig  # noqa: E402
from mllm_keeplora.data.preflight import Preflight  # noqa: E402
from mllm_keeplora.data.records import load_records  # noqa: E402
from mllm_keeplora.modeling.loading import load_base_processor  # noqa: E402

# isort: split
from transformers import LlavaNextImageProcessor, LlavaNextProcessor  # noqa: E402

WIDTH, HEIGHT, FULL = 640, 480, 30_000
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-1.6


def draw(folder: Path, records: int, sizes: int) -> Path:
    """Writes pictures and the file of records that names them."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (HEIGHT // 8 + 8, WIDTH // 8 + 8, 3), dtype=np.uint8)
    scene = np.kron(blocks, np.ones((8, 8, 1), np.uint8)).astype(np.int16)
    grain = (generator.standard_normal((*scene.shape[:2], 1)) * 8).astype(np.int16)
    picture = Image.fromarray(np.clip(scene + grain, 0, 255).astype(np.uint8))
    rows = []
    for number in tqdm(range(records), desc="drawing", disable=None):
        left, top = number % 32, number // 32 % 32
        width, height = WIDTH - number % sizes % 25, HEIGHT - number % sizes // 25
        picture.crop((left, top, left + width, top + height)).save(folder / f"{number}.jpg", quality=90)
        turns = [("human", f"<image>\nWhat is in picture {number}?"), ("gpt", "red circle")]
        said = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": said})
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return path


def processor_of(kind: str) -> Any:
    """The small model's, or LLaVA-NeXT's around its tokenizer."""
    small = load_base_processor(ModelConfig())
    if kind == "llava":
        return small
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=small.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.chat_template,
    )


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Draws, measures and prints the table."""
    about = "Seconds of the check of a run's records before its first stage."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--sizes", type=int, default=1, help="different sizes among the pictures")
    parser.add_argument("--processor", choices=("llava", "llava_next"), default="llava")
    arguments = parser.parse_args()
    processor = processor_of(arguments.processor)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = draw(folder, arguments.records, arguments.sizes)
        megabytes = sum(file.stat().st_size for file in folder.glob("*.jpg")) / 1e6
        print(
            f"{arguments.records} records, {arguments.sizes} size(s), {megabytes / arguments.records:.2f} MB a JPEG\n"
        )
        print(f"|            | wall s | CPU s | scaled to {FULL}: wall s | CPU s |")
        print("|------------|-------:|------:|-----------------------:|------:|")
        for what in ("new", "remembered"):
            wall, cpu = time.perf_counter(), cpu_seconds()
            checker = Preflight(None, folder / "memory", processor)
            samples, _ = load_records(path, folder, checker=checker, task="drawn")
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            if len(samples) != arguments.records:
                raise SystemExit(f"{len(samples)} of {arguments.records} records were found good")
            scale = FULL / arguments.records
            print(f"| {what:<10} | {wall:6.1f} | {cpu:5.1f} | {wall * scale:22.1f} | {cpu * scale:5.1f} |")


if __name__ == "__main__":
    main()
