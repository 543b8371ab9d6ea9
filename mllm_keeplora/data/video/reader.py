"""Video files as frames: decoded in a child process, cached on disk.

`VideoReader.read` gives the frames of one clip or raises a `VideoError` that names it. Nothing that is wrong
with a file can hang or end the run: decoding takes place in a child process (`decoder.py`) that is
ended when it is late and started anew when it has died. Frames are never blank, repeated or rescaled to make
a clip fit.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.video.decoder import Frames
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.runs.files import sha256_file

logger = logging.getLogger(__name__)

# The program of a decoder's process.
DECODER = Path(__file__).with_name("decoder.py")
# Enters the keys of cached clips: raise it when the frames of one file and setting change.
CACHE_VERSION = 1

_START_SECONDS = 120.0  # imports of a starting decoder, on a file system that many processes read at once
_PIPE_BYTES = 2**20  # what Linux allows without privileges; a pipe holds 64 KiB by default
_HEADER_BYTES = 2**16
_TEMPORARY_SECONDS = 3600.0  # no write of a clip takes that long: its process was killed
_RESCAN_SHARE = 1 / 64
_HEADER_BYTES_OF_AN_ENTRY = 1024  # more than names, shape and indices take
_REMEDY = "replace the file, or leave its records out by 'on_bad_record: skip'"


class VideoError(KeepLoRAError, ValueError):
    """A video that cannot be used; the message names the file, what is wrong, and the remedy."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one video file.

    Attributes:
        frames: [T, H, W, 3] uint8, RGB, turned as the file says it is to be shown. Yours to write to.
        indices: which frames of the file they are, increasing; T of them.
        fps: frames per second of the file, on average; 0 where it states none.
        total_frames: of the file.
    """

    frames: Frames
    indices: tuple[int, ...]
    fps: float
    total_frames: int

    @property
    def duration(self) -> float:
        """Length of the file in seconds; NaN where it states no frame rate."""
        return self.total_frames / self.fps if self.fps > 0 else math.nan


class VideoReader:
    """Reads clips, from the cache or through a decoder.

    Several threads may call `read` at once: each call has a decoder of its own for its duration, and there
    are as many decoders as calls that ever overlapped. A forked process (a DataLoader's worker) starts its
    own; a reader that is pickled takes only its settings along.

    Args:
        config: sampling, backend, time limit and size of the cache.
        cache_dir: decoded frames are kept in its folder `frames`, for every reader on it; None for no cache.
    """

    def __init__(self, config: VideoConfig, cache_dir: Path | None) -> None:
        self.config = config
        self._cache_dir = cache_dir
        self._cache: _FrameCache | None = None
        if cache_dir is not None and config.cache_gb > 0:
            self._cache = _FrameCache(cache_dir / "frames", int(config.cache_gb * 1e9))
        self._pool = _Pool(config.backend)
        # Ends the decoders when the reader is collected or the program ends, whichever comes first.
        self._finalizer = weakref.finalize(self, self._pool.close)

    def __reduce__(self) -> tuple[type["VideoReader"], tuple[VideoConfig, Path | None]]:
        return type(self), (self.config, self._cache_dir)

    def read(self, path: Path) -> Clip:
        """The sampled frames of a video file.

        Raises:
            VideoError: the file is missing, empty, truncated, damaged, no video or too short; its size
                changes midway; it is to be shown mirrored, or turned by other than multiples of 90 degrees;
                its decoder took longer than `config.timeout` or crashed; or the chosen backend is not
                installed.
        """
        _check_file(path)
        if self._cache is None:
            return self._decode(path)
        key = self._cache_key(path)
        clip = self._cache.load(key)
        if clip is None:
            clip = self._decode(path)
            self._cache.store(key, clip)
        return clip

    def close(self) -> None:
        """Ends the decoders. A later `read` starts new ones."""
        self._pool.close()

    def _decode(self, path: Path) -> Clip:
        config = self.config
        request = {
            "path": os.path.abspath(path),  # noqa: PTH100  (resolve() would follow links)
            "frames": config.frames,
            "fps": config.fps,
            "timeout": config.timeout,
        }
        try:
            decoder = self._pool.take()
        except _DecoderError as error:
            raise VideoError(f"video {path} cannot be decoded: {error}") from error
        try:
            header, frames = decoder.ask(request, config.timeout)
        except _DecoderError as error:
            raise VideoError(f"video {path} {error}; {_REMEDY}") from error
        finally:
            # Also on Ctrl-C: a decoder that has not finished its answer is of no further use.
            self._pool.give_back(decoder)
        if frames is None:
            raise VideoError(f"video {path} {header['error']}; {header['remedy'] or _REMEDY}")
        return Clip(frames, tuple(header["indices"]), header["fps"], header["total_frames"])

    def _cache_key(self, path: Path) -> str:
        """Of the file's content, not its path: files may be replaced, and data sets may share clips."""
        config = self.config
        # decord and PyAV give the same frames, bit for bit, which a test holds them to.
        backend = "torchcodec" if config.backend == "torchcodec" else "ffmpeg"
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise VideoError(f"video {path} cannot be read: {error.strerror}") from error
        settings = [CACHE_VERSION, digest, config.frames, config.fps, backend]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise VideoError(f"video {path} is a folder; expected a file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise VideoError(f"video {path} does not exist; {_REMEDY}") from error
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror}") from error
    if empty:
        raise VideoError(f"video {path} is empty (0 bytes); {_REMEDY}")


# --- Decoders ---


class _DecoderError(Exception):
    """A decoder that gave no answer. The message follows `video PATH`."""


class _Late(Exception):
    """The child did not answer in time."""


class _Died(Exception):
    """The child has ended; the message says how."""


class _Decoder:
    """One child process. Not thread-safe; after an error, or an answer not fully read, it is unusable."""

    def __init__(self, backend: str) -> None:
        # What ffmpeg prints goes to a file: the child looks into it for damage that ffmpeg conceals, and the
        # parent for the last words of a child that died.
        self._log = cast(BinaryIO, tempfile.TemporaryFile("a+b"))  # noqa: SIM115  (closed by end)
        self._process = subprocess.Popen(
            # -P: the modules beside the script must not stand in for installed ones of the same name.
            [sys.executable, "-P", str(DECODER), backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        self._input = cast(BinaryIO, self._process.stdin)
        self._output = cast(BinaryIO, self._process.stdout)
        with suppress(OSError, AttributeError):  # AttributeError: only Linux has it
            fcntl.fcntl(self._output.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.idle = False

    def wait_until_ready(self) -> None:
        """Waits for the child's imports.

        Raises:
            _DecoderError: they failed.
        """
        try:
            header, _ = self._receive(_START_SECONDS)
        except _Late as error:
            raise _DecoderError(f"its decoder did not start within {_START_SECONDS:g} s") from error
        except _Died as error:
            raise _DecoderError(f"its decoder did not start ({error})") from error
        if "error" in header:
            raise _DecoderError(f"{header['error']}; {header['remedy']}")
        self.idle = True

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], timeout: float) -> tuple[dict[str, Any], Frames | None]:
        """Has one clip decoded.

        Returns:
            The reply's header, and its frames unless the header has an `error`.

        Raises:
            _DecoderError: the child died or did not answer in time.
        """
        self.idle = False
        with suppress(BrokenPipeError):  # it has died, which reading tells with the reason
            self._input.write(json.dumps(request).encode() + b"\n")
        try:
            reply = self._receive(timeout)
        except _Late as error:
            raise _DecoderError(
                f"was not decoded within video.timeout: {timeout:g} s, and its decoder was ended"
            ) from error
        except _Died as error:
            raise _DecoderError(f"crashed its decoder ({error})") from error
        self.idle = True
        return reply

    def _receive(self, timeout: float) -> tuple[dict[str, Any], Frames | None]:
        deadline = time.monotonic() + timeout
        start = bytearray()
        while b"\n" not in start:
            chunk = bytearray(_HEADER_BYTES)
            start += chunk[: self._read_into(memoryview(chunk), deadline)]
        line, _, rest = start.partition(b"\n")
        header: dict[str, Any] = json.loads(line)
        if "shape" not in header:
            return header, None
        frames: Frames = np.empty(header["shape"], np.uint8)
        target = frames.data.cast("B")
        target[: len(rest)] = rest
        received = len(rest)
        while received < len(target):
            received += self._read_into(target[received:], deadline)
        return header, frames

    def _read_into(self, target: memoryview, deadline: float) -> int:
        poll = select.poll()
        poll.register(self._output.fileno(), select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _Late
        count = os.readv(self._output.fileno(), [target])
        if count == 0:
            raise _Died(self._last_words())
        return count

    def _last_words(self) -> str:
        """How the child died; its end of the pipe is closed."""
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code < 0:
            hint = ", out of memory?" if -code == signal.SIGKILL else ""
            return f"signal {signal.Signals(-code).name}{hint}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"exit status {code}: {lines[-1] if lines else 'no message'}"

    def end(self) -> None:
        """Ends and reaps the child."""
        self.close_files()
        if not self.idle:  # an idle one ends with its input
            self._process.kill()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close_files(self) -> None:
        """Closes this process's ends of the pipes."""
        for file in (self._input, self._output, self._log):
            with suppress(OSError):
                file.close()

    def abandon(self) -> None:
        """In a forked process: lets go of the parent's child without ending it."""
        self.close_files()
        self._process.returncode = 0  # else collecting it would wait for a process that is not our child


class _Pool:
    """The decoders of one reader in this process."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._decoders: list[_Decoder] = []  # all, so that a fork can let go of those in use, too
        self._free: list[_Decoder] = []
        _POOLS.add(self)

    def take(self) -> _Decoder:
        """A decoder that no other thread uses, started where none is free.

        Raises:
            _DecoderError: it does not start.
        """
        with self._lock:
            decoder = self._free.pop() if self._free else None
        if decoder is not None:
            if decoder.alive:
                return decoder
            self._drop(decoder)  # killed while it had nothing to do
        decoder = _Decoder(self._backend)
        with self._lock:
            self._decoders.append(decoder)
        try:
            decoder.wait_until_ready()
        finally:
            if not decoder.idle:
                self._drop(decoder)
        return decoder

    def give_back(self, decoder: _Decoder) -> None:
        """Keeps a decoder for the next clip, or ends it where it has not finished this one."""
        if not decoder.idle:
            self._drop(decoder)
            return
        with self._lock:
            self._free.append(decoder)

    def close(self) -> None:
        """Ends the decoders that are free."""
        with self._lock:
            free, self._free = self._free, []
        for decoder in free:
            self._drop(decoder)

    def forget(self) -> None:
        """In a forked process: the decoders are the parent's."""
        self._lock = threading.Lock()  # another thread may have held it at the fork
        for decoder in self._decoders:
            decoder.abandon()
        self._decoders, self._free = [], []

    def _drop(self, decoder: _Decoder) -> None:
        decoder.end()
        with self._lock:
            self._decoders.remove(decoder)


_POOLS: "weakref.WeakSet[_Pool]" = weakref.WeakSet()


def _forget_decoders() -> None:
    for pool in _POOLS:
        pool.forget()


# A fork would share the parent's pipes: answers would go to whoever reads first, and a decoder whose parent
# is gone would wait on for as long as a worker has a copy of its input open.
os.register_at_fork(after_in_child=_forget_decoders)


# --- Cache ---


class _FrameCache:
    """Decoded clips on disk, one safetensors file each, at most `limit` bytes together.

    Entries are evicted at random. Passes over data are cyclic, and there the least recently used entry is the
    one that is needed next: with a cache a little smaller than the data, every read would miss. At random,
    the hit rate falls in step with the size.

    A process counts the files of the others when it starts to write and again after every 1/64 of the limit
    that it has written. So n processes overshoot by at most n/64 of the limit and one clip each.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._sizes: dict[str, int] | None = None  # None: to be counted
        self._names: list[str] = []
        self._total = 0
        self._written = 0
        # It has no state that forked workers would share.
        self._random = random.SystemRandom()
        self._broken = False
        _CACHES.add(self)

    def load(self, key: str) -> Clip | None:
        """A stored clip; None where there is none, or where its file is damaged."""
        try:
            with safe_open(self._path(key), framework="numpy") as file:
                facts, frames = file.metadata(), file.get_tensor("frames")
        except (OSError, SafetensorError):
            return None
        return _unpack(facts, frames)

    def store(self, key: str, clip: Clip) -> None:
        """Writes a clip. A cache that cannot be written is reported once and not used further."""
        if self._broken:
            return
        size = clip.frames.nbytes + _HEADER_BYTES_OF_AN_ENTRY
        if size > self._limit:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(path.name, size)
            # Not synced to the disk, which would take longer than decoding: a checksum finds what a power cut
            # tears.
            save_file({"frames": clip.frames}, temporary, metadata=_facts(clip))
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            self._broken = True
            logger.warning("decoded frames are not cached further: %s cannot be written (%s)", path, error)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def reset(self) -> None:
        """In a forked process: another thread may have held the lock; sizes may be half updated."""
        self._lock = threading.Lock()
        self._sizes = None

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self, name: str, size: int) -> None:
        """Evicts until `size` bytes more fit, and counts them as used."""
        with self._lock:
            if self._sizes is None or self._written > self._limit * _RESCAN_SHARE:
                self._count()
            sizes = cast(dict[str, int], self._sizes)
            self._total -= sizes.get(name, 0)  # a damaged entry that is replaced
            if name not in sizes:
                self._names.append(name)
            sizes[name] = 0
            while self._total + size > self._limit and len(self._names) > 1:
                self._evict(sizes, keep=name)
            sizes[name] = size
            self._total += size
            self._written += size

    def _evict(self, sizes: dict[str, int], keep: str) -> None:
        place = self._random.randrange(len(self._names))
        name = self._names[place]
        if name == keep:
            return
        self._names[place] = self._names[-1]
        self._names.pop()
        self._total -= sizes.pop(name)
        (self._folder / name).unlink(missing_ok=True)  # missing: another process evicted it

    def _count(self) -> None:
        sizes: dict[str, int] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    if entry.name.endswith(".safetensors"):
                        sizes[entry.name] = facts.st_size
                    elif entry.name.endswith(".tmp") and time.time() - facts.st_mtime > _TEMPORARY_SECONDS:
                        Path(entry.path).unlink(missing_ok=True)
        self._sizes, self._names = sizes, list(sizes)
        self._total, self._written = sum(sizes.values()), 0


_CACHES: "weakref.WeakSet[_FrameCache]" = weakref.WeakSet()


def _reset_caches() -> None:
    for cache in _CACHES:
        cache.reset()


os.register_at_fork(after_in_child=_reset_caches)


def _facts(clip: Clip) -> dict[str, str]:
    """One entry: of several, safetensors does not keep the order, and equal clips would differ as files."""
    facts = {
        "indices": clip.indices,
        "fps": clip.fps,
        "total_frames": clip.total_frames,
        "crc32": zlib.crc32(clip.frames.data),
    }
    return {"clip": json.dumps(facts)}


def _unpack(metadata: Mapping[str, str] | None, frames: Frames) -> Clip | None:
    """The clip of a cache file; None where the file is damaged."""
    try:
        facts = json.loads((metadata or {})["clip"])
        if zlib.crc32(frames.data) != facts["crc32"]:
            return None
        return Clip(frames, tuple(facts["indices"]), facts["fps"], facts["total_frames"])
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON
        return None
