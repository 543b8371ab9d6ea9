"""Replies: the likeliest token at every step, whatever a checkpoint asks for, ended where training ends them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GenerationConfig, WatermarkingConfig

from mllm_keeplora.data.chat_template import chat_form
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.evaluation.answer import answer, generate_replies, generation_settings, greedy_replies, stop_tokens
from mllm_keeplora.evaluation.errors import LogitsError
from mllm_keeplora.modeling.loading import load_base
from tests.conversations import ask
from tests.modules.conftest import TEMPLATE, model_config

LENGTH = 6
QUESTIONS = ["what is this ?", "red no what", "is"]


@pytest.fixture(scope="module")
def base(tiny_llava: Path) -> tuple[Any, Any]:
    return load_base(model_config(tiny_llava, "none"))


@pytest.fixture
def live(base: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """A model without an end of its own, so that replies have the full length; its config is put back."""
    model, processor = base
    own, template = model.generation_config, processor.chat_template
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    yield model, processor
    model.generation_config, processor.chat_template = own, template


def inputs_of(processor: Any, question: str) -> dict[str, Any]:
    return prepare_questions(processor, [ask(question, Image.new("RGB", (64, 64)))], torch.device("cpu"))


@torch.no_grad()
def likeliest(model: Any, inputs: dict[str, Any], length: int, stops: set[int]) -> list[int]:
    """By hand: no cache, no settings."""
    ids, said = inputs["input_ids"], []
    while len(said) < length and (not said or said[-1] not in stops):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits
        said.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    return said


# Each makes stock `generate` say something else than the likeliest token, or fail, somewhere in QUESTIONS.
CARRIED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 12)]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 12))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 12))},
    "min_new_tokens": {"min_new_tokens": LENGTH, "eos_token_id": list(range(2, 14))},
    "min_length": {"min_length": 60, "eos_token_id": list(range(2, 14))},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "sequence_bias": {"sequence_bias": [[[5], 50.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 9.0)},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "guidance_scale": {"guidance_scale": 3.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=50.0)},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 0},
    "beams": {"num_beams": 4, "length_penalty": -3.0},
    "max_length": {"max_length": 3},
    "stop_strings": {"stop_strings": ["red", "no", "what"]},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
}
HARMLESS = {
    "prompt_lookup_num_tokens",
    "max_length",
    "beams",
    "forced_bos_token_id",
}  # the same tokens here, or overruled


@pytest.mark.parametrize("name, adapted", [*((name, False) for name in CARRIED), ("repetition_penalty", True)])
def test_greedy_is_the_likeliest_token(name: str, adapted: bool, live: tuple[Any, Any]) -> None:
    model, processor = live
    model.generation_config.update(**CARRIED[name])
    carried = model.generation_config
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
    form = chat_form(processor)
    stops = set(stop_tokens(model, processor.tokenizer, form))
    try:
        for question in QUESTIONS:
            inputs = inputs_of(processor, question)
            expected = likeliest(model, inputs, LENGTH, stops)
            kept = [token for token in expected if token not in stops]
            [reply] = generate_replies(asked, processor, form, inputs, LENGTH)
            assert reply == processor.tokenizer.decode(kept, skip_special_tokens=True)
        assert answer(asked, processor, question, Image.new("RGB", (64, 64)), LENGTH) == reply.strip()
    finally:
        if adapted:
            asked.unload()
    assert model.generation_config is carried, "the checkpoint's own config is put back"


@pytest.mark.parametrize("name", sorted(CARRIED.keys() - HARMLESS))
def test_these_settings_do_change_what_stock_generation_says(name: str, live: tuple[Any, Any]) -> None:
    """Else the test above could not fail."""
    model, processor = live
    model.generation_config.update(**CARRIED[name])
    stops = set(stop_tokens(model, processor.tokenizer, chat_form(processor)))
    changed = False
    for question in QUESTIONS:
        inputs = inputs_of(processor, question)
        try:
            with torch.no_grad():
                found = model.generate(**inputs, max_new_tokens=LENGTH)[0, inputs["input_ids"].shape[1] :].tolist()
        except ValueError:  # stop strings want a tokenizer
            changed = True
        else:
            changed |= found != likeliest(model, inputs, LENGTH, stops)
    assert changed


# Where replies end


def speaks(model: Any, after: int, token: int) -> Callable[[], None]:
    """Makes a model say `token` once it has said `after` others; returns what ends it."""
    steps = 0

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        output[..., token] += 1e4 if steps == after else -1e4
        steps += 1
        return output

    return model.lm_head.register_forward_hook(hook).remove


ENDINGS = {  # a template's end -> ends that the checkpoint's config names
    "<|eot_id|>": [2, [2], None],
    "<|im_end|>": [2, [2, 3]],
    "</s>": [3, [3], None],
}


@pytest.mark.parametrize("end, own", [(end, own) for end, all_own in ENDINGS.items() for own in all_own])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_a_reply_ends_at_every_token_that_ends_one(family: str, end: str, own: Any, tiny: Any) -> None:
    """Those of the config, and the one that training supervises: a config may name another (llama3#104)."""
    model, processor = with_ends(family, tiny)
    media = processor.image_token if family != "qwen2_5_vl" else "<|vision_start|><|image_pad|><|vision_end|>"
    processor.chat_template = TEMPLATE.replace("</s>", end).replace("<image>", media)
    model.generation_config = GenerationConfig(eos_token_id=own, pad_token_id=0)
    form = chat_form(processor)
    taught = processor.tokenizer.convert_tokens_to_ids(end)
    named = own if isinstance(own, list) else [2 if own is None else own]
    assert form.end_token == end
    assert stop_tokens(model, processor.tokenizer, form) == list(dict.fromkeys([*named, taught]))
    assert generation_settings(model, processor)["eos_token_id"] == list(dict.fromkeys([*named, taught]))
    inputs = prepare_questions(processor, [ask("what is this ?", Image.new("RGB", (64, 64)))], torch.device("cpu"))
    for token in {*named, taught}:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        counter, silent = model.register_forward_pre_hook(count), speaks(model, 3, token)
        try:
            generate_replies(model, processor, form, inputs, LENGTH)
        finally:
            counter.remove()
            silent()
        assert calls == 4, "three tokens and the end"


_WITH_ENDS: dict[str, tuple[Any, Any]] = {}


def with_ends(family: str, tiny: Any) -> tuple[Any, Any]:
    """A tiny model of the family whose tokenizer knows all ends."""
    if family not in _WITH_ENDS:
        model, processor = load_base(model_config(tiny(family), "none"))
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|im_end|>"]})
        model.resize_token_embeddings(len(processor.tokenizer))
        _WITH_ENDS[family] = model, processor
    return _WITH_ENDS[family]


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_no_numbers_are_no_answer(live: tuple[Any, Any], value: float) -> None:
    """Finite values of an adapter that are too large give NaN on the way: argmax would take the first token."""
    model, processor = live
    layer = model.get_submodule("model.language_model.layers.1.mlp.down_proj")
    kept = layer.weight.data.clone()
    layer.weight.data.fill_(value)
    try:
        with pytest.raises(LogitsError, match="logits are NaN or infinite.*adapter"):
            greedy_replies(model, processor, [ask("what", None)], 2)
    finally:
        layer.weight.data = kept
    assert len(greedy_replies(model, processor, [ask("what", None)], 2)) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next_video"])
def test_a_model_in_training_answers_as_it_does_after_it(family: str, checkpointing: bool, tiny: Any) -> None:
    """With checkpointing its layers would keep no cache; the mode stays as it was."""
    model, processor = load_base(model_config(tiny(family), "none"))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    asked = [ask(question, None) for question in ("what is this ?", "is this red ?")]
    expected = greedy_replies(model, processor, asked, 8)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert greedy_replies(model, processor, asked, 8) == expected
    assert all(module.training for module in model.modules())
    assert max(len(reply.split()) for reply in expected) > 1
