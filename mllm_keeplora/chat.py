"""Answers questions about an image with a run's model.

bash scripts/chat.sh runs/vqa_embedded --image photo.png "What is shown?"
bash scripts/chat.sh runs/vqa_embedded --image photo.png                  (asks until an empty line)
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, UnidentifiedImageError

from mllm_keeplora.config import ConfigError
from mllm_keeplora.console import command
from mllm_keeplora.data.collator import render_prompt
from mllm_keeplora.finished import load_run


@torch.no_grad()
def answer(
    model: PeftModel, processor: Any, question: str, image: Image.Image | None, max_new_tokens: int = 128
) -> str:
    """Greedy answer to one question; the prompt is the one of training and evaluation."""
    prompt = render_prompt(processor, question, image is not None)
    inputs = processor(text=[prompt], images=None if image is None else [image], return_tensors="pt")
    inputs = inputs.to(model.device)
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
    parser.add_argument(
        "--image", type=Path, help="what the questions are about; without it they are text only"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)"
    )
    # Intermixed: the question may come after the options.
    arguments = parser.parse_intermixed_args()
    with command():
        image = open_image(arguments.image)
        model, processor = load_run(arguments.run)
        for question in _questions(arguments.question):
            print(answer(model, processor, question, image, arguments.max_new_tokens), flush=True)


if __name__ == "__main__":
    main()
