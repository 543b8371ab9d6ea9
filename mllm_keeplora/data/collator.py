"""Samples to model inputs: the model's own chat template, its own processor, answers alone supervised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import Gemma3Processor, InternVLProcessor, ProcessorMixin

from mllm_keeplora.data.chat_template import ChatForm, ProcessorError, Segment, chat_form, render
from mllm_keeplora.data.classification import ClassCollator
from mllm_keeplora.data.conversation import MediaFile, Message, Part, Sample
from mllm_keeplora.data.images import ImageError, load_image
from mllm_keeplora.data.video.reader import Clip, VideoError, VideoReader
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.modeling.families import EQUAL_LENGTHS, Media
from mllm_keeplora.modeling.loss import IGNORED_LABEL, answers_alone


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

    Args:
        processor: a processor with a chat template.
        messages: the last one is a user's.

    Raises:
        ProcessorError: see `render`.
    """
    return "".join(segment.text for segment in render(processor, messages, chat_form(processor)))


# What processors make of prompts: `_pad` makes these of whole samples.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def process_media(
    processor: ProcessorMixin,
    images: Sequence[Sequence[Image.Image]],
    clips: Sequence[Clip],
    text: Sequence[str] | None = None,
    order: Sequence[Media] = (),
) -> dict[str, Any]:
    """The processor's model inputs for images, clips and the prompts that show them.

    Frames were sampled when the clip was decoded, so the processor is told not to sample again, and given the
    clip's own timing (Qwen's models read it).

    Args:
        processor: the base model's.
        images: of each message, in order.
        clips: likewise.
        text: prompts, None for the media alone.
        order: for the media alone, where images and clips are mixed: the kind of each, as prompts would show them.

    Raises:
        ProcessorError: a clip for a processor that takes none; clips of different length for one that takes
            them in one tensor; or images, clips or text that it refuses.
    """
    if clips and not getattr(processor, "video_token", None):
        raise ProcessorError(f"{type(processor).__name__} takes no video; expected a base model of a video family")
    _check_lengths(processor, clips)
    settings: dict[str, Any] = {}
    if clips:
        settings["videos"] = [clip.frames for clip in clips]
        settings["video_metadata"] = [_describe_clip(clip) for clip in clips]
        settings["do_sample_frames"] = False
    alone = text is None
    if alone and isinstance(processor, InternVLProcessor):  # puts frames between images, as a text names them
        kinds: list[str] = [*order] if order else ["image"] * sum(map(len, images)) + ["video"] * len(clips)
        text = ["".join(getattr(processor, f"{kind}_token") for kind in kinds)]
    if text is not None:
        settings |= {"text": list(text), "padding": True}
    shown: list[Any] = [list(group) for group in images if group]
    # LLaVA-OneVision gives an image fewer tokens where it is shown with others. Together are those of one message,
    # not of the conversation: what an image takes may not depend on questions that come later.
    if "batch_num_images" not in processor.image_processor.model_input_names:
        shown = [image for group in shown for image in group]
    if text is not None and shown and isinstance(processor, Gemma3Processor):  # asks for those of each prompt
        flat = iter(shown)
        shown = [list(islice(flat, prompt.count(processor.image_token))) for prompt in text]
    # Left to guess, some take a picture or clip of a height of 1 or 3 for one with its channels first.
    settings["input_data_format"] = "channels_last"
    try:
        inputs = dict(processor(images=shown or None, return_tensors="pt", **settings))
    except ValueError as error:
        raise ProcessorError(f"{type(processor).__name__} refuses its input: {error}") from error
    return {key: value for key, value in inputs.items() if not (alone and key in _OF_TEXT)}


def _check_lengths(processor: ProcessorMixin, clips: Sequence[Clip]) -> None:
    lengths = sorted({len(clip.frames) for clip in clips})
    # Qwen's processors state the size of every clip beside the patches of all of them.
    if len(lengths) > 1 and "video_grid_thw" not in processor.model_input_names:
        raise ProcessorError(
            f"clips of {', '.join(map(str, lengths))} frames for one batch, where {type(processor).__name__} takes "
            f"one length; {EQUAL_LENGTHS}"
        )


def _describe_clip(clip: Clip) -> dict[str, Any]:
    """Qwen's processors take index / fps for a frame's time, and total_num_frames / fps for the length."""
    times = clip.indices if clip.seconds is None else [second * clip.fps for second in clip.seconds]
    return {
        "total_num_frames": clip.total_frames,
        "fps": clip.fps,
        "duration": clip.duration,
        "frames_indices": list(times),
    }


def prepare_questions(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[Message]],
    device: torch.device,
    form: ChatForm | None = None,
) -> dict[str, Any]:
    """Left-padded model inputs, on `device`, of conversations that each end with a question.

    Token for token what a training batch has up to the answer; earlier answers included.

    Args:
        processor: the base model's.
        conversations: messages whose images and clips are decoded.
        device: where the tensors go.
        form: the processor's; None reads it off.

    Raises:
        ProcessorError: see `render`.
    """
    form = form or chat_form(processor)
    shown = [message.parts for messages in conversations for message in messages]
    images = [[part for part in parts if isinstance(part, Image.Image)] for parts in shown]
    clips = [part for parts in shown for part in parts if isinstance(part, Clip)]
    rendered = [render(processor, messages, form) for messages in conversations]
    encoded, inputs = _encode(processor, rendered, images, clips)
    inputs |= _pad(encoded, processor, left=True)
    del inputs["labels"]
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def decoded(messages: Sequence[Message], reader: VideoReader) -> list[Message]:
    """The messages with their images and clips read from disk.

    Raises:
        ImageError, VideoError: one of them cannot be decoded.
    """

    def read(part: Part) -> Part:
        if not isinstance(part, MediaFile):
            return part
        return load_image(part.path) if part.kind == "image" else reader.read(part.path)

    return [replace(message, parts=tuple(map(read, message.parts))) for message in messages]


class ChatCollator:
    """Collates samples to a right-padded training batch.

    The conversation is rendered answer by answer through the processor's chat template. Supervised are each
    answer's tokens and its end token and nothing else. Where the template ends an answer without a special
    token, as LLaVA-1.5's does, the tokenizer's end-of-sequence token takes the place of what it puts there.
    Prompt and answer are separate token sequences: no token spans their border, and what precedes an answer is
    exactly what evaluation gives the model. An answer that is not supervised is read like a prompt.

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
            ProcessorError: the chat template does not suit, a text contains a control token of the model's, or the
                processor takes no video; names the sample.
        """
        images, clips = self._read_images(samples), self._read_clips(samples)
        rendered = [] if all(sample in self._encoded for sample in samples) else [*map(self._render, samples)]
        try:
            if rendered:
                media_inputs = self._encode(samples, rendered, images, clips)
            else:
                order = [file.kind for sample in samples for file in sample.media]
                media_inputs = process_media(self.processor, images, clips, order=order) if order else {}
        except ProcessorError as error:
            names = ", ".join(f"{sample.id!r}" for sample in samples if sample.media)
            raise ProcessorError(f"sample {names}: {error}") from error
        encoded = [self._encoded[sample] for sample in samples]
        return {**_pad(encoded, self.processor, left=False), **media_inputs}

    def _read_images(self, samples: Sequence[Sample]) -> list[list[Image.Image]]:
        """Message by message."""
        images: list[list[Image.Image]] = []
        for sample in samples:
            shown = [[file for file in message.media if file.kind == "image"] for message in sample.messages]
            try:
                images += [[load_image(file.path) for file in files] for files in shown]
            except ImageError as error:
                raise ImageError(f"sample {sample.id!r}: {error}") from error
        return images

    def _read_clips(self, samples: Sequence[Sample]) -> list[Clip]:
        clips = []
        files = [(sample, file) for sample in samples for file in sample.media if file.kind == "video"]
        for sample, file in files:
            if self.reader is None:
                raise VideoError(f"sample {sample.id!r}: clip {file.path}, but no reader for clips")
            try:
                clips.append(self.reader.read(file.path))
            except VideoError as error:
                raise VideoError(f"sample {sample.id!r}: {error}") from error
        return clips

    def _encode(
        self,
        samples: Sequence[Sample],
        rendered: list[list[Segment]],
        images: list[list[Image.Image]],
        clips: list[Clip],
    ) -> dict[str, torch.Tensor]:
        """Fills the cache for `samples`; returns what the processor makes of images and clips."""
        encoded, media_inputs = _encode(self.processor, rendered, images, clips)
        for sample, tokens in zip(samples, encoded, strict=True):
            self.check_length(sample, len(tokens.ids))
            self._encoded[sample] = tokens
        return media_inputs

    @cached_property
    def _form(self) -> ChatForm:
        return chat_form(self.processor)

    def _render(self, sample: Sample) -> list[Segment]:
        try:
            return render(self.processor, sample.messages, self._form)
        except ProcessorError as error:
            raise ProcessorError(f"sample {sample.id!r}: {error}") from error

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


def collator_of(processor: Any, reader: VideoReader | None) -> ChatCollator | ClassCollator:
    """The collator of a processor's kind; a CLIP's has no use for the reader."""
    return ClassCollator(processor) if classifies(processor) else ChatCollator(processor, reader=reader)


@dataclass(frozen=True)
class _EncodedSample:
    ids: torch.Tensor  # [T] int32
    supervised: torch.Tensor  # [T] bool


def _encode(
    processor: ProcessorMixin,
    rendered: Sequence[Sequence[Segment]],
    images: Sequence[Sequence[Image.Image]],
    clips: Sequence[Clip],
) -> tuple[list[_EncodedSample], dict[str, Any]]:
    """Tokens of each conversation, and what the processor makes of images and clips."""
    # Only the processor knows how many tokens an image takes: it is given every prompt that shows one.
    asked = [
        segment for segments in rendered for number, segment in enumerate(segments) if segment.shows or number == 0
    ]
    inputs = process_media(processor, images, clips, [segment.prompt for segment in asked])
    prompts, masks = inputs.pop("input_ids"), inputs.pop("attention_mask")
    ids = {id(s): prompt[mask.bool()].tolist() for s, prompt, mask in zip(asked, prompts, masks, strict=True)}
    encoded = [
        _encode_sample(processor, segments, [ids.get(id(segment)) for segment in segments]) for segments in rendered
    ]
    return encoded, {key: value for key, value in inputs.items() if key not in _OF_TEXT}


def _encode_sample(
    processor: ProcessorMixin, segments: Sequence[Segment], processed: Sequence[list[int] | None]
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


def _tokenise_answer(processor: ProcessorMixin, segment: Segment, prompt: list[int]) -> list[int]:
    """Tokens of the answer as it follows its prompt.

    Some tokenizers (Llama's older form) put a word boundary before every text they are given, which inside a
    conversation is a token the model never has to say. So the answer is tokenised behind its prompt where
    that leaves the prompt's tokens as they are, and by itself where a token would span the border.
    """
    joint = _tokenise(processor, segment.text)
    if joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    return _tokenise(processor, segment.answer or "")


def _tokenise(processor: ProcessorMixin, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# What a batch fills up where its samples differ in length or in the number of their tiles, and with what; a pad token
# stands in `input_ids`.
_FILLED = {
    **{"attention_mask": 0, "labels": IGNORED_LABEL, "token_type_ids": 0, "mm_token_type_ids": 0},
    "pixel_values": 0,
    **{"logits_to_keep": 0, "shift_labels": IGNORED_LABEL},
}


def ready_batch(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of the collator's as it travels to the device: pixels in the dtype that the model rounds them to anyway,
    and the positions whose logits count.

    Args:
        batch: on the CPU, with labels.
        dtype: of the model's computations.
    """
    ready = answers_alone(batch)
    return {key: value.to(dtype) if key.startswith("pixel_values") else value for key, value in ready.items()}


def join_batches(first: Mapping[str, Tensor], second: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The batch that the collator makes of the samples of both, in their order.

    Classes of the second come behind those of the first, also where they are the same.
    """
    filled = {"input_ids": pad_token_id, **_FILLED}
    joined, classes = {}, classes_in(first)
    if classes:
        joined["candidates"] = torch.block_diag(first["candidates"], second["candidates"])
        labels = {key: value for key, value in second.items() if key.endswith("labels")}
        second = {**second, **{key: torch.where(v == IGNORED_LABEL, v, v + classes) for key, v in labels.items()}}
    for key in (key for key in dict.fromkeys([*first, *second]) if key not in joined):
        parts = [batch[key] for batch in (first, second) if key in batch]
        if key in filled:
            largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
            parts = [_filled(part, largest, filled[key]) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def classes_in(batch: Mapping[str, Tensor]) -> int:
    """How many classes a batch compares its pictures with; 0 for one that is answered in words."""
    return batch["candidates"].shape[1] if "candidates" in batch else 0


def _filled(tensor: Tensor, largest: Sequence[int], value: int) -> Tensor:
    missing = [most - size for size, most in zip(tensor.shape[1:], largest, strict=True)]
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)], value=value)


def _pad(encoded: Sequence[_EncodedSample], processor: ProcessorMixin, *, left: bool) -> dict[str, torch.Tensor]:
    pad_token_id = processor.tokenizer.pad_token_id
    length = max(len(sample.ids) for sample in encoded)
    input_ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, sample in enumerate(encoded):
        ids = sample.ids.long()
        place = slice(length - len(ids), None) if left else slice(len(ids))
        input_ids[row, place] = ids
        attention_mask[row, place] = 1
        labels[row, place] = torch.where(sample.supervised, ids, IGNORED_LABEL)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    # Tells Qwen's models which positions are image or video, from which they compute 3-D positions, and Gemma 3, whose
    # image tokens see each other both ways.
    name = "token_type_ids" if isinstance(processor, Gemma3Processor) else "mm_token_type_ids"
    if name in processor.model_input_names:
        batch[name] = torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
    return batch
