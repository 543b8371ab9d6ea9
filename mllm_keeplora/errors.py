"""The base of every error whose message is written for the user."""

import difflib
from collections.abc import Iterable


class KeepLoRAError(Exception):
    """Says what is wrong, where, what was expected and what to do; commands print it without a traceback."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a message about an unknown name; empty where no known one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
