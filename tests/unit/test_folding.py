import pytest
import torch

from mllm_keeplora.linalg.folding import fold_factors


def stage(rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.randn(rank, 12), torch.randn(9, rank), scale


def test_folding_is_the_sum_of_the_updates() -> None:
    stages = [stage(4, 0.5), stage(1, 2.0), stage(3, 1.0)]
    a, b = fold_factors(stages)
    assert a.shape == (8, 12)
    assert b.shape == (9, 8)
    expected = sum(scale * b_t.double() @ a_t.double() for a_t, b_t, scale in stages)
    torch.testing.assert_close(b.double() @ a.double(), expected, atol=1e-5, rtol=1e-6)


def test_folding_stage_by_stage_keeps_the_past_bit_for_bit() -> None:
    first, second = stage(4, 0.5), stage(3, 0.25)
    past = fold_factors([first])
    at_once, in_turn = fold_factors([first, second]), fold_factors([(*past, 1.0), second])
    assert all(torch.equal(x, y) for x, y in zip(at_once, in_turn, strict=True))


def test_nothing_to_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fold_factors([])


def test_factors_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="factors 1 do not fit"):
        fold_factors([stage(4, 1.0), (torch.randn(2, 11), torch.randn(9, 2), 1.0)])
