"""Decompositions that a GPU's solver may fail at: tried again in fp64 on the CPU, and looked at.

cuSOLVER and MAGMA report no convergence, or an internal error, for matrices that LAPACK in fp64 takes; some of them
hand back NaN without a word.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mllm_keeplora.errors import KeepLoRAError

# Largest entry of |V^T V - I| of fp64 vectors that were rounded to fp32: rounding gives below 1e-6 at width 11008.
ORTHONORMALITY_TOLERANCE = 1e-5
_SOLVERS = ("cusolver", "cublas", "magma", "hipsolver")  # what their errors name, which have no class of their own


class DecompositionError(KeepLoRAError, RuntimeError):
    """A matrix that could not be decomposed in fp64 either."""


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of a symmetric matrix [n, n] fp32.

    Raises:
        DecompositionError: neither the device nor fp64 on the CPU gives orthonormal vectors.
    """
    values, vectors = _tried(torch.linalg.eigh, matrix)
    return values, vectors


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
        if bool(torch.isfinite(vectors).all()):
            return values, vectors
        reason = "vectors with NaN"
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
    return values.to(matrix), vectors.to(matrix)


def _said(matrix: Tensor, first: str, second: str) -> str:
    return (
        f"a matrix {list(matrix.shape)} with entries up to {float(matrix.abs().max()):.1e} cannot be decomposed: on "
        f"{matrix.device} {first}; in fp64 on the CPU {second}. Look for values that are far too large in the base's "
        "weights or in the last stage's update"
    )
