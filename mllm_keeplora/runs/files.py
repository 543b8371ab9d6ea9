"""Files of a run: atomic writes, hashes, and the chain of stage manifests. safetensors and JSON only."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.regular_files import irregular_kind
from mllm_keeplora.units import format_bytes

_ABANDONED_AFTER = 24 * 3600  # seconds
_TEMPORARY = re.compile(r"\..*\.(?P<host>[^/]*)-(?P<pid>\d+)\.(tmp|old)")
_WRITE_REMEDY = "Nothing complete is lost: make room (or fix the permission) and run the same command again"


class WriteError(KeepLoRAError, OSError):
    """A file that could not be written, for lack of room say."""


class ArtifactError(KeepLoRAError, RuntimeError):
    """A run directory whose files are not what its manifests say."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it when the block ends well; nothing is left
    otherwise.

    Raises:
        WriteError: the write failed (a full disk, say); the old file, if any, is untouched.
        ArtifactError: a folder or a pipe is in its place.
    """
    temporary = _temporary(check_regular(path), "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # the parent may be what could not be made
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that takes the place of `path` when the block ends well.

    Raises:
        WriteError: the write failed; the old directory is untouched.
    """
    temporary, old = _temporary(path, "tmp"), _temporary(path, "old")
    try:
        for leftover in (temporary, old):
            remove(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        _open_up(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        for leftover in (temporary, old):
            with suppress(OSError):
                remove(leftover)


@contextmanager
def umask_kept(path: Path) -> Iterator[None]:
    """Gives a new file the mode that the umask leaves: safetensors writes 0600, whatever that is."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


def _open_up(folder: Path) -> None:
    """The same for all files in a folder that was just made."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _temporary(path: Path, kind: str) -> Path:
    """Beside `path`; its name says which process is at work, so that others can tell when nobody is."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.{kind}")


def _write_error(path: Path, error: Exception) -> WriteError:
    if isinstance(error, WriteError):  # of a file inside a directory: its own name is in it
        return error
    room = ""
    with suppress(OSError):
        room = f" ({format_bytes(shutil.disk_usage(path.parent).free)} are free there)"
    return WriteError(f"cannot write {path}: {error}{room}. {_WRITE_REMEDY}")


def remove(path: Path) -> None:
    """Removes whatever lies there: a folder with all it holds, a file, a link, a pipe; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_regular(path: Path) -> Path:
    """The path itself, unless reading it would never end (a pipe, a device) or is no reading (a folder).

    Raises:
        ArtifactError: something else than a regular file is there, or the path is one that no file can have.
    """
    try:
        kind = irregular_kind(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:  # a name that is too long, links that go in a circle, a folder that is closed to us
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; name another, or put it right") from error
    if kind is not None:
        raise ArtifactError(f"{path} is {kind}; expected a regular file: put the file back, or remove it")
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON (NaN is an error) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads strict JSON.

    Raises:
        ArtifactError: the file is missing, no regular file or not JSON.
    """
    try:
        return json.loads(check_regular(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not valid JSON ({error}); it was edited or truncated: restore it, or delete it if it is to "
            "be written again"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ArtifactError: the file is no regular file; or names the line that is no JSON object.
    """
    for row, line in enumerate(check_regular(path).read_bytes().split(b"\n"), start=1):
        if line:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ArtifactError(f"{path}, line {row} is not valid JSON: it was edited or truncated") from error
            if not isinstance(value, dict):
                raise ArtifactError(f"{path}, line {row} holds a {type(value).__name__}, not an object: it was edited")
            yield value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def write_sealed(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a JSON object together with its own hash, under "self"; returns it as written."""
    sealed = {**value, "self": _seal(value)}
    write_json(path, sealed)
    return sealed


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Args:
        path: of the file.
        remedy: what to do about a file that was edited.

    Raises:
        ArtifactError: the file is missing, or any of it is not as it was written.
    """
    value = read_json(path)
    try:
        whole = isinstance(value, dict) and value.get("self") == _seal(value)
    except ValueError:  # a number that JSON cannot hold, such as 1e999
        whole = False
    if not whole:
        raise ArtifactError(f"{path} was edited: its own hash does not match; {remedy}")
    return dict(value)


def _seal(value: Mapping[str, Any]) -> str:
    return sha256_json({key: entry for key, entry in value.items() if key != "self"})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes named tensors as safetensors, atomically, with what the file's header is to say."""
    with atomic_path(path) as temporary, umask_kept(temporary):
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        ArtifactError: the file is missing, no regular file or damaged.
    """
    try:
        return load_file(check_regular(path))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; delete it to have it computed again") from error


def file_state(path: Path) -> tuple[int, int] | None:
    """(size in bytes, time of the last change in ns); None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with check_regular(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def found_hash(path: Path) -> str | None:
    """Hex digest of a file's bytes; None where no regular file is."""
    return sha256_file(path) if path.is_file() else None


def remove_temporaries(root: Path) -> None:
    """Removes what killed processes left of files and directories that they were writing below `root`.

    Other processes may be writing there. A temporary stays while its process lives on this machine. One of another
    machine's stays for a day.
    """
    for leftover in [*root.rglob(".*.tmp"), *root.rglob(".*.old")]:
        found = _TEMPORARY.fullmatch(leftover.name)
        with suppress(FileNotFoundError):
            if found and _is_abandoned(leftover, found["host"], int(found["pid"])):
                remove(leftover)


def _is_abandoned(path: Path, host: str, pid: int) -> bool:
    if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
        return True
    # This process is writing nothing now; a container may give its number to every start.
    return host == os.uname().nodename and (pid == os.getpid() or not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order and spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_files(root: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative path -> sha256 of every file below `root`, sorted.

    Args:
        root: the folder.
        skip: files and folders at its top level that are left out.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file() and not _TEMPORARY.fullmatch(p.name))
    found = {p.relative_to(root): p for p in files}
    return {str(name): sha256_file(path) for name, path in found.items() if name.parts[0] not in skip}


def write_hashes(path: Path, skip: tuple[str, ...] = ()) -> None:
    """Writes the hashes of all other files in its folder, but for those that may be edited."""
    write_sealed(path, {"files": hash_files(path.parent, skip=(path.name, *skip))})


def check_hashes(path: Path, remedy: str, skip: tuple[str, ...] = ()) -> None:
    """Compares a folder with what `write_hashes` wrote into it.

    Args:
        path: of the file with the hashes.
        remedy: what to do about a file that was changed.
        skip: files that may be edited, or be added.

    Raises:
        ArtifactError: a file of the folder was changed, removed or added.
    """
    expected, found = read_sealed(path, remedy)["files"], hash_files(path.parent, skip=(path.name,))
    for name in sorted({*expected, *found} - {*skip}):
        if expected.get(name) != found.get(name):
            raise ArtifactError(
                f"{path.parent / name}: hash {str(expected.get(name))[:12]} expected by {path.name}, found "
                f"{str(found.get(name))[:12]}; {remedy}"
            )
