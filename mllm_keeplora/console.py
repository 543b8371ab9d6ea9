"""What every command does around its work: logging, and errors a person can read."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from mllm_keeplora.errors import KeepLoRAError


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
