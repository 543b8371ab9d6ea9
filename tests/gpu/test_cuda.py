"""The same guarantees on a CUDA device with a bf16 compute dtype, and what a rerun there repeats bit for bit."""

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.continual.trainer import train_stage
from mllm_keeplora.linalg.subspace import orthonormality_error, principal_basis
from mllm_keeplora.modeling.adapters import STAGE, activate, attach, factor_parameters
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.loss import answers_alone
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.probes.gradients import gaussian_probe, sketch_gradients
from tests.modules.conftest import all_targets, batch, model_config, tiny_llava  # noqa: F401
from tests.modules.test_training import Rows, collate

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic products need it

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_a_probe_is_autograds_gradient_sketched(tiny_llava: Path, dtype: str, tolerance: float) -> None:  # noqa: F811
    config = replace(model_config(tiny_llava, "nf4"), device="cuda", compute_dtype=dtype)
    model, _ = load_base(config)
    inputs = {key: value.cuda() for key, value in batch().items()}
    targets = all_targets(model)
    sketches = sketch_gradients(model, targets, {t.name: 8 for t in targets}, lambda: [inputs], seed=0)
    dense = copy.deepcopy(model)
    dense.dequantize()
    dense.requires_grad_(True)
    dense(**inputs).loss.backward()
    for target in targets:
        omega = gaussian_probe(target, 8, 0, model.device).cpu()
        exact = omega.T @ dense.get_submodule(target.name).weight.grad.float().cpu()
        assert (sketches[target.name] - exact).norm() / exact.norm() < tolerance, target.name


def test_bases_are_orthonormal_with_tensor_cores_off() -> None:
    weight = torch.randn(256, 512, device="cuda")
    assert orthonormality_error(principal_basis(weight, 0.6)) < 1e-5


def test_tf32_is_switched_off_and_seen() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    exact_products(torch.device("cuda"))
    assert not torch.backends.cuda.matmul.allow_tf32


def on_cuda(tiny_llava: Path) -> Any:  # noqa: F811
    return load_base(replace(model_config(tiny_llava, "nf4"), device="cuda", compute_dtype="bfloat16"))[0]


def test_bases_and_forwards_repeat_bit_for_bit(tiny_llava: Path) -> None:  # noqa: F811
    """Without any switch: what is asked in the same batches is answered alike."""
    weight = torch.randn(256, 512, device="cuda")
    assert torch.equal(principal_basis(weight, 0.6), principal_basis(weight, 0.6))
    inputs = {key: value.cuda() for key, value in batch().items()}
    logits = [on_cuda(tiny_llava)(**inputs).logits for _ in range(2)]
    assert torch.equal(*logits)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_probes_and_training_repeat_where_torch_is_told_so(
    tiny_llava: Path,  # noqa: F811
    tmp_path: Path,
    deterministic: None,
) -> None:
    """Gradients of attention add up in no fixed order otherwise."""
    found = []
    for number in range(2):
        model = on_cuda(tiny_llava)
        targets = all_targets(model)
        inputs = {key: value.cuda() for key, value in answers_alone(batch()).items()}
        sketches = sketch_gradients(model, targets, {t.name: 8 for t in targets}, lambda inputs=inputs: [inputs], 0)
        torch.manual_seed(0)
        factors = {t.name: (torch.randn(2, t.in_features), torch.zeros(t.out_features, 2)) for t in targets}
        adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
        activate(adapted, [STAGE], STAGE, "B")
        folder, config = tmp_path / str(number), TrainConfig(learning_rate=1e-2, max_steps=6)
        where = {"directory": folder / "checkpoints", "log_dir": folder / "logs", "device": model.device}
        train_stage(adapted, Rows(), collate, config, seed=1, mixed=False, report_to=[], **where)
        found.append({**sketches, **{f"B/{n}": factor_parameters(adapted, STAGE, n)[1].detach() for n in factors}})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
