"""What a model is shown, asked and taught: messages of texts, images and clips."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from mllm_keeplora.data.video.reader import Clip
from mllm_keeplora.modeling.families import Media

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class MediaFile:
    """An image or clip on disk."""

    kind: Media
    path: Path


# A text, or something shown: still on disk in records, decoded where a model is asked.
Part = str | MediaFile | Image.Image | Clip


def kind_of(part: Part) -> Media | Literal["text"]:
    """What a part is."""
    if isinstance(part, str):
        return "text"
    if isinstance(part, MediaFile):
        return part.kind
    return "video" if isinstance(part, Clip) else "image"


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who says it.
        parts: in the order in which the chat template is given them; an assistant's is one text.
        supervised: whether an assistant's text is learnt; without meaning for the other roles.
    """

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True

    @property
    def text(self) -> str:
        """Its texts, joined by line breaks."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation; it ends with an assistant's message.

    Attributes:
        id: the record's `id` or `question_id`, or `<file>:<row>` where it has neither.
        messages: system messages (at the beginning), questions and answers.
    """

    id: str
    messages: tuple[Message, ...]

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The images and clips it shows, in order."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, MediaFile))

    @property
    def kinds(self) -> frozenset[Media]:
        """What it shows; empty for text alone."""
        return frozenset(file.kind for file in self.media)

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts, in order."""
        return tuple(message.text for message in self.messages if message.role == "assistant")
