"""Exact folding: the sum of all stages' updates as one pair of low-rank factors (E7)."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def fold_factors(stages: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Concatenates LoRA factors along the rank: `sum_t s_t B_t A_t = [s_1 B_1 .. s_T B_T] [A_1; ..; A_T]`.

    Nothing is recompressed or requantised, so the past is kept bit for bit up to the fp32 product s_t B_t. The
    scale is absorbed in B. So the folded adapter has scale 1, which is alpha = rank for PEFT.

    Args:
        stages: (A [r_t, in], B [out, r_t], s_t) in the order of learning; the accumulated factors come first
            with s = 1.

    Returns:
        (A [R, in], B [out, R]), fp32, R the sum of the ranks.

    Raises:
        ValueError: no stage, or factors whose shapes do not fit.
    """
    if not stages:
        raise ValueError("fold_factors needs at least one stage")
    in_features, out_features = stages[0][0].shape[1], stages[0][1].shape[0]
    for number, (a, b, _) in enumerate(stages):
        if a.shape[1] != in_features or b.shape[0] != out_features or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"factors {number} do not fit: A {tuple(a.shape)}, B {tuple(b.shape)}, expected A "
                f"[r, {in_features}] and "
                f"B [{out_features}, r]"
            )
    return (
        torch.cat([a.float() for a, _, _ in stages], dim=0),
        torch.cat([b.float() * scale for _, b, scale in stages], dim=1),
    )
