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
        accepted: other answers that evaluation counts as right; likewise.
    """

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True
    accepted: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Its texts, joined by line breaks."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The images and clips it shows, in order."""
        return tuple(part for part in self.parts if isinstance(part, MediaFile))


@dataclass(frozen=True)
class Classes:
    """What a picture may show, and how that is said.

    Attributes:
        keys: as folders and records name the classes.
        names: the same classes as prompts and replies name them.
        templates: prompts with `{}` in the place of the name. Training takes the first, evaluation the mean of all.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self, template: str) -> list[str]:
        """One of each class."""
        return [template.replace("{}", name) for name in self.names]


@dataclass(frozen=True)
class Sample:
    """One conversation; it ends with an assistant's message.

    Attributes:
        id: the record's `id` or `question_id`, or `<file>:<row>` where it has neither.
        messages: system messages (at the beginning), questions and answers.
        classes: what its answer, a name, is chosen from; None for an answer in words.
    """

    id: str
    messages: tuple[Message, ...]
    classes: Classes | None = None

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The images and clips it shows, in order."""
        return tuple(file for message in self.messages for file in message.media)

    @property
    def kinds(self) -> frozenset[Media]:
        """What it shows; empty for text alone."""
        return frozenset(file.kind for file in self.media)

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts, in order."""
        return tuple(message.text for message in self.messages if message.role == "assistant")

    @property
    def questions(self) -> tuple[tuple[tuple[Message, ...], Message], ...]:
        """(what the model is asked, the answer) for each answer that is learnt: one question of a test each.

        A question is asked on its own, with the system message and the media of the record, where all media stand at
        the beginning and every answer is learnt: questions about one picture. Else what comes before it is its context.
        """
        start = 1 if self.messages[0].role == "system" else 0
        shown = self.messages[start].media
        apart = self.media == shown == self.messages[start].parts[: len(shown)]
        apart = apart and all(message.supervised for message in self.messages if message.role == "assistant")
        questions = []
        for index, message in enumerate(self.messages):
            if message.role == "assistant" and message.supervised:
                before = self.messages[:index]
                if apart and index > start + 1:
                    before = (*self.messages[:start], Message("user", (*shown, *before[-1].parts)))
                questions.append((before, message))
        return tuple(questions)
