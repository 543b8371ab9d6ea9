"""Whether a reply follows rules that stand in the record: for instructions, and for answers that are one word of it."""

import json
import re
from collections.abc import Callable
from typing import Any

Doc = dict[str, Any]


def _words(reply: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", reply))


def _lines(reply: str) -> list[str]:
    return [line.strip() for line in reply.splitlines() if line.strip()]


def _has_keys(reply: str, keys: list[str]) -> bool:
    try:
        found = json.loads(re.sub(r"^```(?:json)?|```$", "", reply.strip()))
    except (ValueError, RecursionError):  # no JSON, or nested beyond all measure
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


# Name of a rule -> whether a reply follows it, given the value that stands in the record.
RULES: dict[str, Callable[[str, Any], bool]] = {
    "word": lambda reply, text: _words(reply, text) > 0,  # as a whole word, case counts
    "without": lambda reply, text: _words(reply, text) == 0,
    "times": lambda reply, pair: _words(reply.lower(), pair[0].lower()) == pair[1],
    "at_most_words": lambda reply, most: 0 < len(reply.split()) <= most,
    "items": lambda reply, count: len(reply.split(",")) == count and len(_lines(reply)) == 1,
    "bullets": lambda reply, count: sum(line.startswith(("- ", "* ")) for line in _lines(reply)) == count,
    "numbered": lambda reply, count: sum(re.match(r"\d+[.)] ", line) is not None for line in _lines(reply)) == count,
    "json_keys": _has_keys,
    "begins": lambda reply, text: reply.startswith(text),
    "ends": lambda reply, text: reply.endswith(text),
    "upper": lambda reply, wanted: reply.isupper() == wanted,
}


def follows(doc: Doc, replies: list[str]) -> dict[str, float]:
    """1 if the reply, white space around it aside, follows all `rules` of the record, else 0.

    Raises:
        ValueError: rules that are no object, are none, or have a name that is not in `RULES`.
    """
    rules = doc["rules"]
    if not isinstance(rules, dict) or not rules or not rules.keys() <= RULES.keys():
        raise ValueError(
            f"question_id {doc.get('question_id')!r}: rules is {rules!r}, expected an object with some of "
            f"{', '.join(RULES)}"
        )
    reply = replies[0].strip()
    return {"follows": float(all(RULES[name](reply, value) for name, value in rules.items()))}
