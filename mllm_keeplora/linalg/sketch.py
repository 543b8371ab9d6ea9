"""Randomised sketches of a task gradient: Y = Omega^T G (E2), and what can be decided from them (E4, E8).

A probe (see `gradients`) yields Y [q, in] instead of G [out, in]. Its row space approximates G's input-side
range, so directions are read off Y. Energies are not: E||Y||_F^2 = q ||G||_F^2 holds only on average, and
real task gradients have a stable rank near 1, where a single draw is 8-20 % off. The energy threshold is
therefore decided on rows of Y that took no part in choosing the directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mllm_keeplora.linalg.decompositions import thin_svd
from mllm_keeplora.linalg.energy import check_energy
from mllm_keeplora.linalg.subspace import (
    ENERGY_TOLERANCE,
    RANK_TOLERANCE,
    append_columns,
    extend_basis,
    project_to_residual,
    residual_directions,
)

# Share of a sketch's rows held out to decide the energy threshold: a relative error of about sqrt(2 / q2) on
# the residual.
HELD_OUT_SHARE = 0.25


class ExtendedBasis(NamedTuple):
    """Result of `extend_basis_from_sketch`."""

    basis: Tensor  # [in, k'] fp32, first k columns the old basis
    captured: float  # held-out share of the energy inside the extended basis, a fraction
    saturated: bool  # all directions of the sketch are used and the threshold is still not reached


@torch.no_grad()
def refined_directions(projected_sketch: Tensor, back_projection: Tensor) -> Tensor:
    """One Rayleigh-Ritz step: orders and sharpens sketched directions by a second probe pass.

    Args:
        projected_sketch: Q^T, [q, in], orthonormal rows spanning the projected sketch (the probe's A in the
            second pass).
        back_projection: G Q, [out, q], the second pass's gradient with respect to B.

    Returns:
        [q, in], a stand-in for G (I - M M^T) with the same leading right singular vectors: diag(s) V^T Q^T.
    """
    s, vh = thin_svd(back_projection.float())
    return (s.unsqueeze(1) * vh) @ projected_sketch


@torch.no_grad()
def extend_basis_from_sketch(basis: Tensor, sketch: Tensor, energy: float) -> ExtendedBasis:
    """E8 on a sketch: directions from one part of its rows, the threshold decided on the held-out rest.

    With Y1 the building rows and Y2 the held-out ones, right singular vectors v of Y1 (I - M M^T) are added
    in order until
    ||Y2 (I - Q Q^T)||_F^2 <= (1 - energy) ||Y2||_F^2, Q the extended basis.

    Args:
        basis: M, [in, k].
        sketch: Y, [q, in], q >= 2.
        energy: eps_f, fraction in (0, 1].

    Returns:
        The extended basis with its held-out captured fraction and whether the sketch was saturated.

    Raises:
        ValueError: energy outside (0, 1], fewer than two rows, shapes that do not fit, NaN.
    """
    check_energy(energy)
    if sketch.shape[0] < 2:
        raise ValueError(
            f"a sketch of {sketch.shape[0]} row cannot be split into building and held-out rows; use q >= 2"
        )
    held_out_rows = max(1, round(sketch.shape[0] * HELD_OUT_SHARE))
    building, held_out = sketch[held_out_rows:].float(), sketch[:held_out_rows].float()
    total = float(held_out.double().square().sum())
    if total == 0.0:
        return ExtendedBasis(basis.float(), 1.0, False)
    floor = RANK_TOLERANCE * float(building.double().square().sum())
    directions, _ = residual_directions(project_to_residual(building, basis), basis, floor)
    remaining = _remaining_energy(project_to_residual(held_out, basis), directions)
    met = remaining <= (1.0 - energy + ENERGY_TOLERANCE) * total
    added = int(met.int().argmax()) if bool(met.any()) else directions.shape[1]
    captured = 1.0 - float(remaining[added]) / total
    return ExtendedBasis(append_columns(basis, directions[:, :added]), captured, not bool(met.any()))


@torch.no_grad()
def extend_basis_from_covariance(basis: Tensor, sketch: Tensor, energy: float) -> ExtendedBasis:
    """E8 where the energy is that of the covariance C = Y^T Y / q, not of the inputs: ||C||_F^2, as InfLoRA's code has
    it.

    The leading left singular vectors of (I - M M^T) C join M until ||(I - Q Q^T) C||_F^2 <= (1 - energy) ||C||_F^2,
    Q the extended basis. A spectrum falls off twice as fast when it is squared, so the same share needs fewer
    directions. Energies are those of the sketch itself.

    Args:
        basis: M, [in, k].
        sketch: Y, [q, in], of inputs.
        energy: fraction in (0, 1].

    Returns:
        The extended basis and the share of ||C||_F^2 that it holds.

    Raises:
        ValueError: energy outside (0, 1], shapes that do not fit, NaN.
    """
    s, vh = thin_svd(sketch.float())
    rows = (s.square() / len(sketch)).unsqueeze(1) * vh  # K with K^T K = C^2
    extended = extend_basis(basis, rows, energy)
    total = float(rows.double().square().sum())
    left = float(project_to_residual(rows, extended).double().square().sum())
    captured = 1.0 - left / total if total > 0.0 else 1.0
    return ExtendedBasis(extended, captured, captured < energy - ENERGY_TOLERANCE)


def _remaining_energy(residual: Tensor, directions: Tensor) -> Tensor:
    """Energy of `residual` [rows, in] left without the first 0..n of `directions` [in, n]: [n + 1] fp64."""
    per_direction = (residual.double() @ directions.double()).square().sum(0)
    total = residual.double().square().sum()
    left = total - torch.cat([per_direction.new_zeros(1), per_direction.cumsum(0)])
    return left.clamp(min=0.0)
