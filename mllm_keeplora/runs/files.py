"""Files of a run: atomic writes, hashes, and the chain of stage manifests. safetensors and JSON only."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_keeplora.errors import KeepLoRAError

_WRITE_REMEDY = "Nothing complete is lost: make room (or fix the permission) and run the same command again"


class WriteError(KeepLoRAError, OSError):
    """A file that could not be written, for lack of room say."""


class ArtifactError(KeepLoRAError, RuntimeError):
    """A run directory whose files are not what its manifests say."""


_IRREGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def irregular_kind(path: Path) -> str | None:
    """What a path is, links followed, where it is no regular file: "a folder", "a named pipe (FIFO)" and so on.

    Opening a pipe waits for a writer, and a device may have no end: ask before you open what a user names.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    return None if kind == stat.S_IFREG else _IRREGULAR.get(kind, "something else than a file")


def _check_regular(path: Path) -> None:
    """Raises:
    ArtifactError: the path is no regular file.
    OSError: there is nothing.
    """
    kind = irregular_kind(path)
    if kind is not None:
        raise ArtifactError(f"{path} is {kind}; expected a regular file")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it when the block ends well; nothing is left
    otherwise.

    Raises:
        WriteError: the write failed (a full disk, say); the old file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {error}. {_WRITE_REMEDY}") from error
    finally:
        with suppress(OSError):  # the parent may be what could not be made
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that takes the place of `path` when the block ends well."""
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {error}. {_WRITE_REMEDY}") from error
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON (NaN is an error) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ArtifactError: the file is missing, no regular file or not JSON.
    """
    try:
        _check_regular(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"{path} is a folder; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5000 digits; nested without end
        raise ArtifactError(f"{path} is not valid JSON ({error}); it was edited or truncated") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors as safetensors, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        ArtifactError: the file is missing, no regular file or damaged.
    """
    try:
        _check_regular(path)
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; delete it to have it computed again") from error


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        ArtifactError: it is no regular file.
        OSError: it is missing or cannot be read.
    """
    _check_regular(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_temporaries(root: Path) -> None:
    """Removes what a killed process left of files and directories it was writing below `root`."""
    for leftover in [*root.rglob(".*.tmp"), *root.rglob(".*.old")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order and spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_files(root: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative path -> sha256 of every file below `root`, sorted, without `skip` at its top level."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): sha256_file(p) for p in files if str(p.relative_to(root)) not in skip}
