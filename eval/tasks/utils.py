"""What lmms-eval asks of a task on a LLaVA test file: its image, its question, its reference answer, its
score.

lmms-eval loads this file by path from the YAMLs beside it. A scoring function gets lmms-eval's (doc,
replies), one reply per document, and returns {its own name: score}; adding one means a function here and a
YAML of its name beside this file.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from mllm_keeplora.data.records import clean_question, decode_image, refuse_truncated_images

Doc = dict[str, Any]
Settings = dict[str, Any]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Settings) -> str:
    """The question as training asks it: without image placeholder, with the task's prompt suffix."""
    return clean_question(str(doc["text"]), lmms_eval_specific_kwargs["prompt_suffix"])


def doc_to_visual(doc: Doc, lmms_eval_specific_kwargs: Settings) -> list[Image.Image]:
    """The document's image, or an empty list for a text-only question.

    Raises:
        ImageError: if the file is missing or truncated. lmms-eval has PIL accept truncated images, and the
            grey that is filled in would be scored as if it were the real image.
    """
    if not doc.get("image"):
        return []
    with refuse_truncated_images():
        return [decode_image(Path(lmms_eval_specific_kwargs["image_root"]) / doc["image"])]


def doc_to_messages(doc: Doc, lmms_eval_specific_kwargs: Settings) -> list[dict[str, Any]]:
    """One user message: the image, where there is one, then the question."""
    images = [{"type": "image", "url": image} for image in doc_to_visual(doc, lmms_eval_specific_kwargs)]
    question = {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)}
    return [{"role": "user", "content": [*images, question]}]


def doc_to_target(doc: Doc) -> str:
    """The reference answer."""
    return str(doc["answer"])


def exact(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if the reply is the reference answer, ignoring case and surrounding white space, else 0."""
    return {"exact": float(_normalise(replies[0]) == _normalise(doc_to_target(doc)))}


def contains(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if the reference answer is part of the reply, ignoring case, else 0.

    Raises:
        ValueError: for an empty reference answer, which every reply would contain.
    """
    answer = _normalise(doc_to_target(doc))
    if not answer:
        raise ValueError(f"question_id {doc.get('question_id')!r}: any reply contains an empty answer")
    return {"contains": float(answer in _normalise(replies[0]))}


def _normalise(text: str) -> str:
    return text.strip().lower()
