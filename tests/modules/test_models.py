"""Loading: both towers 4-bit, guarded, frozen; bad directories named."""

import gc
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import trl
from safetensors.torch import load_file, save_file

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig
from mllm_keeplora.modeling import loading
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.modeling.linear4bit import computed_weight, free_4bit_weights
from mllm_keeplora.modeling.loading import (
    base_model_hash,
    check_media_tokens,
    known_base_hash,
    load_base,
    load_base_processor,
    resolve_device,
    resolve_model_directory,
)
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.planning.skeleton import build_processor, build_skeleton, describe_weights
from tests.modules.conftest import all_targets, batch, model_config
from tests.modules.tiny_families import BUILDERS, WRITING


def test_both_towers_are_4_bit_and_guarded_and_the_rest_is_not(nf4_model: Any) -> None:
    layers = {n: m for n, m in nf4_model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {t.name for t in all_targets(nf4_model)} <= set(layers)
    assert all(m.support_avx512bf16_for_cpu is False for m in layers.values())
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers.values())
    assert not any("projector" in name or "lm_head" in name for name in layers)


def test_the_base_is_frozen_and_in_eval_mode(model: Any) -> None:
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_the_computed_weight_is_what_the_layer_multiplies_by(model: Any) -> None:
    for target in all_targets(model):
        module = model.get_submodule(target.name)
        x = torch.randn(2, target.in_features)
        bias = module.bias if module.bias is not None else 0.0
        torch.testing.assert_close(module(x) - bias, x @ computed_weight(module).T, atol=1e-5, rtol=1e-4)


def test_only_linear_layers_have_a_computed_weight(nf4_model: Any) -> None:
    with pytest.raises(TypeError, match="Embedding"):
        computed_weight(nf4_model.get_input_embeddings())


def test_loading_twice_gives_the_same_function(tiny_llava: Path, nf4_model: Any) -> None:
    again, _ = load_base(model_config(tiny_llava, "nf4"))
    assert torch.equal(again(**batch()).logits, nf4_model(**batch()).logits)


@pytest.mark.parametrize(
    "remove, message",
    [
        (["processor_config.json", "preprocessor_config.json"], "has no processor"),
        (["config.json"], "has no config"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["model.safetensors"], "has no .*safetensors"),
    ],
)
def test_an_incomplete_model_directory_is_named(
    tiny_llava: Path, tmp_path: Path, remove: list[str], message: str
) -> None:
    directory = shutil.copytree(tiny_llava, tmp_path / "base")
    for name in remove:
        (directory / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=message) as caught:
        load_base(model_config(directory, "nf4"))
    assert str(directory) in str(caught.value)


def test_a_base_model_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nobody/nothing"):
        load_base(ModelConfig(base_model="nobody/nothing"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_a_device_is_an_error(tiny_llava: Path) -> None:
    config = ModelConfig(base_model=str(tiny_llava), device="cuda")
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        load_base(config)
    with pytest.raises(ConfigError, match=r"sees no CUDA device.*--memory_gb GB plans for a card that is not here"):
        make_plan(RunConfig(model=config))


# As nvidia-smi writes it: of drivers 550 and 595, and without a driver.
SMI = "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |"
NEW_SMI = "| NVIDIA-SMI 595.20   KMD Version: 595.20   Driver Version : 595.20   CUDA UMD Version: 13.2 |"
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    "says, built_for, hidden, expected",
    [
        (
            SMI,
            "13.0",
            None,
            "driver 550.54.15 serves CUDA 12.4, and torch .* is built for CUDA 13.0; update the driver",
        ),
        (NEW_SMI, None, None, "driver 595.20 serves CUDA 13.2, and torch .* is a build without CUDA; install"),
        (NO_DRIVER, "13.0", "0", "couldn't communicate with the NVIDIA driver.*install the driver"),
        (SMI, "13.0", "", "CUDA_VISIBLE_DEVICES is '', which hides every GPU; unset it"),
    ],
)
def test_a_driver_that_torch_cannot_use_is_said(
    says: str,
    built_for: str | None,
    hidden: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By auto, which goes on, once; and by cuda, which does not."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "{says}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    loading._say_on_cpu.cache_clear()
    for _ in range(2):
        assert resolve_device(ModelConfig()) == torch.device("cpu")
    [said] = [record.message for record in caplog.records if "NVIDIA driver: " in record.message]
    assert re.search(expected, said) and "takes the CPU" in said
    with pytest.raises(ConfigError, match=f"sees no CUDA device: .*{expected}"):
        resolve_device(ModelConfig(device="cuda"))
    assert resolve_device(ModelConfig(device="cpu")) == torch.device("cpu")


def test_a_machine_without_a_driver_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(ModelConfig()) == torch.device("cpu") and not caplog.records


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash_attention_2", r"flash-attn is not installed: .*\[flash-attn\].*kernels-community/flash-attn2"),
        ("flash_attention_3", r"flash_attn_interface is not installed: build it .*kernels-community/vllm-flash-attn3"),
        ("kernels-community/flash-attn2", r"a kernel of the hub: pip install 'kernels>=[\d.]+,<[\d.]+'"),
    ],
)
def test_missing_kernels_of_attention_say_how_to_get_them(tiny_llava: Path, name: str, message: str) -> None:
    config = ModelConfig(base_model=str(tiny_llava), attn_implementation=name, compute_dtype="bfloat16")
    with pytest.raises(ConfigError, match=message):
        load_base(config)


@pytest.mark.parametrize(
    "name, device, capability, message",
    [
        ("flash_attention_2", "cpu", None, "needs a GPU, and this run takes the CPU"),
        ("kernels-community/flash-attn2", "cpu", None, "needs a GPU, and this run takes the CPU"),
        ("flash_attention_2", "cuda", (7, 5), r"compute capability 8.0; Some GPU has 7.5: use sdpa"),
        ("flash_attention_3", "cuda", (8, 9), r"compute capability 9.0; Some GPU has 8.9"),
        ("flash_attention_2", "cuda", (8, 0), None),
        ("flash_attention_3", "cuda", (9, 0), None),
        ("kernels-community/flash-attn2", "cuda", (7, 5), None),  # it says itself what it runs on
        ("sdpa", "cpu", None, None),
    ],
)
def test_a_device_that_cannot_run_a_kernel_is_named(
    name: str, device: str, capability: Any, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(loading, "is_kernels_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    config = ModelConfig(attn_implementation=name, compute_dtype="bfloat16")
    if message is None:
        loading.check_attention(config, torch.device(device))
        return
    with pytest.raises(ConfigError, match=message):
        loading.check_attention(config, torch.device(device))


def test_the_hash_follows_the_content_not_the_place(tiny_llava: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_llava, tmp_path / "moved")
    first = base_model_hash(tiny_llava, tmp_path / "cache")
    assert base_model_hash(moved, tmp_path / "cache") == first
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert base_model_hash(moved, tmp_path / "cache") != first


def test_a_known_hash_is_remembered_and_none_is_computed(tiny_llava: Path, tmp_path: Path) -> None:
    assert known_base_hash(tiny_llava, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    found = base_model_hash(tiny_llava, tmp_path / "cache")
    assert known_base_hash(tiny_llava, tmp_path / "cache") == found


def test_a_file_that_was_replaced_with_its_time_is_hashed_again(tiny_llava: Path, tmp_path: Path) -> None:
    """Archives and `cp -p` set the time of the last write."""
    moved = shutil.copytree(tiny_llava, tmp_path / "moved")
    first = base_model_hash(moved, tmp_path / "cache")
    weights = moved / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert base_model_hash(moved, tmp_path / "cache") != first


@pytest.mark.parametrize("damaged", ["", "{", "[]", "5", "{}", '{"hash": 5}', '{"hash": "beef"}'])
def test_a_damaged_memory_of_a_hash_is_written_again(tiny_llava: Path, tmp_path: Path, damaged: str) -> None:
    first = base_model_hash(tiny_llava, tmp_path)
    (memory,) = (tmp_path / "model_hashes").iterdir()
    memory.write_text(damaged)
    assert known_base_hash(tiny_llava, tmp_path) is None
    assert base_model_hash(tiny_llava, tmp_path) == known_base_hash(tiny_llava, tmp_path) == first


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def fill(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if part in name).flatten()[0] = value

    return change


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors[name] = torch.zeros(5, 5)


def shard(directory: Path, *, keep_index: bool) -> None:
    """Weights in two files, of which the second is lost."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    half = dict.fromkeys(names[: len(names) // 2], files[0])
    save_file({name: tensors[name] for name in half}, directory / files[0], {"format": "pt"})
    path.unlink()
    if keep_index:
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, files[1]) | half}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_layers(directory: Path) -> None:
    """A config of a smaller model beside the weights of the whole one."""
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 1, "layer_types": None}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: change_weights(p, drop("layers.1.self_attn.q_proj")), "parameters have no tensor .*q_proj"),
        (lambda p: change_weights(p, drop("vision_tower")), "parameters have no tensor .*vision_tower"),
        (lambda p: change_weights(p, drop("multi_modal_projector")), "parameters have no tensor .*projector"),
        (lambda p: change_weights(p, drop("lm_head")), "1 parameters have no tensor .*lm_head"),
        (lambda p: change_weights(p, rename), "parameters have no tensor"),
        (lambda p: change_weights(p, fill("embed_tokens", torch.nan)), "embed_tokens.weight holds NaN"),
        (lambda p: change_weights(p, fill("layer_norm", torch.inf)), "layer_norm.*holds NaN or infinite"),
        (lambda p: change_weights(p, reshape), r"cannot be loaded|q_proj.weight is \[5, 5\].*, expected"),
        (lambda p: shard(p, keep_index=True), "cannot be loaded"),
        (lambda p: shard(p, keep_index=False), "cannot be loaded"),
        (lambda p: fewer_layers(p), "config.json has no place for .*layers.1."),
        (lambda p: (p / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda p: (p / "config.json").write_text("null"), "cannot be loaded"),
        (lambda p: (p / "config.json").write_text('{"model_type": "llava", "text_config": 5}'), "cannot be loaded"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_base_that_is_not_whole_is_refused(
    tiny_llava: Path, tmp_path: Path, damage: Callable[[Path], object], message: str, kind: str
) -> None:
    """transformers fills what is missing with random numbers, and goes on."""
    directory = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    damage(directory)
    with pytest.raises(ConfigError, match=f"base model {directory}.*{message}"):
        load_base(model_config(directory, kind))


@pytest.mark.parametrize("remote_code", [False, True])
def test_a_hub_model_is_one_commits_safetensors_and_code_only_where_asked_for(
    tiny_llava: Path,
    remote_code: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(repository: str, **settings: Any) -> str:
        asked.append((repository, settings))
        return str(tiny_llava)

    monkeypatch.setattr("mllm_keeplora.modeling.loading.snapshot_download", fetch)
    config = ModelConfig(base_model="somebody/model", revision="c0ffee", trust_remote_code=remote_code)
    assert resolve_model_directory(config) == tiny_llava
    [(repository, settings)] = asked
    assert (repository, settings["revision"]) == ("somebody/model", "c0ffee")
    assert "*.safetensors" in settings["allow_patterns"]
    assert ("*.py" in settings["allow_patterns"]) is remote_code
    assert not any("bin" in pattern or "pt" in pattern for pattern in settings["allow_patterns"])
    assert caplog.text == ""

    newest = ModelConfig(base_model=f"somebody/unpinned{remote_code}")
    resolve_model_directory(newest)
    assert asked[-1][1]["revision"] is None
    assert f"'revision: {tiny_llava.name}'" in caplog.text


def test_remote_code_is_not_run_unasked(tiny_llava: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llava, tmp_path / "base")
    values = json.loads((directory / "config.json").read_text())
    values |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "own.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_base(model_config(directory, "nf4"))


def test_a_directory_has_no_revision(tiny_llava: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.revision is 'main'.*directory"):
        load_base(ModelConfig(base_model=str(tiny_llava), revision="main"))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# As published: the forms of unsloth's, Qwen's, casperhansen's and neuralmagic's models.
STORED = {
    "nf4": NF4,
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True, "group_size": 128},
    "fp8": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def edited_config(base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    directory = Path(shutil.copytree(base, tmp_path / "base"))
    values = json.loads((directory / "config.json").read_text())
    change(values)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("place", ["", "text_config"])
@pytest.mark.parametrize("stored", STORED)
def test_a_base_in_another_quantisation_is_refused_everywhere(
    tiny_llava: Path, tmp_path: Path, stored: str, place: str, kind: str
) -> None:
    if (stored, kind) == ("nf4", "nf4"):
        return

    def store(values: dict[str, Any]) -> None:
        (values[place] if place else values)["quantization_config"] = STORED[stored]

    config = model_config(edited_config(tiny_llava, tmp_path, store), kind)
    for use in (load_base, load_base_processor, build_skeleton, build_processor):
        with pytest.raises(ConfigError, match=rf"is stored quantised \(.*model.quantization is {kind}; .*16 or 32 bit"):
            use(config)


def test_a_base_that_is_stored_in_nf4_is_the_same_model(tiny_llava: Path, nf4_model: Any, tmp_path: Path) -> None:
    """It computes as the settings say, whatever its own config says of that."""
    directory = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    nf4_model.save_pretrained(directory)
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(values))
    config = model_config(directory, "nf4")
    model, _ = load_base(config)
    assert torch.equal(model(**batch()).logits, nf4_model(**batch()).logits)
    assert all(m.compute_dtype == torch.float32 for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    assert "stored quantised" in describe_weights(config, build_skeleton(config))
    with pytest.raises(ConfigError, match="stored quantised .*set model.quantization: nf4, or take"):
        load_base(model_config(directory, "none"))


@pytest.mark.parametrize("family", WRITING)
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("wrong", ["config", "tokenizer", "beyond"])
def test_media_tokens_of_another_model_are_refused(family: str, kind: str, wrong: str) -> None:
    config, processor = BUILDERS[family]()
    if kind not in FAMILIES[family].vision_layers or not hasattr(config, f"{kind}_token_id"):
        return  # InternVL's clips are written with the token of images
    check_media_tokens(config, processor, "base")
    # Gemma 3's processor takes the tokens that the model replaces from its tokenizer.
    holder = processor.tokenizer if family == "gemma3" else processor
    token = getattr(holder, f"{kind}_token")
    if wrong == "config":
        setattr(config, f"{kind}_token_id", 1)
    elif wrong == "tokenizer":
        setattr(holder, f"{kind}_token", "what is")
    else:
        config.get_text_config().vocab_size = processor.tokenizer.convert_tokens_to_ids(token)
    with pytest.raises(ConfigError, match=rf"base: its processor writes .* for {kind}s, .*expected one token, the"):
        check_media_tokens(config, processor, "base")


def test_media_tokens_are_looked_at_wherever_a_processor_is_loaded(tiny_llava: Path, tmp_path: Path) -> None:
    directory = edited_config(tiny_llava, tmp_path, lambda values: values.update(image_token_index=7))
    config = model_config(directory, "none")
    for use in (load_base, load_base_processor, build_processor):
        with pytest.raises(ConfigError, match=rf"{directory}.* makes \[4\]; .*image_token_index 7 of its config.json"):
            use(config)


@pytest.mark.parametrize("named", [False, True])
def test_a_template_that_writes_the_date_writes_one_date(tiny_llava: Path, tmp_path: Path, named: bool) -> None:
    """Llama 3.2's and gpt-oss's, as trl has copies of them; the processor is saved that way too."""
    directory = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    own = directory / "chat_template.jinja"
    for name in ("llama3_2", "gptoss"):
        template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        (tmp_path / "t.jinja" if named else own).write_text(template)
        config = ModelConfig(base_model=str(directory), chat_template=str(tmp_path / "t.jinja") if named else None)
        processor = load_base_processor(config)
        text = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        assert "26 Jul 2024" in text or "2024-07-26" in text
        processor.save_pretrained(tmp_path / "saved")
        assert "strftime_now(" not in (tmp_path / "saved" / own.name).read_text()
    (directory / own.name).write_text("{{ strftime_now(form) }}")
    with pytest.raises(ConfigError, match="writes today's date"):
        load_base_processor(model_config(directory, "none"))


def test_dead_4_bit_weights_are_freed_before_others_take_their_place(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They form a cycle, which waits for a garbage collection: an export would hold both models."""
    loaded, base = [], load_base

    def keep_track(config: ModelConfig) -> Any:
        model, processor = base(config)
        loaded.extend(weakref.ref(m.weight) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
        return model, processor

    monkeypatch.setattr(loading, "load_base", keep_track)
    gc.disable()
    try:
        model, _ = loading.load_dense(model_config(tiny_llava, "nf4"), None)
        assert len(loaded) > 10 and not any(weight() is not None for weight in loaded)
        loaded.clear()
        model, _ = keep_track(model_config(tiny_llava, "nf4"))
        del model
        assert any(weight() is not None for weight in loaded)  # else the cycle is gone, and with it the need
        free_4bit_weights()
        assert not any(weight() is not None for weight in loaded)
    finally:
        gc.enable()
