"""Whether a reply follows rules that stand in the record: for instructions, and for answers that are one word of it."""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

Doc = dict[str, Any]


def _words(reply: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", reply))


def _lines(reply: str) -> list[str]:
    return [line.strip() for line in reply.splitlines() if line.strip()]


def _begun(reply: str, mark: str) -> int:
    return sum(re.match(mark, line) is not None for line in _lines(reply))


def _has_keys(reply: str, keys: list[str]) -> bool:
    try:
        found = json.loads(re.sub(r"^```(?:json)?|```$", "", reply.strip()))
    except (ValueError, RecursionError):  # no JSON, or nested beyond all measure
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


def _composed(value: Any) -> Any:
    """Texts in NFC: tokenizers compose accents, so a reply never has them as a decomposed rule does."""
    if isinstance(value, dict):
        return {name: _composed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_composed(item) for item in value]
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


# What a rule's value may be: a number in quotes would never be equal to a count.
VALUES: dict[str, Callable[[Any], bool]] = {
    "a text": _is_text,
    "a whole number": lambda value: type(value) is int,
    "[text, whole number]": lambda value: (
        isinstance(value, list) and [*map(type, value)] == [str, int] and value[0] != ""
    ),
    "a list of texts": lambda value: isinstance(value, list) and value != [] and all(map(_is_text, value)),
    "true or false": lambda value: isinstance(value, bool),
}
# Name of a rule -> its value's kind, and whether a reply follows it, given the value that stands in the record.
RULES: dict[str, tuple[str, Callable[[str, Any], bool]]] = {
    "word": ("a text", lambda reply, text: _words(reply, text) > 0),  # as a whole word, case counts
    "without": ("a text", lambda reply, text: _words(reply, text) == 0),
    "times": ("[text, whole number]", lambda reply, pair: _words(reply.lower(), pair[0].lower()) == pair[1]),
    "at_most_words": ("a whole number", lambda reply, most: 0 < len(reply.split()) <= most),
    "items": ("a whole number", lambda reply, count: len(reply.split(",")) == count and len(_lines(reply)) == 1),
    "bullets": ("a whole number", lambda reply, count: _begun(reply, r"[-*] ") == count),
    "numbered": ("a whole number", lambda reply, count: _begun(reply, r"\d+[.)] ") == count),
    "json_keys": ("a list of texts", _has_keys),
    "begins": ("a text", lambda reply, text: reply.startswith(text)),
    "ends": ("a text", lambda reply, text: reply.endswith(text)),
    "upper": ("true or false", lambda reply, wanted: reply.isupper() == wanted),
}


def follows(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if the reply, white space around it aside, follows all `rules` of the record, else 0.

    How accents are composed does not count.

    Raises:
        ValueError: rules that are no object, are none, or have a name that is not in `RULES` or a value of another
            kind.
    """
    rules = doc["rules"]
    if isinstance(rules, dict):  # tables have every rule in every row
        rules = {name: value for name, value in rules.items() if value is not None}
    if not isinstance(rules, dict) or not rules or not rules.keys() <= RULES.keys():
        raise ValueError(
            f"question_id {doc.get('question_id')!r}: rules is {rules!r}, expected an object with some of "
            f"{', '.join(RULES)}"
        )
    for name, value in rules.items():
        kind = RULES[name][0]
        if not VALUES[kind](value):
            raise ValueError(f"question_id {doc.get('question_id')!r}: the rule {name!r} is {value!r}, expected {kind}")
    reply, rules = _composed(replies[0].strip()), _composed(rules)
    return {"follows": float(all(RULES[name][1](reply, value) for name, value in rules.items()))}
