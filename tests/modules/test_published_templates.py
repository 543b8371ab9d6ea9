"""Chat templates as published: what is learnt is the answer and its end, what precedes it is what evaluation asks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import trl
from PIL import Image
from tokenizers import Tokenizer, models, processors
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mllm_keeplora.config import ModelConfig, VideoConfig
from mllm_keeplora.data.chat_template import ProcessorError, chat_form, render
from mllm_keeplora.data.collator import ChatCollator, prepare_questions
from mllm_keeplora.data.conversation import MediaFile, Message, Part, Sample
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.modeling.loading import load_processor
from mllm_keeplora.resources import find
from tests.clips import write_clip
from tests.modules.tiny_families import (
    BUILDERS,
    GEMMA_FRAME,
    GEMMA_NAMES,
    GEMMA_TOKENS,
    INTERNVL_FRAME,
    INTERNVL_NAMES,
    QWEN_FRAME,
)

PUBLISHED = Path(__file__).parents[1] / "published_templates"
TRL = Path(trl.__file__).parent / "chat_templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A template with its family, and what ends an answer. `lead`: a space that belongs to the answer's first word."""

    template: str
    family: str
    end: str
    lead: str = ""
    system: bool = True


CASES = [
    Case("llava-1.5-7b-hf", "llava", "</s>", " "),
    Case("vicuna-text-only", "llava", "</s>"),
    Case("llava-1.5-7b-hf", "llava_next", "</s>", " "),  # llava-v1.6-vicuna-7b-hf
    Case("llava-v1.6-mistral-7b-hf", "llava_next", "</s>", " "),
    Case("llama3-llava-next-8b-hf", "llava_next", "<|eot_id|>"),
    Case("llava-onevision-qwen2-7b-ov-hf", "llava_onevision", "<|im_end|>"),
    Case("llava-onevision-converted", "llava_onevision", "<|im_end|>"),
    Case("LLaVA-NeXT-Video-7B-hf", "llava_next_video", "</s>", " "),
    # Its end is written `<\s>`, which is no token: the tokenizer's own takes its place.
    Case("LLaVA-NeXT-Video-7B-32K-converted", "llava_next_video", "</s>", " ", system=False),
    Case("LLaVA-NeXT-Video-34B-converted", "llava_next_video", "<|im_end|>"),
    Case("Video-LLaVA-7B-hf", "video_llava", "</s>", " "),
    Case("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "<|im_end|>"),
    Case("Qwen3-VL-8B-Instruct", "qwen3_vl", "<|im_end|>"),
    Case("InternVL3-hf", "internvl", "<|im_end|>"),
    Case("gemma-3-it", "gemma3", "<end_of_turn>"),
    Case("Qwen3.5-4B", "qwen3_5", "<|im_end|>"),
    Case("Qwen3.5-2B", "qwen3_5", "<|im_end|>"),
]
FILMED = [
    case for case in CASES if "<video>" in (PUBLISHED / f"{case.template}.jinja").read_text() or "Qwen" in case[0]
]


def characters(first: Sequence[str], named: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """One token a character, white space too: nothing that a template writes is lost."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    special = list(dict.fromkeys([*first, *SPECIAL]))
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    others = [token for token in special if token not in ("<pad>", "<s>", "</s>", "<unk>")]
    # A processor's names for tokens take the place of the list.
    extra: Any = {**named, **{f"token_{n}": token for n, token in enumerate(others)}} if named else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"extra_special_tokens": extra} if named else {"additional_special_tokens": others}),
    )


def processor_of(case: Case) -> Any:
    _, processor = BUILDERS[case.family]()
    first = ["<pad>", "<s>", "</s>", "<unk>", processor.image_token]
    if getattr(processor, "video_token", None):
        first += [processor.video_token, *(INTERNVL_FRAME if case.family == "internvl" else QWEN_FRAME)]
    if case.family == "gemma3":
        first[4:] = [*GEMMA_TOKENS.values(), *GEMMA_FRAME]
    processor.tokenizer = characters(first, {"internvl": INTERNVL_NAMES, "gemma3": GEMMA_NAMES}.get(case.family))
    processor.chat_template = (PUBLISHED / f"{case.template}.jinja").read_text()
    return processor


@pytest.fixture(params=CASES, ids=lambda case: f"{case.template} {case.family}")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two images of different shape and a clip."""
    root = tmp_path_factory.mktemp("shown")
    rng = np.random.default_rng(0)
    for name, shape in (("a", (64, 64, 3)), ("b", (48, 80, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(root / f"{name}.png")
    write_clip(root / "c.mp4", list(rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)))
    return {path.name: path for path in root.iterdir()}


def image(files: dict[str, Path], name: str = "a") -> MediaFile:
    return MediaFile("image", files[f"{name}.png"])


def conversation(case: Case, files: dict[str, Path]) -> tuple[Message, ...]:
    """Texts and images in several turns, a system prompt, and an answer that is not learnt."""
    asked: list[Part] = [image(files), "What is it?"]
    messages = [
        Message("user", tuple(asked)),
        Message("assistant", ("A red  cat.",)),
        Message("user", ("Sure?",)),
        Message("assistant", ("Yes.\nI am.",), supervised=False),
        Message("user", ("And these:", image(files, "b"), "or", image(files, "a"), "?")),
        Message("assistant", ("No",)),
    ]
    return (Message("system", ("Answer briefly.",)), *messages) if case.system else tuple(messages)


def decoded(opened: Message) -> Message:
    """Its images opened, as evaluation has them."""
    parts = (Image.open(part.path).convert("RGB") if isinstance(part, MediaFile) else part for part in opened.parts)
    return Message(opened.role, tuple(parts), opened.supervised)


def runs(batch: dict[str, torch.Tensor], processor: Any) -> list[str]:
    """The supervised texts."""
    found: list[list[int]] = [[]]
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        if label != -100:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [text(processor, ids) for ids in found if ids]


def text(processor: Any, ids: Sequence[int]) -> str:
    """With each placeholder once, however many tokens it takes, without what a processor puts around them."""
    tokens = processor.tokenizer.convert_ids_to_tokens(list(ids))
    tokens = [token for token in tokens if token not in (*INTERNVL_FRAME, *GEMMA_TOKENS.values(), GEMMA_FRAME[1])]
    shown = {processor.image_token, getattr(processor, "video_token", None)}
    found = "".join(
        token for before, token in zip([None, *tokens], tokens, strict=False) if token not in shown or token != before
    )
    return found.replace(f"\n\n{GEMMA_FRAME[0]}\n\n", GEMMA_FRAME[0])


def test_answers_and_their_ends_are_learnt_and_nothing_else(case: Case, files: dict[str, Path]) -> None:
    processor = processor_of(case)
    batch = ChatCollator(processor)([Sample("s", conversation(case, files))])
    assert runs(batch, processor) == [f"{case.lead}{said}{case.end}" for said in ("A red  cat.", "No")]
    assert chat_form(processor).end_token == case.end


def test_what_precedes_an_answer_is_what_evaluation_gives_the_model(case: Case, files: dict[str, Path]) -> None:
    """Token for token, at every answer of a conversation; the first is the template's own generation prompt."""
    processor, messages = processor_of(case), conversation(case, files)
    learnt = ChatCollator(processor)([Sample("s", messages)])["input_ids"][0].tolist()
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    for number in answers:
        asked = prepare_questions(processor, [[*map(decoded, messages[:number])]], CPU)["input_ids"][0].tolist()
        assert learnt[: len(asked)] == asked
        said = case.lead + messages[number].text + case.end
        assert text(processor, learnt[len(asked) :]).startswith(said)
    assert own_rendering(processor, messages[: answers[0]], prompt=True) == text(
        processor, prepare_questions(processor, [[*map(decoded, messages[: answers[0]])]], CPU)["input_ids"][0].tolist()
    )


def own_rendering(processor: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """By the template alone; where it has models think first, by its own form without thoughts."""
    chat: list[dict[str, Any]] = []
    for message in messages:
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]
        chat.append({"role": message.role, "content": parts})
    readings = ("selectattr", "content in message", "item in message", "item in content")
    if all(reading not in processor.chat_template for reading in readings):
        for message in chat:
            message["content"] = "".join(part.get("text", "<image>\n") for part in message["content"])
    rendered: str = processor.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
    )
    return text(processor, processor.tokenizer(rendered)["input_ids"])


def test_the_whole_is_the_templates_own_rendering(case: Case, files: dict[str, Path]) -> None:
    """Up to white space in history, where templates differ from their own generation prompts, and end tokens; of models
    that think first also up to thoughts that are empty, which their templates drop from earlier turns."""
    processor, messages = processor_of(case), conversation(case, files)
    whole = text(processor, ChatCollator(processor)([Sample("s", messages)])["input_ids"][0].tolist())
    expected = own_rendering(processor, messages, prompt=False)
    if case.end not in expected:
        whole = whole.replace(case.end, "")
        expected = expected.replace("<\\s>", "")
    found, written = "".join(whole.split()), "".join(expected.split())
    if "enable_thinking" in processor.chat_template:
        found, written = (rendered.replace("<think></think>", "") for rendered in (found, written))
    assert found == written


@pytest.mark.parametrize("case", FILMED, ids=lambda case: case.template)
def test_a_clip_in_a_later_turn_beside_an_image(case: Case, files: dict[str, Path]) -> None:
    processor, reader = processor_of(case), VideoReader(VideoConfig(frames=4), None)
    clip = MediaFile("video", files["c.mp4"])
    messages = (
        Message("user", (image(files), "What is it?")),
        Message("assistant", ("A cat.",)),
        Message("user", (clip, "And here?")),
        Message("assistant", ("A dog.",)),
    )
    batch = ChatCollator(processor, None, reader)([Sample("s", messages)])
    assert runs(batch, processor) == [f"{case.lead}{said}{case.end}" for said in ("A cat.", "A dog.")]
    opened = [decoded(messages[0]), messages[1], Message("user", (reader.read(clip.path), "And here?"))]
    asked = prepare_questions(processor, [opened], CPU)
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    for key in asked.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(asked[key])), key


def test_the_older_template_of_internvl_is_told(files: dict[str, Path]) -> None:
    """It writes `<image>`, in whose place its processor today puts nothing."""
    processor = processor_of(Case("InternVL3-converted", "internvl", "<|im_end|>"))
    messages = (Message("user", (image(files), "What?")), Message("assistant", ("A cat.",)))
    with pytest.raises(ProcessorError, match="sample 's': the image token '<IMG_CONTEXT>' comes 0 times .*expected 1"):
        ChatCollator(processor)([Sample("s", messages)])


def test_a_template_without_a_place_for_clips_is_told(files: dict[str, Path]) -> None:
    processor = processor_of(Case("LLaVA-NeXT-Video-7B-converted", "llava_next_video", "</s>"))
    messages = (Message("user", (MediaFile("video", files["c.mp4"]), "What?")), Message("assistant", ("A cat.",)))
    with pytest.raises(ProcessorError, match="sample 's': the video token '<video>' comes 0 times .*expected 1"):
        ChatCollator(processor, None, VideoReader(VideoConfig(frames=4), None))([Sample("s", messages)])


def test_a_template_that_refuses_a_role_is_told() -> None:
    processor = processor_of(CASES[8])
    messages = (Message("system", ("Be brief.",)), Message("user", ("What?",)), Message("assistant", ("A cat.",)))
    with pytest.raises(ProcessorError, match="sample 's': .*system, user .*Only user and assistant roles"):
        ChatCollator(processor)([Sample("s", messages)])


@pytest.mark.parametrize("spoilt", ["if m['role'] != 'system'", "if m['role'] == 'user' or m['role'] == 'assistant'"])
def test_a_template_that_leaves_out_a_system_prompt_is_told(spoilt: str) -> None:
    processor = processor_of(CASES[0])
    processor.chat_template = (
        f"{{% for m in messages {spoilt} %}}{{{{ m['role'] }}}}: {{% for c in m['content'] %}}{{{{ c['text'] }}}}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = (Message("system", ("Be brief.",)), Message("user", ("What?",)), Message("assistant", ("A cat.",)))
    with pytest.raises(ProcessorError, match="leaves out or changes the system's text 'Be brief.'"):
        ChatCollator(processor)([Sample("s", messages)])


def test_the_shipped_vicuna_takes_a_system_prompt_in_place_of_its_own() -> None:
    processor = processor_of(CASES[0])
    processor.chat_template = find("recipes/templates/vicuna_v1.jinja").read_text()
    messages = (Message("system", ("Be brief.",)), Message("user", ("What?",)), Message("assistant", ("A cat.",)))
    [segment] = render(processor, messages, chat_form(processor))
    assert segment.text == "Be brief. USER: What? ASSISTANT: A cat.</s>"
    assert render(processor, messages[1:], chat_form(processor))[0].prompt.startswith("A chat between a curious user")


# Templates of language models, which put thoughts before an answer, strip it, take a text alone, and end it otherwise.
ENDS = {
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "smolvlm": "<end_of_utterance>",
    "lfm2_2_5_vl": "<|im_end|>",
}
# Those that ask for thoughts, and are asked as their own switch for answers without thoughts asks.
THINKING = ("qwen3", "qwen3_5_think", "qwen3_6")


@pytest.mark.parametrize("name", ENDS)
def test_templates_of_language_models(name: str) -> None:
    processor = processor_of(CASES[0])
    processor.tokenizer = characters(["<pad>", "<s>", "</s>", "<unk>", "<image>", ENDS[name]])
    processor.chat_template = (TRL / f"{name}.jinja").read_text()
    messages = (
        Message("user", ("What?",)),
        Message("assistant", ("A cat.",)),
        Message("user", ("Sure?",)),
        Message("assistant", ("Yes.",)),
    )
    form = chat_form(processor)
    segments = render(processor, messages, form)
    assert form.end_token == ENDS[name]
    assert [segment.answer for segment in segments] == [f"{form.lead}{said}{ENDS[name]}" for said in ("A cat.", "Yes.")]
    assert form.lead == (" " if name == "smolvlm" else "")
    chat = [{"role": "user", "content": "What?" if not form.parts else [{"type": "text", "text": "What?"}]}]
    switch = {"enable_thinking": False} if name in THINKING else {}
    assert segments[0].prompt == processor.apply_chat_template(chat, add_generation_prompt=True, **switch)
    # A question in the second turn is asked behind the same history as it was learnt.
    asked = render(processor, messages[:3], form)
    assert "".join(s.text for s in asked) == segments[0].text + segments[1].prompt


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_template_that_only_opens_a_thought_is_told(name: str) -> None:
    """What is learnt would be the thought."""
    processor = processor_of(CASES[0])
    processor.tokenizer = characters(["<pad>", "<s>", "</s>", "<unk>", "<image>"])
    processor.chat_template = (TRL / f"{name}.jinja").read_text()
    with pytest.raises(ProcessorError, match="asks with an open thought.*model.chat_template"):
        chat_form(processor)


@pytest.mark.parametrize("answer", ["<think>\nIt purrs.\n</think>\n\nA cat.", "It purrs.</think>A cat."])
def test_an_answer_with_a_thought_behind_a_closed_one_is_told(answer: str) -> None:
    processor = processor_of(CASES[0])
    processor.tokenizer = characters(["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_end|>"])
    messages = (Message("user", ("What?",)), Message("assistant", (answer,)))
    processor.chat_template = (TRL / "qwen3_5_think.jinja").read_text()
    with pytest.raises(ProcessorError, match="has a thought"):
        render(processor, messages, chat_form(processor))
    processor.chat_template = (TRL / "qwen2_5.jinja").read_text()  # to which it is a text
    assert render(processor, messages, chat_form(processor))[0].answer == f"{answer}<|im_end|>"


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[11]], ids=lambda case: case.family)
def test_a_saved_processor_asks_the_same(case: Case, files: dict[str, Path], tmp_path: Path) -> None:
    """Also where the settings named another template."""
    processor = processor_of(case)
    (tmp_path / "other.jinja").write_text(processor.chat_template)
    processor.chat_template = "{{ 1 }}"
    processor.save_pretrained(tmp_path / "base")
    config, _ = BUILDERS[case.family]()
    for kind in FAMILIES[case.family].vision_layers:
        token = getattr(processor, f"{kind}_token")
        setattr(config, f"{kind}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    config.save_pretrained(tmp_path / "base")
    run = load_processor(ModelConfig(chat_template=str(tmp_path / "other.jinja")), str(tmp_path / "base"))
    run.save_pretrained(tmp_path / "adapter")
    messages = [decoded(message) for message in conversation(case, files)[:2]]
    asked = [
        prepare_questions(each, [messages], CPU)["input_ids"]
        for each in (run, AutoProcessor.from_pretrained(tmp_path / "adapter"))
    ]
    assert torch.equal(*asked)


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A </s> </s>"])
def test_a_tokenizer_that_ends_every_text_is_told(template: str) -> None:
    """Those with `add_eos_token`: the end of the answer would stand in every prompt, in front of the answer."""
    processor = processor_of(CASES[0])
    tokens = [(token, processor.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    ending = processors.TemplateProcessing(single=template, special_tokens=tokens)
    processor.tokenizer.backend_tokenizer.post_processor = ending
    with pytest.raises(ProcessorError, match="ends every text with '</s>', a prompt too.*add_eos_token"):
        chat_form(processor)


@pytest.mark.parametrize("written", ["", "<s>"])
def test_a_tokenizer_that_begins_every_text_begins_it_once(written: str) -> None:
    processor = processor_of(CASES[0])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = begin
    processor.chat_template = written + processor.chat_template
    messages = (Message("user", ("What?",)), Message("assistant", ("A cat.",)), Message("user", ("Sure?",)))
    ids = ChatCollator(processor)([Sample("s", (*messages, Message("assistant", ("Yes.",))))])["input_ids"][0].tolist()
    assert [place for place, token in enumerate(ids) if token == processor.tokenizer.bos_token_id] == [0]
