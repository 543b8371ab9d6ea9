"""What every command does around its work: logging, and errors a person can read."""

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from mllm_keeplora.errors import KeepLoRAError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def command() -> Iterator[None]:
    """Sets logging up; a KeepLoRAError ends with status 2 and its message, others keep their traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
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
