"""The memory of a run's first stage, phase by phase, beside the plan's: JSON of name -> [measured, planned] bytes.

    python tests/recipes/peaks_worker.py CONFIG --setting value ..

Measured is the peak of the resident set (Linux) beyond what the process held before it loaded the model.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import lmms_eval.evaluator  # noqa: F401  # imported now, so that the baseline holds it

from mllm_keeplora.config import parse_config
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stage
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.runs.record import StageRecord

PHASES = {"probe": "probe", "train": "train", "evaluate": "evaluation"}


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    config = parse_config("", Path(sys.argv[1]), sys.argv[2:])
    planned = {name: sum(items.values()) for name, items in make_plan(config).memory.phases().items()}
    before, found, timed = peak(), dict[str, list[int]](), StageRecord.timed

    @contextmanager
    def measured(record: StageRecord, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel begins a new peak
        with timed(record, name):
            yield
        if name in PHASES:
            found[name] = [peak() - before, planned[PHASES[name]]]

    with mock.patch.object(StageRecord, "timed", measured), Run.open(config) as run:
        run_stage(run, 1, {})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
