"""The child process that decodes clips for `video.py`.

It is run by path, not as a module, so that the package and with it torch are not imported: it starts in a
fraction of a second. Decoders crash and hang on damaged files; here they take only this process with them.

Requests are JSON lines on stdin, `{"path", "frames", "fps", "timeout"}`. A reply on stdout is a JSON line
`{"shape", "indices", "fps", "total_frames"}` and then the frames' bytes, or a line
`{"error", "remedy"}`. The first line, before any request, is `{"ready": true}` or an error.

How a clip is decoded:

- PyAV reads the packets first, without decoding: which frames are shown, where decoding can start.
- decord and torchcodec seek by key frame and take packets for frames. Where leading frames of an open group
  of pictures, an edit list or a second size make that wrong, decord returns other frames than those asked
  for, or repeats the last one, and says nothing. So they decode only files for which that cannot be
  (`_doubt`).
- PyAV, the default, decodes everything, in order, leaves out what no wanted frame needs, and checks every
  decoded frame. On the clips of benchmarks/video_input.py it is the fastest of the three as well.
"""

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [T, H, W, 3], RGB
Backend = Literal["decord", "pyav", "torchcodec"]

# The parent ends a decoder that is late. Should the parent be gone, the decoder ends itself this much later.
ALARM_GRACE_SECONDS = 5.0
KEEP_PACKETS_BYTES = 64 * 2**20  # packets of a file up to this size stay in memory between the two passes

_IMAGE_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_IMAGE_FORMATS = ("image2", "gif", "apng", "webp", "webp_pipe", "ico")
_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_MP4_DATA = (b"moov", b"moof", b"mdat")  # boxes whose bytes are needed; a cut `free` or `uuid` harms nothing
_IDENTITY_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
# A playlist under a video's name must not send ffmpeg elsewhere.
_OPEN_OPTIONS = {"protocol_whitelist": "file"}
_H264_IDR, _H264_SPS = 5, 7

# Display matrix (a, b, c, d) of a turn -> k of np.rot90 that shows the frame as a player does.
_QUARTER_TURNS: dict[tuple[float, ...], int] = {
    (1, 0, 0, 1): 0,
    (0, -1, 1, 0): 1,
    (-1, 0, 0, -1): 2,
    (0, 1, -1, 0): 3,
}

# Frame colour space (AVColorSpace) -> swscale's coefficients. All others are BT.601, swscale's own choice.
_MATRICES = {1: 1, 4: 4, 7: 7, 9: 9, 10: 9}
_BT601 = 5
_FULL_RANGE = 2


class Refused(Exception):
    """The clip cannot be used. The message follows `video PATH`."""

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


class _Mistrusted(Exception):
    """This backend may not give the right frames of this file; PyAV does."""


@dataclass(frozen=True)
class _Boxes:
    """What the boxes of an MP4 file say that the demuxer does not pass on."""

    sample_entries: int = 1  # most entries of one `stsd`: more than one can be more than one size
    turned: bool = False


@dataclass(frozen=True)
class _Opened:
    """A clip whose packets have been read and not yet decoded.

    Attributes:
        path: the file.
        stream: PyAV's video stream.
        packets: every packet of the stream with data, then the empty one that ends it; None where they are
            too many to keep.
        pts: times of the frames that are shown, increasing; None where packets carry no usable times.
        shown_all: whether every packet is a frame that is shown.
        restarts: for every packet whether decoding can start there and be exact, whatever came before.
        seekable: whether every key frame is such a packet and comes first in time among what follows it.
        one_size: whether nothing in the stream's headers announces a second picture size.
        boxes: of an MP4 file.
    """

    path: str
    stream: Any
    packets: list[Any] | None
    pts: list[int] | None
    shown_all: bool
    restarts: list[bool]
    seekable: bool
    one_size: bool
    boxes: _Boxes | None


def spread_indices(total: int, file_fps: float, frames: int, fps: float | None) -> tuple[int, ...]:
    """Which frames of a clip are taken: evenly spaced, the first and (from two frames on) the last included.

    Args:
        total: frames of the file.
        file_fps: frames per second of the file; read only with `fps`.
        frames: how many are taken; with `fps` the most that are.
        fps: frames taken per second of the clip; None takes `frames`.

    Returns:
        Strictly increasing indices in [0, total): linspace(0, total - 1, n) rounded down.

    Raises:
        Refused: the clip has fewer frames than have to be taken, or no frame rate.
    """
    count = frames
    if fps is not None:
        if not file_fps > 0:
            raise Refused("states no frame rate", "set video.fps to null to take a fixed number of frames")
        count = min(frames, total, max(1, round(total / file_fps * fps)))
    if count > total:
        raise Refused(
            f"has {total} frames, fewer than video.frames: {frames}, and frames are not repeated to fill up",
            f"lower video.frames to at most {total}, or leave out its records by 'on_bad_record: skip'",
        )
    return tuple(int(index) for index in np.linspace(0, total - 1, count))


# --- The file's own account of its size: demuxers end quietly where the bytes end ---


def check_complete(path: str) -> _Boxes | None:
    """Compares the sizes that a container states with the bytes that are there. Reads headers only.

    Formats that state none are beyond this: a transport stream cut between two of its packets, or a
    fragmented MP4 between two fragments, is a shorter clip.

    Returns:
        What the boxes say, for an MP4 file; None for every other one.

    Raises:
        Refused: the file is cut, or its index is missing.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(256)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"):
            return _check_mp4(file, size, head)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            _check_matroska(file, size)
        elif head[:4] == b"RIFF":
            _check_riff(file, size)
        elif len(head) > 196:
            for first, step in ((0, 188), (4, 192)):  # MPEG-TS, and with time codes as cameras write it
                if head[first] == head[first + step] == 0x47 and size % step:
                    raise _cut(f"its last packet has {size % step} of {step} bytes")
    return None


def _cut(detail: str) -> Refused:
    return Refused(f"is truncated ({detail})", "copy or download it again")


def _check_mp4(file: BinaryIO, size: int, head: bytes) -> _Boxes:
    if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS:
        raise Refused("is an image, not a video")
    position, seen = 0, set()
    boxes = _Boxes()
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - position  # the last box may say so
        if kind in _MP4_DATA and position + length > size:
            raise _cut(f"its {kind.decode()} box should end at byte {position + length}, the file at {size}")
        if length < 8:
            break  # padding after the last box; what a decoder needs and lacks shows below
        seen.add(kind)
        if kind == b"moov":
            file.seek(position)
            boxes = _read_moov(file.read(length))
        position += length
    if b"moov" not in seen:
        raise _cut("it has no index, the moov box; the recording or the copy was not finished")
    return boxes


def _read_moov(data: bytes) -> _Boxes:
    entries, turned = 1, False
    for kind, start, end in _walk(data, 0, len(data)):
        if kind == b"stsd" and end - start >= 8:
            entries = max(entries, struct.unpack_from(">I", data, start + 4)[0])
        elif kind in (b"tkhd", b"mvhd") and end > start:
            # Both place the matrix behind fields that are wider in version 1.
            offset = (40 if kind == b"tkhd" else 36) + (12 if data[start] == 1 else 0)
            turned |= data[start + offset : start + offset + 36] != _IDENTITY_MATRIX
    return _Boxes(sample_entries=entries, turned=turned)


def _walk(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of every box in data[start:end] and in the parents among them."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, start)
        if length < 8:
            return
        stop = min(start + length, end)
        yield kind, start + 8, stop
        if kind in _MP4_PARENTS:
            yield from _walk(data, start + 8, stop)
        start += length


def _check_matroska(file: BinaryIO, size: int) -> None:
    position = 0
    for _ in range(2):  # the EBML header, then the segment that holds everything
        file.seek(position)
        header = file.read(12)
        if len(header) < 12:
            raise _cut("it ends in its header")
        id_length = 9 - header[0].bit_length()
        first = header[id_length]
        length = 9 - first.bit_length()
        if length > 8 or id_length > 4:
            return  # not what the format allows: the demuxer says what is wrong
        value = int.from_bytes(header[id_length : id_length + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:
            return  # of unknown size, as live recordings write it
        position += id_length + length + value
    if position > size:
        raise _cut(f"its segment should end at byte {position}, the file at {size}")


def _check_riff(file: BinaryIO, size: int) -> None:
    position = 0
    while position + 12 <= size:  # long AVI files are several RIFF chunks in a row
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length == 0:
            return
        position += 8 + length + length % 2
    if position > size + 1:
        raise _cut(f"its RIFF chunk should end at byte {position}, the file at {size}")


# --- Reading packets ---


def _open(path: str, boxes: _Boxes | None) -> tuple[Any, _Opened]:
    """Opens a file and reads its packets. Returns PyAV's container, to be closed by the caller, too.

    Raises:
        Refused: it is no video.
    """
    import av

    try:
        container = av.open(path, options=_OPEN_OPTIONS)
    except av.FFmpegError as error:
        raise Refused(f"cannot be opened as a video ({_said(error)})") from error
    try:
        return container, _read_packets(path, container, boxes)
    except av.FFmpegError as error:
        container.close()
        raise Refused(f"cannot be read to its end ({_said(error)})") from error
    except Refused:
        container.close()
        raise


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0]


def _video_stream(container: Any) -> Any:
    from av.stream import Disposition

    covers = Disposition.attached_pic | Disposition.still_image
    streams = [s for s in container.streams.video if not s.disposition & covers]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise Refused(f"has no video stream (it holds {', '.join(kinds)})")
    stream = streams[0]
    if stream.codec_context is None:
        raise Refused("is in a codec that this build of PyAV does not know")
    # One thread: as many processes decode as the loader has workers, and one order of events.
    stream.codec_context.thread_count = 1
    return stream


def _read_packets(path: str, container: Any, boxes: _Boxes | None) -> _Opened:
    stream = _video_stream(container)
    codec = stream.codec_context.name
    keep = Path(path).stat().st_size <= KEEP_PACKETS_BYTES
    kept: list[Any] = []
    end: Any = None
    facts: list[tuple[int | None, bool, bool]] = []  # (pts, is key frame, is shown) of every packet
    restarts: list[bool] = []
    headers: set[bytes] = set()  # sequence parameter sets of h264 key frames
    for packet in container.demux(stream):
        if packet.size == 0:
            end = packet
            continue
        if keep:
            kept.append(packet)
        if packet.is_corrupt:
            raise Refused(f"is damaged (packet {len(facts)} of its video stream)")
        facts.append((packet.pts, packet.is_keyframe, not packet.is_discard))
        restart = packet.is_keyframe and codec in ("h264", "vp8", "libdav1d", "av1", "vp9")
        if packet.is_keyframe and codec == "h264":
            kinds, sets = _read_h264(bytes(packet), stream.codec_context.extradata or b"")
            headers |= sets
            restart = _H264_IDR in kinds
        restarts.append(restart)
    if not facts:
        raise Refused("has a video stream without a frame")
    _refuse_image(container, len(facts))
    pts = _shown_times(facts)
    extradata = stream.codec_context.extradata or b""
    one_size = codec == "h264" and all(header in extradata for header in headers)
    return _Opened(
        path=path,
        stream=stream,
        packets=[*kept, end] if keep else None,
        pts=pts,
        shown_all=pts is not None and len(pts) == len(facts),
        restarts=restarts,
        seekable=_leads_everywhere(facts, restarts),
        one_size=one_size and len(container.streams.video) == 1,
        boxes=boxes,
    )


def _refuse_image(container: Any, packets: int) -> None:
    name = container.format.name
    # Formats of still images are called png_pipe and so on.
    if name.endswith("_pipe") or (packets == 1 and name in _IMAGE_FORMATS) or name == "image2":
        raise Refused(f"is an image ({name.removesuffix('_pipe')}), not a video")


def _read_h264(packet: bytes, extradata: bytes) -> tuple[set[int], set[bytes]]:
    """Kinds of the NAL units in a packet, and its sequence parameter sets."""
    units: list[bytes] = []
    if extradata[:1] == b"\x01" and len(extradata) > 4:  # avcC: every unit follows its length
        width, position = (extradata[4] & 3) + 1, 0
        while position + width < len(packet):
            length = int.from_bytes(packet[position : position + width], "big")
            units.append(packet[position + width : position + width + length])
            position += width + length
    else:
        units = [unit for unit in packet.split(b"\x00\x00\x01") if unit]
    kinds = {unit[0] & 31 for unit in units if unit}
    return kinds, {unit.rstrip(b"\x00") for unit in units if unit and unit[0] & 31 == _H264_SPS}


def _shown_times(facts: Sequence[tuple[int | None, bool, bool]]) -> list[int] | None:
    """Times of the frames that a player shows, increasing; None where they do not tell frames apart."""
    first = next((i for i, (_, key, _) in enumerate(facts) if key), 0)
    start = facts[first][0]
    times = []
    for pts, _, shown in facts[first:]:  # what comes before the first key frame does not decode
        if pts is None or start is None:
            return None
        # Leading frames of the first key frame refer to what is not there; decoders drop them.
        if shown and pts >= start:
            times.append(pts)
    return sorted(times) if len(set(times)) == len(times) else None


def _leads_everywhere(facts: Sequence[tuple[int | None, bool, bool]], restarts: Sequence[bool]) -> bool:
    """Whether decoding can start exactly at every key frame: nothing after it is shown before it."""
    latest: int | None = None
    start: int | None = None
    for (pts, key, _), restart in zip(facts, restarts, strict=True):
        if pts is None or (key and not restart):
            return False
        if key:
            if latest is not None and pts <= latest:
                return False  # frames of the group before are shown after this key frame
            start = pts
        if start is None or pts < start:
            return False
        latest = pts if latest is None else max(latest, pts)
    return True


# --- Decoding ---


def _doubt(clip: _Opened) -> str | None:
    """Why a backend that seeks by key frame may return wrong frames of this clip; None where it cannot."""
    if clip.boxes is None or clip.stream.codec_context.name != "h264":
        return "it is not h264 in an MP4 file"
    if not clip.shown_all:
        return "frames are hidden by an edit list, or have no times of their own"
    if not clip.seekable:
        return "it has key frames at which decoding cannot start (an open group of pictures)"
    if not clip.one_size or clip.boxes.sample_entries > 1:
        return "it has more than one stream header"
    return None


def _decode_decord(clip: _Opened, indices: Sequence[int], total: int) -> Frames:
    import decord

    doubt = _doubt(clip)
    if doubt is not None:
        raise _Mistrusted(f"{doubt}, and decord then returns wrong frames without a word")
    turns = _first_turns(clip) if clip.boxes is not None and clip.boxes.turned else 0
    said = os.fstat(2).st_size
    try:
        # Any positive tolerance below one frame: by default decord repeats frames for those that it lacks.
        reader = decord.VideoReader(clip.path, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
        if len(reader) != total:
            raise _Mistrusted(f"decord counts {len(reader)} frames, PyAV {total}")
        frames: Frames = reader.get_batch(list(indices)).asnumpy()
    except (decord.DECORDError, RuntimeError, UnicodeEncodeError) as error:
        raise _Mistrusted(f"decord: {str(error).splitlines()[0]}") from error
    if os.fstat(2).st_size != said:
        # Its ffmpeg conceals what it cannot decode, and only the log says so.
        raise _Mistrusted("decord met damaged data and went on")
    _check_shape(frames, clip, turns)
    return frames


def _decode_torchcodec(clip: _Opened, indices: Sequence[int], total: int) -> Frames:
    from torchcodec.decoders import VideoDecoder

    doubt = _doubt(clip)
    if doubt is None and clip.boxes is not None and clip.boxes.turned:
        doubt = "it is to be shown turned"
    if doubt is not None:
        raise _Mistrusted(f"{doubt}, and torchcodec's frames are then not known to be right")
    try:
        decoder = VideoDecoder(clip.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        if len(decoder) != total:
            raise _Mistrusted(f"torchcodec counts {len(decoder)} frames, PyAV {total}")
        frames: Frames = decoder.get_frames_at(indices=list(indices)).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _Mistrusted(f"torchcodec: {str(error).splitlines()[0]}") from error
    _check_shape(frames, clip, 0)
    return frames


def _check_shape(frames: Frames, clip: _Opened, turns: int) -> None:
    context = clip.stream.codec_context
    height, width = (context.width, context.height) if turns % 2 else (context.height, context.width)
    if frames.shape[1:] != (height, width, 3):
        raise _Mistrusted(f"frames of shape {frames.shape[1:]}, expected {(height, width, 3)}")


def _first_turns(clip: _Opened) -> int:
    return _quarter_turns(next(_decoded(clip, None)))


def _decode_pyav(clip: _Opened, indices: Sequence[int], total: int) -> Frames:
    """Decodes in order and takes what is wanted; every decoded frame is checked."""
    pts = clip.pts
    wanted = {index if pts is None else pts[index]: place for place, index in enumerate(indices)}
    frames: Frames | None = None
    to_rgb = _RGB()
    for number, frame in enumerate(_decoded(clip, set(wanted))):
        place = wanted.pop(number if pts is None else frame.pts, None)
        if place is not None:
            picture = np.rot90(to_rgb(frame), _quarter_turns(frame))
            if frames is None:
                frames = np.empty((len(indices), *picture.shape), np.uint8)
            if picture.shape != frames.shape[1:]:
                raise Refused("is turned midway: its frames are not all to be shown the same way up")
            frames[place] = picture
        if not wanted:
            break
    if wanted or frames is None:
        missing = [indices[place] for place in wanted.values()]
        raise Refused(
            f"is damaged: no picture for {len(missing)} frames (the first is {missing[0]} of {total})"
        )
    return frames


def _decoded(clip: _Opened, wanted: set[int] | None) -> Iterator[Any]:
    """Frames in the order in which they are shown, all of one size and none damaged.

    Args:
        clip: the clip.
        wanted: times of the frames that are needed (with times); others may be left out where leaving them
            out changes no needed one. None for all.

    Raises:
        Refused: damaged data, or a second size.
    """
    import av

    clip.stream.codec_context.flush_buffers()  # kept packets are decoded again where frames had to be counted
    by_time = wanted if clip.pts is not None else None
    size: tuple[int, int] | None = None
    try:
        for packet in _needed(clip, by_time):
            # Frames that no other refers to (nal_ref_idc 0) need not be decoded if nobody wants them. Other
            # codecs make that promise only within a layer.
            unwanted = by_time is not None and packet.size > 0 and packet.pts not in by_time
            context = packet.stream.codec_context
            context.skip_frame = "NONREF" if unwanted and context.name == "h264" else "DEFAULT"
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise Refused(f"has a damaged picture (at {frame.time} s)")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise Refused(
                        f"changes its size midway, from {size[0]}x{size[1]} to {frame.width}x{frame.height}",
                        "encode it with one size",
                    )
                yield frame
    except av.FFmpegError as error:
        raise Refused(f"is damaged or truncated ({_said(error)})") from error


def _needed(clip: _Opened, wanted: set[int] | None) -> Iterator[Any]:
    """Packets to decode: groups of pictures in which nothing is wanted are left out where that is exact."""
    packets = _all_packets(clip)
    if wanted is None or not clip.seekable:
        yield from packets
        return
    group: list[Any] = []
    for packet, restart in zip(packets, [*clip.restarts, True], strict=True):
        if restart and group:
            if any(p.pts in wanted for p in group):
                yield from group
            group = []
        group.append(packet)
    yield from group  # the empty packet, which makes the decoder give what it holds


def _all_packets(clip: _Opened) -> Iterator[Any]:
    """Every packet with data, then the empty one that ends the stream."""
    if clip.packets is not None:
        yield from clip.packets
        return
    import av

    # Not a seek in the open file: it need not lead to the first packet.
    with av.open(clip.path, options=_OPEN_OPTIONS) as container:
        end = None
        for packet in container.demux(_video_stream(container)):
            if packet.size:
                yield packet
            else:
                end = packet
        yield end


def _quarter_turns(frame: Any) -> int:
    """k of np.rot90 that shows a frame as its display matrix says.

    Raises:
        Refused: the matrix is no turn by a multiple of 90 degrees (mirrored or skewed clips, say).
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 0
    a, b, _, c, d = np.frombuffer(bytes(side_data), "<i4")[:5].astype(np.float64)
    scale = max(np.sqrt(abs(a * d - b * c)), 1.0)
    matrix = tuple(round(float(value), 3) for value in (a / scale, b / scale, c / scale, d / scale))
    turns = _QUARTER_TURNS.get(matrix)
    if turns is None:
        raise Refused(
            f"is to be shown turned or mirrored by the matrix {matrix}; only turns by multiples of 90 "
            "degrees are applied",
            "encode it the way it is to be seen",
        )
    return turns


class _RGB:
    """Frames to RGB as decord's filters do it: by the colour space and range that the frame states.

    PyAV's own conversion takes BT.601 for every frame, which is off by 20 levels on clips marked BT.709.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._reformatter: Any = None

    def __call__(self, frame: Any) -> Frames:
        from av.video.reformatter import VideoReformatter

        matrix = _MATRICES.get(int(frame.colorspace), _BT601)
        full = int(frame.color_range) == _FULL_RANGE
        name = frame.format.name
        key = (matrix, full, name)
        if key != self._key:  # a reformatter keeps the coefficients that it was once given
            self._key, self._reformatter = key, VideoReformatter()
        settings: dict[str, int] = {}
        # The formats called yuvj say themselves that their range is full.
        if name.startswith("yuv") and (matrix != _BT601 or (full and not name.startswith("yuvj"))):
            # Coefficients are applied only where source and destination differ; RGB ignores the destination.
            other = _BT601 if matrix != _BT601 else 1
            settings = {
                "src_colorspace": matrix,
                "dst_colorspace": other,
                "src_color_range": 2 if full else 1,
                "dst_color_range": 1,
            }
        rgb: Frames = self._reformatter.reformat(frame, format="rgb24", **settings).to_ndarray()
        return rgb


_DECODE: dict[str, Callable[[_Opened, Sequence[int], int], Frames]] = {
    "decord": _decode_decord,
    "pyav": _decode_pyav,
    "torchcodec": _decode_torchcodec,
}


def decode(request: dict[str, Any], backend: Backend) -> tuple[dict[str, Any], Frames]:
    """Decodes the frames of one request.

    Raises:
        Refused: the clip cannot be used, or not with this backend.
    """
    path = request["path"]
    container, clip = _open(path, check_complete(path))
    with container:
        total = len(clip.pts) if clip.pts is not None else sum(1 for _ in _decoded(clip, None))
        rate = clip.stream.average_rate or clip.stream.guessed_rate
        fps = float(rate) if rate else 0.0
        indices = spread_indices(total, fps, request["frames"], request["fps"])
        try:
            frames = _DECODE[backend](clip, indices, total)
        except _Mistrusted as error:
            raise Refused(f"is not decoded by {backend}: {error}", "set video.backend: pyav") from error
        facts = {"indices": indices, "fps": fps, "total_frames": total}
        return {"shape": frames.shape, **facts}, np.ascontiguousarray(frames)


# --- The process ---


def _load(choice: str) -> Backend:
    """Imports the chosen backend. PyAV always: it reads the packets.

    Raises:
        Refused: one is missing. The message stands for itself.
    """
    try:
        import av

        av.logging.set_level(None)  # what matters comes as exceptions
    except ImportError as error:
        raise Refused(f"PyAV cannot be imported ({error})", "pip install av") from error
    try:
        if choice == "decord":
            import decord  # noqa: F401

            return "decord"
        if choice == "torchcodec":
            import torchcodec.decoders  # noqa: F401

            return "torchcodec"
    # torchcodec raises RuntimeError where the libraries of its wheel are not there, decord OSError.
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"video.backend: {choice} cannot be imported ({reason})",
            f"pip install {choice}, or set video.backend: pyav",
        ) from error
    return "pyav"


def _write(target: int, data: memoryview) -> None:
    while data:
        data = data[os.write(target, data) :]


def _reply(target: int, header: dict[str, Any], frames: Frames | None = None) -> None:
    _write(target, memoryview(json.dumps(header).encode() + b"\n"))
    if frames is not None:
        _write(target, frames.data.cast("B"))


def main() -> None:
    """Serves requests until stdin ends, which it does when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # What libraries print on stdout would be read as frames.
    target = os.dup(1)
    os.dup2(2, 1)
    try:
        backend = _load(sys.argv[1])
    except Refused as error:
        _reply(target, {"error": str(error), "remedy": error.remedy})
        return
    _reply(target, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The signal's default action ends the process inside a decoder that hangs, where no Python code runs.
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + ALARM_GRACE_SECONDS)
        frames = None
        try:
            header, frames = decode(request, backend)
        except Refused as error:
            header = {"error": str(error), "remedy": error.remedy}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(target, header, frames)
        os.ftruncate(2, 0)


if __name__ == "__main__":
    main()
