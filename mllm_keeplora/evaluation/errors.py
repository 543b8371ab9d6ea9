"""What an evaluation raises."""

from mllm_keeplora.errors import KeepLoRAError


class EvaluationError(KeepLoRAError, RuntimeError):
    """An evaluation that could not be completed; never turned into a score."""


class LogitsError(KeepLoRAError, ArithmeticError):
    """A model whose scores of the next token, or of classes, are no numbers, so that none is the likeliest."""
