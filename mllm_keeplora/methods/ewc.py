"""Elastic weight consolidation (arXiv 1612.00796) on the parameters of one LoRA adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.distributed.processes import sum_of_all
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.hooks import Hooks
from mllm_keeplora.methods.lora_throughout import LoraThroughout
from mllm_keeplora.modeling.adapters import (
    ACCUMULATED,
    STAGE,
    Model,
    activate,
    factor_parameters,
    without_dropout,
)
from mllm_keeplora.modeling.loss import summed_token_loss, supervised_positions
from mllm_keeplora.settings import Range


@dataclass(frozen=True)
class Ewc(LoraThroughout):
    """One adapter trained on throughout; loss + strength / 2 * sum_i F_i (theta_i - theta*_i)^2 (its eq. 3).

    theta are the entries of A and B, theta* their values after the last task, F the sum over past tasks of
    the Fisher information's diagonal, each measured where its task ended: the one-anchor form of Huszar
    (arXiv 1712.03847). F is the empirical one, from the true answers: the squared gradient of a sample's
    summed token losses, averaged over the probe sample. The base has no parameter that moves, so what it knew
    is not protected: there is no F of its pre-training data.

    Args:
        strength: lambda, at least 0.
    """

    gradient_passes: ClassVar[int] = 1
    gradients_of: ClassVar[Literal["weights", "factors"]] = "factors"

    strength: Annotated[float, Range(0, 1_000_000_000)] = 100.0

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """The penalty at each step; none before there is a past of what the stage trains."""
        device, rehearsals = stage.run.device, stage.rehearsals()
        parameters = _named_factors(model, STAGE, stage)
        known = rehearsals[-1] if rehearsals else {}
        fisher = {name: value.to(device) for name, value in known.items() if name in parameters}
        if not fisher:
            return Hooks()
        anchor = {name: parameters[name].detach().clone() for name in fisher}
        return Hooks(penalty=lambda _: self.strength / 2 * weighted_distance(parameters, anchor, fisher))

    def rehearsal(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """F of all tasks so far, for each factor as training sees it."""
        own = fisher_diagonal(stage, cast(PeftModel, model))
        for t in stage.targets:  # the accumulated B is s times the trained one: dL/dB = s dL/d(sB)
            own[f"{t.name}.B"] *= stage.scales[t.name] ** 2
        earlier = stage.rehearsals()
        past = earlier[-1] if earlier else {}
        return {name: value + past.get(name, 0.0) for name, value in own.items()} | {
            name: value for name, value in past.items() if name not in own
        }


def _named_factors(model: PeftModel, adapter: str, stage: StageContext) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for t in stage.targets:
        named[f"{t.name}.A"], named[f"{t.name}.B"] = factor_parameters(model, adapter, t.name)
    return named


def weighted_distance(
    parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    """sum F (theta - theta*)^2 over all factors that have an F, at least one; differentiable scalar."""
    return torch.stack([(f * (parameters[n] - anchor[n]).square()).sum() for n, f in fisher.items()]).sum()


def fisher_diagonal(stage: StageContext, model: PeftModel) -> dict[str, Tensor]:
    """Mean over the probe sample of the squared gradient of a sample's summed token losses.

    Returns:
        `<module>.A` [r, in] and `<module>.B` [out, r] of the accumulated adapter -> fp32 on the CPU, the same
        on all processes. The model is left in eval() with everything frozen.
    """
    activate(model, [ACCUMULATED], ACCUMULATED, "both")
    parameters = _named_factors(model, ACCUMULATED, stage)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    samples = 0
    model.train()
    with without_dropout(model):
        for batch in stage.probe_batches(batch_size=1):
            model.zero_grad()
            summed_token_loss(model, batch).backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.square()
            samples += int(supervised_positions(batch["labels"]).any())
    model.zero_grad()
    model.eval()
    activate(model, [ACCUMULATED])
    total = int(sum_of_all(torch.tensor(samples, device=stage.run.device)))
    return {name: (sum_of_all(value) / total).cpu() for name, value in sums.items()}
