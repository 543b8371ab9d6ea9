"""Errors whose message is written for the user, and the hint at the name that was meant."""

import difflib
from collections.abc import Iterable


class KeepLoRAError(Exception):
    """Says what is wrong, where, what was expected and what to do; commands print it without a traceback."""


class ConfigError(KeepLoRAError, ValueError):
    """A setting that cannot be used; the message names it and says what it should be."""


def without_network(repo: str, kind: str = "model") -> str:
    """What to do where the hub cannot be reached: a sentence's end.

    Args:
        repo: its id on the hub.
        kind: model or dataset.
    """
    option = "" if kind == "model" else f" --repo-type {kind}"
    return (
        f"without a network, fetch it where there is one (hf download {repo}{option} --local-dir FOLDER), copy the "
        "folder and name it in place of the id"
    )


def did_you_mean(name: str, known: Iterable[str], dashes: str = "") -> str:
    """` (did you mean 'train.learning_rate'?)` for a name that is close to a known one or begins it, else "".

    The last part of a dotted name decides, so that a group that is missing or wrong is put right as well.

    Args:
        name: what was given.
        known: names that could have been meant.
        dashes: what is written before a name.
    """
    group, _, last = name.rpartition(".")
    parts = {option: option.rpartition(".")[2] for option in known}
    close = difflib.get_close_matches(last, parts.values(), n=1)
    close = close or [part for part in parts.values() if last and part.startswith(last)]
    meant = [option for option, part in parts.items() if part in close]
    meant = [option for option in meant if option.rpartition(".")[0] == group] or meant
    meant = [option for option in parts if group and last and option.startswith(name)] or meant
    return f" (did you mean {' or '.join(repr(dashes + option) for option in meant)}?)" if meant else ""
