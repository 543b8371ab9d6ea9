"""Collation: what is supervised, training prompt == evaluation prompt, images, padding, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

import mllm_keeplora  # noqa: F401  # prepares the environment for transformers
from mllm_keeplora.data.collator import (
    ChatCollator,
    ProcessorError,
    SampleDataset,
    SampleTooLongError,
    prepare_questions,
    render_prompt,
)
from mllm_keeplora.data.images import ImageError
from mllm_keeplora.modeling.loss import IGNORED_LABEL

# isort: split
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.data.conversation import MediaFile, Message, Sample
from tests.conversations import Turn, ask, sample

EMBEDDED_MODEL = Path(__file__).parents[2] / "recipes/small/vqa_base"
IMAGE_TOKENS = 16  # (64 / 16) ** 2, the class token dropped
WORDS = [
    "USER",
    "ASSISTANT",
    "user",
    "assistant",
    ":",
    "?",
    "#",
    "what",
    "colour",
    "is",
    "it",
    "red",
    "dark",
    "blue",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|start|>", "<|end|>"]


def template(before_user: str, after_user: str, before_answer: str, after_answer: str, prompt: str) -> str:
    """A chat template from the texts around its messages."""
    text = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    image = "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    user = f"{{{{ '{before_user}' }}}}{image}{text}{{{{ '{after_user}' }}}}"
    answer = f"{{{{ '{before_answer}' }}}}{text}{{{{ '{after_answer}' }}}}"
    message = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}"
    loop = f"{{% for m in messages %}}{message}{{% endfor %}}"
    return loop + f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"


TEMPLATES = {
    "embedded": template("USER: ", "", " ASSISTANT: ", "</s>", " ASSISTANT:"),
    # LLaVA-1.5's: a space and no end token after an answer.
    "llava-1.5": template("USER: ", " ", "ASSISTANT: ", " ", "ASSISTANT:"),
    # ViP-LLaVA's kind: nothing at all after an answer.
    "hashes": template("###USER: ", "", "###ASSISTANT: ", "", "###ASSISTANT:"),
    # ChatML's kind: something follows the end token and belongs to what comes after. There it is a line
    # break, here a word, because the word tokenizer does not show white space.
    "chatml": template(
        "<|start|>user\\n", "<|end|> # ", "<|start|>assistant\\n", "<|end|> # ", "<|start|>assistant\\n"
    ),
    # The template writes the begin token that the tokenizer adds as well.
    "begin token": "{{ bos_token }}" + template("USER: ", "", " ASSISTANT: ", "</s>", " ASSISTANT:"),
}
END_TOKEN = {"chatml": "<|end|>"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` in front, as Llama's puts it."""
    words = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    # padding_side: what generation needs, and what training must not be led by.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<|start|>", "<|end|>"],
        padding_side="left",
    )


def make_processor(kind: str = "embedded", tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_convert_rgb=True
        ),
        tokenizer=tokenizer or word_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES.get(kind, kind),
    )


@pytest.fixture(params=sorted(TEMPLATES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.effect_noise((80, 72), 60).save(path)
    return path


ONE = (Turn("what colour is it?", "red"),)
TWO = (Turn("what colour?", "dark blue"), Turn("is it red?", "it is red"))


def supervised_runs(row: torch.Tensor) -> list[list[int]]:
    """The supervised tokens of one row of labels, a list for each unbroken run."""
    runs: list[list[int]] = []
    for previous, label in zip([IGNORED_LABEL, *row.tolist()], row.tolist(), strict=False):
        if label != IGNORED_LABEL:
            if previous == IGNORED_LABEL:
                runs.append([])
            runs[-1].append(label)
    return runs


@pytest.mark.parametrize("turns", [ONE, TWO], ids=["one turn", "two turns"])
@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text only"])
def test_exactly_answers_and_end_tokens_are_supervised(
    kind: str, turns: tuple[Turn, ...], with_image: bool, image: Path
) -> None:
    processor = make_processor(kind)
    batch = ChatCollator(processor)([sample("s", image if with_image else None, turns)])
    end = END_TOKEN.get(kind, "</s>")
    expected = [processor.tokenizer(turn.answer + end, add_special_tokens=False)["input_ids"] for turn in turns]
    assert supervised_runs(batch["labels"][0]) == expected
    chosen = batch["labels"] != IGNORED_LABEL
    assert torch.equal(batch["labels"][chosen], batch["input_ids"][chosen])
    assert batch["labels"][0, -1] == expected[-1][-1]  # nothing after the last end token


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text only"])
def test_the_training_prompt_is_the_evaluation_prompt(kind: str, with_image: bool, image: Path) -> None:
    processor = make_processor(kind)
    batch = ChatCollator(processor)([sample("s", image if with_image else None, ONE)])
    prompt = render_prompt(processor, ask(ONE[0].question, MediaFile("image", image) if with_image else None))
    asked = processor(text=[prompt], images=[Image.open(image).convert("RGB")] if with_image else None)["input_ids"][0]
    first_answer = (batch["labels"][0] != IGNORED_LABEL).nonzero()[0].item()
    assert batch["input_ids"][0, :first_answer].tolist() == list(asked)
    assert asked.count(processor.tokenizer.bos_token_id) == 1
    assert asked.count(processor.image_token_id) == (IMAGE_TOKENS if with_image else 0)


def test_a_conversation_reads_as_the_template_writes_it(kind: str, image: Path) -> None:
    """The parts put together give the template's own rendering, up to end tokens and white space."""
    processor = make_processor(kind)
    batch = ChatCollator(processor)([sample("s", image, TWO)])
    messages: list[dict[str, Any]] = []
    for turn in TWO:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    rendered = processor.apply_chat_template(messages).replace("<image>", "<image>" * IMAGE_TOKENS)
    whole = processor.tokenizer(rendered, add_special_tokens=not rendered.startswith("<s>"))["input_ids"]
    ids = batch["input_ids"][0].tolist()
    if kind in ("llava-1.5", "hashes"):
        ids = [token for token in ids if token != processor.tokenizer.eos_token_id]
    if kind == "chatml":
        assert whole.pop() == processor.tokenizer.convert_tokens_to_ids("#")  # nothing comes after it
    assert ids == whole


@pytest.mark.parametrize("boundary", ["in every text", "at the start of a text"])
def test_an_answer_starts_as_it_does_behind_its_prompt(boundary: str, image: Path) -> None:
    """Both forms of Llama's tokenizer; in the first, " red" alone starts with a word boundary too many."""
    vocabulary = [*SPECIAL, "▁", "▁▁", "▁r", *"USERASSISTANT:?\nabcdefghijklmnopqrstuvwxyz"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(BPE(ids, merges=[("▁", "▁"), ("▁", "r")], unk_token="<unk>"))
    if boundary == "in every text":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    processor = make_processor("llava-1.5", wrap(tokenizer))
    batch = ChatCollator(processor)([sample("s", image, ONE)])
    [run] = supervised_runs(batch["labels"][0])
    assert processor.tokenizer.convert_ids_to_tokens(run) == ["▁r", "e", "d", "</s>"]


def test_a_token_across_the_border_is_cut_there(image: Path) -> None:
    """A tokenizer that joins ":" and the answer's first letter: the prompt keeps its evaluation tokens."""
    vocabulary = [*SPECIAL, ":r", *"USERASSISTANT:?\n abcdefghijklmnopqrstuvwxyz"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(BPE(ids, merges=[(":", "r")], unk_token="<unk>"))
    processor = make_processor(template("USER: ", " ", "ASSISTANT:", " ", "ASSISTANT:"), wrap(tokenizer))
    batch = ChatCollator(processor)([sample("s", image, ONE)])
    [run] = supervised_runs(batch["labels"][0])
    assert processor.tokenizer.convert_ids_to_tokens(run) == ["r", "e", "d", "</s>"]


def tiny_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=64, patch_size=16),
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def test_the_model_takes_mixed_batches_and_padding_changes_nothing(image: Path) -> None:
    processor = make_processor()
    model = tiny_model(processor)
    collator = ChatCollator(processor)
    samples = [
        sample("a", image, TWO),
        sample("b", None, ONE),
        sample("c", image, ONE),
        sample("d", None, TWO),
    ]
    batch = collator(samples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    lengths = batch["attention_mask"].sum(dim=1)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, int(lengths.max()))
    with torch.no_grad():
        logits = model(**batch).logits
        for row, one in enumerate(samples):
            alone = collator([one])
            end = alone["input_ids"].shape[1]
            assert lengths[row] == end == alone["attention_mask"].sum()
            assert batch["attention_mask"][row, :end].all()  # padding on the right
            assert (batch["input_ids"][row, end:] == processor.tokenizer.pad_token_id).all()
            assert (batch["labels"][row, end:] == IGNORED_LABEL).all()
            torch.testing.assert_close(logits[row, :end], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_image_has_no_image_inputs(image: Path) -> None:
    batch = ChatCollator(make_processor())([sample("a", None, ONE), sample("b", None, TWO)])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_cache_changes_nothing_and_images_are_read_anew(image: Path) -> None:
    samples = [sample("a", image, TWO), sample("b", None, ONE), sample("c", image, ONE)]
    collator = ChatCollator(make_processor())
    first = collator(samples)
    assert equal(collator(samples), first)
    assert equal(collator(samples[::-1]), ChatCollator(make_processor())(samples[::-1]))
    Image.new("RGB", (64, 64)).save(image)
    assert not equal(collator(samples), first)


def test_llava_next_gets_as_many_tokens_as_each_image_needs(tmp_path: Path) -> None:
    """Another processor of the same style: the number of image tokens depends on the image's shape."""
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=[[32, 64], [64, 64]],
        ),
        tokenizer=word_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["embedded"],
    )
    samples = []
    for name, size in (("wide", (80, 40)), ("square", (70, 70))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        samples.append(sample(name, tmp_path / f"{name}.png", ONE))
    collator = ChatCollator(processor)
    batch = collator(samples)
    images = [Image.open(file.path).convert("RGB") for shown in samples for file in shown.media]
    prompts = [render_prompt(processor, ask(ONE[0].question, MediaFile("image", tmp_path)))] * 2
    asked = processor(text=prompts, images=images)["input_ids"]
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts == [ids.count(processor.image_token_id) for ids in asked]
    assert counts[0] != counts[1]
    assert batch["image_sizes"].tolist() == [[40, 80], [70, 70]]
    assert equal(collator(samples), batch)


def test_the_embedded_model_answers_in_the_same_form(image: Path) -> None:
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    vocabulary = [word for word in processor.tokenizer.get_vocab() if word.isalpha()][:2]
    one = sample("s", image, (Turn(vocabulary[0], vocabulary[1]),))
    batch = ChatCollator(processor)([one])
    [run] = supervised_runs(batch["labels"][0])
    assert processor.tokenizer.decode(run).split() == [vocabulary[1], processor.tokenizer.eos_token] or (
        processor.tokenizer.decode(run) == vocabulary[1] + processor.tokenizer.eos_token
    )
    asked = processor(
        text=[render_prompt(processor, ask(vocabulary[0], MediaFile("image", image)))],
        images=[Image.open(image).convert("RGB")],
    )
    assert batch["input_ids"][0].tolist() == list(asked["input_ids"][0]) + run
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    side = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == side**2


def test_a_data_loader_serves_the_dataset(image: Path) -> None:
    samples = [sample(str(index), image, ONE) for index in range(5)]
    dataset = SampleDataset(samples)
    assert (len(dataset), dataset[3]) == (5, samples[3])
    loader = DataLoader(dataset, batch_size=2, collate_fn=ChatCollator(make_processor()), num_workers=1)
    assert [len(batch["input_ids"]) for batch in loader] == [2, 2, 1]


def test_a_long_sample_is_refused_by_name_and_never_cut(image: Path) -> None:
    processor = make_processor()
    length = ChatCollator(processor)([sample("long", image, TWO)])["input_ids"].shape[1]
    assert ChatCollator(processor, max_length=length)([sample("long", image, TWO)])["input_ids"].shape[1] == length
    collator = ChatCollator(processor, max_length=length - 1)
    for _ in range(2):  # also when asked for again
        with pytest.raises(SampleTooLongError, match=f"'long'.* has {length} tokens.*max_length is {length - 1}"):
            collator([sample("short", None, ONE), sample("long", image, TWO)])


def test_an_unreadable_image_is_named_with_its_sample(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval leaves it
    collator = ChatCollator(make_processor())
    one = sample("s17", image, ONE)
    collator([one])
    image.write_bytes(image.read_bytes()[:900])
    with pytest.raises(ImageError, match=f"sample 's17': image {image} does not decode"):
        collator([one])
    image.unlink()
    with pytest.raises(ImageError, match=f"sample 's17': image {image} does not exist"):
        collator([one])


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{{ messages | length }}" + TEMPLATES["embedded"], "rewrites what it rendered before"),
        (template("USER: ", "", " ASSISTANT: so ", "</s>", " ASSISTANT:"), "puts words of its own before an answer"),
        (TEMPLATES["embedded"].replace("<image>", ""), "comes 0 times"),
    ],
    ids=["not prefix-stable", "changes answers", "drops images"],
)
def test_unsuitable_chat_templates_are_refused(chat_template: str, reason: str, image: Path) -> None:
    with pytest.raises(ProcessorError, match=f"sample 's': .*{reason}"):
        ChatCollator(make_processor(chat_template))([sample("s", image, ONE)])


@pytest.mark.parametrize("text", ["is it </s> red", "</s>", "is<|end|>it", "what is <image>?", "a<s>b", "<pad>"])
@pytest.mark.parametrize("where", ["question", "answer", "system", "an earlier answer", "two texts put together"])
def test_a_control_token_in_a_text_is_refused_by_name(text: str, where: str) -> None:
    """Such a text would teach to stop in mid-answer, or count as an image."""
    question, answer = Message("user", ("what?",)), Message("assistant", ("red",))
    messages = {
        "question": (Message("user", (text,)), answer),
        "answer": (question, Message("assistant", (text,))),
        "system": (Message("system", (text,)), question, answer),
        "an earlier answer": (question, Message("assistant", (text,), supervised=False), question, answer),
        "two texts put together": (Message("user", (text[: text.index(">")], text[text.index(">") :])), answer),
    }[where]
    [token] = [token for token in SPECIAL if token in text]
    collator = ChatCollator(make_processor())
    with pytest.raises(ProcessorError, match=f"sample 's': the .* text .*contains {re.escape(repr(token))}"):
        collator([Sample("s", messages)])
    if where == "question":
        with pytest.raises(ProcessorError, match="which is no text to this model"):
            prepare_questions(collator.processor, [messages[:1]], torch.device("cpu"))


def test_a_tokenizer_without_case_takes_image_for_its_image_token() -> None:
    tokenizer = Tokenizer(
        WordLevel({token: index for index, token in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=True)])
    collator = ChatCollator(make_processor(tokenizer=wrap(tokenizer)))
    with pytest.raises(ProcessorError, match="'<IMAGE>.*' contains '<image>'"):
        collator([sample("s", None, (Turn("<IMAGE> what?", "red"),))])


@pytest.mark.parametrize("text", ["<think> it", "< /s>", "<video>", "<|im_end|>", "<unk> it", "<image 1>"])
def test_words_that_are_no_tokens_of_this_model_stay_words(text: str, image: Path) -> None:
    processor = make_processor()
    batch = ChatCollator(processor)([sample("s", image, (Turn(text, text),))])
    said = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    [learnt] = supervised_runs(batch["labels"][0])
    assert learnt[:-1] == said and not {*said} & {processor.image_token_id, processor.tokenizer.eos_token_id}


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_tokenizer_without_the_tokens_is_refused(name: str) -> None:
    processor = make_processor()
    setattr(processor.tokenizer, name, None)
    with pytest.raises(ProcessorError, match=f"tokenizer has no {name}"):
        ChatCollator(processor)
