"""How every benchmark measures and reports: both sides in one run, in turns, ratios within a round.

A benchmark is a script with `rows(options) -> list[Row]`; `benchmark(__doc__, rows)` is its main function.
`benchmarks/run.py` runs the scripts one after the other and prints all their rows as one table.
"""

import contextlib
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch

from mllm_keeplora.command_line import OptionParser, command

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "benchmarks"
# glibc keeps freed blocks of up to 32 MB, and the resident set then shows them as held. Under this variable of
# the environment every block above 1 MB goes back to the system when it is freed.
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
        repeats: rounds that count; 1 where `quick`.
        quick: tiny sizes, which only show that the script works; its figures mean nothing.
    """

    device: torch.device
    repeats: int
    quick: bool

    def picture(self, name: str) -> Path | None:
        """Where a picture of that name goes; None where its figures would mean nothing."""
        return None if self.quick else PICTURES / name


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
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every way in every round that counts.

    All ways take their turn in each round, so that a machine that slows down slows all of them.

    Args:
        ways: what is timed.
        repeats: rounds that count.
        device: its queue is waited for.
        warm_up: a first round fills caches and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + warm_up):
        for name, way in ways.items():
            gc.collect()
            synchronize(device)
            started = time.perf_counter()
            way()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: found[int(warm_up) :] for name, found in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU's queue; a CPU has none."""
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


def energy(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in fp64."""
    return float(matrix.double().square().sum())


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps during `forward` for the backward pass, the model's parameters left out."""
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
    """Seconds and peak memory of phases, beyond what the process held when this object was made.

    On a GPU torch's allocations are measured; on a CPU (Linux) the resident set, best by `in_own_process`.

    Attributes:
        found: phase -> its "seconds" and "bytes".
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


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of a benchmark in a process of its own, which returns freed memory (`RETURN_FREED`).

    Args:
        function: a script's; the new process imports it from there.
        arguments: for it; they and what it returns go through JSON.

    Raises:
        SystemExit: it failed.
    """
    script = Path(inspect.getfile(function))
    code = (
        "import json, sys, torch; "
        f"torch.set_num_threads({torch.get_num_threads()}); sys.path.insert(0, {str(script.parent)!r}); "
        f"from {script.stem} import {function.__name__}; "
        f"print(json.dumps({function.__name__}(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    environment = {**os.environ, **RETURN_FREED}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{script.name}: {function.__name__}{arguments} failed; its own message says why")
    return json.loads(done.stdout.splitlines()[-1])


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
    parser = OptionParser(f"python benchmarks/{Path(sys.argv[0]).name}", description)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: only shows that it works")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    with command():
        given = parser.read(sys.argv[1:])
        torch.set_num_threads(given.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options = Options(device, 1 if given.quick else given.repeats, given.quick)
        found = rows(options)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
        print(f"{device_name(device)}; medians of {options.repeats} rounds (smallest to largest)\n")
        print(table(found), flush=True)
