"""Adapters as PEFT saves them, and as they go wrong: read exactly as stock PEFT does, or refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.evaluation.lmms_model import load_for_evaluation
from mllm_keeplora.modeling.adapters import ACCUMULATED, AdapterError, attach
from mllm_keeplora.modeling.loading import load_base, load_dense
from mllm_keeplora.modeling.saved_adapters import CONFIG, WEIGHTS, load_adapter, read_adapter, read_initial_adapter
from tests.modules.conftest import batch, model_config

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def base(directory: Path, quantization: str = "none") -> Any:
    return load_base(model_config(directory, quantization))[0]


def save(model: Any, directory: Path, seed: int = 0, **settings: Any) -> PeftModel:
    """An adapter by stock PEFT, every factor drawn at random, as if trained."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE} | settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(directory))
    return adapted


def change(directory: Path, how: Change) -> None:
    """Edits a saved adapter: `how(tensors, config)` in place."""
    path = directory / CONFIG
    tensors, config = load_file(directory / WEIGHTS), json.loads(path.read_text())
    how(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    path.write_text(json.dumps(config))


def state(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_exact(directory: Path, adapter: Path, quantization: str = "none") -> None:
    """Both ways of reading it give stock PEFT's logits, which are not the base's, and leave the base as it was."""
    stock = PeftModel.from_pretrained(base(directory, quantization), str(adapter)).eval()
    expected = stock(**batch()).logits
    model = base(directory, quantization)
    before, untouched = state(model), model(**batch()).logits
    past = read_initial_adapter(model, adapter, str(directory))
    assert all(torch.equal(x, y) for x, y in zip(before, state(model), strict=True))
    folded = attach(model, ACCUMULATED, past, dict.fromkeys(past, 1.0))(**batch()).logits
    loaded = load_adapter(base(directory, quantization), adapter, str(directory))(**batch()).logits
    for found in (folded, loaded):
        assert (found - expected).norm() / expected.norm() < 1e-5
    assert (expected - untouched).norm() / untouched.norm() > 1e-3


def refusal(model: Any, adapter: Path) -> str:
    """What is said of it; the base stays as it was."""
    before = state(model)
    with pytest.raises(KeepLoRAError) as refused:
        read_initial_adapter(model, adapter, "base")
    assert all(torch.equal(x, y) for x, y in zip(before, state(model), strict=True))
    assert not isinstance(model, PeftModel) and not hasattr(model, "peft_config")
    return str(refused.value)


# Read as stock PEFT reads them


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "v_proj", "fc1"]},
        {"target_modules": "all-linear"},
        {"use_rslora": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"language_model.*q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6}},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"target_modules": ["linear_1", "lm_head"]},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
def test_plain_lora_is_exact(tiny_llava: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    save(base(tiny_llava), tmp_path, **settings)
    assert_exact(tiny_llava, tmp_path)


def test_plain_lora_is_exact_on_nf4(tiny_llava: Path, tmp_path: Path) -> None:
    save(base(tiny_llava, "nf4"), tmp_path, use_rslora=True)
    assert_exact(tiny_llava, tmp_path, "nf4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_exact(tiny_llava: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save(base(tiny_llava), tmp_path)
    change(tmp_path, lambda tensors, _: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert_exact(tiny_llava, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_rewrote_its_base_is_refused_until_it_is_converted(
    tiny_llava: Path, tmp_path: Path, start: str
) -> None:
    adapted = get_peft_model(base(tiny_llava), LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=start))
    first, trained, plain = tmp_path / "first", tmp_path / "trained", tmp_path / "plain"
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(first))
    adapted.peft_config["default"].init_lora_weights = start
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)
    expected = adapted.eval()(**batch()).logits
    adapted.save_pretrained(str(trained))
    adapted.save_pretrained(str(plain), path_initial_model_for_weight_conversion=str(first))
    message = refusal(base(tiny_llava), trained)
    assert f"init_lora_weights '{start}'" in message
    assert "path_initial_model_for_weight_conversion" in message
    found = load_adapter(base(tiny_llava), plain, "base")(**batch()).logits
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_names_of_llava_before_transformers_4_52_are_exact_or_refused_with_the_names(
    tiny_llava: Path, tmp_path: Path
) -> None:
    save(base(tiny_llava), tmp_path)
    expected = PeftModel.from_pretrained(base(tiny_llava), str(tmp_path)).eval()(**batch()).logits
    rename(tmp_path, "model.model.language_model.", "model.language_model.model.")
    try:
        found = load_adapter(base(tiny_llava), tmp_path, "base")(**batch()).logits
    except AdapterError as error:
        assert "language_model.model" in str(error) and "'model.language_model'" in str(error)
        assert "4.52" in str(error)
    else:
        assert (found - expected).norm() / expected.norm() < 1e-5


# Refused


def rename(directory: Path, there: str, here: str) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(there, here)] = tensors.pop(name)

    change(directory, edit)


@pytest.mark.parametrize(
    "there, here, said",
    [
        ("model.model.language_model.", "model.model.", "'model' where this model says 'model.language_model'"),
        ("model.model.language_model.", "model.language_model.", "4.52"),
        ("base_model.model.", "", "no factors of a linear layer"),
        (".lora_A.weight", ".lora_A.default.weight", "no factors of a linear layer"),
        ("q_proj", "qkv", "qkv"),
        ("layers.0.", "layers.7.", "layers.7"),
    ],
)
def test_names_that_the_model_does_not_have_are_refused(
    tiny_llava: Path, tmp_path: Path, there: str, here: str, said: str
) -> None:
    save(base(tiny_llava), tmp_path)
    rename(tmp_path, there, here)
    assert said in refusal(base(tiny_llava), tmp_path)


def drop(text: str) -> Change:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if text in name]:
            del tensors[name]

    return edit


def put(text: str, value: Callable[[Tensor], Tensor]) -> Change:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if text in name]:
            tensors[name] = value(tensors[name])

    return edit


def say(**values: Any) -> Change:
    return lambda _, config: config.update(values)


REFUSED: dict[str, tuple[Change, str]] = {
    "half a pair": (drop("layers.0.self_attn.q_proj.lora_B"), "half a pair.*lora_A alone"),
    "every B missing": (drop("lora_B"), "half a pair"),
    "one module missing": (drop("layers.1.mlp.down_proj"), "1 modules that its target_modules name are not in the file"),
    "no tensors": (drop(""), "holds no tensor"),
    "fewer targets than tensors": (say(target_modules=["q_proj", "v_proj"]), "Add them to target_modules"),
    "more targets than tensors": (say(target_modules=["q_proj", "v_proj", "down_proj"]), "a tower may be missing"),
    "targets of nobody": (say(target_modules=["query_key_value"]), "not taken"),
    "no targets": (say(target_modules=None), "target_modules"),
    "a broken pattern": (say(target_modules="(q_proj"), "target_modules"),
    "another rank": (say(r=8), r"expected \(8, 128\).*rank 8"),
    "rank 0": (say(r=0), "cannot be used"),
    "a rank of text": (say(r="four"), "cannot be used|expected"),
    "transposed": (put("lora_A", lambda t: t.T), "made on another base"),
    "another width": (put("lora_A", lambda t: torch.cat([t, t], 1)), "made on another base"),
    "three axes": (put("lora_A", lambda t: t[None]), "made on another base"),
    "NaN": (put("layers.1.self_attn.v_proj.lora_B", lambda t: t * torch.nan), "B holds NaN"),
    "infinite": (put("lora_A", lambda t: t / 0), "A holds NaN or infinite"),
    "integers": (put("lora_A", lambda t: t.to(torch.int8)), "torch.int8"),
    "every B zero": (put("lora_B", torch.zeros_like), "saved before it was trained"),
    "every A zero": (put("lora_A", torch.zeros_like), "saved before it was trained"),
    "DoRA": (say(use_dora=True), "use_dora: True"),
    "biases": (say(bias="lora_only"), "bias: 'lora_only'"),
    "biases of B": (say(lora_bias=True), "lora_bias"),
    "whole modules": (say(modules_to_save=["lm_head"]), "modules_to_save"),
    "new tokens": (say(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "whole parameters": (say(target_parameters=["experts.w"]), "target_parameters"),
    "replicated layers": (say(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "aLoRA": (say(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "a setting of a newer PEFT": (say(use_newlora={"k": 1}), "use_newlora"),
    "LoftQ": (say(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights 'loftq'"),
    "CorDA": (say(init_lora_weights="corda"), "init_lora_weights 'corda'"),
    "LoRA-GA": (say(init_lora_weights="lora_ga"), "init_lora_weights 'lora_ga'"),
    "a start of a newer PEFT": (say(init_lora_weights="newest"), "init_lora_weights 'newest'"),
    "IA3": (say(peft_type="IA3"), "'IA3', expected 'LORA'"),
    "AdaLoRA": (say(peft_type="ADALORA"), "'ADALORA', expected 'LORA'"),
    "prompt tuning": (say(peft_type="PROMPT_TUNING"), "'PROMPT_TUNING', expected 'LORA'"),
    "no type": (say(peft_type=None), "peft_type is None"),
    "magnitudes without a word": (
        lambda tensors, _: tensors.update({"base_model.model.lm_head.lora_magnitude_vector": torch.ones(3)}),
        "no factors of a linear layer",
    ),
    "embeddings": (
        lambda tensors, _: tensors.update({"base_model.model.x.embed_tokens.lora_embedding_A": torch.ones(4, 3)}),
        "lora_embedding_A",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(nf4_model: Any, tiny_llava: Path, tmp_path: Path, kind: str) -> None:
    how, said = REFUSED[kind]
    save(base(tiny_llava), tmp_path)
    change(tmp_path, how)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refusal(nf4_model, tmp_path))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"lora_bias": True}])
def test_what_peft_itself_saves_beyond_plain_lora_is_refused(
    tiny_llava: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    save(base(tiny_llava), tmp_path, **settings)
    assert "adapter" in refusal(base(tiny_llava), tmp_path)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (CONFIG, b"[]", "peft_type"),
        (CONFIG, b"{", "adapter_config.json is not valid JSON"),
        (CONFIG, b"\xff", "adapter_config.json"),
        (WEIGHTS, b"", "cannot be read"),
        (WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "cannot be read"),
        (WEIGHTS, None, "has no adapter_model.safetensors"),
        (CONFIG, None, "has no adapter_config.json"),
    ],
)
def test_a_damaged_file_is_named(
    nf4_model: Any, tiny_llava: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    save(base(tiny_llava), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refusal(nf4_model, tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_not_read(nf4_model: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert f"only {name}; convert it first, pickled weights are not read" in refusal(nf4_model, tmp_path)


# Said, and read


def test_an_adapter_of_another_base_and_zero_updates_are_told_of(
    tiny_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(base(tiny_llava), tmp_path)
    change(tmp_path, say(base_model_name_or_path="llava-hf/llava-1.5-13b-hf"))
    change(tmp_path, put("layers.1.mlp.down_proj.lora_B", torch.zeros_like))
    with caplog.at_level(logging.WARNING):
        read_adapter(base(tiny_llava), tmp_path, "llava-hf/llava-1.5-7b-hf")
    assert "was made on llava-hf/llava-1.5-13b-hf, and the base is llava-hf/llava-1.5-7b-hf" in caplog.text
    assert "1 of 6 updates are zero, model.language_model.layers.1.mlp.down_proj first" in caplog.text


# Every place where an adapter is read


def settings_of(directory: Path, adapter: Path) -> dict[str, str]:
    return {"base_model": str(directory), "adapter": str(adapter), "quantization": "none", "device": "cpu"}


def test_the_leaderboard_and_the_dense_model_read_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    save(base(tiny_llava), tmp_path, use_rslora=True)
    expected = PeftModel.from_pretrained(base(tiny_llava), str(tmp_path)).eval()(**batch()).logits
    model, _ = load_for_evaluation(settings_of(tiny_llava, tmp_path))
    dense, _ = load_dense(model_config(tiny_llava, "none"), tmp_path)
    for found in (model(**batch()).logits, dense(**batch()).logits):
        assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kind", ["half a pair", "one module missing", "NaN", "DoRA"])
def test_the_leaderboard_and_the_dense_model_refuse_the_same(tiny_llava: Path, tmp_path: Path, kind: str) -> None:
    save(base(tiny_llava), tmp_path)
    change(tmp_path, REFUSED[kind][0])
    with pytest.raises(AdapterError, match=REFUSED[kind][1]):
        load_for_evaluation(settings_of(tiny_llava, tmp_path))
    with pytest.raises(AdapterError, match=REFUSED[kind][1]):
        load_dense(model_config(tiny_llava, "none"), tmp_path)
