"""A solver that fails is tried again in fp64 on the CPU; what neither gives is an error, and nothing else is hidden."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.linalg.decompositions import DecompositionError, leading_eigenvectors, symmetric_eigen, thin_svd
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.subspace import orthonormality_error, principal_basis

# As torch says it of cuSOLVER and MAGMA; the last is silent.
FAILURES: dict[str, Any] = {
    "no convergence": torch.linalg.LinAlgError(
        "linalg.eigh: The algorithm failed to converge because the input matrix is ill-conditioned or has too many "
        "repeated eigenvalues (error code: 4095)."
    ),
    "cusolver": RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd(...)`"),
    "magma": RuntimeError("MAGMA eigh : the algorithm did not converge"),
    "silent": None,
}


@pytest.fixture(params=FAILURES)
def failing_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """fp32 decompositions fail; the dtypes that were tried."""
    tried: list[torch.dtype] = []
    error = FAILURES[request.param]
    for name in ("eigh", "svd"):
        own = getattr(torch.linalg, name)

        def decompose(matrix: Tensor, own: Any = own, **settings: Any) -> Any:
            tried.append(matrix.dtype)
            if matrix.dtype == torch.float64:
                return own(matrix, **settings)
            if error is not None:
                raise error
            return [torch.full_like(part, math.nan) for part in own(matrix, **settings)]

        monkeypatch.setattr(torch.linalg, name, decompose)
    return tried


def test_the_result_is_that_of_the_device(failing_device: list[torch.dtype]) -> None:
    """The basis of a weight (eigh) and A (svd), beside what they are where nothing fails."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(24, 40), torch.randn(12, 40)
    basis, a = principal_basis(weight, 0.6), lora_a_from_gradient(gradient, torch.zeros(40, 0), 4)
    assert set(failing_device) == {torch.float32, torch.float64}
    u = torch.linalg.svd(weight.double()).Vh[: basis.shape[1]].T.float()
    assert torch.linalg.matrix_norm(u @ u.T - basis @ basis.T, 2) < 1e-5
    assert basis.dtype == a.dtype == torch.float32 and orthonormality_error(basis) < 1e-6
    v = torch.linalg.svd(gradient.double()).Vh[:4].float()
    assert torch.linalg.matrix_norm(v.T @ v - a.T @ a, 2) < 1e-5


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3), (0, 5)])
def test_shapes_are_those_of_the_library(shape: tuple[int, int], failing_device: list[torch.dtype]) -> None:
    values, rows = thin_svd(torch.randn(shape))
    assert values.shape == (min(shape),) and rows.shape == (min(shape), shape[1])


def test_what_fp64_cannot_do_either_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError(f"no convergence in {matrix.dtype}")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(DecompositionError, match=r"\[3, 3\] with entries up to 2.0e\+00.*cpu no.*float32.*float64"):
        symmetric_eigen(2 * torch.eye(3))
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (m[0], m * (math.nan if m.dtype == torch.float32 else 1.1)))
    with pytest.raises(DecompositionError, match="orthonormal up to 2.1e-01 alone"):
        symmetric_eigen(torch.eye(3))
    assert issubclass(DecompositionError, KeepLoRAError)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ")])
def test_other_errors_stay_what_they_are(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory is said with what lowers it."""

    def fail(matrix: Tensor) -> Any:
        raise error

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(type(error)) as raised:
        symmetric_eigen(torch.eye(3))
    assert raised.value is error


def test_where_nothing_fails_the_bits_are_the_librarys() -> None:
    matrix = torch.randn(20, 20)
    values, vectors = symmetric_eigen(matrix @ matrix.T)
    expected = torch.linalg.eigh(matrix @ matrix.T)
    assert torch.equal(values, expected.eigenvalues) and torch.equal(vectors, expected.eigenvectors)
    assert torch.equal(thin_svd(matrix)[1], torch.linalg.svd(matrix, full_matrices=False).Vh)


# Spectra of what is decomposed: [n] eigenvalues, descending.
SPECTRA: dict[str, Any] = {
    "power law": lambda n: 1.0 / torch.arange(1, n + 1) ** 2,
    "flat": lambda n: torch.linspace(1.0, 0.1, n),
    "all the same": torch.ones,
    "two clusters": lambda n: torch.cat([torch.full((n // 2,), 3.0), torch.full((n - n // 2,), 1.0)]),
    "a few and zeros": lambda n: torch.cat([torch.tensor([5.0, 5.0, 1.0]), torch.zeros(n - 3)]),
    "zeros": torch.zeros,
    "large": lambda n: torch.linspace(1e12, 1e6, n),
    "small": lambda n: torch.linspace(1e-12, 1e-20, n),
}


@pytest.mark.parametrize("share", [0.6, 0.999])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_part_of_the_eigenvectors_is_that_of_them_all(
    spectrum: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tridiagonal form: the same energy, orthonormal, and eigenvectors."""
    n = 160
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    exact = SPECTRA[spectrum](n).double()
    matrix = (turn * exact @ turn.T).float()
    matrix = (matrix + matrix.T) / 2

    def rank(energies: Tensor) -> int:
        assert energies.shape == (n,) and bool((energies.diff() <= 0).all())
        return int((energies.double().cumsum(0) < share * energies.double().sum()).sum() + 1) if energies[0] > 0 else 0

    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.symmetric_eigen", None)
    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.WIDE", n)
    found = leading_eigenvectors(matrix, rank)
    monkeypatch.undo()
    expected = leading_eigenvectors(matrix, rank)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert abs(found.shape[1] - expected.shape[1]) <= 1  # a threshold may be met up to rounding
    assert orthonormality_error(found) < 1e-5
    k, columns = found.shape[1], found.double()
    assert torch.allclose(matrix.double() @ columns, columns * exact[:k], rtol=0, atol=1e-5 * float(exact[0]))
    assert float((columns.T @ matrix.double() @ columns).trace()) >= float(exact[:k].sum()) * (1 - 1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_is_computed_on_torchs_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy would take a thread a core, and 12 times as long where another process has the cores."""
    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.WIDE", 2)
    before, found = torch.get_num_threads(), set[int]()

    def rank(energies: Tensor) -> int:
        found.update(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return 1

    try:
        torch.set_num_threads(threads)
        with threadpool_limits(3, user_api="blas"):
            leading_eigenvectors(torch.eye(6), rank)
    finally:
        torch.set_num_threads(before)
    assert found == {threads}


@pytest.mark.parametrize("wide", [2, 10_000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_no_numbers_are_said_in_one_way(
    value: float, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.WIDE", wide)
    for matrix in (torch.eye(6), torch.eye(6) + 1, torch.full((6, 6), value)):
        matrix[3, 3] = value
        with pytest.raises(DecompositionError, match="cannot be decomposed"):
            leading_eigenvectors(matrix, lambda energies: 2)


def test_where_the_tridiagonal_form_cannot_be_solved_all_eigenvectors_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*form: Any, **settings: Any) -> Any:
        raise np.linalg.LinAlgError("stemr did not converge")

    matrix = torch.randn(20, 20)
    expected = leading_eigenvectors(matrix @ matrix.T, lambda energies: 4)
    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.eigh_tridiagonal", fail)
    monkeypatch.setattr("mllm_keeplora.linalg.decompositions.WIDE", 20)
    assert torch.equal(leading_eigenvectors(matrix @ matrix.T, lambda energies: 4), expected)
