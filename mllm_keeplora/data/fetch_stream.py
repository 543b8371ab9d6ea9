"""Fetches the data that a stream's YAML names (`hub`) from the Hugging Face hub, and unpacks them.

Files that have arrived whole are kept after an interruption, the others are begun anew. Archives are kept
too: without them the next call would download them again.
"""

import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, RepoFile, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mllm_keeplora.data.records import RecordError, named_media
from mllm_keeplora.data.stream import (
    Hub,
    Stream,
    StreamError,
    TaskSpec,
    named_paths,
)
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.runs.files import atomic_path, file_state
from mllm_keeplora.runs.locks import is_held
from mllm_keeplora.units import format_bytes

# Longer ones first: .tar.gz is not a .gz.
ARCHIVES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tar", ".zip")

# What the decompressors raise on a cut or damaged archive.
_DAMAGE = (zipfile.BadZipFile, tarfile.ReadError, EOFError, zlib.error, LZMAError)
# huggingface_hub's HTTP library changes with its version; this is the base of all that it raises.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_AGAIN = "run the same command again to continue"


class FetchError(KeepLoRAError, RuntimeError):
    """A stream's data could not be fetched; the message says what is there already and what to do."""


@dataclass(frozen=True)
class Fetched:
    """What was fetched: the repository's commit, its files under the data root, and their size in bytes."""

    commit: str
    files: tuple[Path, ...]
    size: int


def fetch_stream(stream: Stream) -> Fetched:
    """Downloads and unpacks everything that the stream's `hub` entry names.

    Raises:
        StreamError: the stream has no `hub` entry.
        FetchError: the repository cannot be reached or has no such files, an archive is damaged, or the disk
            has too little room.
    """
    if stream.hub is None:
        raise StreamError(
            f"stream {stream.name!r} names no 'hub', so there is nothing to fetch from; put the data under "
            f"{stream.data_root} yourself"
        )
    with _alone(stream.data_root):
        fetched = _download(stream.hub, stream.data_root)
        for path in fetched.files:
            if path.name.endswith(ARCHIVES):
                unpack(path)
    return fetched


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keeps others from fetching to the folder, and removes the incomplete files of a fetch that was killed.

    The hub's client gives each incomplete file a new name, so it would neither use nor remove them.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".fetch.lock").open("w") as lock:
        try:
            held = is_held(lock, f"a second fetch to {root} would remove what this one has begun; start none meanwhile")
        except OSError as error:
            raise FetchError(f"{root} cannot be locked: {error}; name another data_root") from error
        if held:
            raise FetchError(f"another command is fetching to {root}; wait for its end")
        for leftover in (root / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
            leftover.unlink(missing_ok=True)
        yield


def _download(hub: Hub, root: Path) -> Fetched:
    try:
        api = HfApi()
        commit = str(api.dataset_info(hub.repo_id, revision=hub.revision).sha)
        tree = api.list_repo_tree(hub.repo_id, recursive=True, revision=commit, repo_type="dataset")
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        wanted = [name for name in sizes if any(fnmatch(name, pattern) for pattern in hub.files)]
        _check_wanted(hub, sizes, wanted)
        _check_room(root, sum(sizes[name] for name in wanted if not (root / name).exists()))
        snapshot_download(
            hub.repo_id,
            repo_type="dataset",
            revision=commit,
            allow_patterns=list(hub.files),
            local_dir=root,
        )
    except (_HTTP_ERROR, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise FetchError(f"{hub.url} (revision {hub.revision}): {_explain(hub, error)}") from error
    # Where the hub goes away in between, snapshot_download calls whatever is in the folder complete.
    cut = [name for name in wanted if (file_state(root / name) or (None,))[0] != sizes[name]]
    if cut:
        raise FetchError(f"{len(cut)} files have not arrived whole, the first {cut[0]}; {_AGAIN}")
    return Fetched(commit, tuple(root / name for name in wanted), sum(sizes[name] for name in wanted))


def _explain(hub: Hub, error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the hub; unset it, or fetch where there is a network and copy the folder"
    if isinstance(error, GatedRepoError):
        return "its owner has to let you in: ask on its page, then log in by `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision; correct 'hub' in the stream YAML"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such dataset, or it is private; correct 'hub', or log in by `hf auth login`"
    cause = error.__cause__ or error
    message = (str(cause).splitlines() or ["no message"])[0]
    return (
        f"it cannot be read ({type(cause).__name__}: {message}); files that have arrived are kept: see to "
        f"the network, then {_AGAIN}; or fetch where there is a network and copy the folder"
    )


def _check_wanted(hub: Hub, sizes: dict[str, int], wanted: Sequence[str]) -> None:
    if wanted:
        return
    tops = sorted({PurePosixPath(name).parts[0] for name in sizes})
    raise FetchError(
        f"{hub.url} has no file like {', '.join(hub.files)}; at its top there are {', '.join(tops[:20])}: "
        "correct 'files' under 'hub' in the stream YAML"
    )


def _check_room(root: Path, needed: int) -> None:
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FetchError(
            f"{format_bytes(needed)} are to be downloaded to {root}, but the disk has {format_bytes(free)} "
            "free (and archives need about as much again when unpacked); make room or choose another "
            "data_root"
        )


# --- Archives ---


def unpack(archive: Path) -> None:
    """Unpacks an archive beside itself, unless that has been done; an interrupted one is begun anew.

    Where everything in it lies in one folder, that folder is made beside the archive, else one with the
    archive's name. Existing files are overwritten.

    Raises:
        FetchError: it is damaged, or a member would be written outside.
    """
    mark = archive.with_name(f".{archive.name}.unpacked")
    state = f"{file_state(archive)}\n"
    if mark.exists() and mark.read_text() == state:
        return
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as opened:
            names = opened.namelist() if isinstance(opened, zipfile.ZipFile) else opened.getnames()
            target = _target(archive, names)
            for name in progress(f"unpacking {archive.name}", "files", names):
                _extract(opened, name, target)
    except _DAMAGE as error:
        raise FetchError(
            f"{archive} is damaged ({type(error).__name__}: {error}); delete it and run the same command again"
        ) from error
    except tarfile.FilterError as error:
        raise FetchError(f"{archive}: {error}; nothing more of it is unpacked") from error
    with atomic_path(mark) as temporary:
        temporary.write_text(state)


def _target(archive: Path, names: Sequence[str]) -> Path:
    parts = [PurePosixPath(name).parts for name in names]
    for name, part in zip(names, parts, strict=True):
        if ".." in part or part[:1] == ("/",):
            raise FetchError(f"{archive}: its member {name!r} would be written outside; it is not unpacked")
    tops = {part[0] for part in parts if part}
    if len(tops) == 1 and any(len(part) > 1 for part in parts):
        return archive.parent
    suffix = next(suffix for suffix in ARCHIVES if archive.name.endswith(suffix))
    return archive.with_name(archive.name.removesuffix(suffix))


def _extract(opened: zipfile.ZipFile | tarfile.TarFile, name: str, target: Path) -> None:
    if isinstance(opened, zipfile.ZipFile):
        opened.extract(name, target)
    else:
        opened.extract(name, target, filter="data")


# --- What is left to do ---


def left_to_do(stream: Stream) -> list[str]:
    """One line per thing that a run would still miss; empty where all named files are there."""
    named = dict.fromkeys(path for spec in stream.specs for path in named_paths(stream, spec))
    elsewhere = {stream.data_root / folder for folder in (stream.hub.elsewhere if stream.hub else {})}
    missing = [path for path in named if not path.exists() and path not in elsewhere]
    media = _media_of(stream, missing)
    found = _files_called({path.name for path in (*missing, *media.values())}, stream.data_root)
    lines = [
        _place_folder(path, media[path], found.get(media[path].name, []))
        if path in media
        else _place(path, found.get(path.name, []))
        for path in missing
    ]
    return [*lines, *_elsewhere(stream)]


def _place(path: Path, candidates: Sequence[Path]) -> str:
    if not candidates:
        return f"{path} is missing"
    same_task = [other for other in candidates if other.parent.name == path.parent.name] or candidates
    return f"{path} is missing; move it there from {' or '.join(map(str, same_task[:3]))}"


def _media_of(stream: Stream, missing: Sequence[Path]) -> dict[Path, Path]:
    """Missing media folder -> one of the files that the records expect in it."""
    expected: dict[Path, Path] = {}
    for spec in stream.specs:
        train = stream.train_file(spec) if isinstance(spec, TaskSpec) else None
        for file, root in ((train, stream.media_root(spec)), (stream.test_file(spec), stream.test_media_root(spec))):
            if root not in missing or root in expected or not isinstance(file, Path) or not file.is_file():
                continue
            try:
                named = named_media(file, root, stream.extracted, stream.classes(spec))
            except RecordError:  # of which the checker speaks
                continue
            inside = [path for path in named if path.is_relative_to(root)]
            if inside:
                expected[root] = min(inside)
    return expected


def _place_folder(folder: Path, medium: Path, candidates: Sequence[Path]) -> str:
    name = medium.relative_to(folder)
    lying = [path for path in candidates if path.parts[-len(name.parts) :] == name.parts]
    if not lying:
        return f"{folder} is missing"
    return f"{folder} is missing; move the images or clips so that {lying[0]} becomes {medium}, and the others likewise"


def _files_called(names: set[str], root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder, _, files in os.walk(root) if names else ():
        for name in names.intersection(files):
            found.setdefault(name, []).append(Path(folder) / name)
    return found


def _elsewhere(stream: Stream) -> Iterator[str]:
    for folder, source in (stream.hub.elsewhere if stream.hub else {}).items():
        path = stream.data_root / folder
        if not path.is_dir():
            yield f"{path} is missing; the repository does not have it, get it from {source}"


def format_fetched(stream: Stream, fetched: Fetched, left: Sequence[str]) -> str:
    """What has arrived, the commit that it is, and what is left to do."""
    hub = stream.hub
    lines = [f"{len(fetched.files)} files ({format_bytes(fetched.size)}) are in {stream.data_root}."]
    if hub is not None and hub.revision != fetched.commit:
        lines.append(f"They are commit {fetched.commit} of {hub.repo_id}; 'revision: {fetched.commit}' pins it.")
    if left:
        lines += ["\nStill to do:", *(f"  {line}" for line in left)]
    return "\n".join(lines)
