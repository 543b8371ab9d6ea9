"""The same guarantees on a CUDA device with a bf16 compute dtype."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mllm_keeplora.linalg.subspace import orthonormality_error, principal_basis
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.probes.gradients import gaussian_probe, sketch_gradients
from tests.modules.conftest import all_targets, batch, model_config, tiny_llava  # noqa: F401

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
        exact = gaussian_probe(target, 8, 0).T @ dense.get_submodule(target.name).weight.grad.float().cpu()
        assert (sketches[target.name] - exact).norm() / exact.norm() < tolerance, target.name


def test_bases_are_orthonormal_with_tensor_cores_off() -> None:
    weight = torch.randn(256, 512, device="cuda")
    assert orthonormality_error(principal_basis(weight, 0.6)) < 1e-5
