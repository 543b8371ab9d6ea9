"""What a method adds to each step of the Trainer."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

Batch = Mapping[str, Tensor]  # model inputs with labels
# One forward and backward pass of a batch, by the task's loss alone or with all that is added to it; the loss.
Backward = Callable[[Batch, bool], Tensor]


class Step(NamedTuple):
    """Where a stage's training is, in optimizer steps."""

    taken: int
    total: int


class Hooks(NamedTuple):
    """What a method adds to each optimizer step."""

    penalty: Callable[[int], Tensor] | None = None  # scalar added to the loss, given the steps so far
    after_step: Callable[[], None] | None = None  # called when the optimizer has moved the factors
    # In place of a batch's one pass: given the batch, where training is and what makes a pass; gives the loss. All
    # processes make the same number of passes, and one of them with what is added to the loss.
    gradients: Callable[[Batch, Step, Backward], Tensor] | None = None
