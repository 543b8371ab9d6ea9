"""KeepLoRA++ on quantised multimodal LLMs: continual fine-tuning that keeps what the model could do.

    keeplora run                  the small VQA stream on a CPU, in minutes
    keeplora COMMAND --help       what a command does, and every option with its default

Files of the package, such as recipes/configs/video/small.yaml, are found from any folder.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from mllm_keeplora.command_line import command
from mllm_keeplora.errors import ConfigError, did_you_mean

COMMANDS = (
    "run",
    "plan",
    "check",
    "fetch",
    "chat",
    "edit",
    "evaluate",
    "export",
    "push",
    "leaderboard",
    "compare",
    "analyze",
    "judge",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `keeplora`.

    Args:
        argv: what follows the command's name; None takes the process's own.

    Returns:
        The exit status.
    """
    with command():
        name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if name in ("-h", "--help"):
            print(_help())
            return 0
        if name == "--version":
            print(f"keeplora {version('mllm-keeplora')}")
            return 0
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or f" ({', '.join(COMMANDS)})"
            raise ConfigError(f"{name!r} is no command of keeplora{hint} (keeplora --help says what each does)")
        return int(_module(name).main(rest) or 0)


def _module(name: str) -> Any:
    """A command's module: a docstring whose first line says what it does, and `main(argv)`."""
    return import_module(f"mllm_keeplora.commands.{name}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {_module(name).__doc__.splitlines()[0]}" for name in COMMANDS]
    return "\n".join([f"usage: keeplora COMMAND ...\n\n{__doc__}\ncommands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
