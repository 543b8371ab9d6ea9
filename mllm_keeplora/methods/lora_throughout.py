"""One LoRA adapter trained on from task to task: what most people do who fine-tune again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllm_keeplora.methods.base import Method, Start
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Factors


@dataclass(frozen=True)
class LoraThroughout(Method):
    """The factors that the last task left are the start of the next; the rank never grows."""

    adds_updates: ClassVar[bool] = False

    def start(self, stage: StageContext, lora_a: Mapping[str, Tensor]) -> Start:
        """The accumulated factors, where there are any, with B as training scales it."""
        fresh = super().start(stage, lora_a).factors
        kept = {name: stage.accumulated[name] for name in fresh if name in stage.accumulated}
        scaled = {name: (a, b / stage.scales[name]) for name, (a, b) in kept.items()}
        return Start(fresh | scaled, replaces_past=bool(stage.accumulated))

    def fold(self, accumulated: Factors, factors: Factors, scales: Mapping[str, float]) -> Factors:
        """The new factors hold their modules' past already."""
        untouched = {name: pair for name, pair in accumulated.items() if name not in factors}
        return super().fold(untouched, factors, scales)
