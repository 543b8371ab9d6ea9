"""After LoDA (arXiv 2603.00191): learn where the new inputs have energy and the old ones little."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from mllm_keeplora.linalg.decompositions import thin_svd
from mllm_keeplora.linalg.subspace import orthonormal_columns
from mllm_keeplora.methods.base import Method, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.adapters import Model, Trainable
from mllm_keeplora.settings import Range


@dataclass(frozen=True)
class Loda(Method):
    """A_t spans the directions v with the largest v^T C_new v / v^T (C_old + ridge I) v, frozen; B trained.

    C are second moments of a layer's inputs, from sketches; C_old is the mean over past tasks, each measured
    after it was learnt. In the first stage the ratio's bottom is constant: the leading directions of C_new.
    This is the task-specific subspace alone. The paper's shared subspace, its gradient-aligned optimisation
    and the recalibration of the shared update are left out.

    Args:
        ridge: in units of the mean eigenvalue of C_new, above 0: how much old energy counts as none.
    """

    trains: ClassVar[Trainable] = "B"
    input_passes: ClassVar[int] = 2

    ridge: Annotated[float, Range(0, 1_000_000, "(]")] = 0.01

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The directions of the largest energy ratio."""
        new, earlier, device = stage.sketch_inputs(model, 0), stage.rehearsals(), stage.run.device
        return per_module(
            stage,
            lambda t: energy_ratio_rows(
                new[t.name].to(device),
                [sketches[t.name].to(device) for sketches in earlier if t.name in sketches],
                self.ridge,
                stage.run.rank(t),
            ),
        )

    def rehearsal(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The task's inputs, sketched, at the model that has learnt it."""
        return stage.sketch_inputs(model, 1)


@torch.no_grad()
def energy_ratio_rows(new: Tensor, old: Sequence[Tensor], ridge: float, rank: int) -> Tensor:
    """Orthonormal rows that span the leading generalised eigenvectors of (C_new, C_old + ridge I).

    Args:
        new: [q, in], a sketch with C_new = new^T new / q.
        old: one sketch per past task; may be empty.
        ridge: in units of trace(C_new) / in.
        rank: rows wanted; fewer where the sketch has fewer.

    Returns:
        [min(rank, q), in] fp32, orthonormal. Computed in fp64: one Cholesky factor [in, in] and one SVD
        [q, in].
    """
    y = new.double() / len(new) ** 0.5
    in_features = y.shape[1]
    bottom = torch.eye(in_features, dtype=y.dtype, device=y.device) * ridge * y.square().sum() / in_features
    for sketch in old:
        z = sketch.double() / (len(sketch) * len(old)) ** 0.5
        bottom += z.T @ z
    root = torch.linalg.cholesky(bottom)  # L L^T = bottom; u = L^T v turns the ratio into ||Y L^-T u||^2
    whitened = torch.linalg.solve_triangular(root, y.T, upper=False).T
    u = thin_svd(whitened)[1][:rank].T
    directions = torch.linalg.solve_triangular(root.T, u, upper=True)
    return orthonormal_columns(directions / directions.norm(dim=0)).T.contiguous()
