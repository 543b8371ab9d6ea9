"""Adapters as PEFT saves them, and as they go wrong: read exactly as stock PEFT does, or refused by name."""

import json
import logging
import re
import shutil
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
from mllm_keeplora.modeling.families import FAMILIES, ModelFamily
from mllm_keeplora.modeling.loading import load_base, load_dense
from mllm_keeplora.modeling.saved_adapters import (
    CONFIG,
    WEIGHTS,
    adapter_facts,
    load_adapter,
    read_adapter,
    read_initial_adapter,
)
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


@pytest.fixture(scope="module")
def bare(tiny_llava: Path) -> Any:
    """A base that every test leaves as it is."""
    return base(tiny_llava)


@pytest.fixture(scope="module")
def plain(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter, to copy."""
    directory = tmp_path_factory.mktemp("plain")
    save(base(tiny_llava), directory)
    return directory


@pytest.fixture
def saved(plain: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def stock_logits(model: Any, adapter: Path) -> Tensor:
    stock = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits = stock(**batch()).logits
    stock.unload()
    return logits


def assert_exact(model: Any, adapter: Path, expected: Tensor | None = None) -> None:
    """Both ways of reading it give stock PEFT's logits, which are not the base's, and leave the base as it was."""
    expected = stock_logits(model, adapter) if expected is None else expected
    before, untouched = state(model), model(**batch()).logits
    past = read_initial_adapter(model, adapter, "base")
    assert all(torch.equal(x, y) for x, y in zip(before, state(model), strict=True))
    folded = attach(model, ACCUMULATED, past, dict.fromkeys(past, 1.0))
    found = [folded(**batch()).logits]
    folded.unload()
    loaded = load_adapter(model, adapter, "base")
    found.append(loaded(**batch()).logits)
    loaded.unload()
    for logits in found:
        assert (logits - expected).norm() / expected.norm() < 1e-5
    assert (expected - untouched).norm() / untouched.norm() > 1e-3
    assert torch.equal(model(**batch()).logits, untouched)


def refusal(model: Any, adapter: Path) -> str:
    """What is said of it; the base stays as it was."""
    before = state(model)
    with pytest.raises(KeepLoRAError) as refused:
        read_initial_adapter(model, adapter, "base")
    assert all(torch.equal(x, y) for x, y in zip(before, state(model), strict=True))
    assert not any("lora" in name for name, _ in model.named_modules())
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
def test_plain_lora_is_exact(bare: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    save(bare, tmp_path, **settings).unload()
    assert_exact(bare, tmp_path)


def test_plain_lora_is_exact_on_nf4(tiny_llava: Path, tmp_path: Path) -> None:
    model = base(tiny_llava, "nf4")
    save(model, tmp_path, use_rslora=True).unload()
    assert_exact(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_exact(bare: Any, saved: Path, dtype: torch.dtype) -> None:
    change(saved, lambda tensors, _: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert_exact(bare, saved)


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
    untouched = base(tiny_llava)
    message = refusal(untouched, trained)
    assert f"init_lora_weights '{start}'" in message
    assert "path_initial_model_for_weight_conversion" in message
    found = load_adapter(untouched, plain, "base")(**batch()).logits
    assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(
    "there, here",
    [
        ("base_model.model.", ""),
        (".weight", ".default.weight"),
        ("model.model.language_model.", "model.language_model.model."),
    ],
)
def test_other_names_that_peft_knows_are_exact(bare: Any, saved: Path, there: str, here: str) -> None:
    """A bare state dict's, an adapter's name among them, and those of LLaVA before transformers 4.52."""
    expected = stock_logits(bare, saved)
    rename(saved, there, here)
    assert_exact(bare, saved, expected)


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
        ("lora_", "loha_", "no factors of a linear layer"),
        ("q_proj", "qkv", "qkv"),
        ("layers.0.", "layers.7.", "layers.7"),
    ],
)
def test_names_that_the_model_does_not_have_are_refused(
    bare: Any, saved: Path, there: str, here: str, said: str
) -> None:
    rename(saved, there, here)
    assert said in refusal(bare, saved)


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
    "one module missing": (
        drop("layers.1.mlp.down_proj"),
        "1 modules that its target_modules name are not in the file",
    ),
    "no tensors": (drop(""), "holds no tensor"),
    "fewer targets than tensors": (say(target_modules=r".*language_model.*q_proj"), "4 of the file's 6.*no more and"),
    "targets of one tower more": (say(target_modules=["q_proj", "v_proj", "down_proj"]), "vision_tower.*no more and"),
    "targets that overlap": (say(target_modules=["q_proj"]), "not taken.*not in the file.*no more and no less"),
    "a changed output layer": (
        lambda tensors, _: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.ones(14, 128)}),
        "lm_head.base_layer",
    ),
    "targets of nobody": (say(target_modules=["query_key_value"]), "not taken"),
    "no targets": (say(target_modules=None), "target_modules"),
    "a broken pattern": (say(target_modules="(q_proj"), "target_modules"),
    "another rank": (say(r=8), r"expected \(8, 192\).*rank 8"),
    "rank 0": (say(r=0), "r is 0 .*other than 0"),
    "rank 0 with no rows": (
        lambda tensors, config: (
            put("lora_A", lambda t: t[:0])(tensors, config),
            put("lora_B", lambda t: t[:, :0])(tensors, config),
            config.update(r=0),
        ),
        "r is 0 .*other than 0",
    ),
    "a rank of text": (say(r="four"), "cannot be used|expected"),
    "a fraction of a rank": (say(r=4.5), "r is 4.5 .*whole for a rank"),
    "ranks as a list": (say(rank_pattern=["q_proj"]), "rank_pattern in .*cannot be used"),
    "a rank of text for some": (say(rank_pattern={"q_proj": "4"}), "rank_pattern.q_proj is '4'"),
    "no scale": (say(lora_alpha=0), "lora_alpha is 0 .*other than 0"),
    "a scale of text": (say(lora_alpha="6"), "lora_alpha is '6'"),
    "a scale of null": (say(lora_alpha=None), "lora_alpha is None"),
    "a scale of true": (say(lora_alpha=True), "lora_alpha is True"),
    "scales in a list": (say(lora_alpha=[6]), r"lora_alpha is \[6\]"),
    "an endless scale": (say(lora_alpha=10**400), "lora_alpha is 1000"),
    "no scale for some": (say(alpha_pattern={".*q_proj": 0}), "alpha_pattern..\\*q_proj is 0"),
    "a scale of text for some": (say(alpha_pattern={"q_proj": "3"}), "alpha_pattern.q_proj is '3'"),
    "a broken pattern of scales": (say(alpha_pattern={"(": 3}), "alpha_pattern in .*cannot be used"),
    "the text false": (say(use_rslora="false"), "use_rslora is 'false' .*true or false"),
    "B beyond fp32": (
        lambda tensors, config: (put("lora_B", lambda t: t * 1e37)(tensors, config), config.update(lora_alpha=1e8)),
        "B times its scale .* is infinite",
    ),
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
def test_what_cannot_be_exact_is_refused_by_name(bare: Any, saved: Path, kind: str) -> None:
    how, said = REFUSED[kind]
    change(saved, how)
    assert re.search(said, refusal(bare, saved))


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
def test_a_damaged_file_is_named(bare: Any, saved: Path, name: str, content: bytes | None, said: str) -> None:
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    assert said in refusal(bare, saved)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_not_read(bare: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert f"only {name}; convert it first, pickled weights are not read" in refusal(bare, tmp_path)


# Said, and read


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_modules_of_a_vision_tower_are_known_by_their_names(family: ModelFamily, tmp_path: Path) -> None:
    """Those of every family, as PEFT saves them."""
    layers = [*family.vision_layers.values(), family.language_layers]
    tensors = {f"base_model.model.{layer}.0.q_proj.lora_A.weight": torch.ones(3, 4) for layer in layers}
    save_file(tensors, tmp_path / WEIGHTS)
    assert adapter_facts(tmp_path / WEIGHTS).vision_modules == len({*family.vision_layers.values()})


def test_an_adapter_of_another_base_and_zero_updates_are_told_of(
    bare: Any, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(saved, say(base_model_name_or_path="llava-hf/llava-1.5-13b-hf"))
    change(saved, put("layers.1.mlp.down_proj.lora_B", torch.zeros_like))
    with caplog.at_level(logging.WARNING):
        read_adapter(bare, saved, "llava-hf/llava-1.5-7b-hf")
    assert "was made on llava-hf/llava-1.5-13b-hf, and the base is llava-hf/llava-1.5-7b-hf" in caplog.text
    assert "1 of 6 updates are zero, model.language_model.layers.1.mlp.down_proj first" in caplog.text


# Every place where an adapter is read


def settings_of(directory: Path, adapter: Path) -> dict[str, str]:
    return {"base_model": str(directory), "adapter": str(adapter), "quantization": "none", "device": "cpu"}


def test_the_leaderboard_and_the_dense_model_read_the_same(bare: Any, tiny_llava: Path, saved: Path) -> None:
    expected = stock_logits(bare, saved)
    model, _ = load_for_evaluation(settings_of(tiny_llava, saved))
    dense, _ = load_dense(model_config(tiny_llava, "none"), saved)
    for found in (model(**batch()).logits, dense(**batch()).logits):
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_the_leaderboard_and_the_dense_model_refuse_the_same(tiny_llava: Path, saved: Path) -> None:
    change(saved, REFUSED["one module missing"][0])
    with pytest.raises(AdapterError, match="not in the file"):
        load_for_evaluation(settings_of(tiny_llava, saved))
    with pytest.raises(AdapterError, match="not in the file"):
        load_dense(model_config(tiny_llava, "none"), saved)
