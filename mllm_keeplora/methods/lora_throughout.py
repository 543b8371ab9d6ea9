"""One LoRA adapter trained on from task to task: what most people do who fine-tune again."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_keeplora.methods.base import Method


@dataclass(frozen=True)
class LoraThroughout(Method):
    """The factors that the last task left are the start of the next; the rank never grows."""

    continues: ClassVar[bool] = True
