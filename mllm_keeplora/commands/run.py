"""What every recipe does: read the settings, build the embedded data on first use, run the stream."""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.commands.program import command
from mllm_keeplora.config import ConfigError, RunConfig, parse_config
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.distributed.processes import from_main, is_main, start_processes
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.planning.plan import check_fits, make_plan
from mllm_keeplora.planning.text import format_plan
from mllm_keeplora.reports.report import format_table, write_report
from mllm_keeplora.runs.run_directory import RunDirectory

PLAN_HELP = (
    "--plan prints memory, disk, steps and passes of the run without loading weights and writes nothing; "
    "--plan --memory_gb 24 compares with a device of 24 GB."
)


@dataclass(frozen=True)
class Embedded:
    """The stream that a recipe runs when it is given no settings.

    Attributes:
        config: settings.
        stream: the stream's YAML.
        data: folder that the stream's data are built in.
        builder: module of `recipes.small` that builds them.
    """

    config: Path
    stream: Path
    data: Path
    builder: str

    def build(self) -> None:
        """Builds the data unless they are there; they appear whole or not at all."""
        if not self.data.exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    f"mllm_keeplora.recipes.small.{self.builder}",
                    "--out",
                    str(self.data),
                ],
                check=True,
            )


def run_recipe(description: str, embedded: Embedded) -> None:
    """A recipe's whole main function.

    Args:
        description: for --help.
        embedded: what runs without arguments.
    """
    with command():
        flags, argv = parse_flags(sys.argv[1:])
        config = parse_config(f"{description}\n{PLAN_HELP}", embedded.config, argv)
        if flags.plan:
            print_plan(config, flags.memory_gb)
            return
        start_processes(cpu=resolve_device(config.model).type == "cpu")
        writes = is_main()
        if Path(config.stream) == embedded.stream and config.data_root is None:
            from_main(embedded.build)
        retention = run_stream(config)
        if writes:  # the processes have left their group
            _report(RunDirectory(Path(config.run_dir)), retention)


def _report(directory: RunDirectory, retention: Mapping[str, Any]) -> None:
    write_report(directory.path)
    print(f"{format_table(retention)}\nreport: {directory.report}\nadapter: {directory.adapter}", flush=True)


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Takes the flags that are no settings of a run off the command line: no YAML and no manifest has them.

    Raises:
        ConfigError: a value that is no size, or a size without a plan.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--memory_gb", type=float)
    try:
        flags, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --memory_gb takes a device's memory in GB, such as 24") from error
    if flags.memory_gb is not None and not (flags.plan and flags.memory_gb > 0):
        raise ConfigError(
            f"--memory_gb {flags.memory_gb:g}: a positive size that --plan compares with; it goes with --plan"
        )
    return flags, rest


def print_plan(config: RunConfig, memory_gb: float | None) -> None:
    """Prints what the run will need; loads no weights and writes nothing.

    Raises:
        PlanError: it does not fit the device's memory; after printing.
    """
    plan = make_plan(config, memory_gb)
    print(format_plan(plan), flush=True)
    check_fits(plan)
