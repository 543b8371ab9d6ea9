"""Row 5, too: what could make a training step faster. Every switch alone, beside the step as a stage takes it.

    python benchmarks/switches.py           a CPU: about 5 minutes
    python benchmarks/switches.py --quick

The step is that of benchmarks/training.py in the first stage. By default torch's SDPA chooses how attention is
fused, the optimizer is `adamw_torch`, a CPU computes in fp32 and a GPU in bf16, and nothing is compiled. The
first compiled step, which compiles, is left out of the ratio; its seconds are given apart. Every row also says
by how much the first loss differs: no switch may win by computing something else.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit
from measure import Options, Row, benchmark, in_turns, milliseconds, ratio, synchronize
from shapes import settings_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from training import Size, Step, size_for, tokens_of

FASTER = 0.97  # what is nearer to 1 is noise


@dataclass(frozen=True)
class Switch:
    """One change.

    Attributes:
        settings: of the base model.
        optimizer: makes one from the trained parameters.
        around: what a step runs in.
        compiled: by torch.compile.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    compiled: bool = False


def switches(device: torch.device) -> Iterator[tuple[str, Switch]]:
    """Those that apply on the device, by name."""
    gpu = device.type == "cuda"
    yield "eager attention", Switch({"attn_implementation": "eager"})
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION] if gpu else []
    for backend in backends:
        yield f"SDPA by {backend.name}", Switch(around=partial(sdpa_kernel, backend))
    if gpu and importlib.util.find_spec("flash_attn"):
        yield "flash-attn", Switch({"attn_implementation": "flash_attention_2"})
    yield "AdamW fused", Switch(optimizer=partial(AdamW, fused=True))
    yield "AdamW foreach", Switch(optimizer=partial(AdamW, foreach=True))
    yield "AdamW of 8 bits, paged", Switch(optimizer=PagedAdamW8bit)
    other = "float32" if gpu else "bfloat16"
    yield f"compute in {other}", Switch({"compute_dtype": other})
    yield "torch.compile", Switch(compiled=True)


class Switched:
    """The step under a switch."""

    def __init__(self, size: Size, device: torch.device, switch: Switch) -> None:
        settings = replace(settings_for(device), **switch.settings)
        self.step = Step(size, device, settings=settings, optimizer=switch.optimizer)
        self.around = switch.around
        if switch.compiled:
            self.step.model.compile()
        started = time.perf_counter()
        self.first_loss = float(self())
        synchronize(device)
        self.first_seconds = time.perf_counter() - started

    def __call__(self) -> torch.Tensor:
        """One step."""
        with self.around():
            return self.step()


def rows(options: Options) -> list[Row]:
    """A row per switch; a switch that this machine or these versions refuse has its reason in its row."""
    torch.manual_seed(0)
    size = size_for(options)
    default = Switched(size, options.device, Switch())
    found = []
    for name, switch in switches(options.device):
        what = f"a training step, {name}, {tokens_of(size)}"
        try:
            switched = Switched(size, options.device, switch)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = " ".join(str(error).split()[:30])
            found.append(Row(5, what, "", "", f"refused: {reason}"))
            continue
        seconds = in_turns({name: switched, "default": default}, options.repeats, options.device)
        quotient = ratio(seconds[name], seconds["default"])
        compiling = f", the first {switched.first_seconds:.0f} s" if switch.compiled else ""
        found.append(
            Row(
                number=5,
                what=what,
                ours=f"{milliseconds(seconds[name])}{compiling}",
                beside=f"{milliseconds(seconds['default'])}, the default",
                result=f"{quotient} x the time, first loss off by "
                f"{abs(switched.first_loss / default.first_loss - 1):.0e} of it; "
                + ("wins" if quotient.median <= FASTER else "does not win"),
            )
        )
    return found


if __name__ == "__main__":
    benchmark(__doc__, rows)
