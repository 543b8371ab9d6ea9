"""One process at a time: file locks that end with the process that holds them, also when it is killed."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm_keeplora.runs.files import ArtifactError, WriteError, check_regular

logger = logging.getLogger(__name__)

NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have no locks


@contextmanager
def only_run(lock: Path) -> Iterator[None]:
    """Holds a run's directory.

    Where the file system has no locks a warning says so, and the run goes on.

    Raises:
        ArtifactError: another process holds it, or its lock is no regular file.
        WriteError: the directory cannot be written.
    """
    check_regular(lock)  # a pipe would be waited for
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise WriteError(f"run_dir {lock.parent} cannot be written: {error}; name another") from error
    with handle:
        try:
            # A record lock, which the workers that read images do not inherit.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise ArtifactError(
                    f"another process is running in {lock.parent}; wait for it, or use another run_dir"
                ) from error
            logger.warning(f"{lock.parent} lies on a file system without locks: start no second run there")
        yield
