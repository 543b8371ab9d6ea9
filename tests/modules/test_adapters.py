"""Adapters through PEFT: exact function, exact freezing, exact names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

from mllm_keeplora.modeling.adapters import (
    ACCUMULATED,
    STAGE,
    AdapterError,
    Factors,
    activate,
    attach,
    factor_parameters,
    read_factors,
    without_dropout,
)
from mllm_keeplora.modeling.loading import load_base, save_adapter
from mllm_keeplora.modeling.saved_adapters import read_initial_adapter
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.runs.files import read_json
from tests.modules.conftest import all_targets, batch, model_config, read_adapter


def random_factors(targets: list[Target], seed: int = 0) -> Factors:
    """Ranks that differ from module to module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        t.name: (
            0.2 * torch.randn(1 + i % 5, t.in_features, generator=generator),
            0.2 * torch.randn(t.out_features, 1 + i % 5, generator=generator),
        )
        for i, t in enumerate(targets)
    }


def ones(factors: Factors) -> dict[str, float]:
    return dict.fromkeys(factors, 1.0)


def test_each_module_computes_with_its_own_rank_and_scale(nf4_model: Any) -> None:
    factors = random_factors(all_targets(nf4_model))
    scales = {name: 0.1 * (i + 1) for i, name in enumerate(factors)}
    inputs = {t.name: torch.randn(2, t.in_features) for t in all_targets(nf4_model)}
    before = {name: nf4_model.get_submodule(name)(x) for name, x in inputs.items()}
    adapted = attach(nf4_model, STAGE, factors, scales)
    for name, x in inputs.items():
        a, b = factors[name]
        update = adapted.get_base_model().get_submodule(name)(x) - before[name]
        torch.testing.assert_close(update, scales[name] * x @ a.T @ b.T, atol=1e-4, rtol=1e-4)


def test_a_zero_b_leaves_the_function_bit_for_bit(nf4_model: Any) -> None:
    before = nf4_model(**batch()).logits
    factors = {name: (a, torch.zeros_like(b)) for name, (a, b) in random_factors(all_targets(nf4_model)).items()}
    assert torch.equal(attach(nf4_model, STAGE, factors, ones(factors))(**batch()).logits, before)


@pytest.mark.parametrize("trainable, suffixes", [("B", {"lora_B"}), ("both", {"lora_A", "lora_B"}), ("none", set())])
def test_exactly_the_named_factors_train(nf4_model: Any, trainable: Any, suffixes: set[str]) -> None:
    factors = random_factors(all_targets(nf4_model))
    attach(nf4_model, ACCUMULATED, factors, ones(factors))
    adapted = attach(nf4_model, ACCUMULATED, factors, ones(factors))
    adapted = attach(adapted, STAGE, factors, ones(factors))
    names = activate(adapted, [ACCUMULATED, STAGE], STAGE, trainable)
    found = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert found == set(names)
    assert len(found) == len(suffixes) * len(factors)
    assert all(f".{STAGE}." in n and n.split(f".{STAGE}.")[0].rsplit(".", 1)[1] in suffixes for n in found)
    assert all(p.dtype == torch.float32 for n, p in adapted.named_parameters() if "lora" in n)


def test_a_language_factor_does_not_reach_the_vision_layer_of_the_same_suffix(nf4_model: Any) -> None:
    """Both towers have `layers.1.self_attn.q_proj`."""
    target = next(t for t in all_targets(nf4_model) if t.name.endswith("language_model.layers.1.self_attn.q_proj"))
    adapted = attach(nf4_model, STAGE, random_factors([target]), {target.name: 1.0})
    carriers = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert carriers == {f"base_model.model.{target.name}"}


def test_factors_of_a_wrong_shape_are_named(nf4_model: Any) -> None:
    target = all_targets(nf4_model)[0]
    with pytest.raises(AdapterError, match=target.name):
        attach(
            nf4_model,
            STAGE,
            {target.name: (torch.zeros(2, 5), torch.zeros(target.out_features, 2))},
            {target.name: 1.0},
        )


def test_no_factors_is_an_error(nf4_model: Any) -> None:
    with pytest.raises(AdapterError, match="nothing to attach"):
        attach(nf4_model, STAGE, {}, {})


def test_an_fp32_factor_answers_protected_inputs_at_rounding_level_on_a_bf16_base(tiny_llava: Path) -> None:
    """PEFT casts the bf16 input up to the factor's fp32; under autocast the product would run in bf16."""
    model, _ = load_base(model_config(tiny_llava, "none"))
    model.bfloat16()
    target = all_targets(model)[0]
    m = torch.linalg.qr(torch.randn(target.in_features, 20)).Q
    a = torch.linalg.qr((torch.eye(target.in_features) - m @ m.T) @ torch.randn(target.in_features, 4)).Q.T
    adapted = attach(model, STAGE, {target.name: (a, torch.randn(target.out_features, 4))}, {target.name: 1.0})
    x = (torch.randn(16, 20) @ m.T).bfloat16()
    live_a, _ = factor_parameters(adapted, STAGE, target.name)
    # What bf16 rounding of the input itself leaves outside M is not the adapter's doing.
    exact = x.double() @ live_a.double().T
    lora_a = adapted.get_base_model().get_submodule(target.name).lora_A[STAGE]
    error = (lora_a(x.float()).double() - exact).norm() / x.double().norm()
    assert error < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = (lora_a(x).double() - exact).norm() / x.double().norm()
    assert under_autocast > 1e-4, "the trap this design avoids is gone; autocast could be allowed again"


def test_dropout_is_off_inside_the_block_and_restored() -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(2, 2))
    with without_dropout(layer):
        assert layer[0].p == 0.0
    assert layer[0].p == 0.3


def test_a_saved_adapter_is_plain_peft_and_exact(tiny_llava: Path, tmp_path: Path) -> None:
    config = model_config(tiny_llava, "nf4")
    model, processor = load_base(config)
    factors = random_factors(all_targets(model))
    adapted = attach(model, ACCUMULATED, factors, ones(factors))
    expected = adapted(**batch()).logits
    save_adapter(tmp_path / "adapter", adapted, config, processor, {"eos_token_id": [2, 7]})
    stored = read_adapter(tmp_path / "adapter")
    assert all(torch.equal(x, y) for name in factors for x, y in zip(stored[name], factors[name], strict=True))
    again = PeftModel.from_pretrained(load_base(config)[0], str(tmp_path / "adapter"))
    found = again(**batch()).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    quantization = read_json(tmp_path / "adapter" / "quantization_config.json")
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True
    assert GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [2, 7]


def test_an_existing_peft_adapter_becomes_the_past_with_its_scale(tiny_llava: Path, tmp_path: Path) -> None:
    model, _ = load_base(model_config(tiny_llava, "nf4"))
    factors = random_factors(all_targets(model))
    adapted = attach(model, ACCUMULATED, factors, dict.fromkeys(factors, 0.5))
    expected = adapted(**batch()).logits
    adapted.save_pretrained(str(tmp_path))
    adapted.unload()
    past = read_initial_adapter(model, tmp_path, "base")
    found = attach(model, ACCUMULATED, past, ones(past))(**batch()).logits
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_factors_are_read_back_as_copies(nf4_model: Any) -> None:
    factors = random_factors(all_targets(nf4_model)[:1])
    adapted = attach(nf4_model, STAGE, factors, ones(factors))
    name = next(iter(factors))
    copied = read_factors(adapted, STAGE, [name])[name][1]
    with torch.no_grad():
        factor_parameters(adapted, STAGE, name)[1].zero_()
    assert torch.equal(copied, factors[name][1])


def test_attaching_draws_no_random_numbers_for_what_it_overwrites(
    nf4_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the first adapter nor for one beside it; PEFT's own start would be drawn, written, and lost."""
    filled: list[int] = []
    for name in ("kaiming_uniform_", "zeros_", "normal_"):
        own = getattr(torch.nn.init, name)

        def fill(tensor: torch.Tensor, *args: Any, own: Any = own, **kwargs: Any) -> torch.Tensor:
            filled.append(0 if tensor.is_meta else tensor.numel())
            return own(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.nn.init, name, fill)
    factors = random_factors(all_targets(nf4_model))
    state = torch.get_rng_state()
    adapted = attach(attach(nf4_model, ACCUMULATED, factors, ones(factors)), STAGE, factors, ones(factors))
    assert sum(filled) == 0 and torch.equal(torch.get_rng_state(), state)
    assert not any(p.is_meta for p in adapted.parameters())
    assert adapted.peft_config[STAGE].init_lora_weights is True  # as a stock adapter says it
    assert not any(p.requires_grad for p in adapted.parameters())
