"""One process at a time: file locks that end with the process that holds them, also when it is killed."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mllm_keeplora.runs.files import ArtifactError, WriteError, check_regular

logger = logging.getLogger(__name__)

# What NFS without a lock service, Lustre without `-o flock` and FUSE answer in place of a lock.
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
SECOND_RUN = (
    "a second run in this run_dir would not be noticed, and both would write over each other's files; start none there "
    "on any machine before this one has ended"
)
HELD = (errno.EACCES, errno.EAGAIN)  # POSIX allows both


def is_held(handle: IO[str], unprotected: str) -> bool:
    """Locks an open file for this process until it is closed or the process ends.

    Where the file system has no locks a warning says so, and the work goes on.

    Args:
        handle: the file, open for writing.
        unprotected: what nobody watches over without a lock, as a sentence of the warning.

    Returns:
        Whether another process holds it, which leaves it unlocked.

    Raises:
        OSError: the file cannot be locked for another reason.
    """
    try:
        # A record lock, which the workers that read images do not inherit.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return True
        if error.errno not in NOT_SUPPORTED:
            raise
        logger.warning(f"{handle.name} lies on a file system without locks ({error.strerror}): {unprotected}")
    return False


@contextmanager
def only_run(lock: Path) -> Iterator[None]:
    """Holds a run's directory.

    Where the file system has no locks a warning says so, and the run goes on.

    Raises:
        ArtifactError: another process holds it, or its lock is no regular file.
        WriteError: the directory cannot be written, or not be locked for a reason that is neither.
    """
    check_regular(lock)  # a pipe would be waited for
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise WriteError(f"run_dir {lock.parent} cannot be written: {error}; name another") from error
    with handle:
        try:
            held = is_held(handle, SECOND_RUN)
        except OSError as error:
            raise WriteError(f"run_dir {lock.parent} cannot be locked: {error}; name another") from error
        if held:
            raise ArtifactError(f"another process is running in {lock.parent}; wait for it, or use another run_dir")
        yield
