"""Joint training along the gradient: the upper bound for methods whose A comes from the gradient."""

from dataclasses import dataclass

from mllm_keeplora.methods.gradient_lora import GradientLora
from mllm_keeplora.methods.joint import Joint


@dataclass(frozen=True)
class JointGradientLora(GradientLora, Joint):
    """All tasks at once, with A from the gradient of all of them at the base, frozen, and nothing protected.

    A random A learns less in the same steps than one from the gradient, so `joint` mixes the starting factor with
    what protection costs. Give it the rank of all stages together.
    """
