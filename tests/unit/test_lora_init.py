"""The frozen factor A (E4, E9): optimal, orthonormal, and orthogonal to what is protected."""

import pytest
import torch

from mllm_keeplora.linalg.lora_init import lora_a_from_gradient


def protected(in_features: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(in_features, k, generator=generator)).Q


@pytest.mark.parametrize("rows", [8, 40])
def test_a_is_the_best_rank_r_row_space_of_the_residual(rows: int) -> None:
    gradient, m = torch.randn(rows, 32), protected(32, 12)
    a = lora_a_from_gradient(gradient, m, 4)
    residual = gradient.double() @ (torch.eye(32).double() - m.double() @ m.double().T)
    captured = (residual @ a.double().T).square().sum()
    best = torch.linalg.svdvals(residual)[:4].square().sum()
    assert captured >= best * (1 - 1e-6)


def test_a_is_orthonormal_and_does_not_read_the_protected_subspace() -> None:
    m = protected(64, 40)
    # Nearly all of the gradient lies inside M: what is left is small, and A's leakage must not grow with it.
    gradient = 1e3 * torch.randn(20, 40) @ m.T + torch.randn(20, 64)
    a = lora_a_from_gradient(gradient, m, 8)
    assert a.dtype == torch.float32
    assert (a.double() @ a.double().T - torch.eye(8).double()).abs().max() < 1e-6
    assert (a.double() @ m.double()).norm() / a.double().norm() < 1e-6


@pytest.mark.parametrize("k, rank, expected", [(28, 8, 4), (32, 8, 0), (0, 8, 8)])
def test_rank_is_bounded_by_the_residual_space(k: int, rank: int, expected: int) -> None:
    assert lora_a_from_gradient(torch.randn(20, 32), protected(32, k), rank).shape == (expected, 32)


def test_rank_is_bounded_by_the_gradients_own_rank() -> None:
    gradient = torch.randn(20, 3) @ torch.randn(3, 32)
    assert lora_a_from_gradient(gradient, protected(32, 4), 8).shape == (3, 32)


def test_a_gradient_inside_the_protected_subspace_leaves_nothing() -> None:
    m = protected(32, 10)
    assert lora_a_from_gradient(torch.randn(20, 10) @ m.T, m, 4).shape == (0, 32)


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        lora_a_from_gradient(torch.randn(4, 4), torch.zeros(4, 0), 0)
