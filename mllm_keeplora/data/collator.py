"""Samples to model inputs: the model's own chat template, its own processor, answers alone supervised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from mllm_keeplora.data.records import ImageError, Sample, Turn, decode_image, refuse_truncated_images
from mllm_keeplora.errors import KeepLoRAError

IGNORED_LABEL = -100  # what torch's cross entropy and every transformers loss leave out


class ProcessorError(KeepLoRAError, ValueError):
    """The base model's processor or chat template, or a text rendered by it, cannot be used for training."""


class SampleTooLongError(KeepLoRAError, ValueError):
    """A sample has more tokens than `max_length`."""


class VqaDataset(Dataset[Sample]):
    """A list of samples as a torch dataset; images are read by the collator."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def render_prompt(processor: ProcessorMixin, question: str, has_image: bool) -> str:
    """The text that asks the model one question, up to where its answer begins.

    Evaluation and chat pass it to `processor(text=..., images=...)`; training does the same with its first
    prompt, so both give the model the same tokens.

    Args:
        processor: a processor with a chat template.
        question: the question with its prompt suffix, without image placeholder.
        has_image: whether an image goes with it.
    """
    return _without_bos(processor, _render(processor, _to_messages([], question, has_image), prompt=True))


class ChatCollator:
    """Collates samples to a right-padded training batch.

    The conversation is rendered turn by turn through the processor's chat template. Supervised are each
    answer's tokens and its end token and nothing else. Where the template ends an answer without a special
    token, as LLaVA-1.5's does, the tokenizer's end-of-sequence token takes the place of what it puts there.
    Prompt and answer are separate token sequences: no token spans their border, and the first prompt's tokens
    are exactly those of evaluation.

    Tokens are computed once for each sample and kept (5 bytes a token); images are read at every access.

    Args:
        processor: a LLaVA-style processor: image processor, tokenizer, chat template, `image_token`.
        max_length: most tokens a sample may have, image tokens included; None for no limit.

    Raises:
        ProcessorError: the processor has no image token, or its tokenizer no pad or end-of-sequence token.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int | None = None) -> None:
        if not getattr(processor, "image_token", None):
            raise ProcessorError(
                f"{type(processor).__name__} has no image token; expected a LLaVA-style processor"
            )
        for name in ("pad_token", "eos_token"):
            if getattr(processor.tokenizer, name) is None:
                raise ProcessorError(
                    f"the base model's tokenizer has no {name}; set one in its tokenizer_config.json"
                )
        self.processor = processor
        self.max_length = max_length
        self._encoded: dict[Sample, _EncodedSample] = {}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Makes one batch.

        Args:
            samples: B samples, with and without images in any mixture.

        Returns:
            input_ids, attention_mask, labels: [B, T] int64, right-padded, labels -100 where not supervised;
            and what the processor makes of the images (pixel_values, ...; absent when no sample has one), in
            sample order.

        Raises:
            ImageError: an image cannot be decoded; names file and sample.
            SampleTooLongError: a sample exceeds `max_length`. Cutting it could remove image tokens.
            ProcessorError: the chat template does not suit, or a text contains the model's image token.
        """
        images = _read_images(samples)
        if all(sample in self._encoded for sample in samples):
            image_inputs = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        else:
            image_inputs = self._encode(samples, images)
        encoded = [self._encoded[sample] for sample in samples]
        return {**_pad(encoded, self.processor.tokenizer.pad_token_id), **image_inputs}

    def _encode(self, samples: Sequence[Sample], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Fills the cache for `samples`; returns what the processor makes of the images."""
        rendered = [_render_segments(self.processor, sample) for sample in samples]
        inputs = dict(
            self.processor(
                text=[segments[0].prompt for segments in rendered],
                images=images or None,
                padding=True,
                return_tensors="pt",
            )
        )
        prompts, masks = inputs.pop("input_ids"), inputs.pop("attention_mask")
        for sample, segments, prompt, mask in zip(samples, rendered, prompts, masks, strict=True):
            encoded = _encode_sample(self.processor, segments, prompt[mask.bool()].tolist())
            self._check_length(sample, len(encoded.ids))
            self._encoded[sample] = encoded
        # Made for the first prompt alone, and no LLaVA model reads them.
        text_keys = {"token_type_ids", "mm_token_type_ids"}
        return {key: value for key, value in inputs.items() if key not in text_keys}

    def _check_length(self, sample: Sample, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise SampleTooLongError(
                f"sample {sample.id!r} (image {sample.image}) has {length} tokens, image tokens included; "
                f"max_length is {self.max_length}. Raise max_length, set it to null, or shorten the sample"
            )


@dataclass(frozen=True)
class _Segment:
    """Rendered text of one turn: what the model is given, and what it is to answer, with end token."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class _EncodedSample:
    ids: torch.Tensor  # [T] int32
    supervised: torch.Tensor  # [T] bool


def _read_images(samples: Sequence[Sample]) -> list[Image.Image]:
    images = []
    with refuse_truncated_images():
        for sample in samples:
            if sample.image is None:
                continue
            try:
                images.append(decode_image(sample.image))
            except ImageError as error:
                raise ImageError(f"sample {sample.id!r}: {error}") from error
    return images


def _render_segments(processor: ProcessorMixin, sample: Sample) -> list[_Segment]:
    """Renders a sample turn by turn; joined, the segments are the conversation the model is trained on."""
    segments: list[_Segment] = []
    done, carried = "", ""  # rendered so far; what follows the last end token and belongs to the next prompt
    for index, turn in enumerate(sample.turns):
        messages = _to_messages(sample.turns[:index], turn.question, sample.image is not None)
        asked = _render(processor, messages, prompt=True)
        prompt = carried + _continuation(asked, done, sample)
        done = _render(processor, [*messages, _message("assistant", turn.answer)], prompt=False)
        answer, carried = _split_answer(processor, _continuation(done, asked, sample), turn, sample)
        segments.append(_Segment(prompt if index else _without_bos(processor, prompt), answer))
    _check_image_tokens(processor, segments, sample)
    return segments


def _continuation(text: str, prefix: str, sample: Sample) -> str:
    if not text.startswith(prefix):
        raise ProcessorError(
            f"sample {sample.id!r}: the chat template rewrites what it rendered before, so answers cannot be "
            f"told from prompts. Expected a text that begins with {prefix!r}, found {text!r}. Give the base "
            "model's processor a chat template that only appends"
        )
    return text[len(prefix) :]


def _split_answer(processor: ProcessorMixin, text: str, turn: Turn, sample: Sample) -> tuple[str, str]:
    """Splits what follows a prompt into (answer with its end token, text that comes after that token)."""
    start = len(text) - len(text.lstrip())
    if not text.startswith(turn.answer, start):
        raise ProcessorError(
            f"sample {sample.id!r}: the chat template puts {text!r} after the prompt; expected the answer "
            f"{turn.answer!r}. Give the base model's processor a template that leaves answers as they are"
        )
    end = start + len(turn.answer)
    tail = text[end:]
    gap = len(tail) - len(tail.lstrip())
    for token in processor.tokenizer.all_special_tokens:
        if tail.startswith(token, gap):
            end += gap + len(token)
            return text[:end], text[end:]
    return text[:end] + processor.tokenizer.eos_token, ""


def _check_image_tokens(processor: ProcessorMixin, segments: Sequence[_Segment], sample: Sample) -> None:
    token = processor.image_token  # type: ignore[attr-defined]  # every LLaVA-style processor has it
    found = [(segment.prompt + segment.answer).count(token) for segment in segments]
    expected = int(sample.image is not None)
    if sum(found) != expected or segments[0].prompt.count(token) != expected:
        raise ProcessorError(
            f"sample {sample.id!r}: the image token {token!r} comes {sum(found)} times in the rendered "
            f"conversation; expected {expected} in its first question. Remove it from the sample's text; if "
            "it is not there, the base model's chat template does not place images"
        )


def _encode_sample(
    processor: ProcessorMixin, segments: Sequence[_Segment], first_prompt: list[int]
) -> _EncodedSample:
    """Tokens of a whole sample; `first_prompt` holds those of the first prompt, image tokens included."""
    ids, supervised = list(first_prompt), [False] * len(first_prompt)
    for index, segment in enumerate(segments):
        prompt = _tokenise(processor, segment.prompt)
        if index:
            ids += prompt
            supervised += [False] * len(prompt)
        answer = _tokenise_answer(processor, segment, prompt)
        ids += answer
        supervised += [True] * len(answer)
    return _EncodedSample(torch.tensor(ids, dtype=torch.int32), torch.tensor(supervised))


def _tokenise_answer(processor: ProcessorMixin, segment: _Segment, prompt: list[int]) -> list[int]:
    """Tokens of the answer as it follows its prompt.

    Some tokenizers (Llama's older form) put a word boundary before every text they are given, which inside a
    conversation is a token the model never has to say. So the answer is tokenised behind its prompt where
    that leaves the prompt's tokens as they are, and by itself where a token would span the border.
    """
    joint = _tokenise(processor, segment.prompt + segment.answer)
    if joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    return _tokenise(processor, segment.answer)


def _tokenise(processor: ProcessorMixin, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _pad(encoded: Sequence[_EncodedSample], pad_token_id: int) -> dict[str, torch.Tensor]:
    length = max(len(sample.ids) for sample in encoded)
    input_ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, sample in enumerate(encoded):
        end = len(sample.ids)
        ids = sample.ids.long()
        input_ids[row, :end] = ids
        attention_mask[row, :end] = 1
        labels[row, :end] = torch.where(sample.supervised, ids, IGNORED_LABEL)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _to_messages(turns: Sequence[Turn], question: str, has_image: bool) -> list[dict[str, Any]]:
    """The turns so far and one more question, as chat messages; the image stands before the first one."""
    messages = []
    for turn in turns:
        messages += [_message("user", turn.question), _message("assistant", turn.answer)]
    messages.append(_message("user", question))
    if has_image:
        messages[0]["content"].insert(0, {"type": "image"})
    return messages


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _render(processor: ProcessorMixin, messages: list[dict[str, Any]], *, prompt: bool) -> str:
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text


def _without_bos(processor: ProcessorMixin, text: str) -> str:
    """Removes a begin-of-sequence token that the tokenizer is going to add itself."""
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text
