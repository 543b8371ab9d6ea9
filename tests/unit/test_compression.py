"""Truncated factors are the best of their rank, and their error is what is said."""

import pytest
import torch

from mllm_keeplora.linalg.compression import product_difference, truncate_factors

SHAPES = [(24, 40, 12), (40, 24, 12), (8, 30, 12), (30, 8, 12), (8, 8, 20)]  # out, in, r


def factors(out: int, inside: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out * inside)
    return torch.randn(r, inside, generator=generator), torch.randn(out, r, generator=generator)


@pytest.mark.parametrize(("out", "inside", "r"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 8, 64])
def test_truncation_is_the_best_of_its_rank(out: int, inside: int, r: int, rank: int) -> None:
    """Against the SVD of the whole product: no product of that rank is closer."""
    a, b = factors(out, inside, r)
    a_2, b_2 = truncate_factors(a, b, rank)
    whole = b.double() @ a.double()
    least = float(torch.linalg.svdvals(whole)[rank:].norm())
    found = float((b_2.double() @ a_2.double() - whole).norm())
    assert len(a_2) == b_2.shape[1] == min(rank, r, out, inside)
    assert found == pytest.approx(least, rel=1e-4, abs=1e-5 * float(whole.norm()))
    assert torch.allclose(a_2.norm(dim=1), b_2.norm(dim=0), rtol=1e-3)  # 16 bits suit both factors alike


@pytest.mark.parametrize(("out", "inside", "r"), SHAPES)
def test_the_difference_of_products_is_that_of_the_matrices(out: int, inside: int, r: int) -> None:
    exact = factors(out, inside, r)
    for other in (truncate_factors(*exact, 3), tuple(factor.bfloat16() for factor in exact)):
        wholes = [b.double() @ a.double() for a, b in (exact, other)]
        difference, norm = product_difference(exact, other)  # type: ignore[arg-type]
        assert difference == pytest.approx(float((wholes[1] - wholes[0]).norm()), rel=1e-9)
        assert norm == pytest.approx(float(wholes[0].norm()), rel=1e-9)


def test_padding_with_zeros_changes_nothing() -> None:
    a, b = factors(10, 12, 4)
    padded = torch.cat([a, torch.zeros(3, 12)]), torch.cat([b, torch.zeros(10, 3)], dim=1)
    assert product_difference((a, b), padded)[0] < 1e-12
