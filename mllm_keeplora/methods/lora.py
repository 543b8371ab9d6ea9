"""Sequential LoRA: what forgets most, and what the other methods are compared with."""

from dataclasses import dataclass

from mllm_keeplora.methods.base import Method


@dataclass(frozen=True)
class SequentialLora(Method):
    """A fresh adapter W + s B A per task, both factors trained, folded exactly (E7); nothing protected."""
