"""Linear layers as the model computes with them: plain or 4-bit."""

import gc
from typing import Any, TypeGuard

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is a plain or bitsandbytes 4-bit linear layer (both subclass nn.Linear)."""
    return isinstance(module, nn.Linear)


@torch.no_grad()
def computed_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight the layer multiplies by, [out, in]; dequantised for a 4-bit layer, which is left as it is.

    Raises:
        TypeError: not a linear layer, or a 4-bit one whose weight has not been quantised yet.
    """
    if not is_linear(module):
        raise TypeError(f"expected a linear layer, got {type(module).__name__}")
    weight: Any = module.weight
    if not isinstance(weight, Params4bit):
        return weight.detach().to(dtype)
    if weight.quant_state is None:
        raise TypeError("4-bit layer without a quant_state: move the model to its device before reading its weights")
    dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.reshape(module.out_features, module.in_features).to(dtype)


def free_4bit_weights() -> None:
    """Frees the memory of 4-bit models that are no longer referred to.

    A `Linear4bit` and its weight refer to each other, so they stay until the garbage collector runs.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA was never used


def guard_linear4bit(model: torch.nn.Module) -> int:
    """Keeps bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    Without it the first inference-mode forward rewrites the packed weight; every later gradient through that
    layer is missing or wrong and `dequantize_4bit` returns garbage. Call right after loading, before any
    forward.

    Args:
        model: a loaded model; modified in place.

    Returns:
        The number of `Linear4bit` modules guarded (0 for a model that is not quantised).
    """
    from bitsandbytes.nn.modules import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
