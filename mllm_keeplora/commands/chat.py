"""Answers questions about an image or a video with a run's model.

bash scripts/chat.sh runs/vqa_small --image photo.png "What is shown?"
bash scripts/chat.sh runs/vqa_small --image photo.png                  (asks until an empty line)
bash scripts/chat.sh runs/video_small --video clip.mp4 "What happens?"
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, UnidentifiedImageError

from mllm_keeplora.commands.program import command
from mllm_keeplora.config import ConfigError
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.video.reader import Clip


@torch.no_grad()
def answer(
    model: PeftModel,
    processor: Any,
    question: str,
    media: Image.Image | Clip | None,
    max_new_tokens: int = 128,
) -> str:
    """Greedy answer to one question; the prompt is the one of training and evaluation."""
    inputs = prepare_questions(processor, [(question, media)], model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return str(
        processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def open_image(path: Path | None) -> Image.Image | None:
    """The image in RGB.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return None if path is None else Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"--image {path} cannot be read: {error}") from error


def _questions(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    while question := _ask():
        yield question


def _ask() -> str:
    try:
        return input("question (empty line ends): " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument(
        "question", nargs="?", help="one question; without it they are read from the terminal"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--image", type=Path, help="what the questions are about; without it they are text only"
    )
    shown.add_argument("--video", type=Path, help="a clip instead, sampled as the run sampled its clips")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)"
    )
    # Intermixed: the question may come after the options.
    arguments = parser.parse_intermixed_args()
    with command():
        run = load_run(arguments.run)
        media: Image.Image | Clip | None = open_image(arguments.image)
        if arguments.video is not None:
            media = run.reader().read(arguments.video)
        model, processor = run.load_model()
        for question in _questions(arguments.question):
            print(answer(model, processor, question, media, arguments.max_new_tokens), flush=True)


if __name__ == "__main__":
    main()
