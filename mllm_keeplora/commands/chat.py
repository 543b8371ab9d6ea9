"""Answers questions about an image or a clip by a run's model, or names the class of a picture.

    keeplora chat runs/vqa_small --image photo.png "What is shown?"
    keeplora chat runs/vqa_small --image photo.png                      asks until an empty line
    keeplora chat runs/video_small --video clip.mp4 "What happens?"
    keeplora chat runs/dcl --task Med --image scan.png "Is the heart enlarged?"
    keeplora chat runs/classification_small --task digits --image photo.png     a CLIP: which of the task's classes

The prompt is that of training and evaluation, and answers are decoded greedily, as there. `--task` adds to each
question what the stream adds to those of that task in evaluation.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import NewTokens
from mllm_keeplora.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora chat", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("question", nargs="?", help="one question; without it they are asked for")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--image", type=Path, help="what the questions are about; without it, text alone")
    shown.add_argument("--video", type=Path, help="a clip instead, sampled as the run sampled its clips")
    parser.add_argument(
        "--task", help="of the stream: adds to questions what it adds to its own; of a CLIP, whose classes"
    )
    parser.add_setting("max_new_tokens", NewTokens, "longest answer, in tokens (default: %(default)s)", default=128)
    given = parser.read(argv)

    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.evaluation.answer import answer

    run = load_run(given.run)
    if run.chooses:
        if given.image is None or given.question is not None:
            raise ConfigError("a CLIP names the class of a picture: give --image, its --task, and no question")
        print(run.name_class(given.image, given.task))
        return
    media = _open(run, given.image, given.video)
    suffix = _suffix(run, given.task)
    model, processor = run.load_model()
    for question in _questions(given.question):
        print(answer(model, processor, question + suffix, media, given.max_new_tokens), flush=True)


def _open(run: Any, image: Path | None, video: Path | None) -> Any:
    from mllm_keeplora.data.images import load_image

    if video is not None:
        return run.reader().read(video)
    return None if image is None else load_image(image)


def _suffix(run: Any, task: str | None) -> str:
    """What is added to every question; without a task nothing is, and a stream that adds something is told of."""
    from mllm_keeplora.data.stream import StreamError

    try:
        stream = run.stream(check_files=False)
    except StreamError:
        if task is not None:
            raise
        return ""  # the stream's YAML is not needed to ask a question
    if task is not None:
        return str(stream.question_suffix(task))
    if adding := [spec.name for spec in stream.specs if stream.question_suffix(spec.name)]:
        print(f"asked as it is; --task adds what the stream adds to questions of {', '.join(adding)}", file=sys.stderr)
    return ""


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
