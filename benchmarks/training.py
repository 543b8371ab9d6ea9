"""A training step: A frozen beside both factors trained, and what a past of many stages costs it.

    python benchmarks/training.py

Step: forward, backward, AdamW, on a random NF4 LLaVA with adapters on every linear layer of both towers; of
LLaVA-1.5-7B's sizes on a GPU, smaller on a CPU, where the rank is scaled down with the width. Loading and
data are left out. A past of T stages has T r columns, random; its content does not change the time.

Forms of the past, every one with the same function up to the rounding of its weights:

    beside     an adapter of rank T r beside the layer: two more products a token and direction
    inside     `modeling.fused_past`: W + B A made anew from the 4-bit weight in either direction; what a
               stage trains with where the base computes in fp32, and the same as `beside` where it does not
    dense      W + B A kept in the compute dtype: no 4-bit weight any more
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from measure import Options, Row, benchmark, in_turns, megabytes, milliseconds, ratio, saved_bytes
from shapes import MIDDLE, TINY, TRUE, Shape, llava_config, random_batch, random_model, settings_for
from torch import Tensor, nn

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, Factors, Trainable, activate, attach
from mllm_keeplora.modeling.fused_past import past_in_base
from mllm_keeplora.modeling.linear4bit import computed_weight
from mllm_keeplora.modeling.loading import DTYPES
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.probes.gradients import module_generator

Form = Literal["beside", "inside", "dense"]
FORMS: tuple[Form, ...] = ("beside", "inside", "dense")
STAGES = (4, 16)


@dataclass(frozen=True)
class Size:
    """What a step works on.

    Attributes:
        shape: of the model.
        batch, length: samples, and tokens of each.
        rank: of a stage.
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


def random_factors(targets: list[Target], rank: int, seed: str, device: torch.device) -> Factors:
    """A whose rows have length 1 on average, B small."""
    factors = {}
    for t in targets:
        generator = module_generator(0, f"{seed}/{t.name}")
        a = torch.randn(rank, t.in_features, generator=generator) * t.in_features**-0.5
        b = torch.randn(t.out_features, rank, generator=generator) * 1e-3
        factors[t.name] = (a.to(device), b.to(device))
    return factors


class Step:
    """A model ready for training steps.

    Args:
        size: of model and batch.
        device: where.
        trains: the stage's factors that move.
        stages: of the past.
        form: of the past.
        settings: of the base; the recipes' for the device when None.
        optimizer: makes one from the trained parameters.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        trains: Trainable = "B",
        stages: int = 0,
        form: Form = "beside",
        settings: ModelConfig | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        settings = settings or settings_for(device)
        base = random_model(llava_config(size.shape), settings, device)
        targets = find_targets(base, {"vision": ["all-linear"], "language": ["all-linear"]})
        past = random_factors(targets, stages * size.rank, "past", device) if stages else {}
        if form == "dense":
            for name, (a, b) in past.items():
                make_dense(base, name, a, b)
            past = {}
        model: Any = attach(base, ACCUMULATED, past, dict.fromkeys(past, 1.0)) if past else base
        start = random_factors(targets, size.rank, "stage", device)
        self.model = attach(model, STAGE, start, dict.fromkeys(start, 1.0))
        beside = [ACCUMULATED] if past else []
        if form == "inside":  # for good: the model trains and is thrown away
            self.inside = past_in_base(self.model, beside)
            beside = self.inside.__enter__()
        activate(self.model, [*beside, STAGE], STAGE, trains)
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
        """What a forward keeps for the backward."""
        return saved_bytes(self.model, lambda: self.model(**self.batch).loss)


def make_dense(model: nn.Module, name: str, a: Tensor, b: Tensor) -> None:
    """Puts W + B A in a plain layer in place of a 4-bit one."""
    layer: Any = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=a.device)
    weight = (computed_weight(layer) + b @ a).to(layer.compute_dtype)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    setattr(model.get_submodule(parent), child, plain)


def arithmetic(targets: list[Target], past_rank: int, tokens: int, form: Form) -> float:
    """Multiplications of the linear layers and of the past in one forward, without the stage's own rank."""
    weights = sum(t.in_features * t.out_features for t in targets)
    widths = sum(t.in_features + t.out_features for t in targets)
    past = {"beside": widths * tokens, "inside": min(weights, widths * tokens), "dense": 0}
    return weights * tokens + past[form] * past_rank


def frozen_beside_plain(options: Options, size: Size) -> Row:
    """Row 5."""
    steps: dict[str, Callable[[], Any]] = {
        "frozen": Step(size, options.device, "B"),
        "plain": Step(size, options.device, "both"),
    }
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


def rows_of_the_past(options: Options, size: Size) -> list[Row]:
    """Row 6: every form at every length of the past beside a step without one."""
    make = partial(Step, size, options.device, "B")
    first = make()
    targets = find_targets(
        random_model(llava_config(size.shape), settings_for(options.device), options.device),
        {"vision": ["all-linear"], "language": ["all-linear"]},
    )
    held, saved = first.held_bytes(), first.saved_bytes()
    tokens = size.batch * size.length
    rows = []
    for stages in STAGES:
        steps = {form: make(stages, form) for form in FORMS}
        ways: dict[str, Callable[[], Any]] = {"first": first, **{str(form): steps[form] for form in FORMS}}
        seconds = in_turns(ways, options.repeats, options.device)
        for form, step in steps.items():
            found = ratio(seconds[form], seconds["first"])
            plain = arithmetic(targets, 0, tokens, form)
            floor = arithmetic(targets, stages * size.rank, tokens, form) / plain
            memory = f"{megabytes(step.held_bytes())} + {megabytes(step.saved_bytes())} activations"
            rows.append(
                Row(
                    6,
                    f"past of {stages} stages of rank {size.rank}, {form}, {tokens_of(size)}",
                    f"{milliseconds(seconds[form])}, {memory}",
                    f"{milliseconds(seconds['first'])}, {megabytes(held)} + {megabytes(saved)}, no past",
                    f"{found} x the time",
                    "<= 1.15" if stages == STAGES[-1] else "",
                    found.median <= 1.15 if stages == STAGES[-1] else None,
                    f"{floor:.2f} x the linear layers' arithmetic",
                )
            )
    return rows


def rows(options: Options) -> list[Row]:
    """Rows 5 and 6."""
    torch.manual_seed(0)
    size = size_for(options)
    return [frozen_beside_plain(options, size), *rows_of_the_past(options, size)]


if __name__ == "__main__":
    benchmark(__doc__ or "", rows)
