"""Trains over a stream of tasks, and measures after each what the model still knows.

    keeplora run                                                    the small VQA stream: CPU, minutes
    keeplora run --config recipes/configs/video/small.yaml          the small video stream
    keeplora run --config FILE.yaml --data_root /where/the/data/are --language.rank 32
    keeplora run --config FILE.yaml --plan                          only what it will need: `keeplora plan`

The command line wins over the YAML file, and that over the defaults below. The same command again continues an
interrupted run and leaves a complete one alone. It ends in the retention report, RUN_DIR/report.html. On several
GPUs: accelerate launch recipes/vqa.py or recipes/video.py, same settings.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mllm_keeplora.commands.plan import FLAGS, PLAN, parse_flags, print_plan
from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.runs.run_directory import RunDirectory


def main(argv: Sequence[str], default_config: Path = Path("recipes/configs/vqa/small.yaml")) -> None:
    """The command line.

    Args:
        argv: settings and flags.
        default_config: settings where `--config` names none.
    """
    flags, settings = parse_flags(argv)
    config = parse_config(__doc__, default_config, settings, flags={"plan": PLAN, **FLAGS})
    if flags.plan:
        print_plan(config, flags)
    else:
        _run(config)


def _run(config: RunConfig) -> None:
    from mllm_keeplora.continual.memory import DeviceMemoryError
    from mllm_keeplora.continual.run_stream import run_stream
    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.distributed.processes import from_main, is_main, start_processes
    from mllm_keeplora.methods.base import load_method
    from mllm_keeplora.modeling.loading import resolve_device
    from mllm_keeplora.planning.plan import smaller_figures, warn_of_memory
    from mllm_keeplora.recipes.small.streams import build_small_base, draw_small_stream
    from mllm_keeplora.reports.card import write_card
    from mllm_keeplora.reports.page import write_report
    from mllm_keeplora.reports.tables import format_table
    from mllm_keeplora.reports.trackers import log_stage

    load_method(config)  # a wrong one is refused before anything is drawn
    start_processes(cpu=resolve_device(config.model).type == "cpu")
    from_main(lambda: draw_small_stream(config.stream, config.data_root))
    from_main(lambda: build_small_base(config.model.base_model))
    writes = is_main()  # asked before the run, which leaves the group of processes at its end
    if not RunDirectory(Path(config.run_dir)).retention.exists():  # what has been complete once has fitted
        from_main(lambda: warn_of_memory(config))
    try:
        retention = run_stream(config, partial(log_stage, config))
    except DeviceMemoryError as error:
        figures = smaller_figures(config, error.phase, error.smaller)
        raise DeviceMemoryError(f"{error}. {figures}".rstrip(". ")) from error
    if writes:
        run = RunDirectory(Path(config.run_dir))
        saved = load_run(run.path)
        write_report(saved)
        if run.adapter_weights.exists():  # a stream may have learnt nothing yet
            write_card(saved)
        print(f"{format_table(retention, saved.guard_note())}\nreport: {run.report}\nadapter: {run.adapter}")
