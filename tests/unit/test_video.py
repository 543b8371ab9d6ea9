"""Video decoding: the right frames, the same from every backend; bad files are errors and never a hang."""

import os
import pickle
import shutil
import signal
import threading
import time
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, Dataset

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.video import reader as video
from mllm_keeplora.data.video.decoder import spread_indices
from mllm_keeplora.data.video.reader import Clip, VideoError, VideoReader
from tests import clips, forked

ROOT = Path(__file__).resolve().parents[2]
CLOSED = {"crf": "4", "x264-params": "keyint=10:min-keyint=10:bframes=3:scenecut=0"}
OPEN = {"crf": "4", "x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"}

REFRESHED = {"crf": "4", "x264-params": "intra-refresh=1:keyint=10:bframes=0"}  # key frames that are no start

decord = pytest.importorskip("decord", reason="decord has no wheel for this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return clips.write_clip(folder / "plain.mp4", clips.moving_frames(40), options=CLOSED)


@pytest.fixture(scope="module")
def readers() -> Iterator[dict[str, VideoReader]]:
    made = {name: VideoReader(_config(backend=name), None) for name in ("pyav", "decord")}
    yield made
    for reader in made.values():
        reader.close()


def _config(**settings: object) -> VideoConfig:
    return VideoConfig(**{"frames": 8, "timeout": 30.0, "cache_gb": 0.0, **settings})  # type: ignore[arg-type]


def _expected(path: Path, frames: int = 8) -> np.ndarray:
    every = clips.decode_all(path)
    return np.stack([every[index] for index in np.linspace(0, len(every) - 1, frames).astype(int)])


# --- Which frames ---


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    for total in range(1, 120):
        for frames in range(1, total + 1):
            indices = spread_indices(total, 25.0, frames, None)
            assert len(indices) == frames
            assert indices[0] == 0 and (frames == 1 or indices[-1] == total - 1)
            assert all(a < b for a, b in zip(indices, indices[1:], strict=False))
            assert list(indices) == np.linspace(0, total - 1, frames).astype(int).tolist()


def test_a_rate_takes_frames_by_the_clips_length_up_to_the_cap() -> None:
    assert len(spread_indices(150, 30.0, 16, 2.0)) == 10  # five seconds
    assert len(spread_indices(3000, 30.0, 16, 2.0)) == 16
    assert spread_indices(3000, 30.0, 16, 2.0)[-1] == 2999
    assert spread_indices(3, 30.0, 16, 2.0) == (0,)
    assert spread_indices(4, 1.0, 16, 8.0) == (0, 1, 2, 3)  # no frame twice


def test_at_a_variable_rate_frames_are_spread_by_time() -> None:
    shown_at = [0.04 * i for i in range(30)] + [1.2 + 0.5 * i for i in range(24)]  # 30 of 54 in 1.2 of 12.7 s
    for frames in range(2, 55):
        indices = np.array(spread_indices(54, 54 / 12.9, frames, None, shown_at))
        assert (np.diff(indices) > 0).all() and indices[0] == 0 and indices[-1] == 53 and len(indices) == frames
        if frames <= 26:  # half a second apart, so that no frame is on for two moments
            for index, moment in zip(indices, np.linspace(0, 12.7, frames), strict=True):
                assert shown_at[index] <= moment + 1e-9 and (index == 53 or moment < shown_at[index + 1])
    assert spread_indices(54, 54 / 12.9, 99, 1.0, shown_at) == spread_indices(54, 54 / 12.9, 13, None, shown_at)


def test_a_frame_that_stays_on_is_taken_once() -> None:
    assert spread_indices(5, 0.5, 4, None, [0.0, 0.1, 0.2, 9.9, 10.0]) == (0, 2, 3, 4)
    assert spread_indices(4, 0.4, 4, None, [0.0, 9.8, 9.9, 10.0]) == (0, 1, 2, 3)
    assert spread_indices(3, 0.3, 9, 1.0, [0.0, 0.1, 10.0]) == (0, 1, 2)


@pytest.mark.parametrize("total", [2, 7, 30, 100])
@pytest.mark.parametrize("rate", [8.0, 25.0, 30000 / 1001])
def test_by_time_and_by_number_are_the_same_at_a_constant_rate(total: int, rate: float) -> None:
    shown_at = [index / rate for index in range(total)]
    for frames in range(1, total + 1):
        assert spread_indices(total, rate, frames, None, shown_at) == spread_indices(total, rate, frames, None)


UNEVEN = [0.04 * i for i in range(30)] + [1.2 + 0.5 * i for i in range(24)]


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.webm", "a.flv", "a.ts", "late.mp4", "late.mkv"])
def test_a_clip_of_variable_rate_gives_its_frames_by_time_and_says_when_they_are_shown(
    file: str, tmp_path: Path, readers: dict[str, VideoReader]
) -> None:
    codec = {"webm": "libvpx-vp9", "flv": "flv"}.get(file.split(".")[1], "libx264")
    later = 5.0 if file.startswith("late") else 0.0
    path = clips.write_timed_clip(tmp_path / file, [later + seconds for seconds in UNEVEN], codec)
    clip = readers["pyav"].read(path)
    assert clip.seconds is not None
    np.testing.assert_allclose(clip.seconds, [UNEVEN[index] for index in clip.indices], atol=2e-3)
    assert max(np.diff(clip.seconds)) < 2 * 12.7 / 7
    np.testing.assert_array_equal(clip.frames, np.stack(clips.decode_all(path))[list(clip.indices)])
    assert clip.duration == pytest.approx(12.7 * 54 / 53, abs=0.01)


def test_so_many_frames_a_second_of_a_clip_of_variable_rate(tmp_path: Path) -> None:
    path = clips.write_timed_clip(tmp_path / "a.mp4", UNEVEN)
    reader = VideoReader(_config(cache_gb=1.0, frames=32, fps=1.0), tmp_path)
    clip, again = reader.read(path), reader.read(path)  # the second from the cache
    assert len(clip.indices) == 13 and clip.seconds is not None
    assert max(np.diff(clip.seconds)) <= 1.5 + 1e-6
    assert (again.seconds, again.indices, again.fps) == (clip.seconds, clip.indices, clip.fps)


@pytest.mark.parametrize("file", ["a.mkv", "a.webm", "a.flv", "a.mp4"])
def test_times_that_are_rounded_are_a_constant_rate(file: str, tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    codec = {"webm": "libvpx-vp9", "flv": "flv"}.get(file.split(".")[1], "libx264")
    path = clips.write_timed_clip(tmp_path / file, [index / 29.97 for index in range(60)], codec)
    clip = readers["pyav"].read(path)
    assert clip.seconds is None and clip.fps == pytest.approx(29.97, rel=0.02)
    assert clip.indices == spread_indices(60, 29.97, 8, None)


def test_a_raw_stream_has_the_rate_that_players_assume(tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    for suffix, codec in (("m1v", "mpeg1video"), ("m2v", "mpeg2video"), ("h264", "libx264")):
        path = clips.write_clip(tmp_path / f"a.{suffix}", clips.moving_frames(30), 25, codec, options={})
        clip = readers["pyav"].read(path)
        assert (clip.seconds, clip.fps, clip.total_frames) == (None, 25.0, 30)


def test_a_clip_that_is_too_short_names_the_setting_to_change(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "short.mp4", clips.moving_frames(5))
    with pytest.raises(VideoError, match="has 5 frames, fewer than video.frames: 8.*lower video.frames to"):
        VideoReader(_config(), None).read(path)


# --- The same frames from every backend ---

Make = Callable[[Path, Path], Path]  # (ordinary clip, target)

FAITHFUL: dict[str, Make] = {
    "as it is": lambda plain, target: Path(shutil.copy(plain, target)),
    "index first": clips.index_first,
    "one group of pictures": lambda _, target: clips.write_clip(target, clips.moving_frames(30)),
    "odd width": lambda _, target: clips.write_clip(target, clips.moving_frames(12, 46, 86)),
    "BT.709": lambda _, target: clips.write_clip(target, clips.moving_frames(12), colorspace=clips.BT709),
    "full range": lambda _, target: clips.write_clip(
        target, clips.moving_frames(12), colorspace=clips.BT709, color_range=clips.FULL_RANGE
    ),
    "10 bit": lambda _, target: clips.write_clip(
        target, clips.moving_frames(12), pix_fmt="yuv420p10le", color_range=clips.FULL_RANGE
    ),
    "4:4:4": lambda _, target: clips.write_clip(target, clips.moving_frames(12), pix_fmt="yuv444p"),
    "turned by 90": lambda plain, target: clips.set_display_matrix(plain, target, (0, 1, -1, 0)),
    "turned by 180": lambda plain, target: clips.set_display_matrix(plain, target, (-1, 0, 0, -1)),
    "turned by 270": lambda plain, target: clips.set_display_matrix(plain, target, (0, -1, 1, 0)),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_backends_agree_bit_for_bit(name: str, plain: Path, tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    path = FAITHFUL[name](plain, tmp_path / "clip.mp4")
    read = {backend: reader.read(path) for backend, reader in readers.items()}
    np.testing.assert_array_equal(read["decord"].frames, read["pyav"].frames)
    assert read["decord"].indices == read["pyav"].indices
    assert (read["decord"].fps, read["decord"].total_frames) == (8.0, read["pyav"].total_frames)
    # And with decord as others use it.
    alone = decord.VideoReader(str(path), num_threads=1).get_batch(list(read["pyav"].indices)).asnumpy()
    np.testing.assert_array_equal(read["pyav"].frames, alone)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 17, 30])
@pytest.mark.parametrize("kind", ["closed", "open", "refreshed", "edited"])
def test_frames_left_out_while_decoding_change_no_frame_that_is_taken(
    kind: str, frames: int, plain: Path, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    if kind == "edited":
        clips.set_edit_list(plain, path, start=1.0, seconds=4.0)
    else:
        options = {"closed": CLOSED, "open": OPEN, "refreshed": REFRESHED}[kind]
        # 45: three frames are the first, one at the start of a group of pictures, and one of the last group.
        clips.write_clip(path, clips.moving_frames(45), options=options)
    clip = VideoReader(_config(frames=frames), None).read(path)
    np.testing.assert_array_equal(clip.frames, _expected(path, frames))


def test_a_clip_states_its_length(plain: Path, readers: dict[str, VideoReader]) -> None:
    clip = readers["pyav"].read(plain)
    assert clip.total_frames == 40 and clip.fps == 8.0 and clip.duration == 5.0
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (8, 64, 96, 3)
    np.testing.assert_array_equal(clip.frames, readers["pyav"].read(plain).frames)


def test_colours_are_those_that_were_encoded(tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    """BT.709 frames read with BT.601's matrix are off by up to 20 levels."""
    import av

    red = np.zeros((32, 32, 3), np.uint8) + np.array([200, 30, 40], np.uint8)
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "0"}
        stream.codec_context.colorspace = clips.BT709
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(
                format="yuv420p", src_colorspace=5, dst_colorspace=clips.BT709
            )
            frame.colorspace = clips.BT709
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for reader in readers.values():
        assert np.abs(reader.read(path).frames.astype(int) - red).max() <= 4  # rounding, twice


@pytest.mark.parametrize(("codec", "pix_fmt", "file"), [("png", "rgba", "a.mov"), ("qtrle", "argb", "a.mov")])
def test_what_is_transparent_shows_white_as_in_pictures(
    codec: str, pix_fmt: str, file: str, tmp_path: Path, readers: dict[str, VideoReader]
) -> None:
    import av

    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:16] = [100, 50, 200, 255]
    picture[16:, :16] = [0, 0, 0, 51]
    with av.open(str(tmp_path / file), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = pix_fmt
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames = readers["pyav"].read(tmp_path / file).frames
    assert (frames[:, :16] == [100, 50, 200]).all()
    assert (frames[:, 16:, :16] == 204).all() and (frames[:, 16:, 16:] == 255).all()


def test_pixels_that_are_not_square_stay_as_they_are_stored(tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for frame in clips.moving_frames(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert readers["pyav"].read(tmp_path / "a.mp4").frames.shape == (8, 64, 96, 3)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_turned_clips_are_seen_as_a_player_shows_them(
    matrix: tuple[float, float, float, float],
    turns: int,
    plain: Path,
    tmp_path: Path,
    readers: dict[str, VideoReader],
) -> None:
    path = clips.set_display_matrix(plain, tmp_path / "turned.mp4", matrix)
    upright = readers["pyav"].read(plain).frames
    np.testing.assert_array_equal(readers["pyav"].read(path).frames, np.rot90(upright, turns, axes=(1, 2)))


# PyAV decodes all of them. Last stands why decord's frames are refused ("": for a reason of decord's own).
# It is None where they are the same.
DELICATE: dict[str, tuple[str, Make, str | None]] = {
    "open groups of pictures": (
        "clip.mp4",
        lambda _, target: clips.write_clip(target, clips.moving_frames(40), options=OPEN),
        "it gives other frames than PyAV",
    ),
    "intra refresh": (
        "clip.mp4",
        lambda _, target: clips.write_clip(target, clips.moving_frames(40), options=REFRESHED),
        "",
    ),
    "edit list": (
        "clip.mp4",
        lambda plain, target: clips.copy_packets(plain, target, later=-0.7),
        "it gives other frames than PyAV",
    ),
    "edit list that hides a group of pictures": (
        "clip.mp4",
        lambda plain, target: clips.set_edit_list(plain, target, start=2.0, seconds=2.0),
        "",
    ),
    "second stream header": ("clip.mp4", clips.add_sample_entry, None),
    # Of rows that are padded to a multiple of their width decord takes the padding for a fourth channel.
    "48 pixels wide": (
        "clip.mp4",
        lambda _, target: clips.write_clip(target, clips.moving_frames(12, 64, 48)),
        "",
    ),
    "mkv": ("clip.mkv", clips.copy_packets, None),
    "ts": ("clip.ts", lambda _, target: clips.write_clip(target, clips.moving_frames(30)), ""),
    "vp9": (
        "clip.webm",
        lambda _, target: clips.write_clip(target, clips.moving_frames(20), codec="libvpx-vp9"),
        None,
    ),
    "mpeg4": (
        "clip.avi",
        lambda _, target: clips.write_clip(target, clips.moving_frames(30), codec="mpeg4"),
        None,
    ),
    "flv": (
        "clip.flv",
        lambda _, target: clips.write_clip(target, clips.moving_frames(30), codec="flv"),
        None,
    ),
    "mpeg": (
        "clip.mpg",
        lambda _, target: clips.write_clip(target, clips.moving_frames(30), 25, codec="mpeg2video"),
        "",
    ),
    "vp8": (
        "clip.webm",
        lambda _, target: clips.write_clip(target, clips.moving_frames(20), codec="libvpx"),
        None,
    ),
    "mjpeg": (
        "clip.avi",
        lambda _, target: clips.write_clip(target, clips.moving_frames(20), codec="mjpeg", pix_fmt="yuvj420p"),
        None,
    ),
    "hevc": (
        "clip.mp4",
        lambda _, target: clips.write_clip(
            target, clips.moving_frames(20), codec="libx265", options={"x265-params": "log-level=none"}
        ),
        None,
    ),
    "wmv": (
        "clip.wmv",
        lambda _, target: clips.write_clip(target, clips.moving_frames(20), codec="wmv2", options={}),
        None,
    ),
    "gif": (
        "clip.gif",
        lambda _, target: clips.write_clip(target, clips.moving_frames(20), codec="gif", pix_fmt="rgb8", options={}),
        "",
    ),
    "no times": ("clip.h264", lambda _, target: clips.write_clip(target, clips.moving_frames(30)), ""),
}


@pytest.mark.parametrize("name", DELICATE)
def test_under_decord_a_clip_has_the_right_frames_or_is_refused(
    name: str, plain: Path, tmp_path: Path, readers: dict[str, VideoReader]
) -> None:
    suffix, make, refusal = DELICATE[name]
    path = make(plain, tmp_path / suffix)
    expected = _expected(path)
    np.testing.assert_array_equal(readers["pyav"].read(path).frames, expected)
    if refusal is None:
        np.testing.assert_array_equal(readers["decord"].read(path).frames, expected)
        return
    with pytest.raises(VideoError, match=f"not decoded by decord: {refusal}.*set video.backend: pyav"):
        readers["decord"].read(path)


@pytest.mark.parametrize("name", ["open groups of pictures", "edit list"])
def test_decord_still_returns_wrong_frames_in_silence(name: str, plain: Path, tmp_path: Path) -> None:
    """The reason for not trusting it there. If this fails, decord was repaired."""
    suffix, make, _ = DELICATE[name]
    path = make(plain, tmp_path / suffix)
    every = clips.decode_all(path)
    alone = decord.VideoReader(str(path), num_threads=1)
    indices = list(range(2, len(every), 3))
    taken = alone.get_batch(indices).asnumpy()
    assert any(not np.array_equal(frame, every[i]) for frame, i in zip(taken, indices, strict=True))


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.avi", "a.flv", "a.webm"])
def test_a_title_that_is_no_utf_8_hinders_nobody(file: str, tmp_path: Path, readers: dict[str, VideoReader]) -> None:
    import av

    path, codec = tmp_path / file, {"webm": "libvpx", "flv": "flv", "avi": "mpeg4"}.get(file.split(".")[1], "libx264")
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Fuehrung"
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in clips.moving_frames(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"Fuehrung" in data
    path.write_bytes(data.replace(b"Fuehrung", "Führung!".encode("latin-1")))
    assert readers["pyav"].read(path).frames.shape == (8, 64, 96, 3)


# --- Bad files ---


def _picture(kind: str) -> Make:
    def make(_: Path, target: Path) -> Path:
        Image.fromarray(clips.moving_frames(1)[0]).save(target, format=kind)
        return target

    return make


def _wav(_: Path, target: Path) -> Path:
    with wave.open(str(target), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return target


def _damaged(plain: Path, target: Path) -> Path:
    data = bytearray(clips.index_first(plain, target).read_bytes())
    start, count = len(data) // 2, len(data) // 4
    data[start : start + count] = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8).tobytes()
    target.write_bytes(data)
    return target


def _two_sizes(suffix: str) -> Make:
    def make(_: Path, target: Path) -> Path:
        parts = [target.with_name(f"{size}{suffix}") for size in (64, 32)]
        for part, size in zip(parts, (64, 32), strict=True):
            clips.write_clip(part, clips.moving_frames(20, size, size))
        target.write_bytes(b"".join(part.read_bytes() for part in parts))
        return target

    return make


def _playlist(plain: Path, target: Path) -> Path:
    shutil.copy(plain, target.with_name("part.mp4"))
    target.write_text("ffconcat version 1.0\nfile part.mp4\n")
    return target


def _cut(share: float, then: Make | None = None) -> Make:
    def make(plain: Path, target: Path) -> Path:
        whole = target.with_name(f"whole{target.suffix}")
        return clips.cut((then or clips.index_first)(plain, whole), target, share)

    return make


BAD: dict[str, tuple[str, Make, str]] = {
    "missing": ("a.mp4", lambda _, target: target, "does not exist"),
    "folder": ("a.mp4", lambda _, target: target.mkdir() or target, "is a folder"),
    "empty": ("a.mp4", lambda _, target: target.touch() or target, "is empty"),
    "text": ("a.mp4", lambda _, target: target.write_text("no video\n" * 99) and target, "is a text that begins"),
    "no index": ("a.mp4", lambda plain, target: clips.cut(plain, target, 0.5), "is truncated"),
    "a third": ("a.mp4", _cut(0.4), "is truncated"),
    "all but one percent": ("a.mp4", _cut(0.99), "is truncated"),
    "cut mkv": ("a.mkv", _cut(0.6, clips.copy_packets), "is truncated"),
    "cut webm": ("a.webm", _cut(0.6, DELICATE["vp9"][1]), "is truncated"),
    "cut avi": ("a.avi", _cut(0.6, DELICATE["mpeg4"][1]), "is truncated"),
    "cut mpeg": ("a.mpg", _cut(0.6, DELICATE["mpeg"][1]), "is damaged or truncated .packet"),
    "cut flv": ("a.flv", _cut(0.6, DELICATE["flv"][1]), "is damaged or truncated .packet"),
    "cut gif": ("a.gif", _cut(0.6, DELICATE["gif"][1]), "is truncated .its end mark is missing"),
    "cut wmv": ("a.wmv", _cut(0.6, DELICATE["wmv"][1]), "is truncated .by its own account"),
    "cover picture": ("a.mp4", lambda _, target: clips.write_cover(target), "has no video stream"),
    "LFS pointer": (
        "a.mp4",
        lambda _, target: target.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n") and target,
        "is a Git LFS pointer, not the file itself; run 'git lfs pull'",
    ),
    "HTML": ("a.mp4", lambda _, target: target.write_text("<!doctype html><p>404") and target, "is an HTML page"),
    "JSON": ("a.mp4", lambda _, target: target.write_text('{"error": "gone"}') and target, "is a JSON text"),
    "gzip": (
        "a.mp4",
        lambda _, target: target.write_bytes(b"\x1f\x8b\x08" + bytes(9)) and target,
        "compressed by gzip",
    ),
    "zeros": ("a.mp4", lambda _, target: target.write_bytes(bytes(9999)) and target, "is nothing but zero bytes"),
    "playlist": ("a.mp4", lambda plain, target: _playlist(plain, target), "is a playlist, which names other files"),
    "pipe": ("a.mp4", lambda _, target: os.mkfifo(target) or target, "is a named pipe .FIFO.; expected a regular file"),
    "device": ("a.mp4", lambda _, target: target.symlink_to("/dev/zero") or target, "is a character device"),
    "cut h264": ("a.h264", _cut(0.6, DELICATE["no times"][1]), "has a damaged picture"),
    "damaged inside": ("a.mp4", _damaged, "is damaged|damaged picture"),
    "sound": ("a.mp4", lambda _, target: clips.write_sound(target), "has no video stream"),
    "wav": ("a.mp4", _wav, "is a sound"),
    "png": ("a.mp4", _picture("PNG"), "is an image"),
    "jpeg": ("a.mp4", _picture("JPEG"), "is an image"),
    "gif": ("a.mp4", _picture("GIF"), "is an image"),
    "webp": ("a.mp4", _picture("WEBP"), "is an image"),
    "too short": (
        "a.mp4",
        lambda _, target: clips.write_clip(target, clips.moving_frames(7)),
        "has 7 frames, fewer than video.frames: 8",
    ),
    # The second part also starts its packet counters anew.
    "two sizes, ts": ("a.ts", _two_sizes(".ts"), "changes its size midway|is damaged"),
    "two sizes, raw": ("a.h264", _two_sizes(".h264"), "changes its size midway, from 64x64 to 32x32"),
    "narrow": (
        "a.mkv",
        lambda _, target: clips.write_clip(target, clips.moving_frames(8, 2, 402), codec="ffv1", options={}),
        "has frames of 402x2 pixels; one side may be at most 200 times the other",
    ),
    "turned by 45": (
        "a.mp4",
        lambda plain, target: clips.set_display_matrix(plain, target, (0.7071, 0.7071, -0.7071, 0.7071)),
        "turned or mirrored",
    ),
    "mirrored": (
        "a.mp4",
        lambda plain, target: clips.set_display_matrix(plain, target, (-1, 0, 0, 1)),
        "turned or mirrored",
    ),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_an_error_that_names_it(
    name: str, backend: str, plain: Path, tmp_path: Path, readers: dict[str, VideoReader]
) -> None:
    file, make, message = BAD[name]
    path = make(plain, tmp_path / file)
    with pytest.raises(VideoError, match=message) as caught:
        readers[backend].read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "vp9", "mpeg4", "flv", "gif", "wmv", "ts"])
def test_flipped_and_cut_bytes_give_a_clip_or_a_refusal(
    name: str, plain: Path, tmp_path: Path, readers: dict[str, VideoReader]
) -> None:
    file, make = ("a.mp4", FAITHFUL["as it is"]) if name == "a.mp4" else DELICATE[name][:2]
    path = make(plain, tmp_path / file)
    whole, random = path.read_bytes(), np.random.default_rng(2)
    for _ in range(6):
        data = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.2 else whole)
        for place in random.integers(0, min(len(data), 1500 if random.random() < 0.7 else len(data)), 3):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            clip = readers["pyav"].read(path)
        except VideoError as error:
            assert str(path) in str(error)
        else:
            assert len(clip.frames) == len(clip.indices) == 8


def test_an_image_is_refused_even_where_one_frame_is_asked_for(tmp_path: Path) -> None:
    reader = VideoReader(_config(frames=1), None)
    for kind in ("PNG", "JPEG", "GIF"):
        with pytest.raises(VideoError, match="is an image"):
            reader.read(_picture(kind)(tmp_path, tmp_path / "a.mp4"))


TORCHCODEC = """
import os
import numpy as np

class VideoDecoder:
    def __init__(self, path, **settings):
        pass

    def get_frames_at(self, indices):
        class Batch:
            class data:
                numpy = staticmethod(lambda: np.load(os.environ["FRAMES"]))
        return Batch
"""


@pytest.mark.parametrize("change", ["none", "one level", "one frame less"])
def test_torchcodec_is_held_to_the_frames_of_pyav(
    change: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place a module that returns given frames: its own are tested where it is installed."""
    expected = VideoReader(_config(), None).read(plain).frames
    frames = expected.copy()
    frames[-1, -1, -1, -1] ^= change == "one level"
    np.save(tmp_path / "frames.npy", frames[:-1] if change == "one frame less" else frames)
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec/__init__.py").touch()
    (tmp_path / "torchcodec/decoders.py").write_text(TORCHCODEC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FRAMES", str(tmp_path / "frames.npy"))
    reader = VideoReader(_config(backend="torchcodec"), None)
    if change == "none":
        np.testing.assert_array_equal(reader.read(plain).frames, expected)
        return
    with pytest.raises(VideoError, match="not decoded by torchcodec: it gives other frames than PyAV"):
        reader.read(plain)


def test_torchcodec_gives_the_frames_of_pyav_or_refuses(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec", reason="torchcodec is not installed")
    reader = VideoReader(_config(backend="torchcodec"), None)
    np.testing.assert_array_equal(reader.read(plain).frames, _expected(plain))
    for name, (suffix, make, _) in DELICATE.items():
        path = make(plain, tmp_path / f"{name}{Path(suffix).suffix}")
        try:
            frames = reader.read(path).frames
        except VideoError as error:
            assert "not decoded by torchcodec" in str(error)
        else:
            np.testing.assert_array_equal(frames, _expected(path))


def test_a_backend_that_is_not_installed_says_so(plain: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "torchcodec.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reader = VideoReader(_config(backend="torchcodec"), None)
    with pytest.raises(
        VideoError, match="not decoded by torchcodec: ImportError: no such library; .*pip install torchcodec"
    ):
        reader.read(plain)


def test_without_pyav_the_remedy_is_said(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(VideoError, match="PyAV is not installed; pip install av"):
        VideoReader(_config(), None).read(plain)


def test_without_decord_pyav_decodes(plain: Path, tmp_path: Path, monkeypatch) -> None:
    expected = VideoReader(_config(), None).read(plain)
    (tmp_path / "decord.py").write_text("raise ImportError('no wheel')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.testing.assert_array_equal(VideoReader(_config(), None).read(plain).frames, expected.frames)
    with pytest.raises(VideoError, match="not decoded by decord: ImportError: no wheel.*set video.backend: pyav"):
        VideoReader(_config(backend="decord"), None).read(plain)


# --- The decoder's process ---


@pytest.fixture
def treacherous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder that hangs, crashes or dies where a clip's name says so."""
    script = tmp_path / "treacherous.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(video.DECODER.parent)!r})\n"
        "import decoder\n"
        "decode = decoder.decode\n"
        "def treacherous(request, backend):\n"
        "    if 'hang' in os.path.basename(request['path']): time.sleep(60)\n"
        "    if 'crash' in os.path.basename(request['path']): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if 'raise' in os.path.basename(request['path']): raise KeyError('unforeseen')\n"
        "    if 'noise' in os.path.basename(request['path']): print('x' * 99, 'y' * 200_000)\n"
        "    return decode(request, backend)\n"
        "decoder.decode = treacherous\n"
        "decoder.main()\n"
    )
    monkeypatch.setattr(video, "DECODER", script)
    return script


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hang", "was not decoded within video.timeout: 2 s"),
        ("crash", "crashed its decoder .signal SIGSEGV"),
        ("raise", "crashed its decoder .exit status 1: KeyError: 'unforeseen'"),
    ],
)
def test_a_decoder_that_hangs_or_dies_costs_one_clip(
    name: str, message: str, plain: Path, tmp_path: Path, treacherous: Path
) -> None:
    bad = Path(shutil.copy(plain, tmp_path / f"{name}.mp4"))
    reader = VideoReader(_config(timeout=2.0), None)
    first = reader.read(plain)
    started = time.monotonic()
    with pytest.raises(VideoError, match=message) as caught:
        reader.read(bad)
    assert str(bad) in str(caught.value)
    assert time.monotonic() - started < 5.0
    np.testing.assert_array_equal(reader.read(plain).frames, first.frames)


def test_a_parent_that_blocks_and_ignores_the_alarm_has_it_all_the_same(
    plain: Path, tmp_path: Path, treacherous: Path
) -> None:
    bad = Path(shutil.copy(plain, tmp_path / "hang.mp4"))
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        with pytest.raises(VideoError, match="was not decoded within video.timeout: 1 s"):
            VideoReader(_config(timeout=1.0), None).read(bad)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGALRM, before)


def test_what_libraries_print_is_not_taken_for_frames(plain: Path, tmp_path: Path, treacherous: Path) -> None:
    noisy = Path(shutil.copy(plain, tmp_path / "noise.mp4"))
    reader = VideoReader(_config(), None)
    np.testing.assert_array_equal(reader.read(noisy).frames, reader.read(plain).frames)


def _pids(reader: VideoReader) -> list[int]:
    return [decoder._process.pid for decoder in reader._idle]


def test_a_decoder_that_was_killed_while_idle_is_replaced(plain: Path) -> None:
    reader = VideoReader(_config(), None)
    first = reader.read(plain)
    os.kill(_pids(reader)[0], signal.SIGKILL)
    time.sleep(0.2)
    np.testing.assert_array_equal(reader.read(plain).frames, first.frames)
    reader.close()
    assert _pids(reader) == []


def _gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended; nobody in this container may be there to reap it
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("state", ["idle", "hanging", "its connection held by a forked process"])
def test_no_decoder_outlives_its_parent(state: str, plain: Path, tmp_path: Path, treacherous: Path) -> None:
    """A parent that is killed outright closes nothing itself; a decoder that hangs does not see it go."""
    bad = Path(shutil.copy(plain, tmp_path / "hang.mp4"))
    program = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from mllm_keeplora.config import VideoConfig\n"
        "from mllm_keeplora.data.video import reader as video\n"
        f"video.DECODER = Path({str(treacherous)!r})\n"
        "reader = video.VideoReader(VideoConfig(frames=2, timeout=1.5), None)\n"
        f"reader.read(Path({str(plain)!r}))\n"
        "print(reader._idle[0]._process.pid, flush=True)\n"
        f"if {state.startswith('its')} and os.fork() == 0:\n"
        "    os.close(1), os.close(2), time.sleep(10), os._exit(0)\n"
        f"if {state == 'hanging'}:\n"
        f"    threading.Thread(target=reader.read, args=(Path({str(bad)!r}),), daemon=True).start()\n"
        "    time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    done = forked.run([script])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _gone(int(done.stdout), seconds=4.0)


class _Clips(Dataset):  # type: ignore[type-arg]
    def __init__(self, reader: VideoReader, paths: list[Path]) -> None:
        self.reader, self.paths = reader, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        frames = self.reader.read(self.paths[index]).frames
        return frames, os.getpid()


@pytest.mark.parametrize("cached", [False, True])
def test_dataloader_workers_read_with_decoders_of_their_own(
    cached: bool, plain: Path, folder: Path, tmp_path: Path
) -> None:
    other = clips.write_clip(folder / "other.mp4", clips.moving_frames(20, seed=1))
    paths = [plain, other] * 4
    reader = VideoReader(_config(cache_gb=1.0 if cached else 0.0), tmp_path)
    expected = {path: VideoReader(_config(), None).read(path).frames for path in (plain, other)}
    reader.read(plain)  # the parent has a decoder before the fork, and uses it after
    loader = DataLoader(_Clips(reader, paths), batch_size=None, num_workers=2)
    for _ in range(2):
        rows = list(loader)
        for path, (frames, _pid) in zip(paths, rows, strict=True):
            np.testing.assert_array_equal(frames, expected[path])
        assert len({pid for _, pid in rows} - {os.getpid()}) == 2
        np.testing.assert_array_equal(reader.read(other).frames, expected[other])


def test_threads_may_read_at_once(plain: Path) -> None:
    reader = VideoReader(_config(), None)
    expected = reader.read(plain).frames
    found: list[Clip] = []
    threads = [threading.Thread(target=lambda: found.extend(reader.read(plain) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(np.array_equal(clip.frames, expected) for clip in found)
    assert len(_pids(reader)) <= 4
    reader.close()


def test_a_reader_can_be_pickled(plain: Path, tmp_path: Path) -> None:
    reader = VideoReader(_config(), tmp_path)
    expected = reader.read(plain)
    copy = pickle.loads(pickle.dumps(reader))
    assert _pids(copy) == []
    np.testing.assert_array_equal(copy.read(plain).frames, expected.frames)


# --- The cache ---


def _entries(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "frames").glob("*.safetensors"))


def _no_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video, "DECODER", tmp_path / "no_such_decoder.py")


def test_a_cached_clip_is_the_decoded_one_and_needs_no_decoder(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = VideoReader(_config(cache_gb=1.0), tmp_path).read(plain)
    _no_decoder(monkeypatch, tmp_path)
    elsewhere = Path(shutil.copy(plain, tmp_path / "another name.mp4"))  # the key is the content
    for path in (plain, elsewhere):
        for backend in ("pyav", "decord"):
            warm = VideoReader(_config(cache_gb=1.0, backend=backend), tmp_path).read(path)
            np.testing.assert_array_equal(warm.frames, cold.frames)
            assert (warm.indices, warm.fps, warm.total_frames) == (cold.indices, cold.fps, cold.total_frames)
            warm.frames[:] = 0  # the reader's own copy: neither file nor other readers see it
    (entry,) = _entries(tmp_path)
    np.testing.assert_array_equal(load_file(entry)["frames"], cold.frames)
    with pytest.raises(VideoError, match="crashed its decoder"):
        VideoReader(_config(cache_gb=1.0, frames=7), tmp_path).read(plain)  # other settings, another entry


def test_no_cache_is_written_where_none_is_wanted(plain: Path, tmp_path: Path) -> None:
    VideoReader(_config(cache_gb=0.0), tmp_path).read(plain)
    assert not (tmp_path / "frames").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "facts", "name", "empty", "header", "other"])
def test_a_damaged_entry_is_decoded_again_and_replaced(damage: str, plain: Path, tmp_path: Path) -> None:
    reader = VideoReader(_config(cache_gb=1.0), tmp_path)
    cold = reader.read(plain)
    (entry,) = _entries(tmp_path)
    whole = entry.read_bytes()
    broken = {
        "cut": whole[:-1000],
        "flip": whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:],
        "facts": whole.replace(b'fps\\": 8.0', b'fps\\": 9.0'),
        "name": whole.replace(b"fps", b"fpz"),
        "empty": b"",
        "header": bytes([255]) * len(whole),
        "other": (2).to_bytes(8, "little") + b"[]",
    }[damage]
    assert broken != whole
    entry.write_bytes(broken)
    np.testing.assert_array_equal(reader.read(plain).frames, cold.frames)
    assert entry.read_bytes() == whole


def test_the_cache_stays_within_its_bound(tmp_path: Path, folder: Path) -> None:
    paths = [clips.write_clip(folder / f"{seed}.mp4", clips.moving_frames(8, 32, 32, seed)) for seed in range(12)]
    limit = 4.5 * 8 * 32 * 32 * 3
    readers = [VideoReader(_config(cache_gb=limit / 1e9), tmp_path) for _ in range(2)]
    decoded = {path: readers[0].read(path).frames.copy() for path in paths}
    sizes = []
    for _ in range(3):
        for index, path in enumerate(paths):  # a cyclic pass, by two readers that write in turn
            np.testing.assert_array_equal(readers[index % 2].read(path).frames, decoded[path])
            sizes.append(sum(entry.stat().st_size for entry in _entries(tmp_path)))
    entry_size = _entries(tmp_path)[0].stat().st_size
    assert max(sizes) <= limit + 2 * entry_size
    assert min(sizes) > 0
    assert {path.name[0] for path in (tmp_path / "frames").iterdir()} != {"."}
    for reader in readers:
        reader.close()


def test_one_reader_alone_never_exceeds_the_bound(tmp_path: Path, folder: Path) -> None:
    frames = [clips.moving_frames(8, 32, 32, seed) for seed in range(20, 30)]
    paths = [clips.write_clip(folder / f"b{i}.mp4", each) for i, each in enumerate(frames)]
    limit = 3 * 8 * 32 * 32 * 3
    reader = VideoReader(_config(cache_gb=limit / 1e9), tmp_path)
    for path in [*paths, *paths]:
        reader.read(path)
        assert sum(entry.stat().st_size for entry in _entries(tmp_path)) <= limit
    tiny = VideoReader(_config(cache_gb=1e-9), tmp_path / "tiny")
    tiny.read(paths[0])
    assert _entries(tmp_path / "tiny") == []


def test_entries_that_others_remove_are_no_error(tmp_path: Path, plain: Path, folder: Path) -> None:
    paths = [plain, clips.write_clip(folder / "c.mp4", clips.moving_frames(8, seed=7))]
    reader = VideoReader(_config(cache_gb=1.2 * 8 * 64 * 96 * 3 / 1e9), tmp_path)
    for path in [*paths, *paths]:
        reader.read(path)
        for entry in _entries(tmp_path):
            entry.unlink()
    shutil.rmtree(tmp_path / "frames")
    reader.read(plain)
    assert len(_entries(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_reported_and_left_alone(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "frames").touch()  # a file where the folder should be
    reader = VideoReader(_config(cache_gb=1.0), tmp_path)
    assert reader.read(plain).frames.shape == reader.read(plain).frames.shape
    assert caplog.text.count("not cached further") == 1


def test_what_a_killed_process_left_is_removed(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    old, recent = (tmp_path / "frames" / f".{name}.safetensors.1.1.tmp" for name in ("old", "recent"))
    for leftover in (old, recent):
        leftover.touch()
    os.utime(old, (0, 0))
    VideoReader(_config(cache_gb=1.0), tmp_path).read(plain)
    assert recent.exists() and not old.exists()
