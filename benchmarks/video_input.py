"""Clips per second of the video reader, beside decord alone in the same run.

    python benchmarks/video_input.py                     # about a minute on one core
    python benchmarks/video_input.py --repeats 21 --frames 16

One h264 clip of 300 frames at 854x480 is encoded first. Then every way of reading it takes its turn, again
and again, so that a machine that slows down slows all of them; ratios are taken within a round and their
median is printed. "cold" reads decode; with a cache they also write the entry, which is removed before.
"cached" reads find it. Under `backend: decord` a clip is decoded by PyAV and by decord. What is decoded is
checked to be the same everywhere.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import decord
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm_keeplora.config import VideoConfig  # noqa: E402
from mllm_keeplora.data.video.cache import Frames  # noqa: E402
from mllm_keeplora.data.video.reader import VideoReader  # noqa: E402

FRAMES, HEIGHT, WIDTH, RATE = 300, 480, 854, 30


def encode(path: Path, noise: float) -> None:
    """A moving scene with noise, at x264's default quality: about as many bytes as a filmed one."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (HEIGHT // 16 + 1, WIDTH // 16 + 1, 3), dtype=np.uint8)
    scene = np.kron(blocks, np.ones((16, 16, 1), np.uint8))[:HEIGHT, :WIDTH].astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FRAMES):
            grain = (generator.standard_normal((HEIGHT, WIDTH, 1)) * noise).astype(np.int16)
            picture = np.clip(np.roll(scene, 3 * index, axis=1) + grain, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def decord_alone(path: Path, frames: int) -> Frames:
    """What a script does without the reader: in this process, unchecked."""
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    taken: Frames = reader.get_batch(np.linspace(0, len(reader) - 1, frames).astype(int)).asnumpy()
    return taken


def remove_entries(cache: Path) -> None:
    """Empties the cache."""
    for entry in cache.glob("*.safetensors"):
        entry.unlink()


def measure(ways: dict[str, Callable[[], Frames]], repeats: int, reset: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of every way in every round; the first round, with imports and page cache, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    reference: Frames | None = None
    for _ in range(repeats + 1):
        for name, way in ways.items():
            if not name.startswith("cached"):
                reset()
            started = time.perf_counter()
            frames = way()
            seconds[name].append(time.perf_counter() - started)
            reference = frames if reference is None else reference
            if not np.array_equal(frames, reference):
                raise SystemExit(f"{name} gives other frames than decord alone")
    return {name: each[1:] for name, each in seconds.items()}


def main() -> None:
    """Encodes, measures and prints the table."""
    about = "Clips per second of the video reader, beside decord alone."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--frames", type=int, default=8, help="frames taken of the clip")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--noise", type=float, default=4.0, help="grain of the encoded scene, in levels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "clip.mp4"
        encode(path, arguments.noise)

        def reader(backend: str, cache_gb: float) -> VideoReader:
            settings = VideoConfig(frames=arguments.frames, backend=backend, cache_gb=cache_gb)  # type: ignore[arg-type]
            return VideoReader(settings, folder)

        readers = {(b, gb): reader(b, gb) for b in ("pyav", "decord") for gb in (0.0, 1.0)}
        ways: dict[str, Callable[[], Frames]] = {"decord alone": lambda: decord_alone(path, arguments.frames)}
        for (backend, cache_gb), each in readers.items():
            cache = "writing the cache" if cache_gb else "no cache"
            ways[f"cold, {backend}, {cache}"] = lambda each=each: each.read(path).frames  # type: ignore[misc]
        # Right after a read that has written the entry.
        ways["cached"] = lambda: readers["pyav", 1.0].read(path).frames
        seconds = measure(ways, arguments.repeats, lambda: remove_entries(folder / "frames"))
        for one in readers.values():
            one.close()
        megabytes = path.stat().st_size / 1e6
    print(
        f"{arguments.frames} of {FRAMES} frames, {WIDTH}x{HEIGHT} h264, {megabytes:.1f} MB; "
        f"median of {arguments.repeats} rounds (smallest to largest)\n"
    )
    print(f"| {'way':<32} | ms a clip | clips/s | x decord alone            |")
    print(f"|{'-' * 34}|----------:|--------:|---------------------------|")
    base = seconds["decord alone"]
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(base, found, strict=True)]
        middle = statistics.median(found)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name:<32} | {middle * 1e3:9.1f} | {1 / middle:7.1f} | {spread:<25} |")


if __name__ == "__main__":
    main()
