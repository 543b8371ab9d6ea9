"""Dataclasses of settings: kind and range of every value, checked by one function wherever a value comes from.

A number states its range in its annotation, `rank: Annotated[int, Range(1, 4096)] = 16`. The names of settings in
groups are dotted: `train.learning_rate`.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mllm_keeplora.errors import ConfigError, did_you_mean

_Settings = TypeVar("_Settings")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_MAPPING = "'name: value' lines"


@dataclass(frozen=True)
class Range:
    """The interval in which a number lies; infinity and NaN never do.

    Args:
        low: its lower end.
        high: its upper end.
        ends: whether the ends belong to it: `[]` both, `(]` the upper alone, `[)` the lower alone.
    """

    low: float
    high: float
    ends: Literal["[]", "(]", "[)"] = "[]"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


@cache
def _hints_of(kind: Hashable) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}  # type: ignore[arg-type]


def hints_of(kind: Any) -> dict[str, Any]:
    """Name of each setting of a dataclass -> its annotation, ranges included."""
    return _hints_of(kind)


def setting_names(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of all settings of a dataclass, those of its groups included."""
    found = []
    for name, hint in hints_of(kind).items():
        inner = is_dataclass(hint)
        found += setting_names(hint, f"{prefix}{name}.") if inner else [prefix + name]
    return found


# --------------------------------------------------------------------------------------------------
# one value


def typed(value: Any, hint: Any, name: str) -> Any:
    """A value as its annotation says: a whole number where any number may stand becomes a float.

    Args:
        value: as YAML or Python gave it.
        hint: annotation of the setting.
        name: of the setting, for messages.

    Raises:
        ConfigError: another kind of value, or one out of range.
    """
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, hint):
            return build(hint, flat_settings(hint, value, f"{name}."), f"{name}.")
        check_settings(value, f"{name}.")
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_typed(value, hint, name)
    if origin is Annotated:
        number = typed(value, args[0], name) if _fits(value, args[0]) else None
        if number is None or any(isinstance(part, Range) and number not in part for part in args[1:]):
            raise _refused(value, hint, name)
        return number
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_text(key, name): typed(item, args[1], f"{name}.{key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(typed(item, args[0], name) for item in value)
    if not _fits(value, hint):
        raise _refused(value, hint, name)
    if hint is Any and isinstance(value, Mapping | list | tuple):
        return typed(value, dict[str, Any] if isinstance(value, Mapping) else list[Any], name)
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that holds no others is of the kind that the annotation says."""
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        return False  # no file name, and cannot be written down
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint in (float, int):
        kinds = (int, float) if hint is float else (int,)
        # bool is an int to Python, and to nobody else; an int can be larger than any float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**1000
    if hint is Path:
        return isinstance(value, str | Path)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _first_typed(value: Any, hint: Any, name: str) -> Any:
    """By the first annotation of a union that takes the value."""
    choices = [choice for choice in get_args(hint) if choice is not NoneType]
    if value is None and NoneType in get_args(hint):
        return None
    if len(choices) == 1 and not (get_origin(choices[0]) is Annotated or choices[0] in _WORDS):
        return typed(value, choices[0], name)  # whose message says more
    for choice in choices:
        if get_origin(choice) in (dict, Mapping) and isinstance(value, Mapping):
            return typed(value, choice, name)
        try:
            return typed(value, choice, name)
        except ConfigError:
            continue
    raise _refused(value, hint, name)


def _text(key: Any, name: str) -> str:
    if not _fits(key, str):
        raise ConfigError(
            f"{name}: expected names that are text, found {shown(key)} (put it in quotes; YAML reads Yes and No as "
            "true and false)"
        )
    return str(key)


def _refused(value: Any, hint: Any, name: str) -> ConfigError:
    takes_text = any(choice is str for choice in (hint, *get_args(hint)))
    remedy = ""
    if takes_text and isinstance(value, int | float):
        remedy = " (put it in quotes)"
    if takes_text and isinstance(value, str):
        remedy = " (it holds a NUL or what is no UTF-8)"
    return ConfigError(f"{name}: expected {expected(hint)}, found {shown(value)}{remedy}")


def expected(hint: Any) -> str:
    """An annotation in words, such as `a whole number in [1, 4096] or null`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([expected(args[0]), *(f"in {part}" for part in args[1:] if isinstance(part, Range))])
    if origin in (Union, UnionType):
        return " or ".join(map(expected, args))
    if origin is Literal:
        return " or ".join(map(str, args)) if len(args) < 3 else f"one of {', '.join(map(str, args))}"
    if origin in (list, tuple):
        return f"a list such as [a, b], each {expected(args[0])}"
    if origin in (dict, Mapping) or is_dataclass(hint):
        return _MAPPING
    return "a path" if hint is Path else _WORDS.get(hint, "a finite value")


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than that."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}.. ({len(text)} characters)"


# --------------------------------------------------------------------------------------------------
# all of a dataclass


def check_settings(settings: Any, prefix: str = "") -> None:
    """Checks the values of a dataclass and of the groups in it.

    Raises:
        ConfigError: naming the first that cannot be used.
    """
    for name, hint in hints_of(type(settings)).items():
        typed(getattr(settings, name), hint, prefix + name)


def flat_settings(kind: Any, document: Any, prefix: str = "", known: Sequence[str] | None = None) -> dict[str, Any]:
    """What nested `name: value` lines say, by dotted names, each value checked.

    Args:
        kind: dataclass of the settings.
        document: as YAML or JSON gave it.
        prefix: of the names.
        known: names that a wrong one may have meant; None takes those of `kind`.

    Raises:
        ConfigError: an unknown name, a group that is no group, or a value that cannot be used.
    """
    if not isinstance(document, Mapping):
        where = f"{prefix.rstrip('.')}: " if prefix else ""
        raise ConfigError(f"{where}expected {_MAPPING}, found {shown(document)}")
    hints, found = hints_of(kind), dict[str, Any]()
    if known is None:
        leaves = setting_names(kind, prefix)
        known = [*leaves, *dict.fromkeys(name.rpartition(".")[0] for name in leaves if "." in name)]
    for key, value in document.items():
        name = f"{prefix}{key}"
        if key not in hints:
            if name in known:  # as a command line has it
                group, _, last = name.rpartition(".")
                raise ConfigError(
                    f"{name} is no setting; expected {last!r} in the group {group!r}: {group}: {{{last}: ..}}"
                )
            raise ConfigError(f"{name} is no setting{did_you_mean(name, known)}")
        if is_dataclass(hints[key]):
            found |= flat_settings(hints[key], value, f"{name}.", known)
        else:
            found[name] = typed(value, hints[key], name)
    return found


def build(kind: type[_Settings], flat: Mapping[str, Any], prefix: str = "") -> _Settings:
    """A dataclass from values by their dotted names; what is not there keeps its default.

    Raises:
        ConfigError: a value that cannot be used, or one that is missing and has no default.
    """
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name, hint = prefix + field.name, hints_of(kind)[field.name]
        if is_dataclass(hint):
            values[field.name] = build(hint, flat, f"{name}.")  # type: ignore[arg-type]
        elif name in flat:
            values[field.name] = typed(flat[name], hint, name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{name} is missing; expected {expected(hint)}")
    return kind(**values)
