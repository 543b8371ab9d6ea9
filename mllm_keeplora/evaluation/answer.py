"""One question at a time, asked as in training and evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from PIL import Image

from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.conversation import Message
from mllm_keeplora.data.video.reader import Clip


@torch.no_grad()
def answer(
    model: PeftModel,
    processor: Any,
    question: str,
    shown: Image.Image | Clip | None,
    max_new_tokens: int = 128,
) -> str:
    """Greedy answer to one question about an image, a clip or nothing.

    Args:
        model: in eval mode.
        processor: the model's.
        question: text of the user's turn.
        shown: what it is about.
        max_new_tokens: longest answer, in tokens.
    """
    parts = (question,) if shown is None else (shown, question)
    return greedy_replies(model, processor, [[Message("user", parts)]], max_new_tokens)[0]


@torch.no_grad()
def greedy_replies(
    model: Any, processor: Any, conversations: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[str]:
    """Greedy replies to conversations that each end with a question; images and clips are decoded."""
    model.eval()
    inputs = prepare_questions(processor, conversations, model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    replies = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(reply).strip() for reply in replies]
