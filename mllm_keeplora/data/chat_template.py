"""Conversations as a model's own chat template writes them: prompts, answers, and the token that ends an answer."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import ProcessorMixin

from mllm_keeplora.data.conversation import Message, Part, kind_of
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.modeling.families import Media

# Stand for answers while a template is rendered: words that no template reads anything into.
_ANSWER = "keeplora-answer-{}-"
_QUESTION = "keeplora-question"
# What reasoning models' templates write around thoughts; in history they leave it out.
_THOUGHTS = re.compile(r"<think>(\s*</think>)?")
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*$")


class ProcessorError(KeepLoRAError, ValueError):
    """The base model's processor or chat template, or a text rendered by it, cannot be used."""


class _OpenThoughtError(ProcessorError):
    """A template that can be read, but asks for thoughts alone."""


@dataclass(frozen=True)
class Segment:
    """Rendered text of one answer and of what comes before it.

    Attributes:
        prompt: what the model is given; at its end the generation prompt.
        answer: what it is to say, with the end token; None for the answer that is asked for.
        supervised: whether it learns to say so.
        shows: images and clips of the prompt.
    """

    prompt: str
    answer: str | None
    supervised: bool
    shows: int

    @property
    def text(self) -> str:
        """Both, as they follow each other."""
        return self.prompt + (self.answer or "")


@dataclass(frozen=True)
class ChatForm:
    """How a base model's chat template writes answers, and what its tokenizer takes for control.

    Attributes:
        lead: spaces between the generation prompt and the answer, which belong to its first word.
        end: text that ends the answer, its last characters the end token.
        end_token: that token. Where the template writes none, as LLaVA-1.5's does, it is the tokenizer's
            end-of-sequence token.
        written: what the template itself writes in place of `end`.
        parts: whether the template reads content as a list of parts; otherwise as one text.
        opens, without: what the template asks with at the very end where a model may think first, and what it writes
            there before an answer without thoughts. Questions are asked with the latter: what is learnt and scored is
            the answer alone.
        controls: token id -> text of special tokens, and of those of images and clips. The token for unknown words
            is left out: any text may hold such words.
    """

    lead: str
    end: str
    end_token: str
    written: str
    parts: bool
    controls: Mapping[int, str]
    opens: str = ""
    without: str = ""


def chat_form(processor: ProcessorMixin) -> ChatForm:
    """How the processor's chat template writes answers: read off a conversation that it renders.

    Training supervises `end_token` last, generation stops there.

    Raises:
        ProcessorError: there is no template, it cannot render a question and its answer, or what it writes before
            an answer is not what it asks for one with, or it asks for thoughts alone; or the tokenizer ends all texts.
    """
    if classifies(processor):
        raise ProcessorError(
            "a CLIP chooses among classes and writes no answers: `keeplora chat RUN --image FILE --task TASK` names "
            "the class of a picture"
        )
    probe = [Message("user", (_QUESTION,)), Message("assistant", (_ANSWER.format(0),))]
    try:
        return _chat_form(processor, probe, parts=True)
    except ProcessorError:
        # A template that takes a text alone writes a list as Python does, or fails on it.
        try:
            return _chat_form(processor, probe, parts=False)
        except _OpenThoughtError:
            raise
        except ProcessorError:
            pass
        raise


def _chat_form(processor: ProcessorMixin, probe: list[Message], *, parts: bool) -> ChatForm:
    _check_ending(processor)
    asked, said = _QUESTION, _ANSWER.format(0)
    prompt = _apply(processor, probe[:1], parts, prompt=True)
    whole = _apply(processor, probe, parts, prompt=False)
    if prompt.count(asked) != 1 or whole.count(said) != 1 or "'type': 'text'" in whole:
        raise ProcessorError(
            f"the base model's chat template does not render a question and its answer: expected {asked!r} and "
            f"{said!r} in it, found {whole!r}. Give its processor a template that does (model.chat_template)"
        )
    before, after = whole.split(said)
    if not _alike(before, prompt):
        raise ProcessorError(
            f"the chat template rewrites what it rendered before, or puts words of its own before an answer: it asks "
            f"with {prompt!r} and writes {before!r} before the answer. Expected the same; give the base model's "
            "processor a template that only appends (model.chat_template)"
        )
    opens, without = _thoughtless(prompt, before)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    gap = len(after) - len(after.lstrip())
    controls = _control_tokens(processor)
    tokens = [token for token in controls.values() if after.startswith(token, gap)]
    if tokens:
        token = max(tokens, key=len)
        written = end = after[:gap] + token
    else:
        token = end = processor.tokenizer.eos_token
        written = after
    return ChatForm(lead if lead.strip(" ") == "" else "", end, token, written, parts, controls, opens, without)


def _thoughtless(prompt: str, before: str) -> tuple[str, str]:
    """`opens` and `without` of a template that asks with `prompt`, and writes `before` before an answer."""
    if _NO_THOUGHT.search(before) and not _NO_THOUGHT.search(prompt):
        shared = len(os.path.commonprefix([prompt, before]))
        return prompt[shared:], before[shared:]
    if _OPEN_THOUGHT.search(prompt):
        raise _OpenThoughtError(
            f"the chat template asks with an open thought, {prompt[-30:]!r}, and has no form for an answer without "
            "one: the answer would be learnt as a thought. Give the base model's processor a template that asks "
            "without <think>, or closes it (model.chat_template)"
        )
    return "", ""


def _check_ending(processor: ProcessorMixin) -> None:
    """Refuses tokenizers that put a token behind every text: the model would be asked behind the end of its answer."""
    tokenizer: Any = processor.tokenizer
    plain = tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]
    given = tokenizer(_QUESTION)["input_ids"]
    if given[len(given) - len(plain) :] != plain:
        raise ProcessorError(
            f"the base model's tokenizer ends every text with {tokenizer.decode(given[-1:])!r}, a prompt too, so that "
            "the answer would come behind the end. Set add_eos_token to false in its tokenizer_config.json, and take "
            "the token out of the post_processor in its tokenizer.json"
        )


def _alike(first: str, second: str) -> bool:
    """Whether two texts differ in white space and empty thoughts alone, in which templates do not agree with
    themselves: LLaVA-OneVision's asks with "assistant", a line break, and writes a space between them in history."""
    return "".join(_THOUGHTS.sub("", first).split()) == "".join(_THOUGHTS.sub("", second).split())


def _control_tokens(processor: ProcessorMixin) -> dict[int, str]:
    tokenizer: Any = processor.tokenizer
    found = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for kind in ("image", "video"):
        token = getattr(processor, f"{kind}_token", None)
        if token is not None:
            found[tokenizer.convert_tokens_to_ids(token)] = token
    found.pop(tokenizer.unk_token_id, None)
    return found


def _check_texts(processor: ProcessorMixin, messages: Sequence[Message], form: ChatForm) -> None:
    """Refuses texts that the model would not read as texts.

    Told by the tokenizer, not by comparing texts: one that ignores case takes `<IMAGE>` for `<image>`. Texts of a
    message are taken together, because templates write them without a gap.
    """
    tokenizer: Any = processor.tokenizer
    for message in messages:
        text = "".join(part for part in message.parts if isinstance(part, str))
        if form.without and message.role == "assistant" and ("<think>" in text or "</think>" in text):
            raise ProcessorError(
                f"the answer {text[:60]!r} has a thought, but the base model's chat template asks for thoughts itself, "
                "and is asked for answers without. Leave thoughts out of answers, or give the processor a template "
                "that asks without <think> (model.chat_template)"
            )
        for index in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if index in form.controls:
                token = form.controls[index]
                at = max(0, text.lower().find(token.lower()) - 30)
                raise ProcessorError(
                    f"the {message.role}'s text {text[at : at + 100]!r} contains {token!r}, which is no text to this "
                    "model but a control token; expected texts without. Remove it or write it another way"
                )


def render(processor: ProcessorMixin, messages: Sequence[Message], form: ChatForm) -> list[Segment]:
    """A conversation in the form of the chat template, answer by answer.

    What precedes an answer is the generation prompt with which the model is asked for it, in training and in
    evaluation, whatever the template writes there in history. Joined, the segments are what the model reads.

    Args:
        processor: the base model's.
        messages: the last one is an answer, or a question that the model is to answer.
        form: the processor's.

    Raises:
        ProcessorError: a template that does not suit, or a text with a control token.
    """
    _check_texts(processor, messages, form)
    segments: list[Segment] = []
    pieces: list[str] = []  # rendered between answers
    history: list[Message] = []
    start = 0
    for index, message in enumerate([*messages, None]):
        if message is None and index == start:
            break  # the conversation ends with an answer
        if message is not None and message.role != "assistant":
            history.append(message)
            continue
        pieces = _render_prompt(processor, history, form, pieces)
        shown = [part for asked in messages[start:index] for part in asked.parts if not isinstance(part, str)]
        prompt = _after_answer(form, pieces[-1]) if segments else _without_bos(processor, pieces[-1])
        prompt = prompt.removesuffix(form.opens) + form.without
        _check_media(processor, prompt, shown)
        answer = None if message is None else form.lead + message.text + form.end
        segments.append(Segment(prompt, answer, message is not None and message.supervised, len(shown)))
        history.append(Message("assistant", (_ANSWER.format(len(segments)),)))
        start = index + 1
    return segments


def _render_prompt(
    processor: ProcessorMixin, history: Sequence[Message], form: ChatForm, earlier: Sequence[str]
) -> list[str]:
    """What is rendered before, between and after the answers of `history`, the last piece asking for the next."""
    text = _apply(processor, history, form.parts, prompt=True)
    for message in history:
        lost = [part for part in message.parts if isinstance(part, str) and part.strip() not in text]
        if lost and message.role != "assistant":
            raise ProcessorError(
                f"the base model's chat template leaves out or changes the {message.role}'s text {lost[0][:100]!r}; "
                f"found {text[:300]!r}. Give its processor a template that writes it (model.chat_template)"
            )
    pieces = re.split(_ANSWER.format(r"\d+"), text)
    if len(pieces) != len(earlier) + 1 or not all(map(_alike, pieces, earlier)):
        raise ProcessorError(
            "the chat template rewrites what it rendered before, so answers cannot be told from prompts. Expected "
            f"{list(earlier)} between the answers, found {pieces[:-1]}. Give the base model's processor a chat "
            "template that only appends (model.chat_template)"
        )
    return [*earlier, pieces[-1]]


def _after_answer(form: ChatForm, piece: str) -> str:
    if not piece.startswith(form.written):
        raise ProcessorError(
            f"the chat template ends an answer with {form.written!r}, but writes {piece[:60]!r} after one that is not "
            "the last; expected the same. Give the base model's processor a template that does (model.chat_template)"
        )
    return piece[len(form.written) :]


def _check_media(processor: ProcessorMixin, prompt: str, shown: Sequence[Part]) -> None:
    """Every image and clip has its placeholder, where the template put it."""
    kinds: tuple[Media, ...] = ("image", "video")
    for kind in kinds:
        expected = sum(kind_of(part) == kind for part in shown)
        token = getattr(processor, f"{kind}_token", None)
        if token is None and expected:
            raise ProcessorError(
                f"{type(processor).__name__} takes no {kind}; expected a base model of a {kind} family"
            )
        found = 0 if token is None else prompt.count(token)
        if found != expected:
            raise ProcessorError(
                f"the {kind} token {token!r} comes {found} times in {prompt[:300]!r}; expected {expected}, one for "
                f"each {kind} shown: the base model's chat template does not place {kind}s there. Give its processor "
                "one that does (model.chat_template)"
            )


def _apply(processor: ProcessorMixin, messages: Sequence[Message], parts: bool, *, prompt: bool) -> str:
    content = _parts if parts else _one_text
    chat: list[Any] = [{"role": m.role, "content": content(processor, m)} for m in messages]
    try:
        text: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    # All that a template can raise: itself, on a role that it does not know, or where content has another form.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise ProcessorError(
            f"the base model's chat template cannot render messages of {roles} ({type(error).__name__}: {error}); give "
            "its processor one that can (model.chat_template)"
        ) from error
    return text


def _parts(processor: ProcessorMixin, message: Message) -> list[dict[str, str]]:
    if message.role != "user":  # templates read the first part of these alone
        return [{"type": "text", "text": message.text}]
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": kind_of(part)} for part in message.parts
    ]


def _one_text(processor: ProcessorMixin, message: Message) -> str:
    """Placeholders on lines of their own, as in LLaVA's data."""
    if all(isinstance(part, str) for part in message.parts):
        return message.text
    if getattr(processor, "image_token", None) != "<image>":
        raise ProcessorError(
            "the base model's chat template reads content as one text and places no images or clips; give its "
            "processor one that reads parts (model.chat_template)"
        )
    return "".join(part if isinstance(part, str) else f"<{kind_of(part)}>\n" for part in message.parts)


def _without_bos(processor: ProcessorMixin, text: str) -> str:
    """Removes a begin-of-sequence token that the tokenizer is going to add itself."""
    tokenizer: Any = processor.tokenizer
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text
