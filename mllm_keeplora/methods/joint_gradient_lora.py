"""Joint training along the gradient: the upper bound for methods whose A comes from the gradient."""

from dataclasses import dataclass

from mllm_keeplora.methods.gradient_lora import GradientLora
from mllm_keeplora.methods.joint import Joint


@dataclass(frozen=True)
class JointGradientLora(GradientLora, Joint):
    """All tasks at once, with A from the gradient of all of them at the base, frozen, and nothing protected.

    `joint` starts from a random A, so that its distance from KeepLoRA mixes the starting factor with what protection
    costs. Give this one the rank of all stages together.
    """
