"""The one reader of YAML: text of a file or of a value on the command line, as JSON's kinds of values.

It reads what YAML 1.2 calls a number, such as `1e-3`. What YAML 1.1 makes of other words stays text: dates, `1:30`
(90 there) and `010` (8 there). A file that would repeat a key, refer to itself or unfold without bound is refused.
"""

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mllm_keeplora.errors import ConfigError
from mllm_keeplora.regular_files import kind_of_mode

# What keeps a refusal within a second; a stream of 500 tasks is below.
LARGEST_FILE = 500_000  # bytes
MOST_VALUES = 10_000  # names included, every alias unfolded
DEEPEST = 50  # lists and mappings in one another
_TOO_MANY = f"it holds more than {MOST_VALUES} values"
_TOO_DEEP = f"it is nested deeper than {DEEPEST}"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _Loader(yaml.SafeLoader):
    """Knows JSON's kinds of values alone, and refuses a key that is there twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    composed = depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 - PyYAML's name
        """The scanner runs ahead of `compose_node`, over a thousand brackets."""
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Stops as soon as it is too much."""
        self.composed += 1
        self.depth += 1
        if self.composed > MOST_VALUES or self.depth > DEEPEST:
            problem = _TOO_DEEP if self.depth > DEEPEST else _TOO_MANY
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Looks at the keys as they are written; what `<<` brings in may be said again."""
        seen = set()
        for key, _ in node.value:
            text = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if text in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", "[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|"
        r"\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", "~|null|Null|NULL|", "~nN\0"),
    ("merge", "<<", "<"),
):
    _firsts = ["" if first == "\0" else first for first in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _firsts)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "merge", "str", "seq", "map")}


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it cannot be read, is no regular file, too large, no UTF-8 text, or as in `parse_yaml`. The
            message does not name the file.
    """
    data = _read_regular_file(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16 text" if data[:2] in _UTF16 else f"not UTF-8 text (byte {error.start})"
        raise ConfigError(f"{kind}; save it as UTF-8") from error
    if "\0" in text:
        raise ConfigError("holds NUL characters, so it is no text in UTF-8; save it as UTF-8")
    return parse_yaml(text)


def _read_regular_file(path: Path) -> bytes:
    """Does not wait for a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            kind = kind_of_mode(os.fstat(descriptor).st_mode)
            if kind is not None:
                raise ConfigError(f"is {kind}; expected a YAML file")
            with open(descriptor, "rb", closefd=False) as file:  # noqa: PTH123 - a descriptor
                data = file.read(LARGEST_FILE + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL or half a surrogate pair in the path
        raise ConfigError(f"cannot be read: {error}") from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"is larger than {LARGEST_FILE} bytes; expected a YAML file of settings")
    return data


def parse_yaml(text: str) -> Any:
    """What YAML text means.

    Raises:
        ConfigError: no valid YAML, a key that is there twice, a value of another kind than JSON has, nested
            deeper than `DEEPEST`, or more than `MOST_VALUES` values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"not valid YAML: {where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError) as error:  # a number of 5000 digits; `!!bool maybe`
        raise ConfigError(f"not valid YAML: {str(error).partition(';')[0]}") from error


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Values below a node, aliases unfolded.

    Args:
        node: where to begin.
        counts: id of a node -> its count, None while it is being counted.
    """
    known = counts.get(id(node), 0)
    if known is None:
        raise _refused(node, "it holds itself")
    if known:
        return known
    if node.tag not in _TAGS:
        raise _refused(node, f"the tag {node.tag} is not read here")
    counts[id(node)] = None
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    children = [child for item in inner for child in (item if isinstance(item, tuple) else (item,))]
    count = 1 + sum(_count(child, counts) for child in children)
    if count > MOST_VALUES:
        raise _refused(node, _TOO_MANY)
    counts[id(node)] = count
    return count


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
