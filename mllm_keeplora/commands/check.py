"""Reads a stream's data completely and reports all that is wrong, before a run is paid for.

    keeplora check --config RUN.yaml                              the data of a run, for its model and settings
    keeplora check recipes/streams/FILE.yaml --data_root /where/the/data/are [--base_model MODEL]
    keeplora check ... --all                                      every bad record, not the first ten of a file

Every record is read, every image and clip decoded and, where a model is named, every record put through its
processor and chat template (its weights are not needed). The report then names the longest samples and the tokens
that a stage trains on. What was found sound is remembered in the folder `cache_dir`, where the run looks: it need not
do it again. Beyond what a run refuses, the check finds what would make scores worth less: ids and records that
repeat, and test questions that training has shown. Exit status: 0 nothing found, 1 something found, 2 it could not
begin.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import ModelConfig, RunConfig, VideoConfig, parse_config
from mllm_keeplora.settings import build

READ = {"all": "list every bad record, not the first ten of a file"}


def main(argv: Sequence[str]) -> int:
    """The command line."""
    shows_all = "--all" in argv
    argv = [text for text in argv if text != "--all"]
    has_config = any(text.partition("=")[0] == "--config" for text in argv)
    config, has_model = (_config_of_run(argv), True) if has_config else _config_of_stream(argv)

    from mllm_keeplora.data.preflight import Preflight
    from mllm_keeplora.data.stream import load_stream
    from mllm_keeplora.data.video.reader import VideoReader
    from mllm_keeplora.planning.check_stream import SHOWN, check_stream, format_report
    from mllm_keeplora.planning.skeleton import build_processor
    from mllm_keeplora.recipes.small.streams import build_small_base, draw_small_stream

    draw_small_stream(config.stream, config.data_root)
    build_small_base(config.model.base_model)
    root = None if config.data_root is None else Path(config.data_root)
    stream = load_stream(Path(config.stream), root, check_files=False, cache_dir=config.cache_dir)
    processor = build_processor(config.model) if has_model else None
    tasks = [task.name for task in stream.tasks]
    report = check_stream(stream, Preflight.of_run(config, tasks, processor, VideoReader(config.video, None)))
    print(format_report(report, None if shows_all else SHOWN), end="")
    return 1 if report.problems else 0


def _config_of_run(argv: Sequence[str]) -> RunConfig:
    return parse_config(__doc__, Path("recipes/configs/vqa/small.yaml"), argv, "keeplora check", READ)


def _config_of_stream(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The settings of a run on that stream, and whether a model was named."""
    parser = OptionParser("keeplora check", __doc__, "--config RUN.yaml | STREAM.yaml [--data_root FOLDER] [--all]")
    parser.add_read(READ)
    parser.add_argument("stream", help="the stream's YAML")
    parser.add_setting("data_root", str | None, "folder of the data, if not the YAML's own", default=None)
    parser.add_setting("cache_dir", str, "as of the run (default: %(default)s)", default=RunConfig().cache_dir)
    parser.add_setting("base_model", str | None, "hub id or folder: its processor counts the tokens", default=None)
    parser.add_settings(VideoConfig, "video.")
    given = parser.read(argv)
    config = RunConfig(
        stream=given.stream,
        data_root=given.data_root,
        cache_dir=given.cache_dir,
        video=build(VideoConfig, vars(given), "video."),
        model=ModelConfig(base_model=given.base_model or ModelConfig().base_model),
    )
    return config, given.base_model is not None
