"""What lmms-eval asks of a task on a run's copy of a test file: what is shown and asked, the reference answer, its
score.

lmms-eval loads this file by path from the YAMLs beside it. A scoring function gets lmms-eval's (doc, replies): the
user's record with `question_id`, `text` and `answer`, and one reply. It returns {its own name: score}; adding one means
a function here and a YAML of its name beside this file.
"""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_keeplora.data.images import load_image
from mllm_keeplora.evaluation.task_files import ASKED, COPY_COLUMN, accepted_answers

Doc = dict[str, Any]


def process_docs(copy: Any) -> Any:
    """The run's copy as documents: each row is one JSON text, decoded where lmms-eval takes it.

    As a transform, not by `map`, which would infer types for the decoded values.

    Args:
        copy: the `datasets.Dataset` of the copy.
    """
    return copy.with_transform(_decode)


def _decode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
    docs = [json.loads(text) for text in rows[COPY_COLUMN]]
    keys = dict.fromkeys(key for doc in docs for key in doc)
    return {key: [doc.get(key) for doc in docs] for key in keys}


def doc_to_text(doc: Doc) -> str:
    """The question's words as training asks them, with the task's suffixes; for models without messages."""
    return "\n".join(part["text"] for part in doc[ASKED][-1]["content"] if part["type"] == "text")


def doc_to_visual(doc: Doc) -> list[Image.Image | str]:
    """Everything that is shown, in order: images, and the paths of clips.

    A path, as in lmms-eval's own video tasks: the model samples the frames it was trained with.

    Raises:
        ImageError: if the file is missing or truncated. lmms-eval has PIL accept truncated images, and the
            grey that is filled in would be scored as if it were the real image.
    """
    return [part["url"] for message in doc_to_messages(doc) for part in message["content"] if part["type"] != "text"]


def doc_to_messages(doc: Doc) -> list[dict[str, Any]]:
    """The conversation that ends with the question; images decoded, clips by path.

    Raises:
        ImageError: as `doc_to_visual`.
    """
    return [{"role": message["role"], "content": [*_shown(message["content"])]} for message in doc[ASKED]]


def _shown(parts: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        if part["type"] == "image":
            yield {"type": "image", "url": load_image(Path(part["path"]))}
        elif part["type"] == "video":
            yield {"type": "video", "url": part["path"]}
        else:
            yield part


def doc_to_target(doc: Doc) -> str:
    """The reference answer, or all that are accepted."""
    return " | ".join(accepted_answers(doc))


def exact(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if the reply is a reference answer, ignoring case and surrounding white space, else 0."""
    return {"exact": float(_normalise(replies[0]) in map(_normalise, accepted_answers(doc)))}


def contains(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if a reference answer is part of the reply, ignoring case, else 0.

    Raises:
        ValueError: for an empty reference answer, which every reply would contain.
    """
    answers = [_normalise(answer) for answer in accepted_answers(doc)]
    if not all(answers):
        raise ValueError(f"question_id {doc.get('question_id')!r}: any reply contains an empty answer")
    return {"contains": float(any(answer in _normalise(replies[0]) for answer in answers))}


def _normalise(text: str) -> str:
    # Tokenizers compose accents (NFC), so a reply never has them as a decomposed reference answer does.
    return unicodedata.normalize("NFC", text.strip().lower())
