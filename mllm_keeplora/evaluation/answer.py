"""Greedy answers to conversations, as training taught them: the same prompts, ended by the same tokens."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mllm_keeplora.data.chat_template import ChatForm, chat_form
from mllm_keeplora.data.classification import tokenise
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.conversation import Classes, Message
from mllm_keeplora.data.video.reader import Clip
from mllm_keeplora.evaluation.errors import LogitsError
from mllm_keeplora.evaluation.settled import CUT_MARK
from mllm_keeplora.modeling.adapters import base_of
from mllm_keeplora.modeling.clip import PROMPTS, CLIPClassifier, classifies

# Tokens between two looks at what has been said. A character is spread over at most 4.
LOOK_EVERY = 8


class _FiniteLogits(LogitsProcessor):
    """Of logits with NaN, argmax takes some token or other, which reads as an answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Gives the scores [batch, tokens] back as they are."""
        if not torch.isfinite(scores.amax(dim=-1)).all():  # NaN is the greatest; single tokens may be at -inf
            raise LogitsError(
                "the model's logits are NaN or infinite, which is no answer: values of its adapter or its weights are "
                "too large. Look at the losses of its training, and take another adapter or a lower learning rate"
            )
        return scores


class _Settled(StoppingCriteria):
    """Ends the reply of a row when its score is settled.

    Looked at is the text that a reply has had in common with itself since the last look: the last tokens can still
    become another text, where they are parts of a character. So nothing ends before the second look.

    Attributes:
        ends: row -> tokens of its reply, for those that were ended here.
    """

    def __init__(self, tokenizer: Any, prompt: int, rules: Sequence[Callable[[str], bool] | None]) -> None:
        self.ends: dict[int, int] = {}
        self._tokenizer, self._prompt = tokenizer, prompt
        self._open = {row: ("", rule) for row, rule in enumerate(rules) if rule is not None}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Which rows [batch] of the token ids [batch, tokens] have ended."""
        length = input_ids.shape[1] - self._prompt
        if length % LOOK_EVERY == 0 and self._open:
            replies = input_ids[list(self._open), self._prompt :].tolist()
            texts = self._tokenizer.batch_decode(replies, skip_special_tokens=True)
            for (row, (before, rule)), text in zip(list(self._open.items()), texts, strict=True):
                if rule(os.path.commonprefix([before, text]).strip()):
                    self.ends[row] = length
                    del self._open[row]
                else:
                    self._open[row] = (text, rule)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done[list(self.ends)] = True
        return done


@contextmanager
def inference_state(model: torch.nn.Module) -> Iterator[None]:
    """Puts every module into eval() without gradients and autocast, and puts each training flag back
    afterwards.

    `torch.no_grad`, not `torch.inference_mode`: the model is trained again afterwards, and tensors made in
    inference mode may not enter autograd. Autocast is off because it would round the fp32 LoRA path (a fresh
    process has none either).

    Side effects:
        The modules' `training` flags, for the duration of the context.
    """
    flags = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def answer(
    model: Any,
    processor: Any,
    question: str,
    shown: Image.Image | Clip | None,
    max_new_tokens: int = 128,
) -> str:
    """Greedy answer to one question about an image, a clip or nothing.

    Args:
        model: in any mode, which it is left in.
        processor: the model's.
        question: text of the user's turn.
        shown: what it is about.
        max_new_tokens: longest answer, in tokens.

    Raises:
        ProcessorError: a question that cannot be asked this model.
        LogitsError: the model gives no numbers to choose a token by.
    """
    parts = (question,) if shown is None else (shown, question)
    return greedy_replies(model, processor, [[Message("user", parts)]], max_new_tokens)[0]


def greedy_replies(
    model: Any, processor: Any, conversations: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[str]:
    """Greedy replies to conversations that each end with a question; images and clips are decoded.

    The model may be in training mode, where checkpointing would leave the cache out; it is left in that.

    Raises:
        ProcessorError: a question that cannot be asked this model.
        LogitsError: the model gives no numbers to choose a token by.
    """
    form = chat_form(processor)
    inputs = prepare_questions(processor, conversations, model.device, form)
    with inference_state(model):
        return [reply.strip() for reply in generate_replies(model, processor, form, inputs, max_new_tokens)]


def class_features(model: Any, processor: Any, classes: Classes) -> torch.Tensor:
    """Of each class the mean over the templates of its prompts' features.

    Args:
        model: a CLIP, with or without an adapter.
        processor: the model's.
        classes: with their templates.

    Returns:
        [classes, projection] fp32, of norm 1.
    """
    base: CLIPClassifier = base_of(model)  # type: ignore[assignment]
    features = torch.zeros((), device=base.device)
    for template in classes.templates:
        tokens = tokenise(processor, classes.prompts(template))
        parts = zip(*(tokens[key].to(base.device).split(PROMPTS) for key in tokens), strict=True)
        features = features + torch.cat([base.prompt_features(*part) for part in parts])
    return torch.nn.functional.normalize(features, dim=-1)


def name_classes(model: Any, classes: Classes, features: torch.Tensor, pixels: torch.Tensor) -> list[str]:
    """The name of the class whose prompts are nearest to each picture; nothing is generated.

    Args:
        model: a CLIP, with or without an adapter, in eval mode.
        classes: to choose from.
        features: theirs, by `class_features`.
        pixels: [pictures, 3, height, width].

    Raises:
        LogitsError: similarities that are no numbers.
    """
    base: CLIPClassifier = base_of(model)  # type: ignore[assignment]
    pictures = base.picture_features(pixels.to(base.device, base.dtype))
    return [classes.names[index] for index in nearest_classes(base.similarities(pictures, features))]


def nearest_classes(similarities: torch.Tensor) -> list[int]:
    """The number of the class that is nearest to each picture, what a CLIP replies.

    Args:
        similarities: [pictures, classes].

    Raises:
        LogitsError: similarities that are no numbers.
    """
    if not torch.isfinite(similarities).all():
        raise LogitsError("the similarities of pictures and classes are not finite: the weights are damaged")
    nearest: list[int] = similarities.argmax(1).tolist()
    return nearest


def generate_replies(
    model: Any,
    processor: Any,
    form: ChatForm,
    inputs: dict[str, Any],
    max_new_tokens: int,
    settled: Sequence[Callable[[str], bool] | None] = (),
) -> list[str]:
    """One greedy reply for each row of `inputs`, without the token that ended it.

    Args:
        model: in eval mode; one that is sharded is `gathered`.
        processor: the model's.
        form: the processor's.
        inputs: of `prepare_questions`.
        max_new_tokens: longest reply, in tokens.
        settled: whether the beginning of a row's reply is enough, in which case the reply may end there, by `CUT_MARK`.
            None, or no more rules: the reply is whole.

    Raises:
        LogitsError: the model gives no numbers to choose a token by.
    """
    tokenizer = processor.tokenizer
    stops = stop_tokens(model, tokenizer, form)
    enough = _Settled(tokenizer, inputs["input_ids"].shape[1], settled)
    with greedy(model, stops, tokenizer.pad_token_id, max_new_tokens) as settings:
        sequences = model.generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([_FiniteLogits()]),
            stopping_criteria=StoppingCriteriaList([enough]),
        )
    replies = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((at for at, token in enumerate(reply) if token in stops), len(reply)) for reply in replies]
    # What had ended anyway by then is whole.
    cut = {row: end for row, end in enough.ends.items() if end <= ends[row] and end < max_new_tokens}
    kept = [reply[: cut.get(row, end)] for row, (reply, end) in enumerate(zip(replies, ends, strict=True))]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [f"{text}{CUT_MARK}" if row in cut else str(text) for row, text in enumerate(texts)]


def stop_tokens(model: Any, tokenizer: Any, form: ChatForm) -> list[int]:
    """Ids of the tokens at which a reply ends: the checkpoint's own, and the one that training supervises.

    The two differ where a chat template ends answers with a token that the generation config does not name.
    """
    taught = tokenizer.convert_tokens_to_ids(form.end_token)
    return list(dict.fromkeys([*own_stop_tokens(model, tokenizer), taught]))


def own_stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens at which a checkpoint says that a reply ends."""
    own = model.generation_config.eos_token_id
    own = tokenizer.eos_token_id if own is None else own
    return list(own) if isinstance(own, list | tuple) else [own]


def generation_settings(model: Any, processor: Any) -> dict[str, Any] | None:
    """The checkpoint's generation config, for those who generate with other code: it names all stop tokens.

    None for a model that generates nothing.
    """
    if classifies(processor):
        return None
    stops = stop_tokens(model, processor.tokenizer, chat_form(processor))
    return {**model.generation_config.to_diff_dict(), "eos_token_id": stops}


@contextmanager
def greedy(model: Any, stops: Sequence[int], pad_token_id: int, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """Settings with which every token of a reply is the likeliest one.

    A checkpoint's own generation config can ask for more than sampling: penalties on repetition (Qwen2.5-VL's),
    suppressed or forced tokens, a least length. transformers fills in from it whatever a given config leaves open,
    so it is set aside meanwhile.

    Side effects:
        The model's `generation_config`, for the duration of the context.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=pad_token_id,
    )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # PEFT keeps a second one for causal language models.
    own = [(holder, holder.generation_config) for holder in (model, inner) if "generation_config" in vars(holder)]
    try:
        for holder, _ in own:
            holder.generation_config = settings
        yield settings
    finally:
        for holder, config in own:
            holder.generation_config = config
