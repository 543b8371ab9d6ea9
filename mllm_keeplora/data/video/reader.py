"""Video files as frames: decoded in a child process, cached on disk.

`VideoReader.read` gives the frames of one clip or raises a `VideoError` that names it. Nothing that is wrong
with a file can hang or end the run: decoding takes place in a child process (`decoder.py`) that is
ended when it is late and started anew when it has died. Frames are never blank, repeated or rescaled to make
a clip fit.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.file_kinds import describe_content
from mllm_keeplora.data.images import MAX_ASPECT
from mllm_keeplora.data.video.cache import FrameCache, Frames
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.regular_files import irregular_kind
from mllm_keeplora.runs.files import sha256_file

# The program of a decoder's process.
DECODER = Path(__file__).with_name("decoder.py")
# Enters the keys of cached clips: raise it when the frames of one file and setting change.
CACHE_VERSION = 2

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
        seconds: when each of these frames is shown, from the file's first frame on; None for a constant rate,
            where that is index / fps.
    """

    frames: Frames
    indices: tuple[int, ...]
    fps: float
    total_frames: int
    seconds: tuple[float, ...] | None = None

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
        self._cache: FrameCache | None = None
        if cache_dir is not None and config.cache_gb > 0:
            self._cache = FrameCache(cache_dir / "frames", int(config.cache_gb * 1e9))
        self._idle: list[_Decoder] = []
        # Ends the decoders when the reader is collected or the program ends, whichever comes first.
        weakref.finalize(self, _end_all, self._idle)

    def __reduce__(self) -> tuple[type["VideoReader"], tuple[VideoConfig, Path | None]]:
        return type(self), (self.config, self._cache_dir)

    def read(self, path: Path) -> Clip:
        """The sampled frames of a video file.

        Raises:
            VideoError: the file is missing, no regular file, empty, truncated, damaged, no video, too short or
                too narrow; its size changes midway; it is to be shown mirrored, or turned by other than multiples
                of 90 degrees; its decoder took longer than `config.timeout` or crashed; or the chosen backend is
                not installed, or gives other frames than PyAV.
        """
        _check_file(path)
        if self._cache is None:
            return _clip(*self._decode(path))
        key = self._cache_key(path)
        entry = self._cache.load(key)
        if entry is None:
            entry = self._decode(path)
            self._cache.store(key, *entry)
        return _clip(*entry)

    def close(self) -> None:
        """Ends the decoders. A later `read` starts new ones."""
        _end_all(self._idle)

    def _decode(self, path: Path) -> tuple[Frames, dict[str, Any]]:
        config = self.config
        request = {
            "path": os.path.abspath(path),  # noqa: PTH100  (resolve() would follow links)
            "frames": config.frames,
            "fps": config.fps,
            "timeout": config.timeout,
        }
        if find_spec("av") is None:
            raise VideoError(f"video {path} cannot be decoded: PyAV is not installed; pip install av")
        with self._borrow_decoder() as decoder:
            try:
                header, frames = decoder.ask(request)
            except (EOFError, OSError) as error:
                raise VideoError(f"video {path} {decoder.last_words(config.timeout)}; {_REMEDY}") from error
        if frames is None:
            what = describe_content(path)
            reason = header["error"] if what is None or what == "a video" else f"is {what}"
            raise VideoError(f"video {path} {reason}; {header['remedy'] or _REMEDY}")
        height, width = frames.shape[1:3]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise VideoError(
                f"video {path} has frames of {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the "
                f"other. {_REMEDY.capitalize()}"
            )
        return frames, {name: header[name] for name in ("indices", "fps", "total_frames", "seconds")}

    @contextmanager
    def _borrow_decoder(self) -> Iterator["_Decoder"]:
        """A decoder that no other thread uses, started where none is free."""
        decoder = self._idle_decoder() or _Decoder(self.config.backend)
        try:
            yield decoder
        except BaseException:
            # Also on Ctrl-C: a decoder that has not finished its answer is of no further use.
            decoder.end()
            raise
        self._idle.append(decoder)

    def _idle_decoder(self) -> "_Decoder | None":
        while True:
            try:
                decoder = self._idle.pop()
            except IndexError:
                return None
            if decoder.usable:
                return decoder
            decoder.end()

    def _cache_key(self, path: Path) -> str:
        """Of the file's content, not its path: files may be replaced, and data sets may share clips.

        The backend is no part of it: all give the same frames, or refuse the clip.
        """
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise VideoError(f"video {path} cannot be read: {error.strerror}") from error
        settings = [CACHE_VERSION, digest, self.config.frames, self.config.fps]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _clip(frames: Frames, facts: dict[str, Any]) -> Clip:
    seconds = facts["seconds"]
    return Clip(
        frames,
        tuple(facts["indices"]),
        facts["fps"],
        facts["total_frames"],
        None if seconds is None else tuple(seconds),
    )


def _check_file(path: Path) -> None:
    try:
        kind = irregular_kind(path)
        if kind is not None:
            raise VideoError(f"video {path} is {kind}; expected a regular file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise VideoError(f"video {path} does not exist; {_REMEDY}") from error
    except VideoError:
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise VideoError(f"video {path} cannot be read: {error}") from error
    if empty:
        raise VideoError(f"video {path} is empty (0 bytes); {_REMEDY}")


class _Decoder:
    """One child process. Not thread-safe; of no further use after an error.

    What the child prints goes to a file, which holds the last words of one that died.
    """

    def __init__(self, backend: str) -> None:
        self._parent = os.getpid()
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (closed by end)
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P: the modules beside the script must not stand in for installed ones of the same name.
                [sys.executable, "-P", str(DECODER), backend, str(theirs.fileno()), str(self._parent)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )

    @property
    def usable(self) -> bool:
        """Whether the child runs, and is this process's own: a forked one has its parent's list."""
        return self._parent == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], Frames | None]:
        """Has one clip decoded.

        Returns:
            The reply's header, and its frames unless the header has an `error`.

        Raises:
            EOFError, OSError: the child died, or was late and ended itself.
        """
        self._connection.send_bytes(json.dumps(request).encode())
        header: dict[str, Any] = json.loads(self._connection.recv_bytes())
        if "error" in header:
            return header, None
        frames: Frames = np.empty(header["shape"], np.uint8)
        self._connection.recv_bytes_into(frames.data.cast("B"))
        return header, frames

    def last_words(self, timeout: float) -> str:
        """How the child ended."""
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return f"was not decoded within video.timeout: {timeout:g} s, and its decoder was ended"
        if code < 0:
            hint = ", out of memory?" if -code == signal.SIGKILL else ""
            return f"crashed its decoder (signal {signal.Signals(-code).name}{hint})"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"crashed its decoder (exit status {code}: {lines[-1] if lines else 'no message'})"

    def end(self) -> None:
        """Ends the child. In a forked process it is the parent's, and only let go of."""
        self._connection.close()
        self._log.close()
        if self._parent == os.getpid():
            self._process.kill()
            self._process.wait()


def _end_all(decoders: list[_Decoder]) -> None:
    while decoders:
        decoders.pop().end()
