"""Checks every image and clip that a data file names, before anything is paid for."""

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mllm_keeplora.data.images import ImageError, load_image
from mllm_keeplora.data.video.reader import VideoError, VideoReader
from mllm_keeplora.runs.files import sha256_json, write_json

_IMAGE_THREADS = 8  # decoding releases the GIL; more threads than this only contend for the disk
# Enters what is remembered: raise it when a file that was sound may no longer be.
_RULES_VERSION = 2


def file_state(path: Path) -> tuple[int, int] | None:
    """(size in bytes, time of the last change in ns); None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class MediaChecker:
    """Decodes every image and clip once, before anything is paid for.

    Attributes:
        reader: decodes clips; None refuses every clip.
        memory: folder that remembers which sets of files were sound, by path, size and time of change, so
            that a continued run need not decode a hundred thousand clips again; None remembers nothing.
    """

    reader: VideoReader | None = None
    memory: Path | None = None

    def problems(self, images: Collection[Path], videos: Collection[Path], label: str) -> dict[Path, str]:
        """The reason for each file that cannot be used. Reads all files once, in threads.

        Args:
            images: paths.
            videos: paths.
            label: what the progress bar calls them.
        """
        return self.problems_of([(images, videos)], label)

    def problems_of(self, sets: Sequence[tuple[Collection[Path], Collection[Path]]], label: str) -> dict[Path, str]:
        """The same for several data files.

        A file that several of them share is read once. Each is remembered by itself, as a run asks for it.

        Args:
            sets: (images, videos) of each data file.
            label: what the progress bar calls them.
        """
        ordered = [(sorted(set(images)), sorted(set(videos))) for images, videos in sets]
        memories = [self._memory_file(images, videos) for images, videos in ordered]
        new = [
            (pair, memory)
            for pair, memory in zip(ordered, memories, strict=True)
            if memory is None or not memory.exists()
        ]
        images = sorted({path for pair, _ in new for path in pair[0]})
        videos = sorted({path for pair, _ in new for path in pair[1]})
        found = _check_all(images, _image_problem, f"checking images of {label}", "image", _IMAGE_THREADS)
        found |= _check_all(videos, self._video_problem, f"checking clips of {label}", "clip", os.cpu_count() or 1)
        for (its_images, its_videos), memory in new:
            if memory is not None and not found.keys() & {*its_images, *its_videos}:
                write_json(memory, {"images": len(its_images), "videos": len(its_videos)})
        return found

    def _video_problem(self, path: Path) -> str | None:
        if self.reader is None:
            return f"{path}: a video, but nothing here reads videos"
        try:
            self.reader.read(path)
        except VideoError as error:
            return str(error)
        return None

    def _memory_file(self, images: list[Path], videos: list[Path]) -> Path | None:
        if self.memory is None:
            return None
        sampling = None if self.reader is None else [self.reader.config.frames, self.reader.config.fps]
        state = [[os.path.realpath(path), file_state(path)] for path in (*images, *videos)]
        return self.memory / f"{sha256_json([_RULES_VERSION, state, sampling])}.json"


# Decodes images, refuses clips, remembers nothing.
IMAGES_ONLY = MediaChecker()


def _check_all(
    paths: list[Path], check: Callable[[Path], str | None], label: str, unit: str, threads: int
) -> dict[Path, str]:
    with ThreadPoolExecutor(threads) as pool:
        reasons = tqdm(
            pool.map(check, paths),
            total=len(paths),
            desc=label,
            unit=unit,
            disable=None,  # no bar where the output is not a terminal,
            delay=2.0,  # nor for data that are checked in less than two seconds
        )
        return {path: reason for path, reason in zip(paths, reasons, strict=True) if reason is not None}


def _image_problem(path: Path) -> str | None:
    try:
        load_image(path)
    except ImageError as error:
        return str(error)
    return None
