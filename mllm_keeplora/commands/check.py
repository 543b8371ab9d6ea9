"""Reads a stream's data completely and reports all that is wrong, before a run is paid for.

    keeplora check recipes/streams/FILE.yaml --data_root /where/the/data/are

Every record is read, every image and clip decoded. What was found sound is remembered in `--cache_dir`, where
the run looks: it need not decode it again. Beyond what a run refuses, the check finds what would make scores
worth less: ids and records that repeat, and test questions that training has shown. Exit status: 0 nothing
found, 1 something found, 2 it could not begin.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import read_settings, settings_parser
from mllm_keeplora.config import RunConfig, VideoConfig


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = settings_parser("keeplora check", __doc__, "STREAM.yaml [--data_root FOLDER]")
    parser.add_argument("stream", type=str, help="the stream's YAML")
    parser.add_argument("--data_root", type=Path | None, help="folder of the data, if not the YAML's own")
    parser.add_argument("--cache_dir", type=str, default=RunConfig().cache_dir, help="as of the run")
    parser.add_class_arguments(VideoConfig, "video", help="as of the run")
    given = read_settings(parser, argv)

    from mllm_keeplora.data.media import MediaChecker
    from mllm_keeplora.data.stream import load_stream
    from mllm_keeplora.data.video.reader import VideoReader
    from mllm_keeplora.planning.check_stream import check_stream, format_report
    from mllm_keeplora.recipes.small.streams import draw_small_stream

    draw_small_stream(given.stream, given.data_root)
    stream = load_stream(Path(given.stream), given.data_root, check_files=False, cache_dir=given.cache_dir)
    checker = MediaChecker(VideoReader(given.video, None), Path(given.cache_dir) / "checked_media")
    report = check_stream(stream, checker)
    print(format_report(report), end="")
    return 1 if report.problems else 0
