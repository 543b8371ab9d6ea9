"""What lmms-eval asks of a task on a LLaVA test file: its image or clip, its question, its reference answer,
its score.

lmms-eval loads this file by path from the YAMLs beside it. A scoring function gets lmms-eval's (doc,
replies), one reply per document, and returns {its own name: score}; adding one means a function here and a
YAML of its name beside this file.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from mllm_keeplora.data.images import load_image
from mllm_keeplora.data.records import clean_question, suffix_for

Doc = dict[str, Any]
Settings = dict[str, Any]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Settings) -> str:
    """The question as training asks it: without media placeholder, with the task's prompt suffix; then what
    the task adds in evaluation alone."""
    question = clean_question(str(doc["text"]), lmms_eval_specific_kwargs["prompt_suffix"])
    return question + suffix_for(lmms_eval_specific_kwargs.get("test_prompt_suffix", ""), doc.get("answer"))


def doc_to_visual(doc: Doc, lmms_eval_specific_kwargs: Settings) -> list[Image.Image | str]:
    """The document's image, or the path of its clip, or an empty list for a text-only question.

    A path, as in lmms-eval's own video tasks: the model samples the frames it was trained with.

    Raises:
        ImageError: if the file is missing or truncated. lmms-eval has PIL accept truncated images, and the
            grey that is filled in would be scored as if it were the real image.
    """
    media_root = Path(lmms_eval_specific_kwargs["media_root"])
    if doc.get("video"):
        return [str(media_root / doc["video"])]
    if not doc.get("image"):
        return []
    return [load_image(media_root / doc["image"])]


def doc_to_messages(doc: Doc, lmms_eval_specific_kwargs: Settings) -> list[dict[str, Any]]:
    """One user message: the image or clip, where there is one, then the question."""
    kind = "video" if doc.get("video") else "image"
    media = [{"type": kind, "url": item} for item in doc_to_visual(doc, lmms_eval_specific_kwargs)]
    question = {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)}
    return [{"role": "user", "content": [*media, question]}]


def doc_to_target(doc: Doc) -> str:
    """The reference answer, or all that are accepted."""
    return " | ".join(accepted_answers(doc))


def accepted_answers(doc: Doc) -> list[str]:
    """The record's answer, or its answers where it lists several (MLLM-ACL's OCR)."""
    answer = doc.get("answer", doc.get("answer_bbox"))  # the latter in CoIN's Grounding
    return [str(text) for text in answer] if isinstance(answer, list) else [str(answer)]


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
    return text.strip().lower()
