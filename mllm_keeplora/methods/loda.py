"""LoDA (arXiv 2603.00191): learn along directions that old and new inputs share, and along the new ones' own.

Written after its published code (github.com/HHHLF/LoDA_ICML2026, `models/decomposed_lora.py`, `methods/dlora.py`) and a
summary of the paper. docs/methods.md says where this differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from mllm_keeplora.config import RunConfig
from mllm_keeplora.distributed.processes import num_processes, sum_of_all
from mllm_keeplora.linalg.decompositions import thin_svd
from mllm_keeplora.linalg.subspace import (
    RANK_TOLERANCE,
    orthonormal_columns,
    orthonormal_complement,
    project_to_residual,
    residual_directions,
)
from mllm_keeplora.methods.base import Learnt, Method, per_module
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.hooks import Backward, Batch, Hooks, Step
from mllm_keeplora.modeling.adapters import STAGE, Factors, Model, Trainable, live_factors
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.gradients import module_generator
from mllm_keeplora.settings import Range

Weight = Annotated[float, Range(0, 1_000_000, "(]")]


@dataclass(frozen=True)
class Loda(Method):
    """A_t = [w A_S; A_I], frozen: a shared half and an isolated half of the rank; B trained.

    With S_new the second moment of a layer's inputs in the new task and S_old the sum of those of past tasks:

    - A_S spans the directions v with the largest v^T (S_old + S_new) v;
    - A_I spans those with the largest v^T S_new v / v^T (S_old + ridge I) v;
    - B is trained by gradients that agree between answers (`AlignedGradients`);
    - then each column b_i of the shared half is multiplied by the lambda_i that is best for old and new inputs
      (`recalibration`); the isolated half, which old inputs hardly reach, stays as it is.

    The second moments are kept as sketches. In the first stage nothing is old: all of A is shared, none of it is
    recalibrated. General inputs are protected as for every method that projects (G2): both halves lie outside M.

    Args:
        ridge: in units of the mean eigenvalue of S_new, above 0: how much old energy counts as none. A sketch has
            fewer rows than S_old has directions, so that the ratio needs it.
        shared_weight: w, of the shared half beside the isolated one: 0.5 in all its settings.
        new_weight: of new inputs beside old ones in the recalibration, its `merge_gamma`: 3 in all its settings.
        rho: most by which a step looks ahead, as the Frobenius norm of the change of a module's weight; 0 takes plain
            gradients. Its settings move B by up to 0.3 (ImageNet-R: 0.7), which its scales 1 / 2 and 1 / sqrt(3) make
            0.09 at the weight.
    """

    trains: ClassVar[Trainable] = "B"
    projects: ClassVar[bool] = True
    input_passes: ClassVar[int] = 3

    ridge: Weight = 0.01
    shared_weight: Weight = 0.5
    new_weight: Weight = 3.0
    rho: Annotated[float, Range(0, 1_000_000)] = 0.09

    def probe_passes(self, config: RunConfig, number: int) -> int:
        """One less in the first stage, which recalibrates nothing."""
        return super().probe_passes(config, number) - (number == 1)

    def step_passes(self) -> int:
        """Each half of a batch once to look ahead and once to learn."""
        return 4 if self.rho else 1

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The two subspaces, shared rows first."""
        inputs, earlier, bases = stage.sketch_inputs(model, 0), stage.rehearsals(), stage.bases

        def rows(t: Target) -> Tensor:
            basis = bases.load(t)
            found = [sketch.to(basis.device) for sketch in _of(t, [inputs, *earlier])]
            new, *old = (project_to_residual(sketch, basis) for sketch in found)
            # What general inputs leave may have fewer directions than the rank (E9).
            floor = RANK_TOLERANCE * float(found[0].double().square().sum())
            rank = min(stage.run.rank(t), residual_directions(new, basis, floor)[0].shape[1])
            shared = shared_rank(rank, old)
            parts = [(self.shared_weight, energy_rows([new, *old], shared))]
            if old:
                own = energy_ratio_rows(new, old, self.ridge, rank - shared)
                parts.append((1.0, own))
            return torch.cat([weight * orthonormal_complement(part.T, basis).T for weight, part in parts])

        return per_module(stage, rows)

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """Gradients that agree between answers."""
        if not self.rho:
            return Hooks()
        scaled = [(stage.scales[name] * a.detach(), b) for name, (a, b) in live_factors(model, STAGE).items()]
        return Hooks(gradients=AlignedGradients(scaled, self.rho, stage.seed))

    def finish(self, stage: StageContext, model: PeftModel, factors: Factors) -> Learnt:
        """The shared half, recalibrated at the model that has learnt the task."""
        if stage.number == 1:
            return Learnt(factors)
        inputs, earlier, recalibrated = stage.sketch_inputs(model, 1), stage.rehearsals(), {}
        for t in (t for t in stage.targets if t.name in factors):
            (a, b), (new, *old) = factors[t.name], _of(t, [inputs, *earlier])
            shared = shared_rank(len(a), old)
            kept = recalibration(a[:shared], new, old, self.new_weight)
            recalibrated[t.name] = a, torch.cat([b[:, :shared] * kept, b[:, shared:]], dim=1)
        return Learnt(recalibrated)

    def rehearsal(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """The task's inputs, sketched, at the model that has learnt it."""
        return stage.sketch_inputs(model, 1)


def _of(target: Target, sketches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """A module's sketches; a task whose samples do not reach it has none."""
    return [found[target.name] for found in sketches if target.name in found]


def shared_rank(rank: int, old: Sequence[Tensor]) -> int:
    """Rows of the shared half: half of the rank, rounded down, and all of it where nothing is old."""
    return rank // 2 if old else rank


@torch.no_grad()
def energy_rows(sketches: Sequence[Tensor], rank: int) -> Tensor:
    """Orthonormal rows that span the leading eigenvectors of sum_i Y_i^T Y_i / q_i.

    Args:
        sketches: Y_i, [q_i, in].
        rank: rows wanted; fewer where the sketches have fewer.

    Returns:
        [rank, in] fp32, the direction of the largest energy first; computed in fp64.
    """
    stacked = torch.cat([sketch.double() / len(sketch) ** 0.5 for sketch in sketches])
    return thin_svd(stacked)[1][:rank].float()


@torch.no_grad()
def energy_ratio_rows(new: Tensor, old: Sequence[Tensor], ridge: float, rank: int) -> Tensor:
    """Orthonormal rows that span the leading generalised eigenvectors of (S_new, S_old + ridge I).

    Args:
        new: [q, in], a sketch with S_new = new^T new / q.
        old: one sketch per past task; S_old is the sum of theirs.
        ridge: in units of trace(S_new) / in.
        rank: rows wanted; fewer where the sketch has fewer.

    Returns:
        [min(rank, q), in] fp32, orthonormal; no row where `new` is zero. Computed in fp64: one Cholesky factor [in, in]
        and one SVD [q, in].
    """
    y = new.double() / len(new) ** 0.5
    in_features, energy = y.shape[1], y.square().sum()
    if energy == 0:
        return new.new_zeros(0, in_features)
    bottom = torch.eye(in_features, dtype=y.dtype, device=y.device) * ridge * energy / in_features
    for sketch in old:
        z = sketch.double() / len(sketch) ** 0.5
        bottom += z.T @ z
    # Where next to nothing of the new inputs is left outside M, the ridge alone would be rounding of old energy.
    bottom.diagonal().add_(torch.finfo(y.dtype).eps * in_features * bottom.diagonal().max())
    root = torch.linalg.cholesky(bottom)  # L L^T = bottom; u = L^T v turns the ratio into ||Y L^-T u||^2
    whitened = torch.linalg.solve_triangular(root, y.T, upper=False).T
    u = thin_svd(whitened)[1][:rank].T
    directions = torch.linalg.solve_triangular(root.T, u, upper=True)
    return orthonormal_columns(directions / directions.norm(dim=0)).T.contiguous()


def recalibration(rows: Tensor, new: Tensor, old: Sequence[Tensor], new_weight: float) -> Tensor:
    """The share of each direction's update that is best for old and new inputs together.

    b a x, with a fixed and b learnt, is to stay 0 for old inputs and b a x for new ones. Of all lambda b a x,

        sum over old x ||lambda b a x||^2 + new_weight * sum over new x ||(1 - lambda) b a x||^2

    is least at lambda = new_weight g_new / (g_old + new_weight g_new), with the energies g = a S a^T.

    Args:
        rows: a, [r, in].
        new: [q, in], a sketch with S_new = new^T new / q.
        old: one sketch per past task; S_old is the sum of theirs.
        new_weight: above 0.

    Returns:
        [r] fp32, in [0, 1]; 1 for a direction that no input reaches.
    """
    reached, *before = ((y @ rows.T).square().sum(0) / len(y) for y in (new, *old))
    disturbed = torch.stack(before).sum(0) if before else torch.zeros_like(reached)
    tiny = torch.finfo(reached.dtype).tiny
    return 1 - disturbed / (disturbed + new_weight * reached).clamp_min(tiny)


class AlignedGradients:
    """Gradient-aligned optimisation: each half of a batch is learnt where the other half would take the model.

    A batch is split at random into halves that have no answer in common. With L_1 and L_2 their parts of the loss, the
    gradient is that of L_1 at B - e_2 plus that of L_2 at B - e_1. e_i points along the gradient g_i of L_i at B. Its
    length changes a module's weight by rho u in Frobenius norm, u uniform in [0, 1] and drawn anew for each step. To
    first order this is the gradient of L_1 + L_2 - <g_1, e_2> - <g_2, e_1>: of steps along which both halves improve.

    A batch of one answer has its plain gradient. General samples pass with the last of the four passes alone.
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], rho: float, seed: int) -> None:
        """Takes s A [r, in] and B [out, r] of every module."""
        self._trained, self._rho, self._seed = [b for _, b in factors], rho, seed
        self._grams = [a @ a.T for a, _ in factors]

    def __call__(self, batch: Batch, step: Step, backward: Backward) -> Tensor:
        """Adds a batch's gradient to what earlier parts of the step have left; gives the loss at the points above."""
        generator = module_generator(self._seed, f"answers/{step.taken}")
        length = self._rho * float(torch.rand((), generator=generator))  # first: one for all processes
        halves = answer_halves(batch["labels"], generator)
        if not _everywhere(halves is not None, batch["labels"].device) or halves is None:
            return backward(batch, False)
        first, second = (only(batch, rows) for rows in halves)
        start, gradients = [b.detach().clone() for b in self._trained], self._taken()
        losses = []
        for source, target, task_alone in ((first, second, True), (second, first, False)):
            backward(source, True)
            self._look_ahead(self._taken(), length)
            self._put(gradients)  # before the pass: several processes average what a pass leaves
            losses.append(backward(target, task_alone))
            gradients = self._taken()
            with torch.no_grad():
                for b, value in zip(self._trained, start, strict=True):
                    b.copy_(value)
        self._put(gradients)
        return torch.stack(losses).sum()

    def _taken(self) -> list[Tensor | None]:
        found = [b.grad for b in self._trained]
        self._put([None] * len(found))
        return found

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for b, gradient in zip(self._trained, gradients, strict=True):
            b.grad = gradient

    @torch.no_grad()
    def _look_ahead(self, gradients: Sequence[Tensor | None], length: float) -> None:
        """B - e: e along the gradient, with ||s e A||_F = length."""
        for b, gradient, gram in zip(self._trained, gradients, self._grams, strict=True):
            if gradient is not None:
                reach = ((gradient @ gram) * gradient).sum().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
                b.sub_(gradient * (length / reach))


def answer_halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """A random split of a batch into rows that have no answer in common.

    Args:
        labels: [batch, length]; a row's answer are its supervised tokens. Rows without any are in neither half.
        generator: on the CPU.

    Returns:
        Two masks [batch] bool on the device of `labels`, the first of half of the answers; None for fewer than two.
    """
    answers = [tuple(token for token in row if token != IGNORED_LABEL) for row in labels.tolist()]
    different = sorted({answer for answer in answers if answer})
    if len(different) < 2:
        return None
    order = torch.randperm(len(different), generator=generator).tolist()
    chosen = {different[number] for number in order[: len(different) // 2]}
    first = [answer in chosen for answer in answers]
    second = [bool(answer) and answer not in chosen for answer in answers]
    return torch.tensor(first, device=labels.device), torch.tensor(second, device=labels.device)


def only(batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    """The batch with the labels of these rows [batch] bool alone: pictures of several rows may be one tensor."""
    labels = {key: batch[key] for key in ("labels", "shift_labels") if key in batch}
    return {**batch, **{key: value.masked_fill(~rows[:, None], IGNORED_LABEL) for key, value in labels.items()}}


def _everywhere(own: bool, device: torch.device) -> bool:
    """Whether it holds in every process: all of them make the same number of passes."""
    return int(sum_of_all(torch.tensor(int(own), device=device))) == num_processes()
