"""Probe gradients against autograd's full-weight gradients, on plain and 4-bit bases, both towers (E2)."""

import copy
from typing import Any

import pytest
import torch

from mllm_keeplora.modeling.adapters import ACCUMULATED, attach
from mllm_keeplora.modeling.linear4bit import computed_weight
from mllm_keeplora.probes.gradients import (
    GradientError,
    back_project_gradients,
    gaussian_probe,
    sketch_gradients,
)
from tests.modules.conftest import all_targets, batch

COLUMNS = 12


def autograd_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """dL/dW of every target by autograd on a dense copy, L the mean over all supervised tokens."""
    dense = copy.deepcopy(model)
    if getattr(dense, "is_quantized", False):
        dense.dequantize()
    dense.requires_grad_(True)
    tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
    for b in batches:
        (dense(**b, num_items_in_batch=1).loss / tokens).backward()
    return {t.name: dense.get_submodule(t.name).weight.grad for t in all_targets(model)}


def columns(model: Any) -> dict[str, int]:
    return {t.name: COLUMNS for t in all_targets(model)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_a_probe_is_autograds_gradient_sketched_on_every_module(model: Any) -> None:
    batches = [batch(3, 0), batch(2, 1)]
    sketches = sketch_gradients(model, all_targets(model), columns(model), lambda: batches, seed=7)
    exact = autograd_gradients(model, batches)
    for target in all_targets(model):
        expected = gaussian_probe(target, COLUMNS, 7).T @ exact[target.name]
        assert relative_error(sketches[target.name], expected) < 1e-5, target.name


def test_the_refinement_pass_is_the_gradient_along_its_directions(model: Any) -> None:
    batches, targets = [batch(3)], all_targets(model)
    rows = {t.name: torch.linalg.qr(torch.randn(t.in_features, 5)).Q.T for t in targets}
    found = back_project_gradients(model, rows, {t.name: t.out_features for t in targets}, lambda: batches)
    exact = autograd_gradients(model, batches)
    for target in targets:
        assert relative_error(found[target.name], exact[target.name] @ rows[target.name].T) < 1e-5, target.name


def test_the_gradient_does_not_depend_on_batching(nf4_model: Any) -> None:
    """Batches of unequal numbers of supervised tokens: a mean of means would weigh them wrongly."""
    whole = batch(4)
    whole["labels"][0, :22] = -100
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    targets = all_targets(nf4_model)
    together = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: [whole], seed=0)
    apart = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: parts, seed=0)
    for name, sketch in together.items():
        assert relative_error(apart[name], sketch) < 1e-5, name


def test_gradient_checkpointing_changes_nothing(nf4_model: Any) -> None:
    targets = all_targets(nf4_model)
    plain = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: [batch()], seed=0)
    nf4_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: [batch()], seed=0)
    for name, sketch in plain.items():
        assert relative_error(checkpointed[name], sketch) < 1e-6, name


def test_a_probe_leaves_no_trace(model: Any) -> None:
    before = model(**batch()).logits
    sketch_gradients(model, all_targets(model), columns(model), lambda: [batch()], seed=0)
    assert not any(model.get_submodule(t.name)._forward_hooks for t in all_targets(model))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not model.training
    assert torch.equal(model(**batch()).logits, before)


def test_a_probe_beside_the_accumulated_adapter_sees_the_current_model(nf4_model: Any) -> None:
    targets, q = all_targets(nf4_model), columns(nf4_model)
    torch.manual_seed(1)
    factors = {t.name: (0.1 * torch.randn(4, t.in_features), 0.1 * torch.randn(t.out_features, 4)) for t in targets}
    dense = copy.deepcopy(nf4_model)
    dense.dequantize()
    with torch.no_grad():
        for name, (a, b) in factors.items():
            dense.get_submodule(name).weight += b @ a
    expected = sketch_gradients(dense, targets, q, lambda: [batch()], seed=0)
    adapted = attach(nf4_model, ACCUMULATED, factors, dict.fromkeys(factors, 1.0))
    found = sketch_gradients(adapted, targets, q, lambda: [batch()], seed=0)
    for name, sketch in expected.items():
        assert relative_error(found[name], sketch) < 1e-4, name
    assert adapted.active_adapters == [ACCUMULATED]


def test_probes_are_drawn_per_module(nf4_model: Any) -> None:
    first, second = all_targets(nf4_model)[:2]
    assert torch.equal(gaussian_probe(first, 4, 0), gaussian_probe(first, 4, 0))
    assert not torch.equal(gaussian_probe(first, 4, 0), gaussian_probe(second, 4, 0))
    assert not torch.equal(gaussian_probe(first, 4, 0), gaussian_probe(first, 4, 1))


def test_a_sample_without_supervised_tokens_is_an_error(nf4_model: Any) -> None:
    silent = batch()
    silent["labels"][:] = -100
    with pytest.raises(GradientError, match="no supervised token"):
        sketch_gradients(nf4_model, all_targets(nf4_model), columns(nf4_model), lambda: [silent], seed=0)


def test_a_nan_loss_is_an_error(nf4_model: Any) -> None:
    broken = batch()
    broken["pixel_values"][:] = float("nan")
    with pytest.raises(GradientError, match="nan"):
        sketch_gradients(nf4_model, all_targets(nf4_model), columns(nf4_model), lambda: [broken], seed=0)
    assert not any(nf4_model.get_submodule(t.name)._forward_hooks for t in all_targets(nf4_model))


def test_a_module_without_gradient_is_named(nf4_model: Any) -> None:
    """Text alone: the vision tower takes no part."""
    text = {k: v[:, 16:] for k, v in batch().items() if k != "pixel_values"}
    with pytest.raises(GradientError, match="model.vision_tower.*received no gradient"):
        sketch_gradients(nf4_model, all_targets(nf4_model), columns(nf4_model), lambda: [text], seed=0)


def test_gradients_before_and_after_generation_are_equal(nf4_model: Any) -> None:
    """Without the guard, bitsandbytes repacks 4-bit weights in inference on CPUs with AVX512-BF16."""
    targets = all_targets(nf4_model)
    weights = {t.name: computed_weight(nf4_model.get_submodule(t.name)) for t in targets}
    before = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: [batch()], seed=0)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.inference_mode():
        nf4_model.generate(**inputs, max_new_tokens=4, do_sample=False)
    after = sketch_gradients(nf4_model, targets, columns(nf4_model), lambda: [batch()], seed=0)
    for target in targets:
        assert torch.equal(before[target.name], after[target.name]), target.name
        assert torch.equal(weights[target.name], computed_weight(nf4_model.get_submodule(target.name)))
