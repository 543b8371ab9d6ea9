"""What every command does around its work: logging, and errors a person can read."""

import errno
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from mllm_keeplora.errors import KeepLoRAError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def _without_rank(record: logging.LogRecord) -> bool:
    """accelerate's logger puts the process before every line; the main one alone writes any."""
    record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return True


@contextmanager
def command() -> Iterator[None]:
    """Sets logging up; a KeepLoRAError ends with status 2 and its message, others keep their traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_rank)
    # transformers deprecates a property that bitsandbytes' integration still reads; nothing a user can act
    # on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    except KeepLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"error: {error}; make room (or fix the permission) and run the same command again",
            file=sys.stderr,
        )
        sys.exit(2)


def with_dashes(argv: Sequence[str]) -> list[str]:
    """`name=value` as `--name=value`, so that both spellings of an option are taken."""
    return [
        f"--{text}" if re.match(r"[a-z_.]+=", text) and not text.startswith("-") else text for text in argv
    ]
