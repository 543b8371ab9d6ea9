"""How far a run's accumulated update could be recompressed: the rank that a stated error needs.

    python benchmarks/recompression.py runs/vqa_small

dW = B A of every adapted layer after the last stage, in fp64. For an error e the smallest rank k with
||dW - dW_k||_F <= e ||dW||_F, where dW_k is the best approximation of that rank. It is given as a share of
the rank that is stored, by exact concatenation. Means over the layers of a tower.
"""

import sys
from pathlib import Path
from statistics import fmean

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from peft import load_peft_weights
from torch import Tensor

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.continual.saved_run import load_run

ERRORS = (0.1, 0.03, 0.01, 0.001)


def rank_shares(a: Tensor, b: Tensor) -> list[float]:
    """Rank for every error over the stored rank, from the R x R core of B A; a [R, in], b [out, R]."""
    core = torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().T).R.T
    energies = torch.linalg.svdvals(core).square()
    dropped = energies.flip(0).cumsum(0).flip(0)  # energy behind the first 0, 1, .. directions
    return [int((dropped > error**2 * energies.sum()).sum()) / len(a) for error in ERRORS]


def main() -> None:
    """Prints one line a tower."""
    parser = OptionParser("python benchmarks/recompression.py", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run that has learnt a task")
    path = parser.read(sys.argv[1:]).run
    factors = load_peft_weights(str(load_run(path).adapter), device="cpu")
    shares: dict[str, list[list[float]]] = {}
    for name in (key for key in factors if ".lora_A." in key):
        a, b = factors[name], factors[name.replace(".lora_A.", ".lora_B.")]
        shares.setdefault("vision" if "vision" in name else "language", []).append(rank_shares(a, b))
    print(f"{'error':10s}" + "".join(f"{error:>10g}" for error in ERRORS))
    for tower, rows in shares.items():
        print(f"{tower:10s}" + "".join(f"{100 * fmean(column):9.1f}%" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    with command():
        main()
