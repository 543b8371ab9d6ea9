"""What a method adds to each step of the Trainer."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Hooks(NamedTuple):
    """What a method adds to each optimizer step."""

    penalty: Callable[[int], Tensor] | None = None  # scalar added to the loss, given the steps so far
    after_step: Callable[[], None] | None = None  # called when the optimizer has moved the factors
