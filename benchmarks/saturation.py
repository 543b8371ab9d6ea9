"""How many columns a sketch needs at a 7B model's width: directions, energy held and saturation, over decays.

    python benchmarks/saturation.py

A matrix of inputs or gradients [tokens, 4096] whose squared singular values fall as i^-decay. Its right singular
vectors are the unit vectors here, which changes no result: a Gaussian sketch knows no direction. `needed` are the
directions that the exact spectrum needs for the share; `taken` those that E8 takes from the sketch (+: saturated), and
`held` what they hold by its held-out rows. `one pass` and `refined` are the energy that A of rank 32 captures beside
the exact leading directions, from probe.columns_per_rank 4.
"""

import argparse

import torch
from torch import Tensor

from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import extend_basis_from_sketch, refined_directions

DECAYS, SHARES, RANK, PER_RANK = (0.5, 1.0, 1.5, 2.0, 3.0), (0.95, 0.99), 32, 4


def spectrum(width: int, decay: float) -> Tensor:
    """Singular values [width], largest first."""
    return torch.arange(1, width + 1).float() ** (-decay / 2)


def needed(values: Tensor, share: float) -> int:
    """Leading directions that hold a share of the energy."""
    energy = values.double().square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def captured(values: Tensor, rows: Tensor) -> float:
    """Energy along orthonormal rows [r, width] beside that of the r leading directions."""
    exact = values.double().square()[: len(rows)].sum()
    return float((rows.double() * values.double()).square().sum() / exact)


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--columns", type=int, nargs="+", default=[128, 256, 512, 1024])
    given = parser.parse_args()
    torch.manual_seed(0)
    nothing = torch.zeros(given.width, 0)
    print("| decay | share | needed | " + " | ".join(f"q = {q}: taken, held" for q in given.columns) + " |")
    for decay in DECAYS:
        values = spectrum(given.width, decay)
        sketches = {q: torch.randn(q, given.width) * values for q in given.columns}
        for share in SHARES:
            found = [extend_basis_from_sketch(nothing, sketches[q], share) for q in given.columns]
            cells = [f"{e.basis.shape[1]}{'+' if e.saturated else ''}, {e.captured:.3f}" for e in found]
            print(f"| {decay} | {share} | {needed(values, share)} | {' | '.join(cells)} |", flush=True)
    print("\n| decay | one pass | refined |")
    for decay in DECAYS:
        values, q = spectrum(given.width, decay), RANK * PER_RANK
        sketch = torch.randn(q, given.width) * values
        rows = lora_a_from_gradient(sketch, nothing, q)
        refined = refined_directions(rows, (rows * values).T)  # G Q of G = diag(values)
        pair = [lora_a_from_gradient(sketch, nothing, RANK), lora_a_from_gradient(refined, nothing, RANK)]
        print(f"| {decay} | {' | '.join(f'{captured(values, a):.3f}' for a in pair)} |", flush=True)


if __name__ == "__main__":
    main()
