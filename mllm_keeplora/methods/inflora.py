"""InfLoRA (arXiv 2404.00228): learn where the new task's inputs lie and those of past tasks do not."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mllm_keeplora.config import Share
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import extend_basis_from_covariance, extend_basis_from_sketch
from mllm_keeplora.methods.base import Features, Method, extended_features, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model, Trainable


@dataclass(frozen=True)
class InfLora(Method):
    """A_t = the leading right singular vectors of X_t (I - M M^T), frozen; B trained (its eq. 9-11).

    X_t are the inputs of the new task, M the input directions of past tasks by GPM's rule. As in its code
    (`update_DualGPM`), the share of energy that M has to hold rises over the T tasks of the stream:

        eps_t = eps_f + (final_eps_f - eps_f) (t - 1) / T,  t = 1 .. T

    Its DualGPM keeps either M or its complement, whichever is smaller: that saves memory and changes no result. Here
    M is kept. Its code takes A_t from the covariance and not from X_t, scales it by 1 / sqrt(3), and leaves M of the
    first task one direction short of its share.

    Args:
        final_eps_f: what the share rises to, its `lame`: 1 in all its settings. `lamb` is the tower's eps_f, there
            0.95 (CIFAR-100) and 0.98 (ImageNet-R). The value of eps_f keeps one share for all tasks.
        energy_of: what the share refers to: the inputs' `covariance`, ||C||_F^2, as in its code, or the `inputs`,
            ||X||_F^2, as in GPM. A covariance's spectrum falls off twice as fast, so that M has far fewer directions.
    """

    trains: ClassVar[Trainable] = "B"
    projects: ClassVar[bool] = True
    input_passes: ClassVar[int] = 2
    protects_features: ClassVar[bool] = True

    final_eps_f: Share = 1.0
    energy_of: Literal["covariance", "inputs"] = "covariance"

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The residual directions of the task's inputs at the model before it."""
        inputs, bases = stage.sketch_inputs(model, 0), stage.bases
        return per_module(
            stage,
            lambda t: lora_a_from_gradient(inputs[t.name].to(bases.device), bases.load(t), stage.run.rank(t)),
        )

    def features(self, stage: StageContext, model: Model) -> Features:
        """Input directions of the task at the model that has learnt it."""
        towers, done = stage.run.config.towers(), (stage.number - 1) / len(stage.run.stream.tasks)
        return extended_features(
            stage,
            stage.sketch_inputs(model, 1),
            extend_basis_from_covariance if self.energy_of == "covariance" else extend_basis_from_sketch,
            lambda t: risen(towers[t.tower].eps_f, self.final_eps_f, done),
        )


def risen(first: float, last: float, done: float) -> float:
    """The share that M has to hold once `done` of the tasks, a fraction, lie before the one just learnt."""
    return first + (last - first) * done
