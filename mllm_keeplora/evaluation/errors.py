"""What an evaluation raises."""

from mllm_keeplora.errors import KeepLoRAError


class EvaluationError(KeepLoRAError, RuntimeError):
    """An evaluation that could not be completed; never turned into a score."""
