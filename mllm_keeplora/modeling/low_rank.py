"""A layer and its adapters as one function while a stage trains: y = W x + B (A x), past and stage in one A and B.

PEFT computes every adapter by itself, in fp32: cast x, two products, scale, cast, add. Here x is cast once, the
factors lie behind one another with their scales in B, and the sum goes into the base's own result. Only `A x` is
computed in fp32: there an input that A must not answer (dW M = 0) gets its zero. The product with B is in the
base's compute dtype and accumulates in fp32. Nothing is kept for the backward pass but what the gradient of the
stage's own factors needs.

Where the base computes in fp32 and there are tokens enough, W + B A is summed for the past first: R in out
multiplications in place of R (in + out) a token, R the past's rank. It is made anew in every forward and backward
from the 4-bit weight; nothing dense is kept. In 16 bits the sum would lose the small update to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from mllm_keeplora.modeling.linear4bit import computed_weight


class Joined(NamedTuple):
    """A layer with its adapters' factors behind one another, the frozen ones first.

    Attributes:
        layer: the base layer.
        a: [R, in] fp32.
        b: [out, R] in the base's compute dtype, each adapter's scale in its columns.
        own_rank: rows of `a` that train, the last ones, or whose columns of `b` do.
        scale: of the adapter that trains.
    """

    layer: nn.Linear
    a: Tensor
    b: Tensor
    own_rank: int = 0
    scale: float = 1.0

    def weight(self, inside: bool) -> Tensor:
        """[out, in] in the compute dtype, the frozen adapters' update in it if asked."""
        weight = computed_weight(self.layer, self.b.dtype)
        if inside:
            frozen = len(self.a) - self.own_rank
            return torch.addmm(weight, self.b[:, :frozen], self.a[:frozen])
        return weight

    def beside(self, inside: bool) -> tuple[Tensor, Tensor]:
        """A and B of what the weight does not hold."""
        frozen = len(self.a) - self.own_rank if inside else 0
        return self.a[frozen:], self.b[:, frozen:]


class _AdaptedLinear(torch.autograd.Function):
    """W x + bias + B A x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own_a: Tensor | None, own_b: Tensor | None, joined: Joined) -> Tensor:
        """x [.., in] in the compute dtype -> [.., out]; own_a [r, in] and own_b [out, r] train, one of them or both."""
        rows, r = x.detach().reshape(-1, x.shape[-1]), joined.own_rank
        if own_a is not None and own_b is not None:  # the optimizer has moved them since
            torch.mul(own_b, joined.scale, out=joined.b[:, -r:])
            if own_a.requires_grad:
                joined.a[-r:].copy_(own_a)
        ctx.inside = _sum_is_cheaper(joined, len(rows))
        a, b = joined.beside(ctx.inside)
        y = linear(rows, joined.weight(True), joined.layer.bias) if ctx.inside else joined.layer(rows)
        if len(a):
            u = linear(rows.float(), a).to(b.dtype)
            y.addmm_(u, b.T)
        _, a_trains, b_trains, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if a_trains else None, u[:, -r:].contiguous() if b_trains else None)
        ctx.joined, ctx.shape = joined, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx in its dtype, and dL/d own_a, dL/d own_b in fp32."""
        (x, u), joined, r = ctx.saved_tensors, ctx.joined, ctx.joined.own_rank
        x_wanted, a_trains, b_trains, _ = ctx.needs_input_grad
        a, b = joined.beside(ctx.inside)
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        du: Any = dy @ b if x_wanted or a_trains else None
        dx = (dy @ joined.weight(ctx.inside)).addmm_(du, a.to(dy.dtype)).view(ctx.shape) if x_wanted else None
        d_own_a = (du[:, -r:].T @ x).float() if a_trains else None
        d_own_b = (dy.T @ u).float().mul_(joined.scale) if b_trains else None
        return dx, d_own_a, d_own_b, None


def _sum_is_cheaper(joined: Joined, tokens: int) -> bool:
    out_features, in_features = joined.layer.out_features, joined.layer.in_features
    frozen = len(joined.a) - joined.own_rank
    return bool(
        frozen
        and joined.b.dtype == torch.float32
        and tokens * (in_features + out_features) > in_features * out_features
    )


@contextmanager
def one_low_rank_path(model: PeftModel) -> Iterator[None]:
    """Inside the block every layer computes its active adapters as one.

    The function is that of PEFT's own path: in fp32 up to the order of summation, in 16 bits up to the rounding of B
    and of its product. What is active and what trains must stay as it is during the block; values may change.

    Args:
        model: with its adapters active, at most one of them with trainable factors; its layers' `forward` and the
            frozen factors' storage are replaced during the block.

    Raises:
        ValueError: two adapters train.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept: dict[nn.Parameter, Tensor] = {}
    try:
        for layer in layers:
            if names := _active(layer):
                layer.forward = _forward(layer, names[-1], *_join(layer, names, kept))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        for parameter, values in kept.items():
            parameter.data = values.to(parameter.device)


def _active(layer: Any) -> list[str]:
    """The layer's adapters, the one that trains last."""

    def trains(name: str) -> bool:
        return bool(layer.lora_A[name].weight.requires_grad or layer.lora_B[name].weight.requires_grad)

    names = sorted((name for name in layer.active_adapters if name in layer.lora_A), key=trains)
    if any(trains(name) for name in names[:-1]):
        raise ValueError(f"one adapter can train, got {', '.join(names)}")
    return names


def _join(
    layer: Any, names: Sequence[str], kept: dict[nn.Parameter, Tensor]
) -> tuple[Joined, Tensor | None, Tensor | None]:
    """Joins a layer's adapters; beside them the parameters that train.

    The frozen ones' parameters become views, so that they are on the device once; `kept` takes what they were, on the
    CPU.
    """
    base = layer.base_layer
    factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    a = torch.cat([a.detach() for a, _, _ in factors])
    b = torch.cat([scale * b.detach() for _, b, scale in factors], dim=1).to(_compute_dtype(base))
    ranks = [len(a) for a, _, _ in factors]
    for (own_a, own_b, scale), rows, columns in zip(factors, a.split(ranks), b.split(ranks, dim=1), strict=True):
        if own_a.requires_grad or own_b.requires_grad:
            return Joined(base, a, b, len(own_a), scale), own_a, own_b
        kept |= {own_a: own_a.data.cpu(), own_b: own_b.data.cpu()}
        own_a.data, own_b.data = rows, columns
    return Joined(base, a, b), None, None


def _compute_dtype(layer: Any) -> torch.dtype:
    return getattr(layer, "compute_dtype", None) or layer.weight.dtype


def _forward(
    layer: Any, last: str, joined: Joined, own_a: Tensor | None, own_b: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The layer's forward with its adapters as one; dropout, which only the stage's has, takes that one out again."""
    frozen = len(joined.a) - joined.own_rank
    past = joined._replace(a=joined.a[:frozen], b=joined.b[:, :frozen], own_rank=0)

    def forward(x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        if layer.disable_adapters:
            return layer.base_layer(x)
        dropout = layer.lora_dropout[last]
        if not layer.training or getattr(dropout, "p", 0.0) == 0.0:
            return _AdaptedLinear.apply(x, own_a, own_b, joined)
        u = layer.lora_A[last](dropout(x.float()))
        return _AdaptedLinear.apply(x, None, None, past) + (layer.lora_B[last](u) * joined.scale).to(x.dtype)

    return forward
