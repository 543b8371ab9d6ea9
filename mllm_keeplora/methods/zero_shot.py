"""The untouched base through a whole stream: the floor for learning, the ceiling for retention."""

from dataclasses import dataclass

from mllm_keeplora.methods.base import Method


@dataclass(frozen=True)
class ZeroShot(Method):
    """dW = 0 in every stage."""

    def learns(self, number: int) -> bool:
        """Never."""
        return False
