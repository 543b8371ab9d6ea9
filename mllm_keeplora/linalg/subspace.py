"""Protected subspaces on the input side of a linear layer (KeepLoRA++, arXiv 2606.16256, section 3).

A layer y = W x has W in R^{out x in}. Everything protected lives in R^{in}: a basis is a matrix [in, k] with
orthonormal columns, fp32. What an update must not touch is what it would have to read from its input.

Torch only; every decomposition runs in the precision stated beside it with autocast off.
"""

import torch
from torch import Tensor

from mllm_keeplora.linalg.decompositions import leading_eigenvectors, thin_svd
from mllm_keeplora.linalg.energy import check_energy

# Relative slack on energy thresholds: an fp32 Gram matrix gives sums of squares to about 1e-7, so a threshold
# met exactly (energy 0.6 where one direction holds exactly 60 %) would otherwise take one direction too many.
ENERGY_TOLERANCE = 1e-6
# A direction whose energy is below this share of the largest is rounding noise of the decomposition, not
# signal.
RANK_TOLERANCE = 1e-12


def _check_matrix(matrix: Tensor, name: str) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} of shape {tuple(matrix.shape)} has NaN or infinite entries")


def _check_basis(basis: Tensor, in_features: int) -> None:
    if basis.ndim != 2 or basis.shape[0] != in_features:
        raise ValueError(f"basis must be [in = {in_features}, k], got shape {tuple(basis.shape)}")


def smallest_rank(energies: Tensor, target: float) -> int:
    """The smallest k whose leading energies sum to `target`; the number of all of them where even these do not.

    Args:
        energies: [n], squared singular values in descending order, any unit.
        target: sum to reach, in the same unit.
    """
    if energies.numel() == 0 or target <= 0.0:
        return 0
    cumulative = energies.double().clamp(min=0.0).cumsum(0)
    reached = cumulative >= target * (1.0 - ENERGY_TOLERANCE)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else energies.numel()


@torch.no_grad()
def principal_basis(weight: Tensor, energy: float) -> Tensor:
    """Principal subspace of a pre-trained weight (E1).

    W = U S V^T. The basis is V[:, :k], with k the smallest such that sum_{i<=k} s_i^2 >= energy * sum_i s_i^2.

    It is computed from the Gram matrix of W's smaller side. That takes one matrix product and the leading part of one
    symmetric eigenproblem of size min(out, in), not a full SVD. Where the input side is the larger one, the result is
    mapped back through W^T. The official code has three thresholds, one of them a direction short; here is one rule.

    Args:
        weight: [out, in], any float dtype; the weight that the model computes with (dequantised when it is
            4-bit).
        energy: eps_w, fraction in (0, 1].

    Returns:
        [in, k], fp32, orthonormal columns, leading direction first. k = 0 for a weight of zeros.

    Raises:
        ValueError: energy outside (0, 1]; weight not a finite matrix.
    """
    check_energy(energy)
    _check_matrix(weight, "weight")
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.float()
        wide = w.shape[1] > w.shape[0]
        gram = w @ w.T if wide else w.T @ w
        leading = leading_eigenvectors(gram, lambda energies: _rank_that_holds(energies, energy))
        # Orthonormalising after the map back also removes the division by the singular values.
        return orthonormal_columns(w.T @ leading) if wide else leading


def _rank_that_holds(energies: Tensor, share: float) -> int:
    """k of E1, from all squared singular values [n], descending."""
    energies = energies.clamp(min=0.0)
    energies[energies <= RANK_TOLERANCE * energies[0]] = 0.0
    return min(smallest_rank(energies, share * float(energies.double().sum())), int((energies > 0).sum()))


def orthonormal_columns(matrix: Tensor) -> Tensor:
    """Orthonormal basis [n, k] fp32 of the columns of `matrix` [n, k] (k <= n), same order, fp64 Householder
    QR inside.

    Each column keeps its direction up to the columns before it and its sign.
    """
    q, r = torch.linalg.qr(matrix.double())
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).float().contiguous()


@torch.no_grad()
def project_to_residual(gradient: Tensor, basis: Tensor) -> Tensor:
    """Residual part of a gradient, G (I - M M^T) (E3).

    G is projected twice. Where most of it lies inside M, one fp32 projection leaks 5e-6; the second takes that to 3e-7.

    Args:
        gradient: [rows, in]; a full gradient (rows = out) or a sketch of one (rows = q), the projection is
            the same.
        basis: M, [in, k], orthonormal columns; k may be 0.

    Returns:
        [rows, in], fp32.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_matrix(gradient, "gradient")
    _check_basis(basis, gradient.shape[1])
    with torch.autocast(gradient.device.type, enabled=False):
        residual, m = gradient.float(), basis.to(gradient.device, torch.float32)
        for _ in range(2):
            residual = residual - (residual @ m) @ m.T
        return residual


@torch.no_grad()
def extend_basis(basis: Tensor, gradient: Tensor, energy: float, total_energy: float | None = None) -> Tensor:
    """Adds the dominant feature directions of a task to the protected basis (E8; GPM, arXiv 2103.09762, eq.
    8-9).

    The leading right singular vectors of G (I - M M^T) join M until the energy of G inside the extended basis
    reaches energy * total. What M already holds counts first, so nothing is added for a task that M covers.

    Args:
        basis: M, [in, k], orthonormal columns.
        gradient: G, [rows, in]; a full gradient or a sketch.
        energy: eps_f, fraction in (0, 1].
        total_energy: the 100 % that `energy` refers to, a squared Frobenius norm in the units of `gradient`; None
            stands for ||G||_F^2. Where it exceeds what `gradient` holds, all directions may be used up too early.

    Returns:
        [in, k'], fp32, k' >= k, orthonormal columns; its first k columns are `basis`.

    Raises:
        ValueError: energy outside (0, 1], shapes that do not fit, a gradient with NaN, a negative total.
    """
    check_energy(energy)
    residual = project_to_residual(gradient, basis)
    captured_total = float(gradient.double().square().sum())
    total = captured_total if total_energy is None else float(total_energy)
    if total < 0.0:
        raise ValueError(f"total_energy must not be negative, got {total}")
    inside = captured_total - float(residual.double().square().sum())
    directions, energies = residual_directions(residual, basis, floor=RANK_TOLERANCE * captured_total)
    added = smallest_rank(energies, energy * total * (1.0 - ENERGY_TOLERANCE) - inside)
    return append_columns(basis, directions[:, :added])


def residual_directions(residual: Tensor, basis: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Right singular vectors of a projected gradient, orthonormal to the basis it was projected against.

    Args:
        residual: [rows, in], as `project_to_residual` returns it.
        basis: M, [in, k].
        floor: energies (squared singular values) at or below it are noise of the projection and are dropped.

    Returns:
        (directions [in, n] fp32, energies [n] fp32, descending), n <= min(rows, in - k).
    """
    s, vh = thin_svd(residual.float())
    energies = s.square()
    n = min(int((energies > floor).sum()), residual.shape[1] - basis.shape[1])
    return orthonormal_complement(vh[:n].T, basis), energies[:n]


def orthonormal_complement(columns: Tensor, basis: Tensor) -> Tensor:
    """Orthonormalises `columns` [in, n] inside the complement of `basis` [in, k], in fp64, twice; returns
    [in, n] fp32.

    Twice because normalising a column whose residual is small scales its leakage up with it.
    """
    q, m = columns.double(), basis.to(columns.device).double()
    for _ in range(2):
        q = q - m @ (m.T @ q)
        q = orthonormal_columns(q).double()
    return q.float()


def append_columns(basis: Tensor, directions: Tensor) -> Tensor:
    """[in, k] and [in, n] -> [in, k + n], fp32, on the device of `directions`."""
    return torch.cat([basis.to(directions.device, torch.float32), directions.float()], dim=1)


def orthonormality_error(basis: Tensor) -> float:
    """Largest entry of |M^T M - I|, fp64 product; 0.0 for an empty basis."""
    if basis.shape[1] == 0:
        return 0.0
    m = basis.double()
    eye = torch.eye(m.shape[1], dtype=m.dtype, device=m.device)
    return float((m.T @ m - eye).abs().max())
