"""Task gradients of 4-bit layers, sketched as the backward pass goes by (E2).

What is needed of a layer's gradient G = dL/dW = sum_tokens dy x^T [out, in] is a product with a thin matrix:

    Omega^T G = (dY Omega)^T X     [q, in]     the input-side randomised range sketch that E3, E4 and E8 need
    G Q       = dY^T (X Q)         [out, q]    the refining pass

An identity behind each layer keeps X and, when dY comes back, makes that product. It is the gradient that a
LoRA adapter with A = 0 and B = Omega (or A = Q^T and B = 0) would get, without the adapter's other products.
No full-size gradient, no dequantised copy; it works through 4-bit layers, gradient checkpointing and
accumulation.

In a run of several processes each back-propagates its own batches and the sums are added up: sums of
gradients and counts of tokens, never means. The model carries no DDP wrapper here: processes may have
different numbers of batches, or none, and batches that leave a tower out.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm_keeplora.distributed.processes import sum_of_all
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.modeling.adapters import without_dropout
from mllm_keeplora.modeling.loss import summed_token_loss, supervised_positions
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.hooks import hooked

CPU = torch.device("cpu")
Batches = Callable[[], Iterable[Mapping[str, Any]]]


class GradientError(KeepLoRAError, RuntimeError):
    """A probe pass that cannot give a usable gradient."""


def module_generator(seed: int, name: str, device: torch.device = CPU) -> torch.Generator:
    """A generator on a device that depends on (seed, module name) and nothing else, so order does not matter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def gaussian_probe(target: Target, columns: int, seed: int, device: torch.device = CPU) -> Tensor:
    """Omega [out, q] fp32, standard normal, drawn where it is used; kinds of devices draw different numbers."""
    generator = module_generator(seed, target.name, device)
    return torch.randn(target.out_features, columns, generator=generator, device=device)


def sketch_gradients(
    model: nn.Module, targets: Sequence[Target], columns: Mapping[str, int], batches: Batches, seed: int
) -> dict[str, Tensor]:
    """One probe pass: Y = Omega^T G of every target at the current model.

    Side effects: the training flag is left at eval. Cost: one forward and one backward per batch.

    Args:
        model: frozen; a base model, or a PeftModel whose active adapters belong to the current model.
        targets: the layers to measure.
        columns: q per module name.
        batches: returns an iterable of model inputs with labels, on the model's device: this process's share.
        seed: of Omega.

    Returns:
        Module name -> Y [q, in], fp32 on the CPU, the same on all processes. G is the sum over all supervised
        tokens of all processes of their loss gradients divided by their number, whatever the batching.

    Raises:
        GradientError: no supervised token, a NaN, or a module that received no gradient.
    """
    device = next(model.parameters()).device
    sketches = {}
    for t in targets:
        omega = gaussian_probe(t, columns[t.name], seed, device)
        sketches[t.name] = _ThinGradient(device, columns[t.name], t.in_features, left=omega)
    return _probe_pass(model, sketches, batches)


def back_project_gradients(
    model: nn.Module, directions: Mapping[str, Tensor], out_features: Mapping[str, int], batches: Batches
) -> dict[str, Tensor]:
    """The refining pass: G Q of every target.

    Args:
        model: as for `sketch_gradients`.
        directions: module name -> Q^T [q, in], orthonormal rows.
        out_features: module name -> out.
        batches: as for `sketch_gradients`.

    Returns:
        Module name -> G Q [out, q], fp32 on the CPU.

    Raises:
        GradientError: as for `sketch_gradients`.
    """
    device = next(model.parameters()).device
    images = {
        name: _ThinGradient(device, out_features[name], len(rows), right=rows.T) for name, rows in directions.items()
    }
    return _probe_pass(model, images, batches)


class _ThinGradient:
    """Where a layer's Omega^T G or G Q adds up.

    Attributes:
        sum: [rows, columns] leaf without a storage of its own; its `.grad` is the sum, fp32, None before any
            token of a batch has come through the layer.
        left: Omega [out, q] or None.
        right: Q [in, q] or None.
    """

    def __init__(
        self,
        device: torch.device,
        rows: int,
        columns: int,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        self.sum = torch.zeros((), device=device).expand(rows, columns).requires_grad_()
        self.left = None if left is None else left.to(device, torch.float32)
        self.right = None if right is None else right.to(device, torch.float32)

    def watch(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: the layer's output as it is."""
        watched: Tensor = _Watch.apply(output, inputs[0], self.sum, self.left, self.right)
        return watched


class _Watch(torch.autograd.Function):
    """y -> y; the gradient for `sum` is (dY left)^T (X right), a missing factor being the identity."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, _sum: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """y [.., out], x [.., in], both of the compute dtype."""
        ctx.save_for_backward(x if right is None else x.float() @ right, left)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dY [.., out], products in fp32."""
        x, left = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2).float()
        thin = dy if left is None else dy @ left
        return gradients[0], None, thin.T @ x.flatten(0, -2).float(), None, None


def _probe_pass(model: nn.Module, sums: Mapping[str, _ThinGradient], batches: Batches) -> dict[str, Tensor]:
    exact_products(next(model.parameters()).device)  # in this pass, and in the decompositions of what it finds
    model.train()  # transformers checkpoints activations in train() only
    try:
        watchers = {name: thin.watch for name, thin in sums.items()}
        with without_dropout(model), hooked(model, watchers, "after"):
            tokens = _accumulate(model, batches())
    finally:
        model.eval()
    return _mean_gradients({name: gradient.sum for name, gradient in sums.items()}, tokens)


def _accumulate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """Back-propagates the summed token losses of the batches; returns the number of supervised tokens.

    The host waits for the device once, at the end.
    """
    device = next(model.parameters()).device
    tokens, losses = torch.zeros((), dtype=torch.long, device=device), torch.zeros((), device=device)
    for batch in batches:
        loss = summed_token_loss(model, batch)
        loss.backward()
        losses += loss.detach()
        tokens += supervised_positions(batch["labels"]).sum()
    if not torch.isfinite(losses):
        raise GradientError(
            f"the loss of the probe batches is {losses.item()}: check the data and the learning rate of the last stage"
        )
    return int(tokens)


def _mean_gradients(sums: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Gradients and tokens summed over all processes, divided. Every process takes part in every sum."""
    device = next(iter(sums.values())).device
    counts = torch.tensor([tokens, *(s.grad is not None for s in sums.values())], device=device)
    total, *reached = sum_of_all(counts).tolist()
    if total == 0:
        raise GradientError("the probe sample has no supervised token: every label is masked")
    gradients = {}
    for (name, own), processes in zip(sums.items(), reached, strict=True):
        if processes == 0:
            raise GradientError(
                f"{name} received no gradient: no sample of the probe passes through it. Raise "
                "probe.fraction or probe.max_samples until some do (images or clips among text), or leave "
                "the module out of the tower's targets"
            )
        gradient = sum_of_all(own.new_zeros(own.shape) if own.grad is None else own.grad)
        if not torch.isfinite(gradient).all():
            raise GradientError(f"{name}: the probe gradient has NaN or infinite entries")
        gradients[name] = gradient.cpu() / total
    return gradients
