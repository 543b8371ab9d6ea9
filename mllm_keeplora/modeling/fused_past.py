"""The past inside the base's product while a stage trains: y = x (W + B A)^T in place of x W^T + (x A^T) B^T.

The accumulated adapter (E7) grows by r columns a stage, and beside the base it costs 2 R (in + out)
multiplications a token in either direction, R the sum of the ranks: for a square layer as much as the base's
own product at R = in / 2. Both factors are frozen in training, so the sum W + B A can be made first: R in out
multiplications, however many tokens follow. It is made anew in every forward and backward from the 4-bit
weight; nothing dense is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear

from mllm_keeplora.distributed.sharding import is_sharded
from mllm_keeplora.modeling.adapters import factor_parameters
from mllm_keeplora.modeling.linear4bit import computed_weight


class _SummedLinear(torch.autograd.Function):
    """x (W + B A)^T + bias; the gradient goes to x alone, and x is not kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor) -> Tensor:
        """x [.., in] fp32, a [R, in] fp32, b [out, R] fp32."""
        ctx.layer, ctx.a, ctx.b = layer, a, b
        return linear(x, torch.addmm(computed_weight(layer), b, a), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """dL/dx [.., in] from dL/dy [.., out]."""
        return gradients[0] @ torch.addmm(computed_weight(ctx.layer), ctx.b, ctx.a), None, None, None


@contextmanager
def past_in_base(model: PeftModel, past: Sequence[str]) -> Iterator[list[str]]:
    """Inside the block the base's layers compute with the past, where that is exact and cheaper.

    It is exact in fp32, up to the order of summation. Where the base computes in 16 bits, W + B A would lose
    the small update to rounding that an fp32 adapter keeps. A sharded base has no whole weight to add to.

    Args:
        model: with the adapters loaded; its layers' `forward` is replaced during the block.
        past: names of frozen adapters of scale 1 whose function the base takes over; at most one.

    Yields:
        The adapters that still have to be active beside the base: none, or `past` as it is.

    Raises:
        ValueError: more than one adapter.
    """
    if len(past) > 1:
        raise ValueError(f"the base takes in one adapter, got {', '.join(past)}")
    layers = _adapted_layers(model, past[0]) if past else {}
    if is_sharded(model) or not all(_computes_in_fp32(layer) for layer in layers.values()):
        yield list(past)
        return
    for name, layer in layers.items():
        a, b = factor_parameters(model, past[0], name)
        layer.forward = _with_past(layer, a.detach(), b.detach())  # type: ignore[assignment, method-assign]
    try:
        yield []
    finally:
        for layer in layers.values():
            del layer.forward


def _adapted_layers(model: PeftModel, adapter: str) -> dict[str, nn.Linear]:
    """Module name -> the base layer under its adapter."""
    modules = model.get_base_model().named_modules()
    return {name: m.base_layer for name, m in modules if adapter in getattr(m, "lora_A", {})}


def _computes_in_fp32(layer: Any) -> bool:
    return (getattr(layer, "compute_dtype", None) or layer.weight.dtype) == torch.float32


def _with_past(layer: nn.Linear, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer's forward with the past, summed first where there are tokens enough to make that cheaper."""
    own, (out_features, in_features) = layer.forward, (layer.out_features, layer.in_features)
    break_even = in_features * out_features / (in_features + out_features)

    def forward(x: Tensor) -> Tensor:
        """x [.., in] fp32 -> [.., out]."""
        if x.numel() / in_features > break_even:
            return _SummedLinear.apply(x, layer, a, b)
        return own(x) + linear(linear(x, a), b)

    return forward
