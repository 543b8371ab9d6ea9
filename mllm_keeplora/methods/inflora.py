"""InfLoRA (arXiv 2404.00228): learn where the new task's inputs lie and those of past tasks do not."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.methods.base import Features, Method, extended_features, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model, Trainable


@dataclass(frozen=True)
class InfLora(Method):
    """A_t = the leading right singular vectors of X_t (I - M M^T), frozen; B trained (its eq. 9-11).

    X_t are the inputs of the new task, M the input directions of past tasks by GPM's rule. Its DualGPM keeps
    either M or its complement, whichever is smaller: that saves memory and changes no result. Here M is kept.
    eps_f is one value for all stages, where InfLoRA raises it slowly.
    """

    trains: ClassVar[Trainable] = "B"
    input_passes: ClassVar[int] = 2
    protects_features: ClassVar[bool] = True

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The residual directions of the task's inputs at the model before it."""
        inputs, bases = stage.sketch_inputs(model, 0), stage.bases
        return per_module(
            stage,
            lambda t: lora_a_from_gradient(inputs[t.name].to(bases.device), bases.load(t), stage.run.rank(t)),
        )

    def features(self, stage: StageContext, model: Model) -> Features:
        """Input directions of the task at the model that has learnt it."""
        return extended_features(stage, stage.sketch_inputs(model, 1))
