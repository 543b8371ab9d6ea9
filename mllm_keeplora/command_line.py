"""What all commands share: how a command line is read, and how a command ends when it cannot go on."""

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import requires
from typing import NoReturn

import jsonargparse

from mllm_keeplora.errors import ConfigError, KeepLoRAError, did_you_mean

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C

# --------------------------------------------------------------------------------------------------
# reading a command line


class OptionParser(argparse.ArgumentParser):
    """Reads the command line of a command that takes a few options; names are never abbreviated."""

    def __init__(self, prog: str, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=raw, allow_abbrev=False)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line; options may stand before, between and after other arguments.

        Raises:
            SystemExit: after `--help`.
            ConfigError: an unknown option, a missing argument or a value that cannot be used.
        """
        given = with_underscores(argv)
        known = _options_of(self)
        for option in (text for text in given if re.match(r"--\w", text)):
            if option[2:].partition("=")[0] not in known:  # before anything else is said to be missing
                self.error(f"unrecognized arguments: {option}")
        return self.parse_intermixed_args(given)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError in place of printing the usage."""
        raise ConfigError(f"{message}{_hint(message, _options_of(self), self.prog)}")


class _SettingsHelp(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of the description as they are."""


def settings_parser(prog: str, description: str | None, usage: str = "") -> jsonargparse.ArgumentParser:
    """A parser for dataclasses of settings: each is `--group.name VALUE`; names are never abbreviated.

    Args:
        prog: the command, such as `keeplora run`.
        description: for `--help`, printed as it is.
        usage: what stands before the settings on the command line.
    """
    return jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} {usage} [--NAME VALUE ...]".replace("  ", " "),
        description=description,
        formatter_class=_SettingsHelp,
        parser_mode="yaml",
        exit_on_error=False,
        allow_abbrev=False,
    )


def read_settings(parser: jsonargparse.ArgumentParser, argv: Sequence[str]) -> jsonargparse.Namespace:
    """The values that a command line gives to the parser's settings, dataclasses built.

    Raises:
        SystemExit: after `--help`.
        ConfigError: an unknown name, or a value of the wrong type or out of range.
    """
    try:
        return parser.instantiate(parser.parse_args(with_underscores(_with_dashes(argv))))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(f"{error}{_hint(str(error), _options_of(parser), parser.prog)}") from error
    except TypeError as error:  # jsonargparse expands a group that is no mapping
        options = _options_of(parser)
        groups = ", ".join(dict.fromkeys(name.split(".")[0] for name in options if "." in name))
        raise ConfigError(f"one of the groups {groups} holds a value; it takes 'name: value' lines") from error


def with_underscores(argv: Sequence[str]) -> list[str]:
    """`--max-length` as `--max_length`: an option may be spelled either way, its value stays as it is."""
    return [re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), text) for text in argv]


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """`name=value` as `--name=value`, except where it is the value of the option before it."""
    previous = ["", *argv]
    return [
        f"--{text}" if re.match(r"[a-z_.]+=", text) and not re.fullmatch(r"--[^=]+", before) else text
        for before, text in zip(previous, argv, strict=False)
    ]


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Without their dashes; those too that the usage alone names, since the command reads them itself."""
    options = [name for action in parser._actions for name in action.option_strings]
    return [name[2:] for name in [*options, *re.findall(r"--[a-z_]+", parser.usage or "")] if name[:2] == "--"]


# How argparse and jsonargparse speak of a name that they do not know.
_UNKNOWN = re.compile(
    r"unrecognized arguments: --([^\s=]+)|Option '([\w.]+)' is not accepted"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'"
)


def _hint(message: str, known: Sequence[str], prog: str) -> str:
    """What may be meant by the unknown name in a parser's message; empty for any other message."""
    found = _UNKNOWN.search(message)
    if found is None:
        return ""
    name = ".".join(filter(None, found.groups()))
    return did_you_mean(name, known) or f" ({prog} --help lists every option)"


# --------------------------------------------------------------------------------------------------
# running


@contextmanager
def command() -> Iterator[None]:
    """Prepares the process for a command, and ends it with one line where that line is all a user needs.

    A `KeepLoRAError`, a full disk and a missing package end with status 2, Ctrl-C with 130; any other error
    keeps its traceback. Whatever is slow to import is to be imported inside.
    """
    _prepare()
    try:
        yield
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
        if error.errno not in _DISK_ERRORS:
            raise
        _end(f"error: {error}; make room (or fix the permission) and run the same command again")


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
    # transformers deprecates a property that bitsandbytes' integration still reads; a user cannot act on it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _without_rank(record: logging.LogRecord) -> bool:
    """accelerate's logger puts the process before every line; the main one alone writes any."""
    record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return True


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
