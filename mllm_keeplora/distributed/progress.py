"""How far long work has come: a bar on a terminal, elsewhere a line of the log every half minute."""

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0  # between two lines
BAR_SECONDS = 1.0  # what takes less needs no bar
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar that writes lines to the log, of which a file or a scheduler's output can hold hours."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes where the work stands; nothing when it ends, since the next line says what follows."""
        if msg is None:
            logger.info(self.format_meter(**{**self.format_dict, "bar_format": _LINE}))


def progress(
    what: str, unit: str, items: Iterable[Any] | None = None, total: int | None = None, initial: int = 0
) -> "tqdm[Any]":
    """The progress of one phase, of the main process alone; it vanishes when the phase ends.

    Args:
        what: is done, such as "training".
        unit: of the count, in the plural.
        items: to go through; None where the caller counts.
        total: how many there are; None takes the length of `items`.
        initial: how many of them were done before.
    """
    silent = os.environ.get("RANK", "0") != "0"  # as launchers say it; asking accelerate would start the processes
    shared: dict[str, Any] = {
        "desc": what,
        "unit": unit,
        "total": total,
        "initial": initial,
        "leave": False,
        "disable": silent,
    }
    if _on_terminal():
        return tqdm(items, **shared, delay=BAR_SECONDS, dynamic_ncols=True)
    # miniters: tqdm would else learn how often to look from steps that may be of unequal length.
    return _Lines(items, **shared, delay=LINE_SECONDS, mininterval=LINE_SECONDS, miniters=1, file=io.StringIO())


def _on_terminal() -> bool:
    """Whether a bar is seen: not where a terminal says that it has no columns, as one of `script` in a job does."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it cannot be asked
        return True
