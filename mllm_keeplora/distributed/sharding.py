"""The frozen base spread over the processes (FSDP2), for bases that leave a GPU no room for its work.

Only the language model's layers are spread. They hold most of a base, and every process runs them in every forward. The
vision tower stays whole, since batches of text alone leave it out. In training and probes a layer is gathered when it
runs and freed afterwards, so processes must run the layers equally often; hence the filler batches of probes. Where
replies are generated, each token would gather all layers again: `gathered` keeps them whole meanwhile.

The LoRA factors stay whole on every process, and DDP adds their gradients up. So stages, files and results are those of
DDP. Each process still loads the whole 4-bit base before it gives its share away.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mllm_keeplora.distributed.processes import SHARD_FLAG, gather, num_processes

T = TypeVar("T")


def sharding_asked() -> bool:
    """Whether the launcher asked for FSDP and there is a process to share with."""
    return os.environ.get(SHARD_FLAG, "false").lower() in ("true", "1") and num_processes() > 1


def shard_base(model: Any) -> None:
    """Spreads the language layers of a loaded base, frozen and without adapters, over all processes."""
    mesh = init_device_mesh(model.device.type, (num_processes(),))
    for layer in model.get_decoder().layers:
        quantised = {n: p for n, p in layer.named_parameters() if isinstance(p, Params4bit)}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for name, parameter in quantised.items():  # PEFT reads them when it wraps a 4-bit layer
            for fact in ("compress_statistics", "quant_type"):
                setattr(layer.get_parameter(name), fact, getattr(parameter, fact))


def is_sharded(model: nn.Module) -> bool:
    """Whether processes must run the model's layers together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keeps the layers of a sharded model whole on every process, which then runs them as often as it likes.

    All processes enter together; each leaves when it is done. It costs one gathering of every layer, and memory for the
    whole base.
    """
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def fillers(model: nn.Module, batches: Sequence[T], filler: T) -> list[T]:
    """As many `filler` as a process needs beside its `batches` to run a sharded model as often as others.

    To be called before the first of them runs: the processes tell each other their numbers here.
    """
    return [filler] * (max(gather(len(batches))) - len(batches)) if is_sharded(model) else []
