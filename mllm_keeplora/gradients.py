"""Task gradients of 4-bit layers, sketched by an ordinary LoRA adapter (E2).

A LoRA adapter with A = 0 and B = Omega leaves the model's function as it is, and back-propagation through it
gives

    dL/dA |_{A=0} = s Omega^T G,        G = dL/dW  [out, in]

which is the input-side randomised range sketch that E3, E4 and E8 need. No hook, no full-size gradient, no
dequantised copy; it works through 4-bit layers, gradient checkpointing and accumulation.

In a run of several processes each back-propagates its own batches and the sums are added up: sums of
gradients and counts of tokens, never means. The model carries no DDP wrapper here: processes may have
different numbers of batches, or none, and batches that leave a tower out.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from mllm_keeplora.adapters import PROBE, Factors, activate, attach, factor_parameters, without_dropout
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.processes import sum_of_all
from mllm_keeplora.targets import Target

Batches = Callable[[], Iterable[Mapping[str, Any]]]


class GradientError(KeepLoRAError, RuntimeError):
    """A probe pass that cannot give a usable gradient."""


def module_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, module name) and nothing else, so order does not matter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def gaussian_probe(target: Target, columns: int, seed: int) -> Tensor:
    """Omega [out, q] fp32, standard normal."""
    return torch.randn(target.out_features, columns, generator=module_generator(seed, target.name))


def sketch_gradients(
    model: nn.Module,
    targets: Sequence[Target],
    columns: Mapping[str, int],
    batches: Batches,
    seed: int,
    keep: Sequence[str] = (),
) -> dict[str, Tensor]:
    """One probe pass: Y = Omega^T G of every target at the current model.

    Side effects: a `probe` adapter is attached during the pass and removed; the training flag and
    requires_grad flags are restored to eval and frozen. Cost: one forward and one backward per batch.

    Args:
        model: base model, or a PeftModel whose `keep` adapters belong to the current model.
        targets: the layers to measure.
        columns: q per module name.
        batches: returns an iterable of model inputs with labels, on the model's device: this process's share.
        seed: of Omega.
        keep: adapters that stay active beside the probe.

    Returns:
        Module name -> Y [q, in], fp32 on the CPU, the same on all processes. G is the sum over all supervised
        tokens of all processes of their loss gradients divided by their number, whatever the batching.

    Raises:
        GradientError: no supervised token, a NaN, or a module that received no gradient.
    """
    factors = {
        t.name: (torch.zeros(columns[t.name], t.in_features), gaussian_probe(t, columns[t.name], seed))
        for t in targets
    }
    return _probe_pass(model, factors, "A", batches, keep)


def back_project_gradients(
    model: nn.Module,
    directions: Mapping[str, Tensor],
    out_features: Mapping[str, int],
    batches: Batches,
    keep: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The refinement pass: G Q of every target, from an adapter with A = Q^T and B = 0 (dL/dB = s G Q).

    Args:
        model, batches, keep: as for `sketch_gradients`.
        directions: module name -> Q^T [q, in], orthonormal rows.
        out_features: module name -> out.

    Returns:
        Module name -> G Q [out, q], fp32 on the CPU.

    Raises:
        GradientError: as for `sketch_gradients`.
    """
    factors = {
        name: (rows, torch.zeros(out_features[name], rows.shape[0])) for name, rows in directions.items()
    }
    return _probe_pass(model, factors, "B", batches, keep)


def _probe_pass(
    model: nn.Module, factors: Factors, measure: str, batches: Batches, keep: Sequence[str]
) -> dict[str, Tensor]:
    peft_model = attach(model, PROBE, factors, dict.fromkeys(factors, 1.0))
    try:
        activate(peft_model, [*keep, PROBE], PROBE, "A" if measure == "A" else "B")
        peft_model.train()  # transformers checkpoints activations in train() only
        with without_dropout(peft_model):
            tokens = _accumulate(peft_model, batches())
        return _mean_gradients(peft_model, list(factors), measure, tokens)
    finally:
        peft_model.eval()
        peft_model.delete_adapter(PROBE)
        if keep:
            activate(peft_model, keep)
        else:
            peft_model.unload()


def _accumulate(model: PeftModel, batches: Iterable[Mapping[str, Any]]) -> int:
    """Back-propagates the summed token losses of the batches; returns the number of supervised tokens."""
    tokens = 0
    for batch in batches:
        # A divisor of 1 makes transformers' own loss the sum over tokens: means of batches would weigh short
        # batches more.
        loss = model(**batch, num_items_in_batch=1).loss
        if not torch.isfinite(loss):
            raise GradientError(
                f"the loss of a probe batch is {loss.item()}: check the data and the learning rate "
                "of the last stage"
            )
        loss.backward()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return tokens


def _mean_gradients(model: PeftModel, names: Sequence[str], measure: str, tokens: int) -> dict[str, Tensor]:
    """Gradients and tokens summed over all processes, divided. Every process takes part in every sum."""
    parameters = [factor_parameters(model, PROBE, name)[0 if measure == "A" else 1] for name in names]
    counts = torch.tensor([tokens, *(p.grad is not None for p in parameters)], device=parameters[0].device)
    total, *reached = sum_of_all(counts).tolist()
    if total == 0:
        raise GradientError("the probe sample has no supervised token: every label is masked")
    gradients = {}
    for name, parameter, processes in zip(names, parameters, reached, strict=True):
        if processes == 0:
            raise GradientError(
                f"{name} received no gradient: no sample of the probe passes through it. Raise "
                "probe.fraction or probe.max_samples until some do (images or clips among text), or leave "
                "the module out of the tower's targets"
            )
        gradient = sum_of_all(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if not torch.isfinite(gradient).all():
            raise GradientError(f"{name}: the probe gradient has NaN or infinite entries")
        gradients[name] = gradient.detach().float().cpu() / total
    return gradients
