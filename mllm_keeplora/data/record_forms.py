"""One record, in whichever form its tool writes it, as a conversation.

| form | keys |
|---|---|
| LLaVA, ShareGPT (LLaMA-Factory) | `conversations`: messages of `from` (human, gpt, system) and `value` |
| TRL, OpenAI, ms-swift, Qwen | `messages`: messages of `role` (user, assistant, system) and `content` |
| TRL | `prompt` and `completion`, both texts or both messages |
| LLaVA test, CL-VISTA | `text` or `question`, and `answer` (`answer_bbox`, `answers`) |
| ms-swift | `query`, `response`, and `history` |
| Alpaca | `instruction`, `input`, `output`, and `history` |
| open-r1, MLLM-CTBench | `problem` and `solution` |

Every form may have `system` (`system_prompt`, `system_message`), and media: `image`, `images`, `image_name` and the
like, or inside a message's content. What a record says and this project does not do (`tools`, `rejected`, ...) is
refused by name, and so is what belongs to a question and would not be asked (`options`, `context`, ...). All other keys
are the user's own and reach the scoring function of a test record.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

from mllm_keeplora.data.conversation import Role
from mllm_keeplora.data.record_files import BadRecord, Converted, Extracted, kind
from mllm_keeplora.modeling.families import Media

# Where media stand in a question's text.
PLACEHOLDERS: dict[str, Media] = {"<image>": "image", "<video>": "video"}
_PLACEHOLDER = re.compile("(<image>|<video>)")
# Those of other tools: MMMU, MiniCPM-V, Phi, InternLM-XComposer, Qwen-VL, and the tokens of several models.
_FOREIGN_PLACEHOLDER = re.compile(
    r"<\|?(?:image|img|video)[ _-]?\d+\|?>|<(?:image|video)here>|<img>[^<]*</img>|<\|(?:image|video)(?:_pad)?\|>"
    r"|<start_of_image>|<\|vision_start\|>|\[img\]",
    re.IGNORECASE,
)
# Keys that name media: those of LLaVA, which has one medium a record and shows it before its question ...
_ONE = ("{}", "{}_name", "{}_path", "{}_file")
# ... and those whose media stand where the placeholders are.
_SEVERAL = ("{}s", "{}_names", "{}_paths", "{}_files")
MEDIA_KEYS: dict[str, Media] = {
    pattern.format(medium): medium for medium in get_args(Media) for pattern in (*_ONE, *_SEVERAL)
}
_ONE_MEDIUM_KEYS = frozenset(pattern.format(medium) for medium in get_args(Media) for pattern in _ONE)
_MEDIA_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv"),
)
# Keys that can name nothing but a medium, whatever their case and the file's suffix.
_MEDIUM_KEY = re.compile(r"(?:image|img|picture|photo|video)s?(?:[_ -]?(?:path|file|name|filename)s?)?(?:[_ -]?\d+)?")
_MEDIA_WORDS = ("image", "img", "video", "clip", "picture", "photo", "frame")
# A part of a clip, which InternVL's and VideoChat2's code cuts out.
_CUTS = (
    *(("clip",), ("start", "end"), ("start_time", "end_time"), ("video_start", "video_end")),
    *(("start_sec", "end_sec"), ("start_second", "end_second"), ("video_start",), ("video_end",)),
)

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_TURN: tuple[Role, Role] = ("user", "assistant")
_CHATS = ("conversations", "messages")
# Question key -> the keys of its answer in the same form, the first that is there counts.
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "text": ("answer", "answer_bbox", "answers"),
    "question": ("answer", "answer_bbox", "answers"),
    "query": ("response",),
    "instruction": ("output",),
    "prompt": ("completion",),
    "problem": ("solution",),
}
_SYSTEMS = ("system", "system_prompt", "system_message")  # the second is OpenOrca's
# What benchmarks keep beside a question and add to it when they ask.
_ADDED_TO_QUESTIONS = re.compile(
    r"context|hint|passage|inputs|(?:(?:question|prompt|instruction)_)?(?:prefix|suffix)|(?:pre|post)_prompt"
    r"|(?:options?|choices?|candidates?)(?:_list)?|[A-H]|a\d|(?:option|choice)[_ ]?\w"
)
_WORD = re.compile(r"\w+|[^\w\s]")
_LABEL = re.compile(r"^\(?[A-Za-z0-9][.):]\s*")
_ANSWERS = tuple(dict.fromkeys(key for keys in _QUESTIONS.values() for key in keys))
# LLaVA's test form: a scoring function is given the record's own `text` and `answer`.
TEST_QUESTIONS = ("text", "question")
_LLAVA_FORMS = ("conversations", *TEST_QUESTIONS)
_SWITCHES = ("loss", "weight", "train")  # ms-swift's; OpenAI's; axolotl's
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # what file systems take, in bytes
_WEIGHTS = ("loss_weight", "sample_weight")  # one, or none, is what every answer has here
_REFUSED_KEYS = (
    *("tools", "functions", "audio", "audios", "objects", "loss_scale", "kto_tag"),
    *("loss_mask", "train_on_inputs", "train_on_prompt", *_WEIGHTS),
)
_REFUSED_PREFIXES = ("chosen", "rejected")


@dataclass(frozen=True)
class Slot:
    """A place for a medium in a message.

    Attributes:
        kind: image or video.
        name: the file as the record names it; None for a placeholder.
        index: of a placeholder, its medium's place in the record's list, where that is stated.
    """

    kind: Media
    name: str | None = None
    index: int | None = None


@dataclass
class Said:
    """A message as it stands in a record, media not yet found.

    Attributes:
        role: who says it.
        parts: texts and media in order.
        supervised: whether an assistant's text is learnt.
        accepted: other answers that count as right.
    """

    role: Role
    parts: list[str | Slot]
    supervised: bool = True
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parsed:
    """A record's content.

    Attributes:
        id: text or whole number; None where it has none.
        messages: system, then questions and answers in turn.
        is_test_form: LLaVA's test form.
    """

    id: str | int | None
    messages: list[Said] = field(default_factory=list)
    is_test_form: bool = False


def parse_record(value: object, answered: bool = True) -> Parsed:
    """One record's content.

    Args:
        value: a JSON value, or a `BadRecord` that is raised.
        answered: False where its last answer may be missing: it lies in another file, or nobody asks for it.

    Raises:
        BadRecord: it cannot be used.
    """
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, dict):
        raise BadRecord(f"the record is a JSON {kind(value)}; expected an object")
    record = {key: item for key, item in value.items() if item is not None}
    _refuse_keys(record)
    messages, question = _read_form(record, answered)
    _add_system(messages, record)
    _check_supervised(messages, answered)
    _place_media(messages, record, as_llava=question in _LLAVA_FORMS)
    return Parsed(_read_id(record), messages, question in TEST_QUESTIONS)


def _refuse_keys(record: Mapping[str, Any]) -> None:
    for key, value in record.items():
        refused = key in _REFUSED_KEYS or key.startswith(_REFUSED_PREFIXES)
        neutral = value is False or value in ("", [], {}) or (key in _WEIGHTS and value == 1)
        if refused and not neutral:
            raise BadRecord(f"it has {key!r}, which nothing here reads; leave the record out, or the key")
        if key in _SWITCHES and isinstance(value, bool | int | float):
            raise BadRecord(f"it has {key!r}; expected that switch at a message of the assistant's")
        if key == "label" and isinstance(value, bool):
            raise BadRecord(
                "it has a 'label' of true or false, as preference data have; leave the record out, or the key"
            )


def _read_id(record: Mapping[str, Any]) -> str | int | None:
    value = record.get("id", record.get("question_id"))
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise BadRecord(f"the id is {value!r}, a JSON {kind(value)}; expected text or a whole number")
    return value


# --- Forms ---


def _read_form(record: Mapping[str, Any], answered: bool) -> tuple[list[Said], str]:
    """The messages, and the key of the questions."""
    found = [key for key in _CHATS if key in record]
    complete = [q for q, answers in _QUESTIONS.items() if q in record and any(a in record for a in answers)]
    if len(found) == 1 and complete == ["problem"]:  # data of mathematics have the pair once more as messages
        said = _said_in(_read_chat(record[found[0]], found[0], answered))
        if all(_words(text) in said for key in ("problem", "solution") for text in _texts(record[key])):
            complete = []
    if len(found) + len(complete) > 1:
        names = ", ".join(map(repr, (*found, *complete)))
        raise BadRecord(f"several forms in one record, beginning with {names}; keep one of them")
    if found:
        _refuse_history(record)
        return _read_chat(record[found[0]], found[0], answered), found[0]
    questions = complete or [key for key in _QUESTIONS if key in record]
    if not questions:
        raise BadRecord(
            "no question: none of 'conversations' (LLaVA, ShareGPT), 'messages' (TRL, ms-swift), "
            f"{', '.join(map(repr, _QUESTIONS))} is there; found {', '.join(map(repr, record)) or 'no key at all'}"
        )
    if len(questions) > 1:
        raise BadRecord(f"several questions, {', '.join(map(repr, questions))}; keep one of them")
    messages = _read_pair(record, questions[0], answered)
    _refuse_unasked(record, questions[0], messages)
    return messages, questions[0]


def _read_pair(record: Mapping[str, Any], question: str, answered: bool) -> list[Said]:
    """A question and an answer under keys of their own, with what went before them."""
    asked = record[question]
    answers = [key for key in _QUESTIONS[question] if key in record] or [key for key in _ANSWERS if key in record]
    if isinstance(asked, list) and question == "prompt" and answers:
        _refuse_history(record)
        return _read_prompt(asked, record[answers[0]])
    if question == "instruction":
        asked = _join_input(asked, record.get("input"))
    elif record.get("input"):
        raise BadRecord(f"'input' beside {question!r}; expected it beside 'instruction'")
    messages = [
        Said(role, _read_content(text, f"'history'[{turn}]", role))
        for turn, pair in enumerate(_read_history(record))
        for role, text in zip(_TURN, pair, strict=True)
    ]
    messages.append(Said("user", _read_content(asked, f"question ({question!r})", "user")))
    if answered and not answers:
        wanted = dict.fromkeys((*_QUESTIONS[question], *_ANSWERS))
        raise BadRecord(
            f"no answer: none of {', '.join(map(repr, wanted))} is there; found {', '.join(map(repr, record))}"
        )
    if answers and (answered or _texts(record[answers[0]])):  # questions to be handed in have '' there
        messages.append(_read_answer(record[answers[0]], "answer"))
    return messages


def _refuse_unasked(record: Mapping[str, Any], question: str, messages: Sequence[Said]) -> None:
    """Other questions, other answers, and what belongs to the question: a record has to say which of them counts."""
    questions = [message for message in messages if message.role == "user"]
    said, asked = _said_in(messages), _said_in(questions[-1:])
    for key, value in record.items():
        options = _texts(value)
        if key in _QUESTIONS and key != question:  # Alpaca's `text` is all of the record
            unread = any(_words(text) not in said and asked not in _words(text) for text in options)
        elif _is_other_answer(key, question):
            unread = any(_words(text) not in said for text in [*options, *_numbers(value)])
        elif _ADDED_TO_QUESTIONS.fullmatch(key):
            unread = bool(options) and not any(_words(_LABEL.sub("", text, count=1)) in said for text in options)
        else:
            unread = False
        if unread:
            raise BadRecord(
                f"it has {key!r} {_short(value)} beside {question!r}, which would be neither asked nor learnt; write "
                f"it into {question!r} or the answer, or give the key another name"
            )


def _is_other_answer(key: str, question: str) -> bool:
    if question == "problem" and key == "answer":  # the short one, beside a derivation
        return True
    return key in ("response", "output", "completion") and key not in _QUESTIONS[question]


def _texts(value: Any) -> list[str]:
    """The texts of a text, or of a list or object of texts, blanks left out."""
    values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _numbers(value: Any) -> list[str]:
    """A number in digits."""
    return [f"{value:.15g}"] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _said_in(messages: Sequence[Said]) -> str:
    """The words of all messages."""
    return _words(" ".join(part for message in messages for part in message.parts if isinstance(part, str)))


def _words(text: str) -> str:
    """For comparison: words and signs with one blank around each, in small letters."""
    return " ".join(["", *_WORD.findall(_PLACEHOLDER.sub(" ", text).lower()), ""])


def _join_input(instruction: Any, more: Any) -> Any:
    """Alpaca's two halves of a question."""
    if not more:
        return instruction
    if not all(isinstance(text, str) and not isinstance(text, Converted) for text in (instruction, more)):
        raise BadRecord("'instruction' or 'input' is no text; expected both in quotes")
    return f"{instruction}\n{more}" if instruction else more


def _read_history(record: Mapping[str, Any]) -> list[Any]:
    history = record.get("history", [])
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs:
        raise BadRecord(f"'history' is a JSON {kind(history)} of another form; expected a list of [question, answer]")
    return list(history)


def _refuse_history(record: Mapping[str, Any]) -> None:
    if record.get("history"):
        raise BadRecord("'history' beside messages; expected what went before among them")


def _read_prompt(prompt: list[Any], completion: Any) -> list[Said]:
    """TRL's prompt and completion as messages: nothing of the prompt is learnt."""
    if not isinstance(completion, list) or not all(isinstance(message, dict) for message in completion):
        raise BadRecord(f"'prompt' has messages, 'completion' is a JSON {kind(completion)}; expected messages in both")
    messages = _read_chat([*prompt, *completion], "prompt + completion")
    for message in messages[: len(prompt)]:
        message.supervised = message.role != "assistant"
    return messages


def _read_chat(value: Any, key: str, answered: bool = True) -> list[Said]:
    """Reads questions and answers in turn, behind at most one system message; the last one is an answer."""
    if not isinstance(value, list) or not value:
        raise BadRecord(f"no question: {key!r} is empty or no list; expected a list of messages")
    messages = [_read_message(message, f"{key}[{index}]") for index, message in enumerate(value)]
    asked = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(asked):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise BadRecord(
                f"{key}[{index + len(messages) - len(asked)}] is the {message.role}'s; expected the {expected}'s "
                "(user or human and assistant or gpt in turn, behind at most one system message)"
            )
    if not asked or (answered and len(asked) % 2):
        raise BadRecord(f"no answer: {key!r} ends with a question")
    return messages


def _read_message(message: Any, where: str) -> Said:
    styles = {"role": "content", "from": "value"}
    style = next((key for key in styles if isinstance(message, dict) and message.get(key) is not None), None)
    if style is None:
        raise BadRecord(
            f"{where} is a JSON {kind(message)} without a role; expected an object with 'role' and 'content', or "
            "'from' and 'value'"
        )
    text_key, role = styles[style], _ROLES.get(message[style]) if isinstance(message[style], str) else None
    if role is None:
        raise BadRecord(f"{where} has {style!r} {message[style]!r}; expected one of {', '.join(_ROLES)}")
    unknown = [k for k, v in message.items() if v is not None and k not in (style, text_key, *_SWITCHES)]
    if unknown:
        raise BadRecord(f"{where} has {', '.join(map(repr, unknown))}, which nothing here reads; remove it")
    what = f"{'question' if role == 'user' else 'answer' if role == 'assistant' else 'text'} ({where}[{text_key!r}])"
    if role == "assistant":
        said = _read_answer(message.get(text_key), what)
        said.supervised = _read_switch(message, where)
        return said
    if any(message.get(switch) for switch in _SWITCHES):
        raise BadRecord(f"{where} is to be learnt, but is no answer; only the assistant's messages are learnt")
    return Said(role, _read_content(message.get(text_key), what, role))


def _read_switch(message: Mapping[str, Any], where: str) -> bool:
    given = {key: message[key] for key in _SWITCHES if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRecord(f"{where} has {key!r} {value!r}; expected true or false: an answer is learnt or it is not")
    if len(set(map(bool, given.values()))) > 1:
        raise BadRecord(f"{where} has {' and '.join(map(repr, given))}, which contradict each other")
    return all(given.values())


def _read_answer(value: Any, what: str) -> Said:
    """The assistant's message; of several accepted answers, the first is the one that is learnt."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        answers = [_read_content(answer, what, "assistant")[0] for answer in value]
        return Said("assistant", [answers[0]], accepted=tuple(map(str, answers[1:])))
    return Said("assistant", _read_content(value, what, "assistant"))


def _add_system(messages: list[Said], record: Mapping[str, Any]) -> None:
    keys = [key for key in _SYSTEMS if record.get(key) not in (None, "")]
    if not keys:
        return
    if len(keys) > 1 or messages[0].role == "system":
        other = repr(keys[1]) if len(keys) > 1 else "a system message"
        raise BadRecord(f"{keys[0]!r} beside {other}; keep one of them")
    messages.insert(0, Said("system", _read_content(record[keys[0]], repr(keys[0]), "system")))


def _check_supervised(messages: Sequence[Said], answered: bool) -> None:
    if answered and not any(message.role == "assistant" and message.supervised for message in messages):
        raise BadRecord("no answer to learn: each one is switched off")


# --- Content ---


def _read_content(value: Any, what: str, role: Role) -> list[str | Slot]:
    """Texts and media of one message. Placeholders are media in questions alone."""
    parts: list[str | Slot] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict) and isinstance(value, list):
            part = _read_part(part, what)
        elif part is None:
            raise BadRecord(f"no {what}")
        elif isinstance(part, str) and isinstance(value, list):
            raise BadRecord(
                f'the {what} has {_short(part)} among its parts; expected {{"type": "text", "text": "..."}}'
            )
        elif not isinstance(part, str):
            raise BadRecord(f"the {what} is {_short(part)}, a JSON {kind(part)}; expected text in quotes")
        if isinstance(part, Converted):
            of = "binary data" if isinstance(part, Extracted) else f"no text but a date or the like ({part})"
            raise BadRecord(f"the {what} is {of} in its table; expected text: write that column as strings")
        if isinstance(part, Slot) and role != "user":
            raise BadRecord(f"the {what} shows {part.kind}s; expected them in questions alone")
        parts += _split(part) if isinstance(part, str) and role == "user" else [part]
    if not any(isinstance(part, str) and _is_seen(part) for part in parts):
        raise BadRecord(f"no {what}: it is empty")
    return parts if role == "user" else ["".join(map(str, parts)).strip()]


def _is_seen(text: str) -> bool:
    """Whether it has more than blanks, controls and marks without a width (a byte order mark, U+200B)."""
    return any(unicodedata.category(char) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for char in text)


def _split(text: str) -> list[str | Slot]:
    return [Slot(PLACEHOLDERS[piece]) if piece in PLACEHOLDERS else piece for piece in _PLACEHOLDER.split(text)]


def _read_part(part: Mapping[str, Any], what: str) -> str | Slot:
    """{"type": "text", "text": ...}, or {"type": "image"}, with the file where the record has no list of them."""
    given = {key: value for key, value in part.items() if value is not None}
    named = given.pop("type", next(iter(given), None))
    if named == "text" and isinstance(given.get("text"), str) and len(given) == 1:
        text: str = given["text"]
        return text
    medium = next((m for m in get_args(Media) if named in (m, f"{m}_url")), None)
    # Rows of llava-instruct-mix-vsft say which of the record's images it is.
    index = given.pop("index", None) if given.keys() == {"index"} else None
    unread = [key for key in given if key not in (medium, f"{medium}_url", "url", "path")]
    if not isinstance(index, int | None) or isinstance(index, bool):
        unread.append("index")
    if medium is None or unread or len(given) > 1:
        raise BadRecord(
            f"the {what} has a part {_short(dict(part))}; expected "
            '{"type": "text", "text": "..."}, {"type": "image"} or {"type": "image", "image": "..."} (or video)'
        )
    if not given:
        return Slot(medium, index=index)
    [value] = given.values()
    if isinstance(value, dict) and value.keys() == {"url"}:  # OpenAI's {"image_url": {"url": ...}}
        value = value["url"]
    return Slot(medium, read_name(value, medium))


def read_name(value: Any, medium: Media) -> str:
    """The path of a file, from any form that tools write it in.

    Raises:
        BadRecord: it is none.
    """
    if isinstance(value, dict) and value.get("bytes") is None and value.keys() <= {"bytes", "path"}:
        value = value.get("path")  # datasets' form of a medium
    if not isinstance(value, str):
        raise BadRecord(f"the {medium} is a JSON {kind(value)}; expected the path of a file")
    if value.startswith("file://"):
        value = unquote(urlsplit(value).netloc + urlsplit(value).path)
    elif value.startswith("data:") or "://" in value[:12]:
        raise BadRecord(f"the {medium} is {_short(value)}; expected the path of a file: write it to one")
    if not value.strip() or "\0" in value:
        raise BadRecord(f"the {medium} path is {value!r}; expected the path of a file")
    if any(len(name.encode()) > _LONGEST_NAME for name in value.split("/")) or len(value) > _LONGEST_PATH:
        raise BadRecord(
            f"the {medium} is {_short(value)}, too long for a path; expected the path of a file: write what is encoded "
            "there to one"
        )
    return value


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Media ---


def _place_media(messages: Sequence[Said], record: Mapping[str, Any], as_llava: bool) -> None:
    """Fills the questions' placeholders with the media that the record names."""
    named, one_medium = _named_media(record)
    questions = [message for message in messages if message.role == "user"]
    slots = [part for message in questions for part in message.parts if isinstance(part, Slot)]
    if as_llava and {slot.kind for slot in named} == {"video"} and all(slot == Slot("image") for slot in slots):
        for message in questions:  # LLaVA-Video's data write <image> for a clip
            message.parts = [Slot("video") if part == Slot("image") else part for part in message.parts]
        slots = [Slot("video")] * len(slots)
    open_slots = [slot for slot in slots if slot.name is None]
    if not slots:
        _refuse_other_places(messages, shown=bool(named))
        questions[0].parts[:0] = named
    else:
        _check_counts(open_slots, named)
        _check_order(open_slots)
        names = {medium: iter([slot.name for slot in named if slot.kind == medium]) for medium in get_args(Media)}
        for message in questions:
            message.parts = [
                Slot(part.kind, next(names[part.kind])) if isinstance(part, Slot) and part.name is None else part
                for part in message.parts
            ]
    shown = len(named) + len(slots) - len(open_slots)
    _refuse_unread(record, shown > 0)
    if any(isinstance(part, Slot) and part.kind == "video" for message in questions for part in message.parts):
        _refuse_cut(record)
    for message in questions:
        message.parts = _tidy(message.parts, first=as_llava and one_medium and shown == 1)


def _named_media(record: Mapping[str, Any]) -> tuple[list[Slot], bool]:
    """What the record names beside its messages, and whether by keys of one medium alone."""
    named, keys = [], []
    for medium in get_args(Media):
        used = [key for key, its in MEDIA_KEYS.items() if its == medium and record.get(key) not in (None, [])]
        if len(used) > 1:
            raise BadRecord(f"{medium}s under {' and '.join(map(repr, used))}; keep one of them")
        for key in used:
            value = record[key]
            named += [Slot(medium, read_name(name, medium)) for name in (value if isinstance(value, list) else [value])]
        keys += used
    return named, all(key in _ONE_MEDIUM_KEYS for key in keys)


def _refuse_other_places(messages: Sequence[Said], shown: bool) -> None:
    """Places that are written as another tool writes them, or where nothing is shown, in a record without ours."""
    for message in messages:
        text = " ".join(part for part in message.parts if isinstance(part, str))
        found = _FOREIGN_PLACEHOLDER.search(text) if message.role != "assistant" else None
        if shown and message.role == "system":
            found = found or _PLACEHOLDER.search(text)
        if found is not None:
            raise BadRecord(
                f"the {message.role}'s text has {_short(found.group())} where media seem to be meant; expected <image> "
                "or <video> in a question, and the file under 'images' or 'videos'"
            )


def _check_order(open_slots: Sequence[Slot]) -> None:
    for medium in get_args(Media):
        for place, slot in enumerate(slot for slot in open_slots if slot.kind == medium):
            if slot.index not in (None, place):
                raise BadRecord(
                    f"the {medium} of index {slot.index} is shown at place {place}, both counted from 0; expected them "
                    "in the order of the record's list"
                )


def _refuse_cut(record: Mapping[str, Any]) -> None:
    for keys in _CUTS:
        values = [
            value for key in keys for value in (record[key] if isinstance(record.get(key), list) else [record.get(key)])
        ]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise BadRecord(
                f"{' and '.join(map(repr, keys))} seem to say which part of the clip is meant, but clips are shown "
                "whole; cut the file, or remove the key"
            )


def _check_counts(open_slots: Sequence[Slot], named: Sequence[Slot]) -> None:
    counts = {
        medium: [sum(slot.kind == medium for slot in slots) for slots in (open_slots, named)]
        for medium in get_args(Media)
    }
    for placeholder, medium in PLACEHOLDERS.items():
        if counts[medium][0] and not counts[medium][1]:
            raise BadRecord(f"no {medium} although the question has {placeholder}")
    for placeholder, medium in PLACEHOLDERS.items():
        places, files = counts[medium]
        if places != files:
            raise BadRecord(
                f"{files} {medium}s are named, but its questions have {places} times {placeholder}; expected as many "
                "of one as of the other"
            )


def _refuse_unread(record: Mapping[str, Any], shown: bool) -> None:
    """A key that seems to name a medium and is not read would ask the question without its picture."""
    for key, value in record.items():
        if key in MEDIA_KEYS or key in (*_QUESTIONS, *_ANSWERS):
            continue
        values = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v]
        must = bool(_MEDIUM_KEY.fullmatch(key.lower()))
        name = next(
            (v for v in values if must or isinstance(v, Extracted) or v.lower().endswith(_MEDIA_SUFFIXES)), None
        )
        about_media = any(word in key.lower() for word in _MEDIA_WORDS)
        metadata = key.lower().endswith(("id", "url")) or not about_media
        if name and not (shown and metadata):
            raise BadRecord(
                f"{key!r} seems to name a medium ({_short(name)}) that is not shown; name it 'image' or "
                "'video', with others in a list 'images' or 'videos', or remove it"
            )


def _tidy(parts: Sequence[str | Slot], first: bool) -> list[str | Slot]:
    """Without blanks at the ends and between media. `first` puts media before texts, as LLaVA's code does."""
    if first:
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    merged: list[str | Slot] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, str) and isinstance(last, str):
            merged[-1] = last + part
        else:
            merged.append(part)
    kept = [part for part in merged if not isinstance(part, str) or part.strip()]
    texts = [index for index, part in enumerate(kept) if isinstance(part, str)]
    kept[texts[0]] = str(kept[texts[0]]).lstrip()
    kept[texts[-1]] = str(kept[texts[-1]]).rstrip()
    return kept
