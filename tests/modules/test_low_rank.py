"""A layer and its adapters as one: the function and gradients of PEFT's own path, for less work."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mllm_keeplora.linalg.subspace import project_to_residual
from mllm_keeplora.modeling.adapters import (
    ACCUMULATED,
    STAGE,
    activate,
    adapters_off,
    attach,
    factor_parameters,
    without_dropout,
)
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.low_rank import one_low_rank_path
from tests.modules.conftest import all_targets, batch, model_config

RANK = 8
# The counter knows addmm alone.
ADDMM = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}


def with_past(model: Any, past_rank: int, trains: Any = "B", dropout: float = 0.0) -> Any:
    """A model that trains a stage's factors on top of a past."""
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            t.name: (
                torch.randn(rank, t.in_features, generator=generator) * t.in_features**-0.5,
                torch.randn(t.out_features, rank, generator=generator) * 0.2,
            )
            for t in all_targets(model)
        }

    past, stage = factors(past_rank), factors(RANK)
    adapted = attach(model, ACCUMULATED, past, dict.fromkeys(past, 1.0))
    adapted = attach(adapted, STAGE, stage, dict.fromkeys(stage, 0.5), dropout)
    activate(adapted, [ACCUMULATED, STAGE], STAGE, trains)
    return adapted.train()


def dense(directory: Path, dtype: str = "float32") -> Any:
    """The tiny model, not quantised."""
    return load_base(replace(model_config(directory, "none"), compute_dtype=dtype))[0]


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every trainable parameter; the same dropout in every call."""
    torch.manual_seed(0)
    result = model(**inputs)
    result.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result.logits.detach().float(), found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def joined(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


# 4 samples: more tokens than make the sum W + B A cheaper in every layer; 1: fewer than that of most.
@pytest.mark.parametrize("samples, trains", [(1, "B"), (4, "B"), (1, "both"), (4, "both"), (4, "A")])
def test_the_function_and_the_gradients_are_pefts(model: Any, samples: int, trains: str) -> None:
    layers = len(all_targets(model))
    adapted, inputs = with_past(model, 24, trains), batch(samples)
    logits, expected = gradients(adapted, inputs)
    with one_low_rank_path(adapted):
        one, found = gradients(adapted, inputs)
    assert distance(one, logits) < 1e-5
    assert list(found) == list(expected) and len(found) == layers * (1 + (trains == "both"))
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 1e-4, name
        assert found[name].dtype == torch.float32
    assert torch.equal(gradients(adapted, inputs)[0], logits), "PEFT's path again, with the factors as they were"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_16_bits_it_is_no_further_from_fp32_than_pefts(tiny_llava: Path, quantization: str) -> None:
    def found(dtype: str, path: Any) -> tuple[Tensor, Tensor]:
        settings = replace(model_config(tiny_llava, quantization), compute_dtype=dtype)
        adapted, inputs = with_past(load_base(settings)[0], 24), batch(4)
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
        with path(adapted):
            logits, gradient = gradients(adapted, inputs)
        return logits, joined(gradient)

    exact, peft, one = (
        found("float32", nullcontext),
        found("bfloat16", nullcontext),
        found("bfloat16", one_low_rank_path),
    )
    for truth, theirs, ours in zip(exact, peft, one, strict=True):
        assert distance(ours, truth) < 1.5 * distance(theirs, truth)
        assert distance(ours, theirs) < 0.1


def test_what_the_past_does_is_in_it(nf4_model: Any) -> None:
    """What the tests above would miss if neither path took the past in."""
    adapted, inputs = with_past(nf4_model, 24), batch(4)
    with one_low_rank_path(adapted):
        with_it = gradients(adapted, inputs)[0]
    activate(adapted, [STAGE], STAGE, "B")
    with one_low_rank_path(adapted):
        assert distance(gradients(adapted, inputs)[0], with_it) > 1e-2


def test_a_stage_without_a_past_and_a_past_without_a_stage(nf4_model: Any) -> None:
    adapted, inputs = with_past(nf4_model, 24), batch(2)
    for active, trains in (([STAGE], "both"), ([ACCUMULATED], "none")):
        activate(adapted, active, STAGE, trains)  # type: ignore[arg-type]
        with torch.no_grad():
            expected = adapted(**inputs).logits
            with one_low_rank_path(adapted):
                assert distance(adapted(**inputs).logits, expected) < 1e-5


def test_activations_can_be_computed_again(nf4_model: Any) -> None:
    nf4_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapted, inputs = with_past(nf4_model, 24, "both"), batch(4)
    _, expected = gradients(adapted, inputs)
    with one_low_rank_path(adapted):
        _, found = gradients(adapted, inputs)
    assert distance(joined(found), joined(expected)) < 1e-5


def test_dropout_reaches_the_stage_alone(nf4_model: Any) -> None:
    adapted, inputs = with_past(nf4_model, 24, "both", dropout=0.3), batch(4)
    logits, expected = gradients(adapted, inputs)
    with one_low_rank_path(adapted):
        one, found = gradients(adapted, inputs)
        assert distance(one, logits) < 1e-5
        assert distance(joined(found), joined(expected)) < 1e-5
        with without_dropout(adapted):
            assert distance(gradients(adapted, inputs)[0], logits) > 1e-3


def test_the_base_alone_and_what_has_moved(nf4_model: Any) -> None:
    name = all_targets(nf4_model)[-1].name
    adapted, inputs = with_past(nf4_model, 24, "both"), batch(2)
    with torch.no_grad(), adapters_off(adapted):
        base = adapted(**inputs).logits
    with torch.no_grad(), one_low_rank_path(adapted):
        with adapters_off(adapted):
            assert torch.equal(adapted(**inputs).logits, base)
        before = adapted(**inputs).logits
        for parameter in factor_parameters(adapted, STAGE, name):
            parameter.mul_(3)
        moved = adapted(**inputs).logits
    assert distance(moved, before) > 1e-3
    with torch.no_grad():
        assert distance(moved, adapted(**inputs).logits) < 1e-5


def test_one_adapter_trains(nf4_model: Any) -> None:
    name = all_targets(nf4_model)[0].name
    adapted = with_past(nf4_model, 24)
    factor_parameters(adapted, ACCUMULATED, name)[1].requires_grad_(True)
    with pytest.raises(ValueError, match="one adapter can train, got default, stage"), one_low_rank_path(adapted):
        pass


@contextmanager
def one_layer(dtype: torch.dtype, a: Tensor, past_rank: int = 24) -> Iterator[nn.Module]:
    """A layer with a past and a stage, in the block; B trains."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(a.shape[1], 96, bias=False).to(dtype))
    past = {"0": (a[:1].repeat(past_rank, 1), torch.randn(96, past_rank, generator=generator))}
    stage = {"0": (a, torch.randn(96, len(a), generator=generator))}
    adapted = attach(attach(base, ACCUMULATED, past, {"0": 1.0}), STAGE, stage, {"0": 1.0})
    activate(adapted, [ACCUMULATED, STAGE], STAGE, "B")
    with one_low_rank_path(adapted):
        yield adapted


def test_in_16_bits_a_protected_input_is_answered_as_by_the_base() -> None:
    """B x would move the output by 0.6 % of its size if A x were computed in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 128, generator=generator).bfloat16()
    basis = torch.linalg.qr(x.float().T).Q
    a = project_to_residual(project_to_residual(torch.randn(RANK, 128, generator=generator), basis), basis)
    with torch.no_grad(), one_layer(torch.bfloat16, a) as layer:
        adapted = layer(x)
        with adapters_off(layer):
            base = layer(x)
    assert distance(adapted.float(), base.float()) < 1e-4
    assert float((x @ a.bfloat16().T).float().norm() / x.float().norm() / a.norm()) > 1e-4


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_frozen_factors_keep_nothing(dtype: torch.dtype, size: int) -> None:
    """A x of the stage is all that the backward pass needs, for any past."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = torch.randn(40, 128, dtype=dtype, requires_grad=True)
    with one_layer(dtype, torch.randn(RANK, 128)) as layer, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert kept == [40 * RANK * size]


class Operations(TorchDispatchMode):
    """Names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_input_is_cast_once_and_nothing_is_added_beside_the_products() -> None:
    """In bf16: B put in place, W x, the cast of x, A x, its cast, B's product into W x, what is kept of A x."""
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    with one_layer(torch.bfloat16, torch.randn(RANK, 128)) as layer, Operations() as operations:
        layer(x)
    work = [n for n in operations.found if n not in ("t", "view", "detach", "slice", "alias", "permute")]
    assert work == ["mul", "mm", "_to_copy", "mm", "_to_copy", "addmm_", "clone"]


def test_a_long_past_costs_little_and_a_frozen_a_nothing(tiny_llava: Path) -> None:
    """Multiplications of a step on a dense base, whose products the counter sees: 8 samples of 23 tokens."""
    inputs = batch(8)

    def flops(adapted: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=ADDMM) as counter:
            adapted(**inputs).loss.backward()
        adapted.zero_grad()
        return counter.get_total_flops()

    adapted = with_past(dense(tiny_llava), 64)
    beside = flops(adapted)
    activate(adapted, [STAGE], STAGE, "B")
    alone = flops(adapted)
    activate(adapted, [STAGE], STAGE, "both")
    assert alone < flops(adapted), "training A as well takes its gradient's product"
    activate(adapted, [ACCUMULATED, STAGE], STAGE, "B")
    with one_low_rank_path(adapted):
        together = flops(adapted)
    assert alone < together < alone + 0.6 * (beside - alone)
