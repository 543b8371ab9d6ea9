"""O-LoRA (arXiv 2310.14152): a penalty that keeps a task's A away from the A of past tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.hooks import Hooks
from mllm_keeplora.modeling.adapters import STAGE, factor_parameters
from mllm_keeplora.settings import Range


@dataclass(frozen=True)
class OLora(Method):
    """Loss + strength * sum_{i<t} ||A_i A_t^T||_F^2, summed over the modules (its eq. 7-8).

    Its published code sums absolute values in place of squares.

    Args:
        strength: lambda_1, at least 0; 0.5 in the paper.
    """

    strength: Annotated[float, Range(0, 1_000_000_000)] = 0.5

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """The penalty at each step; none in the first stage."""
        past = {n: a.to(stage.run.device) for n, (a, _) in stage.accumulated.items()}
        reached = {t.name: past[t.name] for t in stage.targets if t.name in past}
        return Hooks(penalty=lambda _: self.strength * overlap(model, reached)) if reached else Hooks()


def overlap(model: PeftModel, past: Mapping[str, Tensor]) -> Tensor:
    """sum ||A_past A^T||_F^2 over the modules, A the stage adapter's; differentiable scalar."""
    products = (rows @ factor_parameters(model, STAGE, name)[0].T for name, rows in past.items())
    return torch.stack([product.square().sum() for product in products]).sum()
