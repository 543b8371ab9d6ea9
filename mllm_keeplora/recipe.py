"""What every recipe does: read the settings, build the embedded data on first use, run the stream."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mllm_keeplora.config import parse_config
from mllm_keeplora.console import command
from mllm_keeplora.models import resolve_device
from mllm_keeplora.processes import from_main, start_processes
from mllm_keeplora.stream_runner import run_stream

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Embedded:
    """The stream that a recipe runs when it is given no settings; paths are relative to the repository.

    Attributes:
        config: settings.
        stream: the stream's YAML.
        data: folder that the stream's data are built in.
        builder: script that builds them.
    """

    config: Path
    stream: Path
    data: Path
    builder: Path

    def build(self) -> None:
        """Builds the data unless they are there; they appear whole or not at all."""
        if not self.data.exists():
            subprocess.run([sys.executable, str(self.builder), "--out", str(self.data)], check=True)


def run_recipe(description: str, embedded: Embedded) -> None:
    """A recipe's whole main function.

    Args:
        description: for --help.
        embedded: what runs without arguments.
    """
    os.chdir(ROOT)  # every relative path in the shipped files is relative to the repository
    with command():
        config = parse_config(description, embedded.config)
        if Path(config.stream) == embedded.stream and config.data_root is None:
            start_processes(cpu=resolve_device(config.model).type == "cpu")
            from_main(embedded.build)
        run_stream(config)
