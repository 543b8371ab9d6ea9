"""Conversations of the tests, told in turns of (question, answer)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from mllm_keeplora.data.conversation import MediaFile, Message, Part, Sample


class Turn(NamedTuple):
    """One question with its answer."""

    question: str
    answer: str


def sample(name: str, image: Path | None, turns: tuple[Turn, ...], video: Path | None = None) -> Sample:
    """A sample that shows at most one image or clip, before its first question."""
    messages = [message for turn in turns for message in _messages(turn)]
    if image is not None:
        messages[0] = Message("user", (MediaFile("image", image), *messages[0].parts))
    if video is not None:
        messages[0] = Message("user", (MediaFile("video", video), *messages[0].parts))
    return Sample(name, tuple(messages))


def _messages(turn: Turn) -> Iterator[Message]:
    yield Message("user", (turn.question,))
    yield Message("assistant", (turn.answer,))


def turns_of(sample: Sample) -> tuple[Turn, ...]:
    """The turns of a sample that has a question before every answer."""
    questions = [message.text for message in sample.messages if message.role == "user"]
    return tuple(Turn(*pair) for pair in zip(questions, sample.answers, strict=True))


def shown_by(sample: Sample) -> Path | None:
    """The only file that a sample shows."""
    [*files] = sample.media
    assert len(files) < 2
    return files[0].path if files else None


def ask(question: str, shown: Part | None = None) -> list[Message]:
    """A conversation that asks one question."""
    return [Message("user", (question,) if shown is None else (shown, question))]


def read_copy(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of a run's copy of a test file; `task` is its lmms-eval YAML."""
    table = pq.read_table(task["dataset_kwargs"]["data_files"]["test"])
    return [json.loads(text) for text in table["record"].to_pylist()]
