"""One question at a time, asked as in training and evaluation."""

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
    inputs = prepare_questions(processor, [[Message("user", parts)]], model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    reply = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(reply, skip_special_tokens=True)).strip()
