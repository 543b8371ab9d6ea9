"""The frozen LoRA factor A: where a task may write (E3, E4, E9)."""

import torch
from torch import Tensor

from mllm_keeplora.linalg.subspace import RANK_TOLERANCE, project_to_residual, residual_directions


@torch.no_grad()
def lora_a_from_gradient(gradient: Tensor, basis: Tensor, rank: int) -> Tensor:
    """A_t = the top-r right singular vectors of the residual gradient G (I - M M^T), as rows (E4).

    The rows are orthonormal, and orthogonal to M. So B A moves the weight inside the residual subspace alone,
    whatever B becomes.

    Args:
        gradient: G, [rows, in]; a full gradient, or a sketch Omega^T G, which has the same row space.
        basis: M, [in, k], orthonormal columns.
        rank: largest number of rows wanted.

    Returns:
        [r, in], fp32, r = min(rank, in - k, numerical rank of the residual gradient) (E9); r = 0 when nothing
        is left.
        ||A M|| is at rounding level (fp64 re-projection before the last rounding to fp32).

    Raises:
        ValueError: rank < 1, shapes that do not fit, a gradient with NaN or infinity.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    residual = project_to_residual(gradient, basis)
    # The floor is relative to the whole gradient: a residual at rounding level of what was projected away is
    # noise.
    floor = RANK_TOLERANCE * float(gradient.double().square().sum())
    directions, _ = residual_directions(residual, basis, floor)
    return directions[:, :rank].T.contiguous()
