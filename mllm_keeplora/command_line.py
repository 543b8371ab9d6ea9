"""What all commands share: how a command line is read, and how a command ends when it cannot go on."""

import argparse
import errno
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib.metadata import requires
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import docstring_parser
from tqdm.contrib.logging import logging_redirect_tqdm

from mllm_keeplora.errors import ConfigError, KeepLoRAError, did_you_mean
from mllm_keeplora.settings import expected, hints_of, typed
from mllm_keeplora.yaml_files import parse_yaml

_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_REQUIRED = "required"
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
_LONGEST_WORD = 200  # of what was given, in a message
OUTPUT_CLOSED = 141  # and to a command whose output nobody reads any more

# --------------------------------------------------------------------------------------------------
# reading a command line


class OptionParser(argparse.ArgumentParser):
    """Reads a command line: options, of which names are never abbreviated, and other arguments.

    Args:
        prog: the command, such as `keeplora run`.
        description: for `--help`, printed as it is.
        usage: how it is called, where its settings are too many to be listed there.
    """

    def __init__(self, prog: str, description: str | None, usage: str | None = None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        whole = None if usage is None else f"{prog} {usage} [--NAME VALUE ...]".replace("  ", " ")
        super().__init__(prog, whole, description, formatter_class=raw, allow_abbrev=False)
        self._hints: dict[str, Any] = {}

    def add_setting(self, name: str, hint: Any, text: str, group: Any = None, **options: Any) -> None:
        """An option with one value, of which the annotation says kind and range.

        Args:
            name: without dashes.
            hint: annotation as of a setting.
            text: for `--help`.
            group: of the options in `--help`.
            options: of argparse, such as `default`; without one `read` gives nothing where it is not there.
        """
        self._hints[name] = hint
        to = self if group is None else group
        to.add_argument(f"--{name}", metavar="VALUE", help=text, **{"default": argparse.SUPPRESS, **options})

    def add_read(self, flags: Mapping[str, str]) -> None:
        """Options that the command has taken out of the command line already, for `--help` and messages.

        Args:
            flags: name, followed by that of its value if it takes one (`memory_gb GB`) -> text for `--help`.
        """
        for flag, text in flags.items():
            name, _, value = flag.partition(" ")
            kind: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
            self.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)

    def add_settings(self, kind: type, prefix: str = "", elsewhere: Mapping[str, str] | None = None) -> None:
        """An option for every setting of a dataclass and of the groups in it, as its docstring describes them.

        Args:
            kind: the dataclass.
            prefix: of the names.
            elsewhere: dotted name of a setting or a group -> where its default comes from.
        """
        docs, elsewhere = docstring_parser.parse(kind.__doc__ or ""), elsewhere or {}
        texts = {found.arg_name: found.description for found in docs.params}
        group = self.add_argument_group(prefix.rstrip(".") or "settings", docs.short_description)
        for field in fields(kind):
            name, hint = prefix + field.name, hints_of(kind)[field.name]
            if is_dataclass(hint):
                self.add_settings(hint, f"{name}.", elsewhere)  # type: ignore[arg-type]
                continue
            default = elsewhere.get(name) or elsewhere.get(prefix.rstrip("."))
            end = f"default: {default}" if default else _default(field)
            text = f"{texts[field.name]} ({expected(hint)}; {end})".replace("%", "%%")
            self.add_setting(name, hint, text, group, required=end == _REQUIRED)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line; options may stand before, between and after other arguments.

        A setting may be written `name=value` as well.

        Raises:
            SystemExit: after `--help`.
            ConfigError: an unknown option, a missing argument or a value that cannot be used.
        """
        given = list(self._joined(with_underscores(argv)))
        known = _options_of(self)
        for option in (text for text in given if re.match(r"--\w", text)):
            if option[2:].partition("=")[0] not in known:  # before anything else is said to be missing
                self.error(f"unrecognized arguments: {option}")
        values = self.parse_intermixed_args(given)
        for name, hint in self._hints.items():
            text = getattr(values, name, None)
            if isinstance(text, str):
                try:
                    setattr(values, name, value_of(text, hint, f"--{name}"))
                except ConfigError as error:
                    self.error(str(error))
        return values

    def _joined(self, argv: Sequence[str]) -> Iterator[str]:
        """Settings and their values as one text each, so that a value may begin with a dash."""
        rest = iter(argv)
        for text in rest:
            name, equals, _ = text.partition("=")
            if text[:2] == "--" and text[2:] in self._hints:
                value = next(rest, None)
                if value is None or re.match(r"--\w", value):
                    self.error(f"{text}: expected a value behind it, found {value or 'none'}")
                text = f"{text}={value}"
            elif equals and name in self._hints:
                text = f"--{text}"
            yield text

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError in place of printing the usage."""
        found = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message)
        options = _options_of(self)
        hint = did_you_mean(found[1], options, "--") if found else ""
        if found and any(option.startswith(f"{found[1]}.") for option in options):
            hint = f" (a group of settings, each --{found[1]}.NAME)"
        said = " ".join(word if len(word) <= _LONGEST_WORD else f"{word[:60]}.." for word in message.split(" "))
        raise ConfigError(f"{said}{hint} ({self.prog} --help lists every option)")


def _default(field: Field[Any]) -> str:
    """What `--help` says of a setting that is not given."""
    if field.default_factory is not MISSING:
        value: Any = field.default_factory()
    elif field.default is not MISSING:
        value = field.default
    else:
        return _REQUIRED
    if value is None:
        return "default: not set"
    return f"default: {str(value).lower() if isinstance(value, bool) else str(value).replace(chr(39), '')}"


def value_of(text: str, hint: Any, name: str) -> Any:
    """What the text behind an option means; text is taken as it is where text is expected."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in kinds and text in ("null", "None"):
        return None
    as_it_is = any(kind in (str, Path) or isinstance(next(iter(get_args(kind)), None), str) for kind in kinds)
    try:
        return typed(text if as_it_is else parse_yaml(text), hint, name)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def with_underscores(argv: Sequence[str]) -> list[str]:
    """`--max-length` as `--max_length`: an option may be spelled either way, its value stays as it is."""
    return [re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), text) for text in argv]


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Without their dashes."""
    options = [name for action in parser._actions for name in action.option_strings]
    return [name[2:] for name in options if name[:2] == "--"]


# --------------------------------------------------------------------------------------------------
# running


@contextmanager
def command() -> Iterator[None]:
    """Prepares the process for a command, and ends it with one line where that line is all a user needs.

    A `KeepLoRAError`, a full disk, a name that no file can have and a missing package end with status 2, Ctrl-C with
    130. Where nobody reads the output any more (`| head`) it ends without a word, with 141. Any other error keeps its
    traceback. Whatever is slow to import is to be imported inside.
    """
    _prepare()
    try:
        try:
            with logging_redirect_tqdm():  # lines above the bars, not through them
                yield
        finally:
            sys.stdout.flush()  # at the interpreter's end nobody could answer
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes there
        sys.exit(OUTPUT_CLOSED)
    except KeyboardInterrupt:
        _end("interrupted; the same command continues", INTERRUPTED)
    except KeepLoRAError as error:
        _end(f"error: {error}")
    except ModuleNotFoundError as error:
        extra = _extra_with(error.name or "")
        if extra is None:
            raise
        _end(f"error: {error.name} is not installed; pip install 'mllm-keeplora[{extra}]' brings it")
    except OSError as error:
        if error.errno in _NAME_ERRORS:
            _end(f"error: {error}; name another")
        if error.errno not in _DISK_ERRORS:
            raise
        _end(f"error: {error}; make room (or fix the permission) and run the same command again")


def _output_is_closed() -> bool:
    """Whether the reader of a pipe on standard output is gone."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _prepare() -> None:
    # Two threads that spin while they wait for a busy core are slower than one; waiting passively costs
    # nothing on free cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers obeys it too
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mllm_keeplora").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_rank)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would say all twice
    logging.getLogger("huggingface_hub.utils._http").addFilter(_no_retry)
    # transformers deprecates a property that bitsandbytes' integration still reads; a user cannot act on it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _without_rank(record: logging.LogRecord) -> bool:
    """accelerate's logger puts the process before every line; the main one alone writes any."""
    record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return True


def _no_retry(record: logging.LogRecord) -> bool:
    """The hub's client writes two lines for each of its six tries: one stands for all; waits that it names stay."""
    what, tried, _ = record.getMessage().partition(" thrown while requesting ")
    if tried:
        _say_retries(what)
    return not (tried or what.startswith("Retrying in "))


@cache
def _say_retries(what: str) -> None:
    logging.getLogger(__name__).warning(f"the Hugging Face hub does not answer ({what}); trying again for a while")


def _end(line: str, status: int = 2) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def _extra_with(module: str) -> str | None:
    """The extra of this package that installs a module; None where no extra does."""
    wanted = module.partition(".")[0].replace("_", "-").lower()
    for requirement in requires("mllm-keeplora") or ():
        found = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)", requirement)
        if found and found[1].replace("_", "-").lower() == wanted:
            return found[2]
    return None
