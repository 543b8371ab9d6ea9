"""Files that come along with the package, in a checkout and in an installed wheel alike."""

import errno
import os
from importlib.resources import files
from pathlib import Path

SHIPPED = ("recipes", "eval", "studies")  # folders of the repository that the wheel carries as sub-packages


def shipped(name: str) -> Path:
    """Where a shipped file lies, by its path in the repository.

    Args:
        name: such as `recipes/streams/ucit.yaml`; its first part is one of `SHIPPED`.
    """
    top, *rest = Path(name).parts
    return Path(str(files(f"mllm_keeplora.{top}"))).joinpath(*rest)


def find(path: str | Path) -> Path:
    """A path as the user wrote it where something is there, else the shipped file of that name.

    So `recipes/configs/vqa/small.yaml` works in any folder, and a file of the user's own wins over a shipped
    one. A path that is neither comes back as it is; whoever opens it says that it is missing.
    """
    own = Path(path)
    if is_there(own) or own.is_absolute() or own.parts[:1] not in [(name,) for name in SHIPPED]:
        return own
    found = shipped(str(path))
    return found if found.exists() else own


def unusable(path: str | Path) -> str | None:
    """Why no file or folder can have a path: a name that is too long, links in a circle, NUL; None where one can."""
    try:
        os.stat(path)  # noqa: PTH116
    except OSError as error:
        return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    except ValueError:
        return "it holds a NUL or what is no UTF-8"
    return None


def is_there(path: Path) -> bool:
    """Whether a path exists; False too for one that no file can have, of which `Path.exists` makes an OSError."""
    return os.path.exists(path)  # noqa: PTH110
