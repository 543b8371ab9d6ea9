"""Answers questions about an image or a clip by a run's model.

    keeplora chat runs/vqa_small --image photo.png "What is shown?"
    keeplora chat runs/vqa_small --image photo.png                      asks until an empty line
    keeplora chat runs/video_small --video clip.mp4 "What happens?"

The prompt is that of training and evaluation, and answers are decoded greedily, as there.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import NewTokens


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora chat", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("question", nargs="?", help="one question; without it they are asked for")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--image", type=Path, help="what the questions are about; without it, text alone")
    shown.add_argument("--video", type=Path, help="a clip instead, sampled as the run sampled its clips")
    parser.add_setting("max_new_tokens", NewTokens, "longest answer, in tokens (default: %(default)s)", default=128)
    given = parser.read(argv)

    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.evaluation.answer import answer

    run = load_run(given.run)
    media = _open(run, given.image, given.video)
    model, processor = run.load_model()
    for question in _questions(given.question):
        print(answer(model, processor, question, media, given.max_new_tokens), flush=True)


def _open(run: Any, image: Path | None, video: Path | None) -> Any:
    from mllm_keeplora.data.images import load_image

    if video is not None:
        return run.reader().read(video)
    return None if image is None else load_image(image)


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
