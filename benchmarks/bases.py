"""Row 1: principal bases of weights of real shapes (E1) beside a full SVD, seconds and exactness.

    python benchmarks/bases.py              a CPU: the ViT's shapes, square ones up to 4096; about 6 minutes
    python benchmarks/bases.py --quick

On a GPU: all shapes of LLaVA-1.5-7B. Beside `principal_basis` stands what the public code does:
`torch.linalg.svd(full_matrices=False)`, of which the first k columns of V are kept, k by the same rule.

Spectra: a power law s_i = 1 / i, and the flat one of a Gaussian matrix. They bracket trained weights: the
first needs 1 to 4 directions for the energies asked for, the second a quarter to two thirds of them all.

A basis is exact when its k is the SVD's, its energy is within 1e-4 of the sum of the k leading squared
singular values (fp64), and its columns are orthonormal to 1e-5. The largest angle to the SVD's basis is
reported only: two singular values that nearly tie at k exchange their directions at no loss of energy.

"With all eigenvectors" is the Gram product and `torch.linalg.eigh`, without a wide weight's map back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from matplotlib.figure import Figure
from measure import Options, Ratio, Row, benchmark, device_name, in_turns, milliseconds, ratio
from torch import Tensor

from mllm_keeplora.linalg.subspace import orthonormality_error, principal_basis, smallest_rank

# [out, in]
GPU_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 1024), (4096, 1024))
CPU_SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (2048, 2048), (4096, 4096))
QUICK_SHAPES = ((96, 64), (64, 96))
SPECTRA = ("power law", "flat")
ENERGIES = (0.6, 0.85)
ONE_ROUND = 4096  # smaller side from which a CPU takes one round: its SVDs take a quarter of a minute each

MAX_ENERGY_LOST = 1e-4
MAX_ORTHONORMALITY_ERROR = 1e-5
WANTED_ON_A_GPU = 20.0


@dataclass(frozen=True)
class Exactness:
    """A basis [in, k] judged against the fp64 spectrum and the SVD's basis.

    Attributes:
        k, svd_k: both ranks.
        energy_lost: 1 - its energy over that of the k leading directions, fraction; rounding makes it
            negative.
        orthonormality: largest entry of |M^T M - I|.
        angle: largest principal angle to the SVD's basis, degrees.
    """

    k: int
    svd_k: int
    energy_lost: float
    orthonormality: float
    angle: float

    @property
    def holds(self) -> bool:
        """Whether the basis counts as exact."""
        return (
            self.k == self.svd_k
            and abs(self.energy_lost) <= MAX_ENERGY_LOST
            and self.orthonormality <= MAX_ORTHONORMALITY_ERROR
        )

    def __str__(self) -> str:
        return (
            f"k {self.k} (SVD {self.svd_k}), energy lost {self.energy_lost:.0e}, orthonormal to "
            f"{self.orthonormality:.0e}, angle {self.angle:.2g} degrees"
        )


def make_weight(shape: tuple[int, int], spectrum: str, device: torch.device) -> Tensor:
    """A random weight [out, in], fp32, of that spectrum."""
    generator = torch.Generator(device).manual_seed(0)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    if spectrum == "flat":
        return gaussian(*shape)
    n = min(shape)
    left, right = (torch.linalg.qr(gaussian(side, n)).Q for side in shape)
    return (left / torch.arange(1, n + 1, device=device)) @ right.T


def svd_basis(weight: Tensor, energy: float) -> Tensor:
    """V[:, :k] of the full SVD [in, k], k by the rule of E1."""
    _, values, rows = torch.linalg.svd(weight, full_matrices=False)
    energies = values.square()
    return rows[: smallest_rank(energies, energy * float(energies.double().sum()))].T.contiguous()


def smaller_gram(weight: Tensor) -> Tensor:
    """W W^T or W^T W, whichever is smaller."""
    return weight @ weight.T if weight.shape[1] > weight.shape[0] else weight.T @ weight


def judge(weight: Tensor, energies: Tensor, share: float) -> Exactness:
    """Judges both bases.

    Args:
        weight: W [out, in].
        energies: its squared singular values, fp64, descending.
        share: of the energy that a basis holds.
    """
    basis, other = principal_basis(weight, share), svd_basis(weight, share)
    k = basis.shape[1]
    energy = float((weight.double() @ basis.double()).square().sum() / energies[:k].sum())
    outside = basis.double() - other.double() @ (other.double().T @ basis.double())
    sine = float(torch.linalg.eigvalsh(outside.T @ outside)[-1].clamp(0.0, 1.0).sqrt())
    angle = math.degrees(math.asin(sine))
    return Exactness(k, other.shape[1], 1.0 - energy, orthonormality_error(basis), angle)


def flops(shape: tuple[int, int], k: int) -> tuple[float, float]:
    """Operations of both ways (Golub & Van Loan's counts with vectors): (here, SVD).

    Here: Gram product 2 m n^2, symmetric eigenproblem 9 n^3; for a wide weight also the map back 2 m n k and
    its Householder QR 4 m k^2 - 4/3 k^3. SVD: the cheaper of 14 m n^2 + 8 n^3 and 6 m n^2 + 20 n^3.
    """
    n, m = sorted(shape)
    ours = 2.0 * m * n**2 + 9.0 * n**3
    if shape[1] > shape[0]:
        ours += 2.0 * m * n * k + 4.0 * m * k**2 - 4.0 / 3.0 * k**3
    return ours, min(14.0 * m * n**2 + 8.0 * n**3, 6.0 * m * n**2 + 20.0 * n**3)


def measure(shape: tuple[int, int], spectrum: str, options: Options) -> tuple[list[Row], dict[float, Ratio]]:
    """One weight: a row and a ratio of times per energy."""
    device = options.device
    weight = make_weight(shape, spectrum, device)
    gram = smaller_gram(weight)
    energies = torch.linalg.eigvalsh(smaller_gram(weight.double())).flip(0).clamp(min=0.0)
    repeats = 1 if device.type == "cpu" and min(shape) >= ONE_ROUND else options.repeats
    ways = {
        "svd": partial(svd_basis, weight, ENERGIES[0]),
        "gram": partial(smaller_gram, weight),
        "eigh": partial(torch.linalg.eigh, gram),
        **{str(share): partial(principal_basis, weight, share) for share in ENERGIES},
    }
    seconds = in_turns(ways, repeats, device)
    note = "" if repeats == options.repeats else f", {repeats} round"
    what = f"weight basis, {shape[0]}x{shape[1]}, {spectrum}, eps_w "
    found = [
        _row(f"{what}{share}{note}", shape, judge(weight, energies, share), seconds, str(share), device)
        for share in ENERGIES
    ]
    return found, {share: ratio(seconds["svd"], seconds[str(share)]) for share in ENERGIES}


def _row(
    what: str,
    shape: tuple[int, int],
    exactness: Exactness,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    device: torch.device,
) -> Row:
    own, faster = seconds[ours], ratio(seconds["svd"], seconds[ours])
    gram = 100 * ratio(seconds["gram"], own).median
    whole = [gram_seconds + eigh for gram_seconds, eigh in zip(seconds["gram"], seconds["eigh"], strict=True)]
    arithmetic = flops(shape, exactness.k)
    return Row(
        number=1,
        what=what,
        ours=f"{milliseconds(own)}, Gram {gram:.0f} %; with all eigenvectors {ratio(whole, own)} times",
        beside=f"SVD {milliseconds(seconds['svd'])}",
        result=f"{faster} times as fast; {exactness}",
        goal="exact" if device.type == "cpu" else f">= {WANTED_ON_A_GPU:.0f} times as fast, exact",
        met=exactness.holds and (device.type == "cpu" or faster.median >= WANTED_ON_A_GPU),
        floor=f"operations alone: {arithmetic[1] / arithmetic[0]:.1f} times",
    )


def draw(ratios: dict[tuple[tuple[int, int], str], dict[float, Ratio]], title: str, file: Path) -> None:
    """Bars per shape: how many times as fast as the SVD, from the slowest round to the fastest."""
    shapes = list(dict.fromkeys(shape for shape, _ in ratios))
    groups = [(spectrum, energy) for spectrum in SPECTRA for energy in ENERGIES]
    figure = Figure(figsize=(9, 4), layout="tight")
    axes = figure.subplots()
    for number, (spectrum, energy) in enumerate(groups):
        values = [ratios[shape, spectrum][energy] for shape in shapes]
        medians = [value.median for value in values]
        spread = (
            [value.median - value.smallest for value in values],
            [value.largest - value.median for value in values],
        )
        places = [place + 0.2 * (number - 1.5) for place in range(len(shapes))]
        axes.bar(places, medians, 0.19, yerr=spread, capsize=2, label=f"{spectrum}, eps_w {energy}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"{rows}x{columns}" for rows, columns in shapes])
    axes.set(xlabel="weight, out x in", ylabel="times as fast as torch.linalg.svd", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)


def rows(options: Options) -> list[Row]:
    """Every shape and spectrum."""
    shapes = GPU_SHAPES if options.device.type == "cuda" else CPU_SHAPES
    found: list[Row] = []
    ratios = {}
    for shape in QUICK_SHAPES if options.quick else shapes:
        for spectrum in SPECTRA:
            measured, ratios[shape, spectrum] = measure(shape, spectrum, options)
            found += measured
    if (picture := options.picture("bases.png")) is not None:
        draw(ratios, f"Principal bases of weights ({device_name(options.device)})", picture)
    return found


if __name__ == "__main__":
    benchmark(__doc__, rows)
