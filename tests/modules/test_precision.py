"""fp32 products are fp32 where protection is decided, whatever switched TF32 on; what A then answers is recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_keeplora.continual.stage import protected_answer
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.modeling import precision
from mllm_keeplora.modeling.adapters import STAGE, activate, attach
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.precision import PrecisionError, exact_products
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import sketch_gradients
from mllm_keeplora.probes.protected_bases import weight_basis_files
from tests.modules.conftest import all_targets, batch, model_config
from tests.modules.test_training import prepare, train

CPU = torch.device("cpu")


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """With `bits` explicit bits of the mantissa, rounded to the nearest as tensor cores do."""
    drop = 23 - bits
    return ((matrix.contiguous().view(torch.int32) + (1 << (drop - 1))) >> drop << drop).view(torch.float32)


@pytest.fixture
def tf32_on() -> Any:
    """As lmms-eval's wrappers leave it when they are imported; put back afterwards."""
    torch.backends.cuda.matmul.allow_tf32 = True
    assert torch.get_float32_matmul_precision() == "high"
    yield
    torch.set_float32_matmul_precision("highest")


def is_off() -> bool:
    return (
        torch.get_float32_matmul_precision() == "highest"
        and not torch.backends.cuda.matmul.allow_tf32
        and not torch.backends.cudnn.allow_tf32
    )


@pytest.mark.parametrize("what", ["bases", "gradients", "inputs", "training"])
def test_it_is_switched_off_before_anything_is_measured_or_trained(
    what: str, tiny_llava: Path, tmp_path: Path, tf32_on: None
) -> None:
    """The state is looked at while the layers run, not afterwards."""
    model = prepare(tiny_llava) if what == "training" else load_base(model_config(tiny_llava, "nf4"))[0]
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(is_off()))
    targets = [t for t in all_targets(load_base(model_config(tiny_llava, "nf4"))[0])]
    columns = {t.name: 2 for t in targets}
    if what == "bases":
        weight_basis_files(model, targets[:1], {"vision": 0.5, "language": 0.5}, tmp_path)
        seen.append(is_off())
    elif what == "gradients":
        sketch_gradients(model, targets, columns, lambda: [batch()], 0)
    elif what == "inputs":
        sketch_inputs(model, targets, columns, lambda: [batch()], 0)
    else:
        train(model, tmp_path, max_steps=1)
    assert seen and all(seen)


@pytest.mark.parametrize("name, bits", [("TF32", 10), ("bf16", 7)])
def test_a_device_that_rounds_all_the_same_is_refused(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact_products(CPU)
    monkeypatch.setattr(precision, "_product", lambda m: rounded(m, bits) @ rounded(m, bits))
    with pytest.raises(PrecisionError, match="NVIDIA_TF32_OVERRIDE"):
        exact_products(CPU)


def test_the_answer_tells_tf32_from_fp32() -> None:
    """Both as the paper's shapes give them: r 16 of 512, half of it protected; and none where nothing is."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 256)).Q
    a = lora_a_from_gradient(torch.randn(64, 512), basis, 16)
    assert protected_answer(a, basis) < 1e-6
    assert protected_answer(rounded(a, 10), rounded(basis, 10)) > 3e-5
    for empty in (torch.zeros(512, 0), torch.zeros(512, 3)):
        assert protected_answer(a[:0] if empty.shape[1] else a, empty) == 0.0


def test_a_layer_that_computes_in_bf16_answers_protected_inputs_in_fp32(tiny_llava: Path) -> None:
    """The live path of a stage, which training takes: what the record has is what it gives."""
    config = model_config(tiny_llava, "nf4")
    model: Any = load_base(type(config)(**{**vars(config), "compute_dtype": "bfloat16"}))[0]
    torch.manual_seed(0)
    for t in all_targets(model)[::5]:
        basis = torch.linalg.qr(torch.randn(t.in_features, t.in_features // 2)).Q
        a = lora_a_from_gradient(torch.randn(16, t.in_features), basis, 4)
        adapted = attach(model, STAGE, {t.name: (a, torch.randn(t.out_features, 4))}, {t.name: 1.0})
        activate(adapted, [STAGE], STAGE, "B")
        layer = adapted.get_base_model().get_submodule(t.name)
        found = layer.lora_A[STAGE](basis.T)
        assert found.dtype == torch.float32
        assert float(found.norm() / a.norm()) == pytest.approx(protected_answer(a, basis), abs=1e-7)
        assert protected_answer(a, basis) < 1e-6
        adapted.unload()
