"""Decompositions that a GPU's solver may fail at: tried again in fp64 on the CPU, and looked at.

cuSOLVER and MAGMA report no convergence, or an internal error, for matrices that LAPACK in fp64 takes; some of them
hand back NaN without a word.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, lapack
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mllm_keeplora.errors import KeepLoRAError

# Largest entry of |V^T V - I| of fp64 vectors that were rounded to fp32: rounding gives below 1e-6 at width 11008.
ORTHONORMALITY_TOLERANCE = 1e-5
# Width from which a part of the eigenvectors is cheaper on a CPU than all of them (docs/log.md).
WIDE = 2048
_SOLVERS = ("cusolver", "cublas", "magma", "hipsolver")  # what their errors name, which have no class of their own


class DecompositionError(KeepLoRAError, RuntimeError):
    """A matrix that could not be decomposed in fp64 either."""


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of a symmetric matrix [n, n] fp32.

    Raises:
        DecompositionError: neither the device nor fp64 on the CPU gives orthonormal vectors.
    """
    return _tried(torch.linalg.eigh, matrix)


def leading_eigenvectors(matrix: Tensor, rank: Callable[[Tensor], int]) -> Tensor:
    """The leading eigenvectors of a symmetric matrix, as many as its eigenvalues ask for.

    On a CPU a wide matrix is brought to tridiagonal form once. All its eigenvalues follow from that form, and then only
    the eigenvectors that are asked for are computed and turned back. Everywhere else all of them are computed.

    Args:
        matrix: [n, n] fp32.
        rank: how many, from all eigenvalues [n], descending.

    Returns:
        [n, k] fp32, orthonormal columns, largest eigenvalue first.

    Raises:
        DecompositionError: as for `symmetric_eigen`.
    """
    if matrix.device.type == "cpu" and len(matrix) >= WIDE:
        # SciPy's threads are not torch's: a thread a core, and where cores are busy with other work each step of the
        # reduction waits for all of them.
        try:
            with threadpool_limits(torch.get_num_threads(), user_api="blas"):
                return _leading_by_tridiagonal_form(matrix, rank)
        except (np.linalg.LinAlgError, ValueError):
            pass  # no convergence, which the other algorithm need not share; or entries that are no numbers, said there
    values, vectors = symmetric_eigen(matrix)
    return vectors.flip(1)[:, : rank(values.flip(0))].contiguous()


def _leading_by_tridiagonal_form(matrix: Tensor, rank: Callable[[Tensor], int]) -> Tensor:
    # LAPACK's own steps. The reduction is fp32, as in torch's eigh; what is solved in fp64 costs little.
    n = len(matrix)
    work = int(lapack.ssytrd_lwork(n, lower=1)[0])
    reflectors, diagonal, beside, scales, _ = lapack.ssytrd(matrix.numpy().T, lower=1, lwork=work)
    form = diagonal.astype(np.float64), beside.astype(np.float64)
    values = eigh_tridiagonal(*form, eigvals_only=True, lapack_driver="sterf")
    k = rank(torch.from_numpy(values[::-1].copy()).float())
    if k == 0:
        return matrix.new_zeros(n, 0)
    _, vectors = eigh_tridiagonal(*form, select="i", select_range=(n - k, n - 1), lapack_driver="stemr")
    vectors = np.asfortranarray(vectors[:, ::-1], dtype=np.float32)
    turned, _, _ = lapack.sormqr("L", "N", reflectors[1:, :-1], scales, vectors[1:], 64 * k)
    return torch.from_numpy(np.concatenate([vectors[:1], turned])).contiguous()


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [k], descending, and right singular vectors [k, in] as rows, of a matrix [rows, in] fp32.

    Raises:
        DecompositionError: as for `symmetric_eigen`.
    """

    def decompose(given: Tensor) -> tuple[Tensor, Tensor]:
        _, values, rows = torch.linalg.svd(given, full_matrices=False)
        return values, rows

    return _tried(decompose, matrix)


def _tried(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = decompose(matrix)
        if _are_finite(values, vectors):
            return values, vectors
        reason = "values or vectors with NaN"
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        if not isinstance(error, LinAlgError) and not any(s in str(error).lower() for s in _SOLVERS):
            raise
        reason = str(error).splitlines()[0]
    try:
        values, vectors = decompose(matrix.double().cpu())
    except LinAlgError as error:
        raise DecompositionError(_said(matrix, reason, str(error).splitlines()[0])) from error
    thin = vectors if vectors.shape[0] >= vectors.shape[1] else vectors.T
    off = float((thin.T @ thin - torch.eye(thin.shape[1], dtype=thin.dtype)).abs().max()) if thin.numel() else 0.0
    if not off <= ORTHONORMALITY_TOLERANCE:  # NaN is not below either
        raise DecompositionError(_said(matrix, reason, f"vectors that are orthonormal up to {off:.1e} alone"))
    if not _are_finite(values, vectors):
        raise DecompositionError(_said(matrix, reason, "values with NaN"))
    return values.to(matrix), vectors.to(matrix)


def _are_finite(values: Tensor, vectors: Tensor) -> bool:
    """Of a diagonal matrix with NaN the vectors are sound."""
    return bool(torch.isfinite(values).all() and torch.isfinite(vectors).all())


def _said(matrix: Tensor, first: str, second: str) -> str:
    return (
        f"a matrix {list(matrix.shape)} with entries up to {float(matrix.abs().max()):.1e} cannot be decomposed: on "
        f"{matrix.device} {first}; in fp64 on the CPU {second}. Look for values that are far too large in the base's "
        "weights or in the last stage's update"
    )
