"""Small video files for the tests: ordinary ones, and ones that are damaged in a chosen way."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

BT709, FULL_RANGE = 1, 2  # AVColorSpace, AVColorRange


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    fps: int = 8,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    colorspace: int | None = None,
    color_range: int | None = None,
) -> Path:
    """Encodes frames [H, W, 3] uint8 (even sizes), nearly without loss. The container is the suffix's.

    `options` are the encoder's, in place of the quality that is set otherwise.
    """
    quality = {"libx264": {"crf": "4"}, "libvpx-vp9": {"crf": "8", "b": "0"}, "mpeg4": {"qscale": "1"}}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = dict(quality.get(codec, {}) if options is None else options)
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            if colorspace is not None:
                picture.colorspace = colorspace
            if color_range is not None:
                picture.color_range = color_range
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_timed_clip(path: Path, times: Sequence[float], codec: str = "libx264") -> Path:
    """A clip whose frames are shown at the given seconds; the container is the suffix's."""
    milliseconds = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        frames = moving_frames(len(times))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", milliseconds
        for frame, seconds in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = round(seconds * 1000), milliseconds
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_cover(path: Path) -> Path:
    """A sound with a cover picture, which containers store as a video stream."""
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic.value
        picture = av.VideoFrame.from_ndarray(moving_frames(1, 64, 64)[0], format="rgb24").reformat(format="yuvj420p")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for stream, content in ((cover, picture), (sound, frame), (sound, None)):
            container.mux(stream.encode(content))
    return path


def moving_frames(count: int, height: int = 64, width: int = 96, seed: int = 0) -> list[np.ndarray]:
    """Coloured blocks that move, so that every frame differs and later ones refer to earlier ones."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return [np.roll(picture, 3 * index, axis=1) for index in range(count)]


def copy_packets(source: Path, target: Path, *, later: float = 0.0, options: Mapping[str, str] | None = None) -> Path:
    """Writes the packets of a clip to another file, `later` by so many seconds.

    Earlier than 0 makes an MP4 hide the first frames by an edit list, as cutting without encoding does.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w", options=dict(options or {})) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
                shift = round(later / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                writer.mux(packet)
    return target


def index_first(source: Path, target: Path) -> Path:
    """The same MP4 with its index in front, so that cutting its end leaves the index whole."""
    return copy_packets(source, target, options={"movflags": "faststart"})


def cut(source: Path, target: Path, share: float) -> Path:
    """The first part of a file's bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def set_display_matrix(source: Path, target: Path, matrix: tuple[float, float, float, float]) -> Path:
    """An MP4 that is to be shown turned: (a, b, c, d) of its track's matrix."""
    data = bytearray(source.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def set_edit_list(source: Path, target: Path, *, start: float, seconds: float) -> Path:
    """An MP4 of which a player shows `seconds` from `start` on, as trimming without encoding leaves it."""
    data = bytearray(source.read_bytes())
    edit, media = data.index(b"elst") + 12, data.index(b"mdhd") + 16
    (shown_from,) = struct.unpack_from(">i", data, edit + 4)
    (rate,) = struct.unpack_from(">I", data, media)
    struct.pack_into(">Ii", data, edit, round(seconds * 1000), shown_from + round(start * rate))
    target.write_bytes(data)
    return target


def add_sample_entry(source: Path, target: Path) -> Path:
    """An MP4 that announces a second stream header, the way files of two sizes do."""
    data = bytearray(source.read_bytes())
    start = data.index(b"stsd") + 8
    data[start : start + 4] = struct.pack(">I", 2)
    target.write_bytes(data)
    return target


def write_sound(path: Path) -> Path:
    """A file with an audio stream and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """Every frame in order, by PyAV alone: the reference for which picture belongs to which index."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
