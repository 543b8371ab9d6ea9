"""Joint training: all tasks at once, the upper bound of what a stream can leave behind."""

from dataclasses import dataclass, replace

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import RunContext


@dataclass(frozen=True)
class Joint(Method):
    """min over one adapter of the sum of all tasks' losses, in the first stage, with the steps of all stages.

    Later stages learn nothing, so all rows of the matrix are one: read Last and the general benchmarks; BWT
    is 0 by construction. Its rank is that of one stage, as every other method's update in a stage.
    """

    def learns(self, number: int) -> bool:
        """The first stage alone."""
        return number == 1

    def samples(self, run: RunContext, number: int) -> list[Sample]:
        """Those of all tasks; the Trainer shuffles them."""
        return [sample for task in run.stream.tasks for sample in run.task_samples(task.name)]

    def train_config(self, run: RunContext, config: TrainConfig) -> TrainConfig:
        """A number of steps is a stage's: times the number of tasks. Epochs grow by themselves."""
        return replace(config, max_steps=max(config.max_steps * len(run.stream.tasks), -1))
