"""What lies under a path where that is no regular file: opening a pipe waits for a writer, a device may have no end."""

import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def irregular_kind(path: Path) -> str | None:
    """What a path is, links followed; None for a regular file. Ask before you open what a user names.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
    """
    return kind_of_mode(path.stat().st_mode)


def kind_of_mode(mode: int) -> str | None:
    """The same of a file's mode, as `os.stat` gives it."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else than a file")
