"""Samples to model inputs: the model's own chat template, its own processor, answers alone supervised."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from mllm_keeplora.data.conversation import MediaFile, Message, Sample, kind_of
from mllm_keeplora.data.media import ImageError, decode_image, refuse_truncated_images
from mllm_keeplora.data.video.reader import Clip, VideoError, VideoReader
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.modeling.loss import IGNORED_LABEL


class ProcessorError(KeepLoRAError, ValueError):
    """The base model's processor or chat template, or a text rendered by it, cannot be used for training."""


class SampleTooLongError(KeepLoRAError, ValueError):
    """A sample has more tokens than `max_length`."""


class SampleDataset(Dataset[Sample]):
    """A list of samples as a torch dataset; images and clips are read by the collator."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def render_prompt(processor: ProcessorMixin, messages: Sequence[Message]) -> str:
    """The text that asks the model the last of the messages, up to where its answer begins.

    Evaluation and chat pass it to `process_media`; training does the same with its prompts, so both give the
    model the same tokens.

    Args:
        processor: a processor with a chat template.
        messages: the last one is a user's.
    """
    return _without_bos(processor, _render(processor, messages, prompt=True))


def process_media(
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    clips: Sequence[Clip],
    text: Sequence[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The processor's model inputs for images, clips and the prompts that show them.

    Frames were sampled when the clip was decoded, so the processor is told not to sample again, and given the
    clip's own timing (Qwen's models read it).

    Args:
        processor: the base model's.
        images: in the order of the prompts that show them.
        clips: likewise.
        text: prompts, None for the media alone.
        **settings: for the tokenizer (padding_side).

    Raises:
        ProcessorError: a clip for a processor that takes none; or images, clips or text that it refuses.
    """
    if clips and not getattr(processor, "video_token", None):
        raise ProcessorError(f"{type(processor).__name__} takes no video; expected a base model of a video family")
    if clips:
        settings["videos"] = [clip.frames for clip in clips]
        settings["video_metadata"] = [_describe_clip(clip) for clip in clips]
        settings["do_sample_frames"] = False
    if text is not None:
        settings |= {"text": list(text), "padding": True}
    # Left to guess, some take a picture or clip of a height of 1 or 3 for one with its channels first.
    settings["input_data_format"] = "channels_last"
    try:
        return dict(processor(images=list(images) or None, return_tensors="pt", **settings))
    except ValueError as error:
        raise ProcessorError(f"{type(processor).__name__} refuses its input: {error}") from error


def _describe_clip(clip: Clip) -> dict[str, Any]:
    return {
        "total_num_frames": clip.total_frames,
        "fps": clip.fps,
        "duration": clip.duration,
        "frames_indices": list(clip.indices),
    }


def prepare_questions(
    processor: ProcessorMixin, conversations: Sequence[Sequence[Message]], device: torch.device
) -> dict[str, Any]:
    """Left-padded model inputs, on `device`, of conversations that each end with a question.

    Args:
        processor: the base model's.
        conversations: messages whose images and clips are decoded.
        device: where the tensors go.

    Raises:
        ProcessorError: a clip for a processor that takes none.
    """
    parts = [part for messages in conversations for message in messages for part in message.parts]
    images = [part for part in parts if isinstance(part, Image.Image)]
    clips = [part for part in parts if isinstance(part, Clip)]
    prompts = [render_prompt(processor, messages) for messages in conversations]
    inputs = process_media(processor, images, clips, prompts, padding_side="left")
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


class ChatCollator:
    """Collates samples to a right-padded training batch.

    The conversation is rendered turn by turn through the processor's chat template. Supervised are each
    answer's tokens and its end token and nothing else. Where the template ends an answer without a special
    token, as LLaVA-1.5's does, the tokenizer's end-of-sequence token takes the place of what it puts there.
    Prompt and answer are separate token sequences: no token spans their border, and the first prompt's tokens
    are exactly those of evaluation. An answer that is not supervised is read like a prompt.

    Tokens are computed once for each sample and kept (5 bytes a token); images and clips are read at every
    access.

    Args:
        processor: of a family in the table of `modeling.families`: tokenizer, chat template, image
            processor, `image_token`, and their video counterparts.
        max_length: most tokens a sample may have, media tokens included; None for no limit.
        reader: decodes clips; None where there are none.

    Raises:
        ProcessorError: the processor has no image token, or its tokenizer no pad or end-of-sequence token.
    """

    def __init__(
        self, processor: ProcessorMixin, max_length: int | None = None, reader: VideoReader | None = None
    ) -> None:
        if not getattr(processor, "image_token", None):
            raise ProcessorError(f"{type(processor).__name__} has no image token; expected a LLaVA-style processor")
        for name in ("pad_token", "eos_token"):
            if getattr(processor.tokenizer, name) is None:
                raise ProcessorError(f"the base model's tokenizer has no {name}; set one in its tokenizer_config.json")
        self.processor = processor
        self.max_length = max_length
        self.reader = reader
        self._encoded: dict[Sample, _EncodedSample] = {}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Makes one batch.

        Args:
            samples: B samples, with images, with clips and with text alone in any mixture.

        Returns:
            input_ids, attention_mask, labels: [B, T] int64, right-padded, labels -100 where not supervised;
            mm_token_type_ids [B, T] for a model that reads it; and what the processor makes of images and
            clips (pixel_values, pixel_values_videos, ...; absent when no sample has one), in sample order.

        Raises:
            ImageError, VideoError: an image or clip cannot be decoded; names file and sample.
            SampleTooLongError: a sample exceeds `max_length`. Cutting it could remove media tokens.
            ProcessorError: the chat template does not suit, a text contains the model's image or video token,
                or the processor takes no video.
        """
        images, clips = self._read_images(samples), self._read_clips(samples)
        if all(sample in self._encoded for sample in samples):
            media_inputs = process_media(self.processor, images, clips) if images or clips else {}
        else:
            media_inputs = self._encode(samples, images, clips)
        encoded = [self._encoded[sample] for sample in samples]
        return {**_pad(encoded, self.processor), **media_inputs}

    def _read_images(self, samples: Sequence[Sample]) -> list[Image.Image]:
        images = []
        with refuse_truncated_images():
            for sample, file in _files(samples, "image"):
                try:
                    images.append(decode_image(file.path))
                except ImageError as error:
                    raise ImageError(f"sample {sample.id!r}: {error}") from error
        return images

    def _read_clips(self, samples: Sequence[Sample]) -> list[Clip]:
        clips = []
        for sample, file in _files(samples, "video"):
            if self.reader is None:
                raise VideoError(f"sample {sample.id!r}: clip {file.path}, but no reader for clips")
            try:
                clips.append(self.reader.read(file.path))
            except VideoError as error:
                raise VideoError(f"sample {sample.id!r}: {error}") from error
        return clips

    def _encode(
        self, samples: Sequence[Sample], images: list[Image.Image], clips: list[Clip]
    ) -> dict[str, torch.Tensor]:
        """Fills the cache for `samples`; returns what the processor makes of images and clips."""
        rendered = [_render_segments(self.processor, sample) for sample in samples]
        # Only the processor knows how many tokens an image takes: it is given every prompt that shows one.
        asked = [segment for segments in rendered for segment in segments if segment.needs_processor]
        inputs = process_media(self.processor, images, clips, [segment.prompt for segment in asked])
        prompts, masks = inputs.pop("input_ids"), inputs.pop("attention_mask")
        ids = {id(s): prompt[mask.bool()].tolist() for s, prompt, mask in zip(asked, prompts, masks, strict=True)}
        for sample, segments in zip(samples, rendered, strict=True):
            encoded = _encode_sample(self.processor, segments, [ids.get(id(segment)) for segment in segments])
            self.check_length(sample, len(encoded.ids))
            self._encoded[sample] = encoded
        # Made for these prompts alone; `_pad` makes those of whole samples.
        text_keys = {"token_type_ids", "mm_token_type_ids"}
        return {key: value for key, value in inputs.items() if key not in text_keys}

    def check_length(self, sample: Sample, length: int) -> None:
        """Refuses a sample of more tokens than `max_length`.

        Raises:
            SampleTooLongError: names the sample and what it shows.
        """
        if self.max_length is not None and length > self.max_length:
            files = ", ".join(str(file.path) for file in sample.media)
            raise SampleTooLongError(
                f"sample {sample.id!r} ({files or 'text'}) has {length} tokens, media tokens included; max_length is "
                f"{self.max_length}. Raise max_length, set it to null, or shorten the sample"
            )


@dataclass(frozen=True)
class _Segment:
    """Rendered text of one answer and of what comes before it.

    Attributes:
        prompt: what the model is given.
        answer: what it is to say, with end token.
        supervised: whether it learns to say so.
        needs_processor: the prompt is the sample's first, or shows something.
    """

    prompt: str
    answer: str
    supervised: bool
    needs_processor: bool


@dataclass(frozen=True)
class _EncodedSample:
    ids: torch.Tensor  # [T] int32
    supervised: torch.Tensor  # [T] bool


def _files(samples: Sequence[Sample], kind: Media) -> Iterator[tuple[Sample, MediaFile]]:
    return ((sample, file) for sample in samples for file in sample.media if file.kind == kind)


def _render_segments(processor: ProcessorMixin, sample: Sample) -> list[_Segment]:
    """Renders a sample answer by answer; joined, the segments are the conversation the model is trained on."""
    segments: list[_Segment] = []
    done, carried = "", ""  # rendered so far; what follows the last end token and belongs to the next prompt
    shown: list[MediaFile] = []  # since the last answer
    for index, message in enumerate(sample.messages):
        shown += [part for part in message.parts if isinstance(part, MediaFile)]
        if message.role != "assistant":
            continue
        asked = _render(processor, sample.messages[:index], prompt=True)
        prompt = carried + _continuation(asked, done, sample)
        done = _render(processor, sample.messages[: index + 1], prompt=False)
        answer, carried = _split_answer(processor, _continuation(done, asked, sample), message.text, sample)
        _check_media_tokens(processor, prompt, answer, shown, sample)
        if not segments:
            prompt = _without_bos(processor, prompt)
        segments.append(_Segment(prompt, answer, message.supervised, bool(shown) or not segments))
        shown = []
    return segments


def _continuation(text: str, prefix: str, sample: Sample) -> str:
    if not text.startswith(prefix):
        raise ProcessorError(
            f"sample {sample.id!r}: the chat template rewrites what it rendered before, so answers cannot be "
            f"told from prompts. Expected a text that begins with {prefix!r}, found {text!r}. Give the base "
            "model's processor a chat template that only appends"
        )
    return text[len(prefix) :]


def _split_answer(processor: ProcessorMixin, text: str, said: str, sample: Sample) -> tuple[str, str]:
    """Splits what follows a prompt into (answer with its end token, text that comes after that token)."""
    start = len(text) - len(text.lstrip())
    if not text.startswith(said, start):
        raise ProcessorError(
            f"sample {sample.id!r}: the chat template puts {text!r} after the prompt; expected the answer "
            f"{said!r}. Give the base model's processor a template that leaves answers as they are"
        )
    end = start + len(said)
    tail = text[end:]
    gap = len(tail) - len(tail.lstrip())
    for token in processor.tokenizer.all_special_tokens:
        if tail.startswith(token, gap):
            end += gap + len(token)
            return text[:end], text[end:]
    return text[:end] + processor.tokenizer.eos_token, ""


def _check_media_tokens(
    processor: ProcessorMixin, prompt: str, answer: str, shown: Sequence[MediaFile], sample: Sample
) -> None:
    tokens: dict[Media, str | None] = {
        "image": processor.image_token,  # type: ignore[attr-defined]  # the collator has seen to that
        "video": getattr(processor, "video_token", None),
    }
    for media, token in tokens.items():
        if token is None:
            continue  # process_media refuses the clip
        expected = sum(file.kind == media for file in shown)
        found, said = prompt.count(token), answer.count(token)
        if found != expected or said:
            raise ProcessorError(
                f"sample {sample.id!r}: the {media} token {token!r} comes {found + said} times in a question and its "
                f"answer; expected {expected}, in the question. Remove it from the sample's text; "
                f"if it is not there, the base model's chat template does not place {media}s"
            )


def _encode_sample(
    processor: ProcessorMixin, segments: Sequence[_Segment], processed: Sequence[list[int] | None]
) -> _EncodedSample:
    """Tokens of a whole sample; `processed` holds what the processor made of the prompts that it was given."""
    ids: list[int] = []
    supervised: list[bool] = []
    begin = len(processor.tokenizer("")["input_ids"])  # what the tokenizer puts before every text
    for segment, tokens in zip(segments, processed, strict=True):
        prompt = _tokenise(processor, segment.prompt)
        given = prompt if tokens is None else tokens[begin if ids else 0 :]
        answer = _tokenise_answer(processor, segment, prompt)
        ids += given + answer
        supervised += [False] * len(given) + [segment.supervised] * len(answer)
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


def _pad(encoded: Sequence[_EncodedSample], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    pad_token_id = processor.tokenizer.pad_token_id
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
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if "mm_token_type_ids" in processor.model_input_names:
        # Tells Qwen's models which positions are image or video, from which they compute 3-D positions.
        batch["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
    return batch


def _render(processor: ProcessorMixin, messages: Sequence[Message], *, prompt: bool) -> str:
    """The messages in the form of the chat template, which places the media tokens."""
    chat: list[Any] = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": kind_of(part)}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    text: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    return text


def _without_bos(processor: ProcessorMixin, text: str) -> str:
    """Removes a begin-of-sequence token that the tokenizer is going to add itself."""
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text
