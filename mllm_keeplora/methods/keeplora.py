"""KeepLoRA++ (arXiv 2606.16256): learn in the residual subspace, small steps in shallow layers.

gamma 1 in both towers is KeepLoRA (arXiv 2601.19659).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mllm_keeplora.config import RunConfig
from mllm_keeplora.linalg.layer_scaling import layer_scales
from mllm_keeplora.methods.base import Features, extended_features
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.gradient_lora import GradientLora
from mllm_keeplora.modeling.adapters import Model
from mllm_keeplora.modeling.targets import Target


@dataclass(frozen=True)
class KeepLora(GradientLora):
    """A frozen in the residual subspace of weights and past features, B trained (E1-E9).

    Args:
        features_from: what the feature bases of past tasks are read from (E8): `gradients` at the new model,
            as in the published MLLM code, or input `activations`, as in the paper: then eps_f is a share of
            the inputs' energy.
    """

    projects: ClassVar[bool] = True
    protects_weights: ClassVar[bool] = True
    protects_features: ClassVar[bool] = True
    gradient_passes: ClassVar[int] = 2

    features_from: Literal["gradients", "activations"] = "gradients"

    def layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l rises from gamma to 1 within the tower (E5)."""
        return layer_scales(target.num_layers, config.towers()[target.tower].gamma)[target.depth]

    def features(self, stage: StageContext, model: Model) -> Features:
        """Directions of the task at the new model that M does not hold yet (E8)."""
        measure = stage.sketch if self.features_from == "gradients" else stage.sketch_inputs
        return extended_features(stage, measure(model, 1))
