"""LoRA along the task's gradient: what KeepLoRA's A does by itself, with nothing protected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_keeplora.config import RunConfig
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import refined_directions
from mllm_keeplora.methods.base import Method, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model, Trainable
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.gradients import back_project_gradients


@dataclass(frozen=True)
class GradientLora(Method):
    """A = the leading right singular vectors of G (I - M M^T), frozen; B trained (E2-E4), with M empty.

    KeepLoRA derives from it and fills M. The difference between the two is what protection does.
    """

    trains: ClassVar[Trainable] = "B"
    gradient_passes: ClassVar[int] = 1

    def probe_passes(self, config: RunConfig, number: int) -> int:
        """One more where the probe is refined."""
        return super().probe_passes(config, number) + config.probe.refine

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The leading directions of the task's gradient outside M (E2-E4)."""
        gradients = stage.sketch(model, 0)
        if stage.run.config.probe.refine:
            gradients = _refine(stage, model, gradients)
        return per_module(stage, lambda t: _residual_rows(stage, t, gradients[t.name], stage.run.rank(t)))


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
