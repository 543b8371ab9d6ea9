"""Rows 5 and 6: a training step with A frozen beside both factors trained, and what earlier stages add to it.

    python benchmarks/training.py

A step is forward, backward and AdamW on a random NF4 LLaVA with adapters on every linear layer of both
towers. On a GPU the model has LLaVA-1.5-7B's sizes; on a CPU it is smaller, and the rank is scaled down with
the width. Loading and data are left out. T earlier stages have left an adapter of T r columns. It is random:
its content does not change the time.

The adapter of the earlier stages takes one of three forms, whose functions are equal up to rounding:

    beside     beside the layer by PEFT, rank T r: two more products a token and direction
    joined     `modeling.low_rank`: one path with the stage's own factors; where the base computes in fp32 and
               there are tokens enough, W + B A is made anew from the 4-bit weight in either direction
    dense      W + B A is kept in the compute dtype: no 4-bit weight any more
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from measure import Options, Row, benchmark, in_turns, megabytes, milliseconds, ratio, saved_bytes
from shapes import (
    MIDDLE,
    TINY,
    TRUE,
    Shape,
    all_linear,
    llava_config,
    random_batch,
    random_factors,
    random_model,
    settings_for,
)
from torch import Tensor, nn

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import (
    ACCUMULATED,
    STAGE,
    Trainable,
    activate,
    attach,
    attach_accumulated,
)
from mllm_keeplora.modeling.linear4bit import computed_weight
from mllm_keeplora.modeling.loading import DTYPES
from mllm_keeplora.modeling.low_rank import one_low_rank_path
from mllm_keeplora.modeling.targets import Target

Form = Literal["beside", "joined", "dense"]
FORMS: tuple[Form, ...] = ("beside", "joined", "dense")
STAGES = (4, 16)


@dataclass(frozen=True)
class Size:
    """What a step works on.

    Attributes:
        shape: of the model.
        batch, length: samples, and tokens of each.
        rank: that a stage learns.
    """

    shape: Shape
    batch: int
    length: int
    rank: int


def size_for(options: Options) -> Size:
    """LLaVA-1.5-7B at batch 8 and 640 tokens on a GPU."""
    if options.quick:
        return Size(TINY, 2, 48, 4)
    return Size(TRUE, 8, 640, 64) if options.device.type == "cuda" else Size(MIDDLE, 8, 160, 16)


class Step:
    """A model ready for training steps.

    Args:
        size: of model and batch.
        device: where the model lies.
        trains: the stage's factors that move.
        stages: how many have left their factors.
        form: what became of these factors.
        settings: of the base; the recipes' for the device when None.
        optimizer: makes one from the trained parameters.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        trains: Trainable = "B",
        stages: int = 0,
        form: Form = "joined",
        settings: ModelConfig | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        settings = settings or settings_for(device)
        base = random_model(llava_config(size.shape), settings, device)
        self.targets = all_linear(base)
        earlier = random_factors(self.targets, stages * size.rank, "past", device) if stages else {}
        if form == "dense":
            for name, (a, b) in earlier.items():
                make_dense(base, name, a, b)
            earlier = {}
        start = random_factors(self.targets, size.rank, "stage", device)
        self.model = attach(attach_accumulated(base, earlier), STAGE, start, dict.fromkeys(start, 1.0))
        beside = [ACCUMULATED] if earlier else []
        activate(self.model, [*beside, STAGE], STAGE, trains)
        if form != "beside":  # never left: the model is thrown away as it is
            self.path = one_low_rank_path(self.model)
            self.path.__enter__()
        self.model.train()
        self.batch = random_batch(size.shape, size.batch, size.length, device)
        self.batch["pixel_values"] = self.batch["pixel_values"].to(DTYPES[settings.compute_dtype])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer(trained, lr=1e-5)

    def __call__(self) -> Tensor:
        """One step; the loss before it."""
        loss: Tensor = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def held_bytes(self) -> int:
        """Parameters, their gradients and the optimizer's state."""
        parameters = [p.numel() * p.element_size() for p in self.model.parameters()]
        trained = [3 * p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad]
        return sum(parameters) + sum(trained)

    def saved_bytes(self) -> int:
        """What the forward pass keeps for the backward pass."""
        return saved_bytes(self.model, lambda: self.model(**self.batch).loss)


def make_dense(model: nn.Module, name: str, a: Tensor, b: Tensor) -> None:
    """Puts W + B A in a plain layer in place of a 4-bit one."""
    layer: Any = model.get_submodule(name)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=a.device)
    weight = (computed_weight(layer) + b @ a).to(layer.compute_dtype)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    model.set_submodule(name, plain)


def more_arithmetic(targets: list[Target], size: Size, stages: int, form: Form) -> float:
    """Multiplications of the linear layers in one forward pass, over those without the stages' factors."""
    tokens = size.batch * size.length
    weights = sum(t.in_features * t.out_features for t in targets)
    widths = sum(t.in_features + t.out_features for t in targets)
    a_rank = {"beside": widths * tokens, "joined": min(weights, widths * tokens), "dense": 0}
    return 1 + a_rank[form] * stages * size.rank / (weights * tokens)


def frozen_beside_plain(options: Options, size: Size) -> Row:
    """Row 5."""
    steps = {"frozen": Step(size, options.device, "B"), "plain": Step(size, options.device, "both")}
    seconds = in_turns(steps, options.repeats, options.device)
    found = ratio(seconds["frozen"], seconds["plain"])
    return Row(
        5,
        f"a training step, A frozen, rank {size.rank}, {tokens_of(size)}",
        milliseconds(seconds["frozen"]),
        f"{milliseconds(seconds['plain'])}, A and B trained",
        f"{found} x the time",
        "<= 1.0",
        found.median <= 1.0,
        "the gradient of A is the only arithmetic left out",
    )


def tokens_of(size: Size) -> str:
    """Width and batch, as text."""
    return f"width {size.shape.hidden}, {size.batch} x {size.length} tokens"


def rows_after_stages(options: Options, size: Size) -> list[Row]:
    """Row 6: a step after some stages, in every form, beside one in the first stage."""
    first = Step(size, options.device)
    beside = f"{megabytes(first.held_bytes())} + {megabytes(first.saved_bytes())}, no past"
    found = []
    for stages in STAGES:
        steps: dict[str, Step] = {form: Step(size, options.device, stages=stages, form=form) for form in FORMS}
        seconds = in_turns({"first": first, **steps}, options.repeats, options.device)
        for form in FORMS:
            step, times = steps[form], ratio(seconds[form], seconds["first"])
            memory = f"{megabytes(step.held_bytes())} + {megabytes(step.saved_bytes())} activations"
            wanted = stages == STAGES[-1]
            found.append(
                Row(
                    6,
                    f"past of {stages} stages of rank {size.rank}, {form}, {tokens_of(size)}",
                    f"{milliseconds(seconds[form])}, {memory}",
                    f"{milliseconds(seconds['first'])}, {beside}",
                    f"{times} x the time",
                    "<= 1.15" if wanted else "",
                    times.median <= 1.15 if wanted else None,
                    f"{more_arithmetic(first.targets, size, stages, form):.2f} x the linear layers' arithmetic",
                )
            )
    return found


def rows(options: Options) -> list[Row]:
    """Rows 5 and 6."""
    torch.manual_seed(0)
    size = size_for(options)
    return [frozen_beside_plain(options, size), *rows_after_stages(options, size)]


if __name__ == "__main__":
    benchmark(__doc__, rows)
