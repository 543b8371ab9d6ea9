"""The program of a decoder's process, which decodes clips for `reader.py`.

It is run by path, not as a module, so that the package and with it torch are not imported: it starts in a
fraction of a second. Decoders crash and hang on damaged files; here they take only this process with them.

A request is the JSON object `{"path", "frames", "fps", "timeout"}`. The reply is `{"shape", "indices", "fps",
"total_frames", "seconds"}`, followed by a message with the frames' bytes, or `{"error", "remedy"}`. A decoder that
takes longer than `timeout` seconds ends itself, so that it needs no parent for that.

How a clip is decoded:

- PyAV reads the packets first, without decoding: which frames are shown, and where decoding can start.
- It reads them again and decodes in order. It leaves out what no wanted frame needs, and checks every frame.
- Under `backend: decord` or `torchcodec` that decoder then takes the same frames, and a clip is refused where
  it gives other ones. Both seek by key frame; after an edit list, an open group of pictures or an intra
  refresh they may return other frames than those asked for, without a word.
"""

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [T, H, W, 3], RGB

_PARENT_CHECK_SECONDS = 1.0
_IMAGE_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_IMAGE_FORMATS = ("gif", "apng", "webp", "ico")
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")
# GUIDs of an ASF file (WMV), and of its object of file properties.
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# How animations begin and end.
_LAST_BYTES = {b"GIF8": b";", b"\x89PNG": b"IEND\xaeB`\x82"}
_MP4_DATA = (b"moov", b"moof", b"mdat")  # boxes whose bytes are needed; a cut `free` or `uuid` harms nothing
# Formats whose files name other files.
_PLAYLISTS = {"hls", "concat", "dash", "imf", "sdp", "webm_dash_manifest"}
# A playlist under a video's name must not send ffmpeg elsewhere.
_OPEN_OPTIONS = {"protocol_whitelist": "file"}
_NO_TIMES = 0x80  # AVFMT_NOTIMESTAMPS
# Codecs whose every key frame starts decoding anew.
_EXACT_KEYS = ("vp8", "vp9", "av1", "libdav1d")

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


def spread_indices(
    total: int, file_fps: float, frames: int, fps: float | None, shown_at: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Which frames of a clip are taken: evenly spaced, the first and (from two frames on) the last included.

    At a constant rate they are spaced by number. At a variable rate they are spaced by time: for each moment
    the frame that is then on the screen. No frame is taken twice; where one stays on for longer, the next ones
    are taken.

    Args:
        total: frames of the file.
        file_fps: frames per second of the file, on average; read only with `fps`.
        frames: how many are taken; with `fps` the most that are.
        fps: frames taken per second of the clip; None takes `frames`.
        shown_at: seconds at which each frame is shown, increasing; None for a constant rate.

    Returns:
        Strictly increasing indices in [0, total); at a constant rate linspace(0, total - 1, n) rounded down.

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
    if shown_at is None:
        return tuple(int(index) for index in np.linspace(0, total - 1, count))
    moments = np.linspace(shown_at[0], shown_at[-1], count)
    # A millionth of a mean interval: a moment that is a frame's own time is not to miss it by rounding.
    late = (shown_at[-1] - shown_at[0]) / (total - 1) * 1e-6
    on_screen = np.searchsorted(shown_at, moments + late, side="right") - 1
    place = np.arange(count)
    apart = np.maximum.accumulate(on_screen - place) + place
    return tuple(int(index) for index in np.minimum(apart, total - count + place))


# --- The file's own account of its size: ffmpeg ends quietly where the bytes end ---


def check_complete(path: str) -> None:
    """Compares the size that a container states with the bytes that are there. Reads headers only.

    Formats that state none are beyond this: a transport stream cut between two of its packets, or a
    fragmented MP4 between two fragments, or an FLV, is a shorter clip. The numbers of frames that MP4 and AVI
    state are no help: files with an edit list or dropped frames have fewer.

    Raises:
        Refused: the file is cut, or its index is missing, or it is an image in an MP4 file.
    """
    size = Path(path).stat().st_size
    end = 0
    with Path(path).open("rb") as file:
        head = file.read(256)
        if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS:
            raise Refused("is an image, not a video")
        if head[4:8] in _MP4_STARTS:
            end = _end_of_mp4(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _end_of_matroska(file)
        elif head[:4] == b"RIFF":
            end = _end_of_riff(file, size)
        elif head[:16] == _ASF:
            end = _end_of_asf(file)
        elif head[:4] in _LAST_BYTES:
            file.seek(max(0, size - len(head)))
            if not file.read().rstrip(b"\0\r\n").endswith(_LAST_BYTES[head[:4]]):
                raise _cut("its end mark is missing")
        elif len(head) > 196:
            for first, step in ((0, 188), (4, 192)):  # MPEG-TS, and with time codes as cameras write it
                if head[first] == head[first + step] == 0x47 and size % step:
                    raise _cut(f"its last packet has {size % step} of {step} bytes")
    if end > size:
        raise _cut(f"by its own account it ends at byte {end}, the file at {size}")


def _cut(detail: str) -> Refused:
    return Refused(f"is truncated ({detail})", "copy or download it again")


def _end_of_mp4(file: BinaryIO, size: int) -> int:
    """Where the last box ends that decoding needs.

    Raises:
        Refused: there is no index.
    """
    position = end = 0
    indexed = False
    while position < size:
        file.seek(position)
        length, kind, wide = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        indexed |= kind == b"moov"
        length = wide if length == 1 else length
        if length < 8:  # 0 reaches to the end of the file; anything else is padding
            break
        position += length
        if kind in _MP4_DATA:
            end = position
    if not indexed and end <= size:
        raise _cut("it has no index, the moov box; the recording or the copy was not finished")
    return end


def _end_of_matroska(file: BinaryIO) -> int:
    """Where the segment ends that holds everything; 0 where the file does not say."""
    end = 0
    for _ in ("the EBML header", "the segment"):
        file.seek(end + 4)  # after its name
        first = file.read(1) or b"\xff"
        width = 9 - first[0].bit_length()
        length = int.from_bytes(first + file.read(width - 1)) & ((1 << 7 * width) - 1)
        if length == (1 << 7 * width) - 1:
            return 0  # of unknown size, as live recordings write it
        end = file.tell() + length
    return end


def _end_of_asf(file: BinaryIO) -> int:
    """The size that the file states; 0 where it does not, as broadcasts leave it."""
    file.seek(0)
    head = file.read(65536)
    start = head.find(_ASF_PROPERTIES)
    if start < 0 or len(head) < start + 92:
        return 0
    (size,), (flags,) = struct.unpack_from("<Q", head, start + 40), struct.unpack_from("<I", head, start + 88)
    return 0 if flags & 1 else int(size)


def _end_of_riff(file: BinaryIO, size: int) -> int:
    """Where the last RIFF chunk ends: long AVI files are several in a row."""
    position = end = 0
    while position + 12 <= size:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length == 0:
            break
        end = position + 8 + length
        position = end + length % 2
    return end


# --- Reading packets ---


class _Packet(NamedTuple):
    pts: int | None
    is_key: bool
    is_shown: bool


@dataclass(frozen=True)
class _Clip:
    """A file whose packets have been read and not yet decoded.

    Attributes:
        path: the file.
        fps: frames per second as it states it, on average; 0 where it states none.
        tick: seconds of one step of its times; 0 where the file has no times of its own.
        packets: what every packet of the video stream says.
        times: pts of the frames that are shown, increasing; None where packets carry no usable times.
        seekable: whether decoding can start at every key frame and be exact, whatever came before.
    """

    path: str
    fps: float
    tick: float
    packets: list[_Packet]
    times: list[int] | None
    seekable: bool


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its video stream.

    Raises:
        Refused: it is no video, or what the block does with it fails in ffmpeg.
    """
    try:
        # Not `options`: PyAV hands those to every stream, too, and dies of streams that it meets later (FLV).
        # Titles in Latin-1 or GBK are common; nobody reads them here.
        container = av.open(path, container_options=_OPEN_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise Refused(f"cannot be opened as a video ({error.strerror})") from error
    with container:
        if _PLAYLISTS.intersection(container.format.name.split(",")):
            raise Refused(f"is a playlist ({container.format.name}), which names other files", "name those files")
        try:
            yield container, _video_stream(container)
        except av.FFmpegError as error:
            raise Refused(f"is damaged or truncated ({error.strerror})") from error


def _video_stream(container: Any) -> Any:
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


def _read_packets(path: str) -> _Clip:
    packets: list[_Packet] = []
    exact = True
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0:  # the one that ends the stream
                continue
            if packet.is_corrupt:
                raise Refused(f"is damaged or truncated (packet {len(packets)} of its video stream)")
            packets.append(_Packet(packet.pts, packet.is_keyframe, not packet.is_discard))
            exact = exact and (not packet.is_keyframe or _starts_anew(packet))
        if not packets:
            raise Refused("has a video stream without a frame")
        name = container.format.name
        # Formats of still images are called png_pipe and so on.
        if name.endswith("_pipe") or name == "image2" or (len(packets) == 1 and name in _IMAGE_FORMATS):
            raise Refused(f"is an image ({name.removesuffix('_pipe')}), not a video")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        # Of raw streams ffmpeg makes the times up, from the rate that it assumes.
        made_up = container.format.flags & _NO_TIMES
        tick = 0.0 if made_up else float(stream.time_base or 0)
    return _Clip(path, fps, tick, packets, _shown_times(packets), exact)


def _starts_anew(packet: Any) -> bool:
    """Whether no packet after this key frame refers to one before it."""
    codec = packet.stream.codec_context.name
    if codec != "h264":
        return codec in _EXACT_KEYS
    try:
        # Of h264's key frames only an IDR picture, NAL unit type 5, promises that.
        idr = BitStreamFilterContext("filter_units=pass_types=5", packet.stream)
        return bool(idr.filter(av.Packet(bytes(packet))))
    except av.FFmpegError:
        return False  # everything is decoded, which says what is wrong


def _shown_times(packets: Sequence[_Packet]) -> list[int] | None:
    """Times of the frames that a player shows, increasing; None where they do not tell frames apart."""
    first = next((i for i, packet in enumerate(packets) if packet.is_key), 0)
    start = packets[first].pts
    times = []
    for packet in packets[first:]:  # what comes before the first key frame does not decode
        if packet.pts is None or start is None:
            return None
        # Leading frames of the first key frame refer to what is not there; decoders drop them.
        if packet.is_shown and packet.pts >= start:
            times.append(packet.pts)
    return sorted(times) if len(set(times)) == len(times) else None


def _rate(clip: _Clip) -> tuple[float, list[float] | None]:
    """Frames per second, and when each frame is shown if that is not at a constant rate.

    A rate is constant if no frame is further from its place than half an interval: times are rounded to
    ticks. The rate that a file states is taken unless its frames are half an interval off by the end.

    Returns:
        (frames per second on average, seconds from the first frame on or None for a constant rate); where
        packets carry no times, the rate is the one that ffmpeg assumes.
    """
    if clip.times is None or len(clip.times) < 2 or not clip.tick > 0:
        return clip.fps, None
    seconds = (np.array(clip.times) - clip.times[0]) * clip.tick
    last = len(seconds) - 1
    interval = float(seconds[-1]) / last
    constant = bool(np.abs(seconds - np.arange(last + 1) * interval).max() <= interval / 2)
    if clip.fps > 0 and constant and abs(last / clip.fps - seconds[-1]) <= interval / 2:
        return clip.fps, None
    return 1 / interval, None if constant else seconds.tolist()


# --- Decoding ---


def decode(request: dict[str, Any], backend: str) -> tuple[dict[str, Any], Frames]:
    """Decodes the frames of one request.

    Raises:
        Refused: the clip cannot be used, or not with this backend.
    """
    check_complete(request["path"])
    clip = _read_packets(request["path"])
    total = sum(1 for _ in _decoded(clip, None)) if clip.times is None else len(clip.times)
    if total == 0:
        raise Refused("has a video stream without a frame that can be shown")
    fps, shown_at = _rate(clip)
    indices = spread_indices(total, fps, request["frames"], request["fps"], shown_at)
    frames = _take(clip, indices, total)
    if backend != "pyav":
        _compare(frames, backend, clip.path, indices)
    return {
        "shape": frames.shape,
        "indices": indices,
        "fps": fps,
        "total_frames": total,
        "seconds": None if shown_at is None else [shown_at[index] for index in indices],
    }, frames


def _take(clip: _Clip, indices: Sequence[int], total: int) -> Frames:
    """Decodes in order and takes what is wanted."""
    times = clip.times
    wanted = {index if times is None else times[index]: place for place, index in enumerate(indices)}
    frames: Frames | None = None
    for number, frame in enumerate(_decoded(clip, None if times is None else set(wanted))):
        place = wanted.pop(number if times is None else frame.pts, None)
        if place is not None:
            picture = np.rot90(_to_rgb(frame), _quarter_turns(frame))
            if frames is None:
                frames = np.empty((len(indices), *picture.shape), np.uint8)
            if picture.shape != frames.shape[1:]:
                raise Refused("is turned midway: its frames are not all to be shown the same way up")
            frames[place] = picture
        if not wanted:
            break
    if wanted or frames is None:
        missing = [indices[place] for place in wanted.values()]
        raise Refused(f"is damaged: no picture for {len(missing)} frames (the first is {missing[0]} of {total})")
    return frames


def _decoded(clip: _Clip, wanted: Container[int] | None) -> Iterator[Any]:
    """Frames in the order in which they are shown, all of one size and none damaged.

    Args:
        clip: the clip.
        wanted: times of the frames that are needed; others may be left out where leaving them out changes no
            needed one. None for all.

    Raises:
        Refused: damaged data, or a second size.
    """
    needed = _needed(clip, wanted)
    size: tuple[int, int] | None = None
    # Not a seek in a file that is open: it need not lead to the first packet.
    with _opened(clip.path) as (container, stream):
        packets = (packet for packet in container.demux(stream) if packet.size)
        taken = (packet for packet, need in zip(packets, needed, strict=False) if need)
        for packet in chain(taken, [None]):  # None has the decoder give what it holds
            # Frames that no other refers to (nal_ref_idc 0) need not be decoded if nobody wants them. Other
            # codecs make that promise only within a layer.
            unwanted = wanted is not None and packet is not None and packet.pts not in wanted
            context = stream.codec_context
            context.skip_frame = "NONREF" if unwanted and context.name == "h264" else "DEFAULT"
            for frame in stream.decode(packet):
                if frame.is_corrupt:
                    raise Refused(f"has a damaged picture (time stamp {frame.pts})")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise Refused(
                        f"changes its size midway, from {size[0]}x{size[1]} to {frame.width}x{frame.height}",
                        "encode it with one size",
                    )
                yield frame


def _needed(clip: _Clip, wanted: Container[int] | None) -> list[bool]:
    """For every packet whether it has to be decoded: not in a group of pictures where nothing is wanted."""
    if wanted is None or not clip.seekable:
        return [True] * len(clip.packets)
    groups = list(accumulate(packet.is_key for packet in clip.packets))
    used = {group for group, packet in zip(groups, clip.packets, strict=True) if packet.pts in wanted}
    return [group in used for group in groups]


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


def _to_rgb(frame: Any) -> Frames:
    """A frame as RGB the way decord's filters do it: by the colour space and range that it states.

    What is transparent shows white, as in pictures.

    PyAV's own conversion takes BT.601 for every frame, which is off by 20 levels on clips marked BT.709.
    """
    matrix = _MATRICES.get(int(frame.colorspace), _BT601)
    name = frame.format.name
    # The formats called yuvj say themselves that their range is full.
    full = int(frame.color_range) == _FULL_RANGE and not name.startswith("yuvj")
    settings: dict[str, int] = {}
    if name.startswith("yuv") and (matrix != _BT601 or full):
        settings = {
            "src_colorspace": matrix,
            # Coefficients are applied only where source and destination differ; RGB ignores the destination.
            "dst_colorspace": _BT601 if matrix != _BT601 else 1,
            "src_color_range": 2 if int(frame.color_range) == _FULL_RANGE else 1,
            "dst_color_range": 1,
        }
    # A new one for every frame: a reformatter keeps the coefficients that it was once given.
    transparent = any(component.is_alpha for component in frame.format.components)
    picture: Any = VideoReformatter().reformat(frame, format="rgba" if transparent else "rgb24", **settings)
    pixels: Frames = picture.to_ndarray()
    if not transparent:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


# --- The other decoders ---


def _take_by_decord(path: str, indices: list[int]) -> Frames:
    import decord

    try:
        frames: Frames = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError) as error:  # of no common base class
        raise RuntimeError(error) from error
    return frames


def _take_by_torchcodec(path: str, indices: list[int]) -> Frames:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames: Frames = decoder.get_frames_at(indices).data.numpy()
    return frames


_TAKE_BY: dict[str, Callable[[str, list[int]], Frames]] = {
    "decord": _take_by_decord,
    "torchcodec": _take_by_torchcodec,
}


def _compare(frames: Frames, backend: str, path: str, indices: Sequence[int]) -> None:
    """Refuses a clip of which a backend gives other frames than PyAV, or none.

    Raises:
        Refused: it does, or it is not installed.
    """
    remedy = "set video.backend: pyav"
    try:
        if np.array_equal(_TAKE_BY[backend](path, list(indices)), frames):
            return
        reason = "it gives other frames than PyAV, which decodes every frame in order"
    # torchcodec raises RuntimeError where libraries of its wheel are missing, decord OSError.
    except (ImportError, OSError, RuntimeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if backend not in sys.modules:
            remedy += f", or pip install {backend}"
    raise Refused(f"is not decoded by {backend}: {reason}", remedy)


# --- The process ---


def _serve(connection: Connection, backend: str) -> None:
    """Answers one request."""
    request = json.loads(connection.recv_bytes())
    # The signal's default action ends the process inside a decoder that hangs, where no Python code runs.
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    frames = None
    try:
        header, frames = decode(request, backend)
    except Refused as error:
        header = {"error": str(error), "remedy": error.remedy}
    signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send_bytes(json.dumps(header).encode())
    if frames is not None:
        connection.send_bytes(frames.data.cast("B"))
    os.ftruncate(2, 0)  # what ffmpeg said: the parent reads it only after a crash


def main() -> None:
    """Serves requests for as long as the parent is there. Arguments: backend, connection, parent's id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may ignore or block it, which is inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    av.logging.set_level(None)  # what matters comes as exceptions
    backend, connection, parent = sys.argv[1], Connection(int(sys.argv[2])), int(sys.argv[3])
    # Processes that the parent forks hold copies of its end: that it is gone need not close the connection.
    while os.getppid() == parent:
        if connection.poll(_PARENT_CHECK_SECONDS):
            _serve(connection, backend)


if __name__ == "__main__":
    main()
