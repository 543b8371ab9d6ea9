"""How every benchmark here measures and reports: both sides in one run, in turns, ratios within a round.

A benchmark is a script with `rows(options) -> list[Row]`; `benchmark(__doc__, rows)` is its main function.
Its rows go to `benchmarks/run.py`, which runs all scripts one after the other and prints one table.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "benchmarks"
# glibc keeps freed blocks of up to 32 MB to itself, which the resident set then shows as held. For the
# environment of a process whose memory is measured.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


class Ratio(NamedTuple):
    """Median, smallest and largest of the ratios of single rounds."""

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.smallest:.3g} to {self.largest:.3g})"


@dataclass(frozen=True)
class Options:
    """What a benchmark is run with.

    Attributes:
        device: where it runs.
        repeats: rounds that count.
        quick: sizes and numbers that only show that the script works; its figures mean nothing.
        pictures: where it draws; None for nowhere.
    """

    device: torch.device
    repeats: int
    quick: bool
    pictures: Path | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        number: the row of docs/benchmarks.md that it belongs to.
        what: what is measured, shapes included.
        ours, beside: both sides' own figures, with units.
        result: the figure that the goal is about: a ratio, an energy, a number of bytes.
        goal: what it should be; "" where none is set for this hardware.
        met: whether it is; None without a goal.
        floor: the arithmetic limit of the figure, or what else bounds it; "" where nothing does.
    """

    number: int
    what: str
    ours: str
    beside: str
    result: str
    goal: str = ""
    met: bool | None = None
    floor: str = ""


def in_turns(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every way in every round; the first round, with caches and lazy set-up, is left out.

    All ways take their turn in each round, so that a machine that slows down slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            gc.collect()
            synchronize(device)
            started = time.perf_counter()
            way()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for a GPU's queue; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """above / below, round by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text."""
    return f"{1e3 * statistics.median(seconds):.4g} ms"


def megabytes(count: float) -> str:
    """Bytes as text, in units of 1e6."""
    return f"{count / 1e6:.4g} MB"


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """What autograd keeps during `forward` for the backward, parameters of the model left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(found.values())


class Peaks:
    """Seconds and peak memory of phases, beyond what the process held when the object was made.

    Torch's allocations on a GPU; the resident set on a CPU (Linux), best in a process started with
    `RETURN_FREED`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, dict[str, float]] = {}
        self._reset()
        self.baseline = self._peak()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block."""
        self._reset()
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.found[name] = {"seconds": seconds, "bytes": self._peak() - self.baseline}

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel begins a new peak of the resident set

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    lines = ["| | what | here | beside | result | goal | met | floor |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "no"
        cells = (str(row.number), row.what, row.ours, row.beside, row.result, row.goal, met, row.floor)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} thread(s)"


def benchmark(description: str, rows: Callable[[Options], list[Row]]) -> None:
    """A benchmark's main function: reads the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that the script works")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = None if arguments.quick else PICTURES
    found = rows(Options(device, arguments.repeats, arguments.quick, pictures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    print(f"{device_name(device)}; medians of {arguments.repeats} rounds (smallest to largest)\n")
    print(table(found))
    sys.stdout.flush()
