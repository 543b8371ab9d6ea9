"""The past inside the base's product: the same function and gradients as beside it, for less arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, activate, attach
from mllm_keeplora.modeling.fused_past import past_in_base
from mllm_keeplora.modeling.loading import load_base
from tests.modules.conftest import all_targets, batch, model_config

RANK = 8


def with_past(model: Any, past_rank: int) -> Any:
    """A model that trains B of a stage on top of a past."""
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            t.name: (
                torch.randn(rank, t.in_features, generator=generator) * t.in_features**-0.5,
                torch.randn(t.out_features, rank, generator=generator) * 0.2,
            )
            for t in all_targets(model)
        }

    past, stage = factors(past_rank), factors(RANK)
    adapted = attach(model, ACCUMULATED, past, dict.fromkeys(past, 1.0))
    adapted = attach(adapted, STAGE, stage, dict.fromkeys(stage, 0.5))
    activate(adapted, [ACCUMULATED, STAGE], STAGE, "B")
    return adapted


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every trainable parameter."""
    result = model(**inputs)
    result.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result.logits.detach(), found


# 4 samples: more tokens than the break-even of every layer; 1: fewer than that of most.
@pytest.mark.parametrize("samples", [1, 4])
def test_the_function_and_the_gradients_are_those_of_the_adapter_beside_the_base(model: Any, samples: int) -> None:
    adapted, inputs = with_past(model, 24), batch(samples)
    logits, expected = gradients(adapted, inputs)
    with past_in_base(adapted, [ACCUMULATED]) as beside:
        assert beside == []
        trainable = activate(adapted, [STAGE], STAGE, "B")
        inside, found = gradients(adapted, inputs)
    assert (inside - logits).norm() / logits.norm() < 1e-5
    assert list(found) == list(expected) == trainable
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-4, name
    activate(adapted, [ACCUMULATED, STAGE], STAGE, "B")
    assert torch.equal(adapted(**inputs).logits, logits), "the layers compute by themselves again"


def test_activations_can_be_computed_again(nf4_model: Any) -> None:
    nf4_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapted, inputs = with_past(nf4_model, 24), batch(4)
    adapted.train()
    _, expected = gradients(adapted, inputs)
    with past_in_base(adapted, [ACCUMULATED]):
        activate(adapted, [STAGE], STAGE, "B")
        _, found = gradients(adapted, inputs)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-4, name


def test_without_the_past_the_function_is_another_one(nf4_model: Any) -> None:
    """What the test above would miss if the base took nothing in."""
    adapted, inputs = with_past(nf4_model, 24), batch(4)
    with_it = adapted(**inputs).logits
    activate(adapted, [STAGE])
    assert (adapted(**inputs).logits - with_it).norm() / with_it.norm() > 1e-2


def test_a_base_that_computes_in_16_bits_keeps_the_past_beside_it(tiny_llava: Path) -> None:
    settings = replace(model_config(tiny_llava, "none"), compute_dtype="bfloat16")
    adapted = with_past(load_base(settings)[0], 24)
    with past_in_base(adapted, [ACCUMULATED]) as beside:
        assert beside == [ACCUMULATED]


def test_there_is_one_past(model: Any) -> None:
    with pytest.raises(ValueError, match="one adapter, got a, b"), past_in_base(model, ["a", "b"]):
        pass


def test_a_long_past_costs_little_and_a_frozen_a_nothing(tiny_llava: Path) -> None:
    """Multiplications of a step on a dense base, whose products the counter sees: 8 samples of 23 tokens."""
    inputs = batch(8)

    def flops(adapted: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            adapted(**inputs).loss.backward()
        adapted.zero_grad()
        return counter.get_total_flops()

    def dense() -> Any:
        return load_base(model_config(tiny_llava, "none"))[0]

    adapted = with_past(dense(), 64)
    beside = flops(adapted)
    activate(adapted, [STAGE], STAGE, "B")
    alone = flops(adapted)
    activate(adapted, [STAGE], STAGE, "both")
    assert alone < flops(adapted), "training A as well takes its gradient's product"
    with past_in_base(adapted, [ACCUMULATED]):
        activate(adapted, [STAGE], STAGE, "B")
        inside = flops(adapted)
    assert alone < inside < alone + 0.6 * (beside - alone)
