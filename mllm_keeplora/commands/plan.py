"""Says what a run will need: memory, disk, steps and passes.

    keeplora plan --config recipes/configs/vqa/llava15_7b_ucit.yaml --data_root /where/UCIT/is
    keeplora plan --config FILE.yaml --memory_gb 24      fails where the run does not fit 24 GB
    keeplora plan --config FILE.yaml --measure           takes the times from 20 steps on this machine

No weights are loaded and nothing is written, but with --measure, and for a base model that is built from packages. It
takes the settings of `keeplora run`, and refuses what that refuses before it loads a model; data and weights may yet
be missing. `keeplora run --plan` is the same.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from mllm_keeplora.command_line import value_of, with_underscores
from mllm_keeplora.config import ConfigError, RunConfig, parse_config
from mllm_keeplora.settings import Range

MemoryGB = Annotated[float, Range(0, 1_000_000, "(]")]
PLAN = "print what the run will need, and do not begin it: keeplora plan"
MEMORY_GB = "compare the plan with a card that is not here, of so many GB (default: the device that the run would use)"
MEASURE = "take the times from 20 steps and a batch of each other phase, run here in a temporary folder"
FLAGS = {"memory_gb GB": MEMORY_GB, "measure": MEASURE}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    flags, settings = parse_flags(["--plan", *argv])
    default = Path("recipes/configs/vqa/small.yaml")
    config = parse_config(__doc__, default, settings, "keeplora plan", FLAGS)
    print_plan(config, flags)


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits a command line into `--plan` and what goes with it, which no YAML has, and the settings of a run.

    Raises:
        ConfigError: a value that is no size, or what goes with a plan without one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--memory_gb")
    parser.add_argument("--measure", action="store_true")
    try:
        flags, rest = parser.parse_known_args(with_underscores(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error} (keeplora plan --help says what it takes)") from error
    if flags.memory_gb is not None:
        flags.memory_gb = value_of(flags.memory_gb, MemoryGB, "--memory_gb")
        if not flags.plan:
            raise ConfigError(f"--memory_gb {flags.memory_gb:g}: it goes with --plan, which compares with it")
    if flags.measure and not flags.plan:
        raise ConfigError("--measure: it goes with --plan, which says what was measured")
    return flags, rest


def print_plan(config: RunConfig, flags: argparse.Namespace) -> None:
    """Prints what a run will need.

    Args:
        config: settings.
        flags: of `parse_flags`.

    Raises:
        KeepLoRAError: what the run would refuse before it loads a model.
        PlanError: it does not fit the device's memory; after printing.
    """
    from mllm_keeplora.planning.measure import measure
    from mllm_keeplora.planning.plan import check_fits, check_run, make_plan
    from mllm_keeplora.planning.text import format_plan
    from mllm_keeplora.recipes.small.streams import build_small_base, draw_small_stream

    check_run(config, flags.memory_gb)
    build_small_base(config.model.base_model)
    if flags.measure:
        draw_small_stream(config.stream, config.data_root)
        plan = replace(make_plan(config, flags.memory_gb), rates=measure(config))
    else:
        plan = make_plan(config, flags.memory_gb)
    print(format_plan(plan), flush=True)
    check_fits(plan)
