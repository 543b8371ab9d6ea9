"""Layerwise training: blocks of layers learn one after another, shallow to deep (after arXiv 2211.06860).

The paper grows a network by a layer at a time, trains that layer alone and freezes those before it. A pre-trained model
has its layers already, so here each block's LoRA update takes the place of a new layer: before its turn it adds
nothing, after its turn it is frozen. See docs/methods.md for what of the paper is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.config import ConfigError
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.hooks import Backward, Batch, Hooks, Step
from mllm_keeplora.modeling.adapters import STAGE, live_factors
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.settings import Range

Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r] as they train


@dataclass(frozen=True)
class Layerwise(Method):
    """Sequential LoRA whose depth blocks train one after another, each for an equal share of a stage's steps.

    Both towers are cut into `blocks` of equally many layers, and block k of each trains in the k-th part of the steps.
    One schedule runs over all steps: with a rate that decays, deeper blocks take smaller steps
    (`train.lr_scheduler_type: constant_with_warmup` gives all blocks one rate).

    The loss has `stability * sum ||s B A||_F^2` beside it. Inputs that lie within epsilon of each other are answered by
    an update within delta = ||s B A|| epsilon: small deltas are what the paper calls epsilon-delta stability, and what
    its manifold term is there for.

    Args:
        blocks: per tower, at most its layers.
        stability: of the updates, at least 0.
    """

    blocks: Annotated[int, Range(1, 10_000)] = 2
    stability: Annotated[float, Range(0, 1_000_000_000)] = 1e-3

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """The penalty, and gradients for one block alone.

        Raises:
            ConfigError: a tower has fewer layers than blocks.
        """
        shallowest = min(stage.targets, key=lambda t: t.num_layers)
        if shallowest.num_layers < self.blocks:
            raise ConfigError(
                f"method_options.blocks: expected at most {shallowest.num_layers}, the layers of the "
                f"{shallowest.tower} tower, found {self.blocks}"
            )
        factors = live_factors(model, STAGE)
        blocks: list[list[Pair]] = [[] for _ in range(self.blocks)]
        for t in stage.targets:
            blocks[block_of(t, self.blocks)].append(factors[t.name])
        scaled = {name: (stage.scales[name], *pair) for name, pair in factors.items()}
        return Hooks(
            penalty=(lambda _: self.stability * squared_norms(scaled)) if self.stability else None,
            gradients=OneBlock(blocks),
        )


def block_of(target: Target, blocks: int) -> int:
    """Which of a tower's blocks a layer belongs to, 0 = shallowest."""
    return target.depth * blocks // target.num_layers


def squared_norms(factors: Mapping[str, tuple[float, Tensor, Tensor]]) -> Tensor:
    """sum ||s B A||_F^2 = sum s^2 tr(B^T B A A^T) over modules of (s, A [r, in], B [out, r]); differentiable scalar."""
    return torch.stack([s * s * ((b.T @ b) * (a @ a.T)).sum() for s, a, b in factors.values()]).sum()


class OneBlock:
    """Takes away the gradients of all blocks but the one whose turn it is, so that no optimizer moves them."""

    def __init__(self, blocks: Sequence[Sequence[Pair]]) -> None:
        """Takes the factors of every block, shallow to deep."""
        self._blocks = blocks

    def __call__(self, batch: Batch, step: Step, backward: Backward) -> Tensor:
        """One pass over the batch; gives its loss.

        Raises:
            ConfigError: the stage has fewer steps than blocks.
        """
        if step.total < len(self._blocks):
            raise ConfigError(
                f"method_options.blocks: {len(self._blocks)} blocks need as many steps, the stage has {step.total}; "
                "raise train.max_steps or train.num_train_epochs, or lower the blocks"
            )
        loss = backward(batch, False)
        turn = step.taken * len(self._blocks) // step.total
        for number, block in enumerate(self._blocks):
            for parameter in (p for pair in block for p in pair if number != turn):
                parameter.grad = None
        return loss
