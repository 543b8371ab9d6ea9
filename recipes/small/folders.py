"""Writes a folder so that it is whole or absent."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` in one rename when the block ends without an error.

    Args:
        out: folder to create, its parents as needed.
        replace: whether a folder that is there gives way to the new one.

    Raises:
        FileExistsError: `out` is already there and not to be replaced; nothing is touched.
    """
    if out.exists() and not replace:
        raise FileExistsError(f"{out} already exists; remove it to have it written again")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's folder is private
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # nothing is left there after a successful rename
