"""Protected subspaces: energy thresholds, projection, extension (E1, E3, E8) against full SVDs."""

import pytest
import torch

from mllm_keeplora.linalg.subspace import (
    extend_basis,
    orthonormality_error,
    principal_basis,
    project_to_residual,
)

SHAPES = [(48, 32), (32, 48), (40, 40)]


def matrix(rows: int, columns: int, seed: int = 0, decay: float = 0.9) -> torch.Tensor:
    """A matrix with singular values decay^i."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator)).Q
    return (u * decay ** torch.arange(n)) @ v.T


def basis(in_features: int, k: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(in_features, k, generator=generator)).Q


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.2, 0.6, 0.85, 0.99])
def test_principal_basis_is_the_smallest_that_reaches_the_energy(shape: tuple[int, int], energy: float) -> None:
    weight = matrix(*shape)
    energies = torch.linalg.svdvals(weight.double()).square()
    k = principal_basis(weight, energy).shape[1]
    assert energies[:k].sum() >= energy * energies.sum() * (1 - 1e-6)
    assert energies[: k - 1].sum() < energy * energies.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_principal_basis_spans_the_leading_right_singular_vectors(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    found = principal_basis(weight, 0.85)
    expected = torch.linalg.svd(weight.double()).Vh[: found.shape[1]].T
    assert found.dtype == torch.float32
    assert orthonormality_error(found) < 1e-5
    torch.testing.assert_close(
        (expected.T @ found.double()).abs(), torch.eye(found.shape[1]).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("energy, k", [(0.6, 1), (0.6001, 2), (0.9, 2), (0.9001, 3), (1.0, 3)])
@pytest.mark.parametrize("wide", [False, True])
def test_principal_basis_at_the_boundary(energy: float, k: int, wide: bool) -> None:
    """Squared singular values 6, 3, 1: the first direction holds exactly 60 %."""
    weight = torch.zeros(8, 5)
    weight[:3, :3] = torch.diag(torch.tensor([6.0, 3.0, 1.0]).sqrt())
    assert principal_basis(weight.T if wide else weight, energy).shape[1] == k


def test_principal_basis_of_zeros_is_empty() -> None:
    assert principal_basis(torch.zeros(4, 6), 0.6).shape == (6, 0)


def test_principal_basis_takes_half_precision_weights() -> None:
    weight = matrix(32, 24)
    assert principal_basis(weight.bfloat16(), 0.6).dtype == torch.float32


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.01, float("nan")])
def test_energy_outside_the_unit_interval_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        principal_basis(torch.eye(4), energy)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        extend_basis(torch.zeros(4, 0), torch.eye(4), energy)


def test_projection_leaves_nothing_inside_and_everything_outside() -> None:
    m = basis(32, 10)
    outside = torch.randn(6, 32) @ (torch.eye(32) - m @ m.T)
    # Nearly all energy inside: the case in which a single fp32 projection leaks.
    gradient = 1e4 * torch.randn(6, 10) @ m.T + outside
    residual = project_to_residual(gradient, m)
    assert (residual @ m).norm() / residual.norm() < 1e-4
    assert (residual - outside).norm() / outside.norm() < 5e-2
    torch.testing.assert_close(project_to_residual(outside, m), outside, atol=1e-5, rtol=0)


def test_projection_on_an_empty_basis_is_the_identity() -> None:
    gradient = torch.randn(3, 8)
    assert torch.equal(project_to_residual(gradient, torch.zeros(8, 0)), gradient)


@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_extend_basis_follows_gpm(k: int, energy: float) -> None:
    """Energy inside M counts first; then the fewest leading residual directions that reach the threshold."""
    gradient, m = matrix(40, 24, seed=1, decay=0.7), basis(24, k)
    extended = extend_basis(m, gradient, energy)
    assert torch.equal(extended[:, :k], m)
    assert orthonormality_error(extended) < 1e-5
    total = gradient.double().square().sum()
    residual = torch.linalg.svdvals(gradient.double() @ (torch.eye(24).double() - m.double() @ m.double().T)).square()
    inside = total - residual.sum()
    added = extended.shape[1] - k
    assert inside + residual[:added].sum() >= energy * total * (1 - 1e-5)
    assert added == 0 or inside + residual[: added - 1].sum() < energy * total * (1 - 1e-7)


def test_extend_basis_adds_nothing_for_a_covered_gradient() -> None:
    m = basis(24, 8)
    gradient = torch.randn(10, 8) @ m.T
    assert extend_basis(m, gradient, 1.0).shape == (24, 8)


def test_extend_basis_refers_to_the_given_total() -> None:
    gradient = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    empty = torch.zeros(3, 0)
    assert extend_basis(empty, gradient, 0.6).shape[1] == 1  # 9 of 14
    assert extend_basis(empty, gradient, 0.6, total_energy=20.0).shape[1] == 2  # 12 of 20 wanted
    assert extend_basis(empty, gradient, 0.9, total_energy=100.0).shape[1] == 3  # all there is


def test_a_full_basis_cannot_grow() -> None:
    assert extend_basis(torch.eye(6), torch.randn(4, 6), 1.0).shape == (6, 6)


def test_nan_is_refused() -> None:
    broken = torch.full((3, 4), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        principal_basis(broken, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        project_to_residual(broken, torch.zeros(4, 0))
