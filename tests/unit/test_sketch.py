"""Sketched decisions beside exact ones."""

import pytest
import torch

from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import extend_basis_from_sketch, refined_directions
from mllm_keeplora.linalg.subspace import extend_basis, orthonormality_error


def gradient(decay: float = 0.8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(96, 64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    return (u * decay ** torch.arange(64)) @ v.T


def sketch(g: torch.Tensor, q: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(q, g.shape[0], generator=torch.Generator().manual_seed(seed)) @ g


def captured(g: torch.Tensor, basis: torch.Tensor) -> float:
    return float((g @ basis).square().sum() / g.square().sum())


@pytest.mark.parametrize("energy", [0.9, 0.95, 0.99])
def test_threshold_decided_on_held_out_rows_agrees_with_the_exact_one(energy: float) -> None:
    g, m = gradient(), torch.zeros(64, 0)
    result = extend_basis_from_sketch(m, sketch(g, 64), energy)
    exact = extend_basis(m, g, energy)
    assert not result.saturated
    assert captured(g, result.basis) >= energy - 0.02
    assert abs(result.basis.shape[1] - exact.shape[1]) <= max(3, exact.shape[1] // 2)
    assert result.captured == pytest.approx(captured(g, result.basis), abs=0.02)
    assert orthonormality_error(result.basis) < 1e-5


def test_the_old_basis_comes_first_and_counts_first() -> None:
    g = gradient()
    m = extend_basis(torch.zeros(64, 0), g, 0.995)
    result = extend_basis_from_sketch(m, sketch(g, 64), 0.99)
    assert torch.equal(result.basis, m)


def test_saturation_is_reported() -> None:
    flat = torch.linalg.qr(torch.randn(96, 64)).Q  # all 64 directions alike: 12 building rows cannot hold 99 %
    result = extend_basis_from_sketch(torch.zeros(64, 0), sketch(flat, 16), 0.99)
    assert result.saturated
    assert result.captured < 0.99
    assert result.basis.shape[1] == 12


def test_a_gradient_of_zero_adds_nothing() -> None:
    result = extend_basis_from_sketch(torch.zeros(8, 0), torch.zeros(4, 8), 0.99)
    assert result.basis.shape == (8, 0)
    assert not result.saturated


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="q >= 2"):
        extend_basis_from_sketch(torch.zeros(8, 0), torch.randn(1, 8), 0.99)


def test_refinement_captures_at_least_as_much_and_nearly_the_optimum() -> None:
    g, m, rank = gradient(0.9), torch.linalg.qr(torch.randn(64, 10)).Q, 8
    y = sketch(g, 32)
    one_pass = lora_a_from_gradient(y, m, rank)
    rows = lora_a_from_gradient(y, m, 32)
    two_pass = lora_a_from_gradient(refined_directions(rows, g @ rows.T), m, rank)
    exact = lora_a_from_gradient(g, m, rank)
    energies = [float((g @ a.T).square().sum()) for a in (one_pass, two_pass, exact)]
    assert energies[0] < energies[1] <= energies[2] * (1 + 1e-6)
    assert energies[1] > 0.97 * energies[2]
