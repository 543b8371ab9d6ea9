"""Decoded frames on disk: one safetensors file for a clip, all of them within a bound."""

import json
import logging
import os
import random
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mllm_keeplora.runs.files import umask_kept

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]  # [T, H, W, 3], RGB

_HEADER_BYTES = 1024  # of an entry: more than names, shape and facts take
_RECOUNT_SHARE = 1 / 64
_TEMPORARY_SECONDS = 3600.0  # no write of a clip takes that long: its process was killed


class FrameCache:
    """Frames of clips and what is known about them, by key, in at most `limit` bytes together.

    Entries are evicted at random. Passes over data are cyclic, and there the least recently used entry is the
    one that is needed next: with a cache a little smaller than the data, every read would miss. At random,
    the hit rate falls in step with the size.

    Any number of threads and processes may use one folder. Each counts it before it first writes and after
    every 1/64 of the limit that it has written, so n of them overshoot by at most n/64 of the limit and one
    clip each.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._room = 0  # bytes that may be written until the folder is counted again
        self._broken = False
        # It has no state that forked workers would share.
        self._random = random.SystemRandom()

    def load(self, key: str) -> tuple[Frames, dict[str, Any]] | None:
        """Frames and facts; None where there is no entry, or where it is damaged."""
        try:
            with safe_open(self._path(key), framework="numpy") as file:
                frames = file.get_tensor("frames")
                facts = json.loads((file.metadata() or {})["clip"])
            if facts.pop("crc32") != _checksum(frames, facts):
                return None
        # A header that is no JSON object of ours is a ValueError, KeyError, TypeError or AttributeError.
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return frames, facts

    def store(self, key: str, frames: Frames, facts: dict[str, Any]) -> None:
        """Writes an entry. A cache that cannot be written is reported once and not written further."""
        size = frames.nbytes + _HEADER_BYTES
        if self._broken or size > self._limit:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        # One field: of several, safetensors does not keep the order, and equal clips would differ as files.
        metadata = {"clip": json.dumps({**facts, "crc32": _checksum(frames, facts)})}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._room < size:
                self._make_room(size)
            self._room -= size
            # Not synced to the disk, which would take longer than decoding: the checksum finds what a power
            # cut tears.
            with umask_kept(temporary):
                save_file({"frames": frames}, temporary, metadata=metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            self._broken = True
            logger.warning("decoded frames are not cached further: %s cannot be written (%s)", path, error)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Counts the folder and evicts until `size` bytes and 1/64 of the limit are free."""
        sizes: dict[Path, int] = {}
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process evicted it
                status = path.stat()
                if path.suffix == ".safetensors":
                    sizes[path] = status.st_size
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > _TEMPORARY_SECONDS:
                    path.unlink()
        self._room = max(size, int(self._limit * _RECOUNT_SHARE))
        excess = sum(sizes.values()) + self._room - self._limit
        for path in self._random.sample(sorted(sizes), len(sizes)):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= sizes[path]


def _checksum(frames: Frames, facts: dict[str, Any]) -> int:
    return zlib.crc32(frames.data, zlib.crc32(json.dumps(facts).encode()))
