"""What the benchmarks measured must not get lost: operations and shares of energy, never seconds."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import refined_directions
from mllm_keeplora.linalg.subspace import principal_basis, project_to_residual
from mllm_keeplora.modeling.linear4bit import computed_weight
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.probes.gradients import back_project_gradients, sketch_gradients
from mllm_keeplora.recipes.small import draw
from tests.conversations import Turn, sample

SMALL = Path(__file__).resolve().parents[2] / "recipes" / "small"
# The default q = 4 r. At so small an r, q = r holds 0.90 only and a pass without refinement 0.982, so that
# either bound below is missed when what it guards is lost.
RANK, COLUMNS_PER_RANK = 2, 4


class Decompositions(TorchDispatchMode):
    """Records eigenproblems and SVDs: (name, shape of the matrix)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "eig" in name or "svd" in name:
            self.found.append((name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(160, 48), (48, 160), (64, 64)])
def test_a_weight_basis_costs_one_eigenproblem_of_the_smaller_side(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with Decompositions() as decompositions:
        principal_basis(weight, 0.6)
    assert decompositions.found == [("_linalg_eigh", (min(shape), min(shape)))]


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """The small LLaVA, trained, on NF4, and its processor."""
    return load_base(ModelConfig(base_model=str(SMALL / "vqa_base"), device="cpu"))


def drawn_batch(processor: Any, directory: Path) -> dict[str, Tensor]:
    """16 charts with their questions: a domain that the model was not trained on."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(16):
        image, questions = draw.chart(random)
        path = directory / f"{number}.png"
        image.save(path)
        turns = tuple(Turn(question.text, question.answer) for question in questions)
        samples.append(sample(str(number), path, turns))
    return dict(ChatCollator(processor)(samples))


def exact_gradients(model: Any, targets: list[Target], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """dL/dW [out, in] of every target on a dense copy; the loss a sum, as its scale does not matter here."""
    dense = copy.deepcopy(model)
    dense.dequantize()
    dense.requires_grad_(True)
    dense(**batch, num_items_in_batch=1).loss.backward()
    return {t.name: dense.get_submodule(t.name).weight.grad for t in targets}


def captured(residuals: dict[str, Tensor], factors: dict[str, Tensor]) -> float:
    """Energy of all residual gradients along the factors, over that of their leading directions, fraction."""
    held = sum(float((g @ factors[name].T).square().sum()) for name, g in residuals.items())
    best = sum(float(torch.linalg.svdvals(g)[: len(factors[name])].square().sum()) for name, g in residuals.items())
    return held / best


def test_a_sketch_holds_nearly_all_that_the_exact_gradient_would(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = trained
    batch = drawn_batch(processor, tmp_path)
    targets = find_targets(model, {"vision": ["all-linear"], "language": ["all-linear"]})
    bases = {t.name: principal_basis(computed_weight(model.get_submodule(t.name)), 0.6) for t in targets}
    exact = exact_gradients(model, targets, batch)
    residuals = {name: project_to_residual(g, bases[name]) for name, g in exact.items()}

    columns = {t.name: COLUMNS_PER_RANK * RANK for t in targets}
    sketches = sketch_gradients(model, targets, columns, lambda: [batch], seed=0)
    once = {name: lora_a_from_gradient(y, bases[name], RANK) for name, y in sketches.items()}
    assert captured(residuals, once) >= 0.98

    spans = {name: lora_a_from_gradient(y, bases[name], len(y)) for name, y in sketches.items()}
    out_features = {t.name: t.out_features for t in targets}
    images = back_project_gradients(model, spans, out_features, lambda: [batch])
    refined = {name: refined_directions(rows, images[name]) for name, rows in spans.items()}
    twice = {name: lora_a_from_gradient(g, bases[name], RANK) for name, g in refined.items()}
    assert captured(residuals, twice) >= 0.995
