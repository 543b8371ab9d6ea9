"""The processes of a run under `torchrun` or `accelerate launch`; a lone process never waits here.

The main process alone decides and writes files; the others wait and read. So a phase is skipped on all processes or on
none. Decompositions are shared out, and each one's result is its owner's everywhere: rounding differs between machines,
A and M must not. A process that fails ends with its message; the launcher then ends the others, which wait in a
collective.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import ConfigError, KeepLoRAError

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

# The others wait while the main process decomposes and writes; the launcher, not this limit, ends a dead run.
TIMEOUT = timedelta(hours=12)
_ACCELERATES_FLAG, SHARD_FLAG = "ACCELERATE_USE_FSDP", "KEEPLORA_SHARD_BASE"
# What `accelerate launch` asks of a training, and the answer that leaves a run as its settings describe it: autocast
# would round the fp32 LoRA path, and a compiled model does not sum as the one that probes and evaluation call.
_NOT_TAKEN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
_OTHER_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
LOST = ("Connection closed by peer", "Connection reset by peer")


class LostProcessError(KeepLoRAError, RuntimeError):
    """Another process of the run ended while this one waited for it."""


def start_processes(cpu: bool) -> None:
    """Joins the processes that the launcher started, unless that has been done.

    Args:
        cpu: talk over gloo, also where there is a GPU.

    Raises:
        ConfigError: the launcher asks for an engine of training that runs do not have.
    """
    _check_launcher()
    # accelerate's own FSDP would wrap the trained factors too, in the middle of a stage: see sharding.py.
    if _ACCELERATES_FLAG in os.environ:
        os.environ[SHARD_FLAG] = os.environ.pop(_ACCELERATES_FLAG)
    PartialState(cpu=cpu, timeout=TIMEOUT)


def _check_launcher() -> None:
    """Switches off what `accelerate launch` hands on from a file of its own that would change what a stage computes."""
    for name in _OTHER_ENGINES:
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"the launcher sets {name}, and a run trains by DDP or FSDP; name recipes/accelerate/ddp.yaml or "
                "fsdp.yaml as its --config_file"
            )
    for name, off in _NOT_TAKEN.items():
        asked = os.environ.get(name, off)
        if asked.lower() != off.lower():
            setting = name.removeprefix("ACCELERATE_").lower()
            logger.warning(f"the launcher asks for {setting} {asked}; it is left out, since the run's settings decide")
            os.environ[name] = off


def end_processes() -> None:
    """Leaves the group at the end of a run that went well, so that no backend complains of a leak."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Keeps a process's own message from drowning in the tracebacks of those that waited for it (gloo).

    Raises:
        LostProcessError: in place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if num_processes() == 1 or not any(text in str(error) for text in LOST):
            raise
        raise LostProcessError("another process of the run has ended; its own message says why") from error


def num_processes() -> int:
    """How many processes the run has."""
    return PartialState().num_processes


def process_index() -> int:
    """This process's number, from 0."""
    return PartialState().process_index


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return PartialState().is_main_process


def from_main(compute: Callable[[], T]) -> T:
    """Runs `compute` on the main process alone; its result on every process, which all have waited for it."""
    result = [compute() if is_main() else None]
    return broadcast_object_list(result)[0]


def wait_for_everyone() -> None:
    """Returns once every process is here."""
    PartialState().wait_for_everyone()


def own_share(items: Sequence[T]) -> list[T]:
    """This process's items: every one belongs to exactly one process; a process may get none."""
    state = PartialState()
    return list(items[state.process_index :: state.num_processes])


def shared_out(items: Sequence[S], compute: Callable[[S], T], what: str) -> list[T]:
    """`compute` of every item, each on one process; all results, in the order of the items, on every process.

    Args:
        items: the same on all processes.
        compute: gives what is on the CPU; nothing in it may wait for another process.
        what: is done, for the bar.
    """
    own = [compute(item) for item in progress(what, "modules", own_share(items))]
    shares = [broadcast_object_list([own], from_process=rank)[0] for rank in range(num_processes())]
    return [shares[number % len(shares)][number // len(shares)] for number in range(len(items))]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    return gather_object([value])


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum over all processes; its device is the model's."""
    return reduce(tensor, "sum")
