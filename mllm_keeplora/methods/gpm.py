"""Gradient projection memory (GPM, arXiv 2103.09762) on a LoRA update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.linalg.subspace import project_to_residual
from mllm_keeplora.methods.base import Features, Method, extended_features
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.hooks import Hooks
from mllm_keeplora.modeling.adapters import STAGE, Model, factor_parameters
from mllm_keeplora.modeling.targets import Target


@dataclass(frozen=True)
class Gpm(Method):
    """Sequential LoRA whose A is projected, A <- A (I - M M^T), at first and after every step (its eq. 7).

    M holds the input directions of past tasks; the pre-trained weight is not protected. GPM projects each
    step's gradient. AdamW scales entries one by one, which would turn a projected gradient back out of the
    subspace, so the factor itself is projected: dW M = 0 either way. All of M lies on the device in training.
    """

    projects: ClassVar[bool] = True
    protects_features: ClassVar[bool] = True
    input_passes: ClassVar[int] = 1

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """PEFT's default, projected; of no more rows than there are directions left (E9)."""
        start, bases = super().initial_a(stage, model), stage.bases

        def rows(t: Target) -> Tensor:
            basis = bases.load(t).cpu()
            return project_to_residual(start[t.name][: t.in_features - basis.shape[1]], basis)

        return {t.name: rows(t) for t in stage.targets}

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """Projects every A after each step; a module that has no direction left has none."""
        loaded = {t.name: stage.bases.load(t) for t in stage.targets}
        bases = {name: basis for name, basis in loaded.items() if basis.shape[1] < len(basis)}
        return Hooks(after_step=lambda: project_factors(model, bases))

    def features(self, stage: StageContext, model: Model) -> Features:
        """Input directions of the task at the model that has learnt it."""
        return extended_features(stage, stage.sketch_inputs(model, 1))


@torch.no_grad()
def project_factors(model: PeftModel, bases: Mapping[str, Tensor]) -> None:
    """A <- A (I - M M^T) in place, for every module's stage adapter."""
    for name, basis in bases.items():
        if basis.shape[1] > 0:
            a, _ = factor_parameters(model, STAGE, name)
            a.copy_(project_to_residual(a, basis))
