"""Reads a stream's data completely and reports all that is wrong, before a run is paid for.

    keeplora check recipes/streams/FILE.yaml --data_root /where/the/data/are

Every record is read, every image and clip decoded. What was found sound is remembered in `--cache_dir`, where
the run looks: it need not decode it again. Beyond what a run refuses, the check finds what would make scores
worth less: ids and records that repeat, and test questions that training has shown. Exit status: 0 nothing
found, 1 something found, 2 it could not begin.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import RunConfig, VideoConfig
from mllm_keeplora.settings import build


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = OptionParser("keeplora check", __doc__, "STREAM.yaml [--data_root FOLDER]")
    parser.add_argument("stream", help="the stream's YAML")
    parser.add_setting("data_root", Path | None, "folder of the data, if not the YAML's own", default=None)
    parser.add_setting("cache_dir", str, "as of the run (default: %(default)s)", default=RunConfig().cache_dir)
    parser.add_settings(VideoConfig, "video.")
    given = parser.read(argv)
    video = build(VideoConfig, vars(given), "video.")

    from mllm_keeplora.data.media import MediaChecker
    from mllm_keeplora.data.stream import load_stream
    from mllm_keeplora.data.video.reader import VideoReader
    from mllm_keeplora.planning.check_stream import check_stream, format_report
    from mllm_keeplora.recipes.small.streams import draw_small_stream

    draw_small_stream(given.stream, given.data_root)
    stream = load_stream(Path(given.stream), given.data_root, check_files=False, cache_dir=given.cache_dir)
    checker = MediaChecker(VideoReader(video, None), Path(given.cache_dir) / "checked_media")
    report = check_stream(stream, checker)
    print(format_report(report), end="")
    return 1 if report.problems else 0
