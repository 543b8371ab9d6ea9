"""KeepLoRA++ (arXiv 2606.16256): learn in the residual subspace, small steps in shallow layers.

gamma 1 in both towers is KeepLoRA (arXiv 2601.19659).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mllm_keeplora.config import RunConfig
from mllm_keeplora.linalg.layer_scaling import layer_scales
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import refined_directions
from mllm_keeplora.methods.base import Features, Method, extended_features, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model, Trainable
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.gradients import back_project_gradients


@dataclass(frozen=True)
class KeepLora(Method):
    """A frozen in the residual subspace of weights and past features, B trained (E1-E9).

    Args:
        features_from: what the feature bases of past tasks are read from (E8): `gradients` at the new model,
            as in the published MLLM code, or input `activations`, as in the paper: then eps_f is a share of
            the inputs' energy.
    """

    trains: ClassVar[Trainable] = "B"
    protects_weights: ClassVar[bool] = True
    protects_features: ClassVar[bool] = True
    gradient_passes: ClassVar[int] = 2

    features_from: Literal["gradients", "activations"] = "gradients"

    def probe_passes(self, config: RunConfig) -> int:
        """One more where the probe is refined."""
        return super().probe_passes(config) + config.probe.refine

    def layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l rises from gamma to 1 within the tower (E5)."""
        return layer_scales(target.num_layers, config.towers()[target.tower].gamma)[target.depth]

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The leading directions of the residual gradient (E2-E4)."""
        gradients = stage.sketch(model, 0)
        if stage.run.config.probe.refine:
            gradients = _refine(stage, model, gradients)
        return per_module(stage, lambda t: _residual_rows(stage, t, gradients[t.name], stage.run.rank(t)))

    def features(self, stage: StageContext, model: Model) -> Features:
        """Directions of the task at the new model that M does not hold yet (E8)."""
        measure = stage.sketch if self.features_from == "gradients" else stage.sketch_inputs
        return extended_features(stage, measure(model, 1))


def _residual_rows(stage: StageContext, target: Target, sketch: Tensor, rank: int) -> Tensor:
    bases = stage.bases
    return lora_a_from_gradient(sketch.to(bases.device), bases.load(target), rank)


def _refine(stage: StageContext, model: Model, sketches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optional second pass: the projected sketch, ordered by what G really holds along it."""
    rows = per_module(stage, lambda t: _residual_rows(stage, t, sketches[t.name], len(sketches[t.name])))
    rows = {name: span for name, span in rows.items() if len(span) > 0}
    if not rows:
        return dict(sketches)
    out_features = {t.name: t.out_features for t in stage.targets}
    images = back_project_gradients(model, rows, out_features, stage.probe_batches)
    refined = {name: refined_directions(rows[name], images[name]) for name in rows}
    return {**sketches, **refined}
