"""Experience replay: a share of every earlier task's samples is trained on again."""

from dataclasses import dataclass

from mllm_keeplora.config import Share
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.records import select_evenly
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import RunContext


@dataclass(frozen=True)
class Replay(Method):
    """Sequential LoRA on D_t and a kept share of D_1 .. D_{t-1} (Chaudhry et al., arXiv 1902.10486).

    Uses data that the other methods must not see again. The kept samples are evenly spaced over a task, and a
    step draws from own and kept samples alike.

    Args:
        share: kept samples of an earlier task over all of them.
    """

    share: Share = 0.1

    def samples(self, run: RunContext, number: int) -> list[Sample]:
        """The task's own, then those kept of the earlier tasks."""
        found = list(super().samples(run, number))
        for task in run.stream.tasks[: number - 1]:
            past = run.task_samples(task.name)
            found += [past[i] for i in select_evenly(len(past), self.share, len(past))]
        return found
