"""Evaluation of live and saved tiny LLaVA models by lmms-eval, with the traps of both."""

import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# First of the third-party imports: the package lets torchvision import beside a CPU-only torch.
import mllm_keeplora  # noqa: F401

# isort: split
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.config import EvaluationConfig, ModelConfig, RunConfig
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.data.chat_template import chat_form
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.conversation import Message
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.eval import leaderboard
from mllm_keeplora.evaluation import lmms_model
from mllm_keeplora.evaluation.answer import LOOK_EVERY, _Settled, generate_replies, inference_state
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.lmms_model import KeepLoRAModel
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.settled import CUT_MARK
from mllm_keeplora.evaluation.task_files import read_index, write_task_files
from mllm_keeplora.modeling.loading import base_model_hash, load_base
from mllm_keeplora.resources import shipped
from mllm_keeplora.runs.files import ArtifactError, write_hashes
from mllm_keeplora.runs.run_directory import RunDirectory
from tests import forked
from tests.conversations import read_copy

SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
WORDS = ["USER", "ASSISTANT", ":", "?", "what", "is", "the", "colour", "of", "this", "thing", "and", "shape"]
ANSWERS = [f"w{number}" for number in range(40)]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %} ASSISTANT: {% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random tiny LLaVA whose replies depend on image and question."""
    vocabulary = [*SPECIAL_TOKENS, *WORDS, *ANSWERS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False),
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=64, patch_size=32, initializer_factor=20.0),
            text_config=LlamaConfig(
                **sizes, vocab_size=len(vocabulary), eos_token_id=3, pad_token_id=0, initializer_range=0.3
            ),
            image_token_index=4,
            image_seq_length=4,
            vision_feature_layer=-2,
        )
    )
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def live(base: Path) -> tuple[Any, Any]:
    return load_base(ModelConfig(base_model=str(base), quantization="none", device="cpu"))


QUESTIONS = [
    "what is this ?",
    "what is the colour of this thing ?",
    "shape ?",
    "what is the shape and the colour ?",
]


def write_data(root: Path, count: int, answers: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """A test file in LLaVA's form; answers default to words that the model does not say."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    records = []
    for index in range(count):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        records.append(
            {
                "question_id": index,
                "image": f"images/{index}.png",
                "text": "<image>\n" + QUESTIONS[index % len(QUESTIONS)],
                "answer": (answers or {}).get(index, "nothing"),
            }
        )
    (root / "test.json").write_text(json.dumps(records))
    return records


def make_stream(root: Path) -> Stream:
    """Two tasks and a general benchmark of 7, 5 and 4 questions."""
    for name, count in (("birds", 7), ("tools", 5), ("scenes", 4)):
        write_data(root / name, count)

    def files(name: str) -> dict[str, Any]:
        return {"test": f"{name}/test.json", "media_root": name, "max_new_tokens": 4}

    birds = TaskSpec("birds", train="birds/test.json", metric="exact", **files("birds"))
    tools = TaskSpec("tools", train="tools/test.json", metric="contains", **files("tools"))
    return Stream("tiny", root, (birds, tools), (GeneralSpec("scenes", metric="exact", **files("scenes")),))


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    stream = make_stream(tmp_path / "data")
    write_task_files(stream, tmp_path / "tasks")
    return stream


def evaluate(live: tuple[Any, Any], stream: Stream, where: Path, **settings: Any) -> dict[str, Any]:
    settings = {"batch_size": 3, "limit": None, **settings}
    return evaluate_row(*live, stream, where / "tasks", where / "out", **settings)


def read_replies(where: Path, name: str) -> list[str]:
    return [json.loads(line)["reply"] for line in (where / "out" / f"{name}.jsonl").read_text().splitlines()]


def test_scores_count_the_right_replies(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    scores = evaluate(live, stream, tmp_path)
    assert list(scores) == ["birds", "tools", "scenes"]
    assert [score["n"] for score in scores.values()] == [7, 5, 4]
    assert all(score["value"] == 0.0 and score["stderr"] == 0.0 for score in scores.values())

    # Make three of birds' answers right, in upper case: the file is read again, not served from a cache.
    replies = read_replies(tmp_path, "birds")
    assert len(set(replies)) > 2, "replies have to depend on the question for the other tests to mean something"
    write_data(stream.data_root / "birds", 7, {index: replies[index].upper() for index in (0, 3, 5)})
    write_task_files(stream, tmp_path / "tasks")
    score = evaluate(live, stream, tmp_path, names=["birds"])["birds"]
    assert score["native"] == score["value"] == pytest.approx(3 / 7)
    assert score["stderr"] == pytest.approx(math.sqrt((3 / 7) * (4 / 7) / 6))
    lines = [json.loads(line) for line in (tmp_path / "out" / "birds.jsonl").read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(7))
    assert [line["score"] for line in lines] == [1, 0, 0, 1, 0, 1, 0]
    assert [line["reply"] for line in lines] == replies
    assert lines[2]["doc"]["question_id"] == 2 and lines[2]["target"] == "nothing"


def test_names_and_limit_select(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    scores = evaluate(live, stream, tmp_path, names=["scenes", "birds"], limit=1)
    assert {name: (score["n"], score["stderr"]) for name, score in scores.items()} == {
        "birds": (1, None),
        "scenes": (1, None),
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["birds.jsonl", "scenes.jsonl"]
    with pytest.raises(EvaluationError, match="no task bird$"):
        evaluate(live, stream, tmp_path, names=["bird"])


def test_replies_do_not_depend_on_batch_size_or_on_other_tasks(
    live: tuple[Any, Any], stream: Stream, tmp_path: Path
) -> None:
    evaluate(live, stream, tmp_path, batch_size=1)
    one_by_one = read_replies(tmp_path, "birds")
    evaluate(live, stream, tmp_path, batch_size=4)
    assert read_replies(tmp_path, "birds") == one_by_one
    evaluate(live, stream, tmp_path, batch_size=7, names=["birds"])
    assert read_replies(tmp_path, "birds") == one_by_one


def text_too(stream: Stream, where: Path) -> Stream:
    """The stream, whose tasks may hold questions of text alone."""
    tasks = tuple(replace(task, allow_text_only=True) for task in stream.tasks)
    stream = replace(stream, tasks=tasks)
    write_task_files(stream, where / "tasks")
    return stream


def test_text_only_questions_are_answered_beside_images(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    path = stream.data_root / "birds" / "test.json"
    records = json.loads(path.read_text())
    for index in (1, 4):
        del records[index]["image"]
        records[index]["text"] = records[index]["text"].removeprefix("<image>\n")
    path.write_text(json.dumps(records))
    stream = text_too(stream, tmp_path)
    evaluate(live, stream, tmp_path, names=["birds"], batch_size=1)
    one_by_one = read_replies(tmp_path, "birds")
    evaluate(live, stream, tmp_path, names=["birds"], batch_size=7)
    assert read_replies(tmp_path, "birds") == one_by_one
    for record in records:
        record.pop("image", None)
        record["text"] = record["text"].removeprefix("<image>\n")
    path.write_text(json.dumps(records))
    write_task_files(stream, tmp_path / "tasks")
    assert evaluate(live, stream, tmp_path, names=["birds"])["birds"]["n"] == 7


def test_equal_documents_are_counted_apart(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    path = stream.data_root / "birds" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1] * 3))
    write_task_files(stream, tmp_path / "tasks")
    assert evaluate(live, stream, tmp_path, names=["birds"])["birds"]["n"] == 3
    assert len(read_replies(tmp_path, "birds")) == 3


def test_the_process_is_left_as_found(
    live: tuple[Any, Any], stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # whatever imported lmms-eval before
    model, processor = live
    model.train()
    frozen = model.model.vision_tower.eval()
    side = processor.tokenizer.padding_side
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(11), np.random.seed(12), torch.manual_seed(13)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(11), np.random.seed(12), torch.manual_seed(13)
    evaluate(live, stream, tmp_path, limit=2)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert model.training and model.model.language_model.training and not frozen.training
    assert processor.tokenizer.padding_side == side
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # lmms-eval's clean() emptied the wrapper, not the model, and a second evaluation is an equal one.
    assert evaluate(live, stream, tmp_path, limit=2) == evaluate(live, stream, tmp_path, limit=2)


def test_failed_generation_stops_the_evaluation(
    live: tuple[Any, Any], stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = live[0]
    generate, calls = model.generate, 0

    def fail_late(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 2:  # for a single question, too
            raise torch.cuda.OutOfMemoryError("no memory left")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", fail_late)
    model.train()
    with pytest.raises(
        EvaluationError, match="keeplora_tiny_.*, document .*OutOfMemoryError: no memory left"
    ) as caught:
        evaluate(live, stream, tmp_path)
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert model.training
    assert not (tmp_path / "out").exists(), "no partial row"


def test_unreadable_image_is_named_not_guessed(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    path = stream.data_root / "birds" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(EvaluationError, match="keeplora_tiny_birds', document 2: .*2.png"):
        evaluate(live, stream, tmp_path, names=["birds"])


def test_failing_scoring_and_missing_tasks_are_errors(live: tuple[Any, Any], stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no task keeplora_tiny_birds.*write_task_files"):
        evaluate_row(*live, stream, tmp_path / "data", tmp_path / "out", batch_size=1, limit=None)
    with pytest.raises(EvaluationError, match="nonsense.*contains, exact"):
        broken = TaskSpec("x", train="birds/test.json", test="birds/test.json", metric="nonsense")
        write_task_files(Stream("tiny", stream.data_root, (broken,)), tmp_path / "more")


def test_task_files_name_everything(stream: Stream, tmp_path: Path) -> None:
    names = write_task_files(stream, tmp_path / "tasks")
    assert names == ["keeplora_tiny_birds", "keeplora_tiny_tools", "keeplora_tiny_scenes"]
    task = yaml.safe_load((tmp_path / "tasks" / "keeplora_tiny_tools.yaml").read_text())
    assert task["include"] == str(shipped("eval/tasks/contains.yaml"))
    copy = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert copy.parent == tmp_path / "tasks" and len(read_copy(task)) == 5
    assert task["generation_kwargs"] == {"max_new_tokens": 4, "do_sample": False, "until": []}
    name, entries = read_index(tmp_path / "tasks")
    assert name == "tiny" and [(e.name, e.kind, e.score) for e in entries] == [
        ("birds", "task", "exact"),
        ("tools", "task", "contains"),
        ("scenes", "general", "exact"),
    ]


def test_stock_benchmarks_need_no_file(stream: Stream, tmp_path: Path) -> None:
    pope = GeneralSpec("hallucination", lmms_eval_task="pope", score="pope_accuracy", native_max=1.0)
    names = write_task_files(Stream("tiny", stream.data_root, stream.tasks, (pope,)), tmp_path / "stock")
    assert names[-1] == "pope" and not (tmp_path / "stock" / "pope.yaml").exists()


def test_other_record_forms_are_asked_turn_by_turn(live: tuple[Any, Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_data(root, 2)
    turns = [("human", "<image>\n" + QUESTIONS[0]), ("gpt", "a"), ("human", QUESTIONS[1]), ("gpt", "b")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    (root / "talk.json").write_text(json.dumps([{"id": "x", "image": "images/0.png", "conversations": conversations}]))
    task = TaskSpec("talk", "talk.json", "talk.json", "exact", prompt_suffix=" ?", max_new_tokens=2)
    stream = Stream("tiny", root, (task,))
    write_task_files(stream, tmp_path / "tasks")
    assert evaluate(live, stream, tmp_path)["talk"]["n"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "talk.jsonl").read_text().splitlines()]
    assert [(line["doc"]["question_id"], line["doc"]["text"], line["target"]) for line in lines] == [
        ("x-0", QUESTIONS[0], "a"),
        ("x-1", QUESTIONS[1], "b"),
    ]


def test_pictures_of_a_test_file_are_shown_in_every_form_and_turn(live: tuple[Any, Any], tmp_path: Path) -> None:
    """Replies are those of LLaVA's own form, and a later turn is asked with what came before it."""
    root = tmp_path / "data"
    plain = write_data(root, 3)
    told = []
    for number, record in enumerate(plain):
        words = record["text"].removeprefix("<image>\n")
        content = [
            {"type": "image", "image": record["image"]},
            {"type": "text", "text": words},
        ]
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": "nothing"}]
        told.append(
            [{**record, "images": [record["image"]], "image": None}, {"messages": said}, {"messages": said}][number]
        )
    two = {
        "role": "user",
        "content": [{"type": "image", "image": "images/1.png"}, {"type": "text", "text": QUESTIONS[2]}],
    }
    told[2] = {"messages": [*told[2]["messages"], two, {"role": "assistant", "content": "a"}]}
    (root / "told.json").write_text(json.dumps(told))
    tasks = tuple(TaskSpec(name, "test.json", f"{name}.json", "exact", max_new_tokens=4) for name in ("test", "told"))
    stream = Stream("tiny", root, tasks)
    write_task_files(stream, tmp_path / "tasks")
    scores = evaluate(live, stream, tmp_path, batch_size=1)
    assert [score["n"] for score in scores.values()] == [3, 4]
    assert read_replies(tmp_path, "told")[:3] == read_replies(tmp_path, "test")


class Request:
    """The part of lmms-eval's Instance that the wrapper reads."""

    task_name = "t"

    def __init__(self, doc_id: int, messages: Any, settings: dict[str, Any]) -> None:
        self.doc_id = doc_id
        self.args = ("question", lambda doc: messages, settings, doc_id, "t", "test")


def ask(live: tuple[Any, Any], messages: Any = None, **settings: Any) -> str:
    wrapper = KeepLoRAModel(*live)
    wrapper.task_dict = {"t": {"test": {0: {}}}}
    messages = messages or [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]}]
    return wrapper.generate_until([Request(0, messages, settings)])[0]


def test_a_process_without_questions_answers_none(live: tuple[Any, Any]) -> None:
    assert KeepLoRAModel(*live).generate_until([]) == []


def test_max_new_tokens_and_until_are_honoured(live: tuple[Any, Any]) -> None:
    reply = ask(live, max_new_tokens=6)
    words = reply.split()
    assert len(words) > 2, "the random model has to say something"
    assert ask(live, max_new_tokens=2).split() == words[:2]
    assert ask(live, max_new_tokens=6, until=["nowhere", words[1]]) == words[0]
    assert ask(live, max_new_tokens=6, until="nowhere") == reply
    assert ask(live, max_new_tokens=6, temperature=0, top_p=None, num_beams=1, do_sample=False) == reply


@pytest.mark.parametrize(
    "settings", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 3}, {"repetition_penalty": 2.0}]
)
def test_settings_that_would_be_ignored_are_refused(live: tuple[Any, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=f"task 't', document 0: .*{next(iter(settings))}"):
        ask(live, **settings)


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    "content, reason",
    [
        ([TEXT, {"type": "audio", "url": "x.wav"}], "expected a text, an image or a whole clip, found audio"),
        ([TEXT, {"type": "video", "url": "x.mp4"}], "no reader for clips"),
        ([TEXT, {"type": "image", "url": "x.png"}], "x.png"),
        ([{"type": "text", "text": "a </s> b"}], "contains '</s>', which is no text to this model"),
        ([{"type": "text", "text": "a <image> b"}], "contains '<image>'"),
    ],
)
def test_messages_that_cannot_be_shown_are_refused(live: tuple[Any, Any], content: Any, reason: str) -> None:
    with pytest.raises(EvaluationError, match=f"task 't', document 0: .*{reason}"):
        ask(live, [{"role": "user", "content": content}])


def attach_adapter(model: Any) -> PeftModel:
    torch.manual_seed(5)
    names = [
        name
        for name, _ in model.named_modules()
        if name.endswith(("q_proj", "down_proj", "mlp.fc1")) and ("layers.0." in name or "language_model" in name)
    ]
    config = LoraConfig(r=4, lora_alpha=64, target_modules=names, init_lora_weights=False)
    return get_peft_model(model, config)


def test_gradients_on_nf4_are_equal_before_and_after_generating(base: Path, stream: Stream, tmp_path: Path) -> None:
    model, processor = load_base(ModelConfig(base_model=str(base), device="cpu"))
    adapted = attach_adapter(model)
    weights = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    prompt = "USER: <image>\nwhat is this ? ASSISTANT: w1 w2 w3"
    image = Image.open(stream.data_root / "birds" / "images" / "0.png")
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")

    def gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: value.grad.clone() for name, value in weights.items() if value.grad is not None}

    before = gradients()
    assert len(before) == len(weights) and all(gradient.abs().max() > 0 for gradient in before.values())
    scores = evaluate((adapted, processor), stream, tmp_path)
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(score["n"] for score in scores.values())


def test_autocast_around_the_evaluation_changes_nothing(live: tuple[Any, Any]) -> None:
    model, processor = live
    inputs = processor(text=["USER: what is this ? ASSISTANT:"], return_tensors="pt")
    with inference_state(model):
        expected = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), inference_state(model):
        found = model(**inputs).logits
    assert torch.equal(expected, found) and not found.requires_grad


def test_saved_model_and_adapter_answer_like_the_live_ones(base: Path, stream: Stream, tmp_path: Path) -> None:
    model, processor = load_base(ModelConfig(base_model=str(base), device="cpu"))
    plain = ask((model, processor), max_new_tokens=6)
    adapted = attach_adapter(model)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = ask((adapted.eval(), processor), max_new_tokens=6)
    assert expected != plain, "the adapter has to change the reply for this test to mean something"
    arguments = f"base_model={base},adapter={tmp_path / 'adapter'},quantization=nf4,device=cpu"
    loaded = KeepLoRAModel.create_from_arg_string(arguments, {"batch_size": "5", "device": None})
    assert loaded.batch_size == 5
    assert ask((loaded.model, loaded.processor), max_new_tokens=6) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("base_modle=x", "unknown argument base_modle.*base_model"),
        ("adapter=x", "base_model is missing"),
        ("base_model=x,quantization=int8", "quantization is 'int8', expected nf4 or none"),
    ],
)
def test_wrong_model_arguments_are_errors(arguments: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        KeepLoRAModel.create_from_arg_string(arguments)


@pytest.mark.parametrize("batch_size", ["auto", 0, -1, 2.5])
def test_wrong_batch_size_is_an_error(live: tuple[Any, Any], batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        KeepLoRAModel(*live, batch_size)


def test_lmms_eval_knows_the_model() -> None:
    points = importlib.metadata.entry_points(group="lmms_eval.models")
    assert "mllm_keeplora.evaluation.entry_point:model_manifest" in {point.value for point in points}, (
        "reinstall: pip install -e ."
    )
    from lmms_eval.models import get_model

    assert get_model("keeplora") is KeepLoRAModel  # in a new process: tests/recipes/test_wheel.py


def make_run(base: Path, stream: Stream, directory: Path) -> Path:
    """A run directory as a finished stream leaves it: adapter, task files, config and the in-process row."""
    model, processor = load_base(ModelConfig(base_model=str(base), device="cpu"))
    adapted = attach_adapter(model)
    adapted.save_pretrained(str(directory / "adapter"))
    write_task_files(stream, directory / "eval_tasks")
    scores = evaluate_row(
        adapted, processor, stream, directory / "eval_tasks", directory / "out", batch_size=3, limit=None
    )
    config = RunConfig(model=ModelConfig(base_model=str(base), device="cpu"), evaluation=EvaluationConfig(batch_size=3))
    retention = {
        "method": "keeplora",
        "tasks": ["birds", "tools"],
        "general": ["scenes"],
        "rows": [{"stage": 0, "task": None, "scores": {}}, {"stage": 2, "task": "tools", "scores": scores}],
    }
    (directory / "config.json").write_text(json.dumps(asdict(config)))
    (directory / "retention.json").write_text(json.dumps(retention))
    return directory


def test_leaderboard_repeats_the_run_in_a_fresh_process(base: Path, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "data")
    run = make_run(base, stream, tmp_path / "run")
    # Answers that the adapted model gives, so that equal scores are not all zero.
    replies = [json.loads(line)["reply"] for line in (run / "out" / "birds.jsonl").read_text().splitlines()]
    write_data(stream.data_root / "birds", 7, dict(enumerate(replies[:5])))
    run = make_run(base, stream, tmp_path / "run")
    expected = json.loads((run / "retention.json").read_text())["rows"][-1]["scores"]
    assert expected["birds"]["value"] >= 5 / 7

    command = ["-m", "mllm_keeplora.commands.main", "leaderboard", run, "--table", tmp_path / "table"]
    finished = forked.run(command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "All 3 scores equal" in finished.stdout
    assert not re.search("Postprocessing|examples/s|DEBUG", finished.stdout + finished.stderr)  # bars of no use here
    table = json.loads((tmp_path / "table" / "leaderboard.json").read_text())
    (row,) = table["rows"]
    assert (row["run"], row["stream"], row["method"], row["equal_to_run"]) == (
        "run",
        "tiny",
        "keeplora",
        True,
    )
    assert {**row["tasks"], **row["general"]} == expected
    assert row["mean"] == pytest.approx((expected["birds"]["value"] + expected["tools"]["value"]) / 2)
    assert "| 1 | run | keeplora |" in (tmp_path / "table" / "leaderboard.md").read_text()
    assert len(list((run / "leaderboard").rglob("*_results.json"))) == 1
    assert len(list((run / "leaderboard").rglob("*_samples_*.jsonl"))) == 3


def write_run(directory: Path, **changes: Any) -> Path:
    """The files of a finished run without a model, as the leaderboard reads them."""
    stream = make_stream(directory / "data")
    write_task_files(stream, directory / "eval_tasks")
    score = {"value": 0.5, "native": 0.5, "native_max": 1.0, "stderr": 0.1, "n": 4}
    limits = {name: changes.get(name) for name in ("limit", "general_limit")}
    config = RunConfig(model=ModelConfig(base_model="base"), evaluation=EvaluationConfig(batch_size=3, **limits))
    number = changes.get("stage", 2)
    row = {
        "stage": number,
        "task": (None, "birds", "tools")[number],
        "scores": dict.fromkeys(["birds", "tools", "scenes"], score),
    }
    row["scores"] |= changes.get("scores", {})
    retention = {"method": "lora", "tasks": ["birds", "tools"], "general": ["scenes"], "rows": [row]}
    (directory / "config.json").write_text(json.dumps(asdict(config)))
    (directory / "retention.json").write_text(json.dumps(retention))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 2}, "first 2 questions"),
        ({"general_limit": 500}, r"first 500 questions \(evaluation.general_limit\)"),
        ({"stage": 1}, "stage 1 of 2"),
        ({"scores": {"tools": None}}, "found .*birds.*scenes"),
    ],
)
def test_leaderboard_refuses_subsets_and_unfinished_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    leaderboard.read_run(write_run(tmp_path / "fine"))
    with pytest.raises(EvaluationError, match=message):
        leaderboard.read_run(write_run(tmp_path / "run", **changes))


def test_command_line_refuses_paths_that_lmms_eval_would_split(tmp_path: Path) -> None:
    run = leaderboard.read_run(write_run(tmp_path / "a,b"))
    with pytest.raises(EvaluationError, match="a,b"):
        leaderboard.lmms_eval_arguments(run, tmp_path, None)


def test_leaderboard_ranks_by_mean_and_replaces_a_run(tmp_path: Path) -> None:
    run = leaderboard.read_run(write_run(tmp_path / "run"))

    def row(name: str, value: float) -> dict[str, Any]:
        scores = {key: {**score, "value": value, "stderr": None} for key, score in run.scores.items()}
        return {**leaderboard.build_row(run, scores, equal=True), "run": name}

    for name, value in (("good", 0.5), ("bad|worse", 0.25), ("good", 0.75), ("best", 0.875)):
        leaderboard.add_row(tmp_path, row(name, value))
    lines = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert "| rank | run | method | base | birds | tools | *scenes* | mean | equal |" in lines
    assert [line.split(" | ")[1] for line in lines if line.startswith("| ") and line[2].isdigit()] == [
        "best",
        "good",
        "bad\\|worse",
    ]
    assert "| 2 | good | lora | base | 0.750 | 0.750 | 0.750 | 0.750 | yes |" in lines


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(1.0, 0.0, "1.000 (0.981–1.000)"), (0.5, (0.25 / 199) ** 0.5, "0.500 (0.431–0.569)"), (0.62, None, "0.620")],
)
def test_a_score_has_the_interval_of_the_page(value: float, stderr: float | None, text: str) -> None:
    score: Any = {"value": value, "stderr": stderr, "n": 200, "native": value, "native_max": 1.0}
    assert leaderboard.format_score(score) == text


def test_lmms_eval_does_not_print_what_it_is_debugged_by() -> None:
    """A level of one's own stays. The first import decides, so this is asked of another process."""
    code = "import mllm_keeplora.evaluation\nfrom loguru import logger\nlogger.debug('aside')\nlogger.warning('heard')"
    for level, said in ((None, False), ("DEBUG", True)):
        environment = {name: value for name, value in os.environ.items() if name != "LOGURU_LEVEL"}
        environment |= {"LOGURU_LEVEL": level} if level else {}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert "heard" in found.stderr and ("aside" in found.stderr) == said


def test_runs_of_one_name_in_two_folders_are_two_rows(tmp_path: Path) -> None:
    rows = []
    for place, value in (("a", 0.5), ("b", 0.25), ("a", 0.75)):
        if not (tmp_path / place / "mine").exists():
            write_run(tmp_path / place / "mine")
        run = leaderboard.read_run(tmp_path / place / "mine")
        scores = {key: {**score, "value": value} for key, score in run.scores.items()}
        rows.append(leaderboard.build_row(run, scores, equal=True))
        leaderboard.add_row(tmp_path, rows[-1])
    assert json.loads((tmp_path / "leaderboard.json").read_text())["rows"] == [rows[2], rows[1]]
    text = (tmp_path / "leaderboard.md").read_text()
    assert f"| 1 | {tmp_path}/a/mine |" in text and f"| 2 | {tmp_path}/b/mine |" in text
    # A row of an earlier version, which does not say where its run lies, is replaced.
    old = {key: value for key, value in rows[0].items() if key != "directory"}
    (tmp_path / "leaderboard.json").write_text(json.dumps({"schema_version": 1, "rows": [old]}))
    leaderboard.add_row(tmp_path, rows[1])
    assert json.loads((tmp_path / "leaderboard.json").read_text())["rows"] == [rows[1]]


@pytest.mark.parametrize("content", ["[]", "{}", '{"rows": 3}', '{"rows": [1]}', '{"rows": [{}]}'])
def test_a_table_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "leaderboard.json").write_text(content)
    run = leaderboard.read_run(write_run(tmp_path / "run"))
    with pytest.raises(ArtifactError, match=r"leaderboard\.json is no leaderboard"):
        leaderboard.add_row(tmp_path, leaderboard.build_row(run, run.scores, equal=True))


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "3", '{"stream": "s", "tasks": 3}', '{"stream": "s", "tasks": [{"name": "a"}]}', '{"stream": "s"}'],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "eval_tasks" / "tasks.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tasks\.json is not what a run writes"):
        leaderboard.read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: shutil.rmtree(run.adapter), "holds no adapter/"),
        (lambda run: run.adapter_weights.unlink(), "adapter_model.safetensors is missing"),
        (lambda run: run.adapter_weights.write_bytes(b"other"), "adapter_model.safetensors: hash"),
        (lambda run: shutil.rmtree(run.path / "base"), "neither a directory here nor a hub model"),
        (lambda run: (run.path / "base/config.json").unlink(), "has no config"),
        (lambda run: (run.path / "base/config.json").write_text("{}"), "cannot be loaded"),
        (lambda run: (run.path / "base/more.json").write_text("{}"), "was trained on another base model than"),
    ],
)
def test_the_model_is_looked_at_before_lmms_eval_starts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[RunDirectory], object], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = RunDirectory(write_run(tmp_path / "run"))
    shutil.copytree(base, run.path / "base")
    cache, model = str(tmp_path / "cache"), ModelConfig(base_model=str(run.path / "base"))
    run.config.write_text(json.dumps(asdict(RunConfig(cache_dir=cache, model=model))))
    run.adapter.mkdir()
    for path in (run.adapter_config, run.adapter_weights):
        path.write_text("{}")
    write_hashes(run.adapter_hashes)
    manifest = run.stage(0, None).manifest
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"base_model": {"hash": base_model_hash(run.path / "base", Path(cache))}}))
    leaderboard._check_model(load_run(run.path))
    spoil(run)
    monkeypatch.setitem(sys.modules, "lmms_eval.cli.dispatch", None)  # importing it would be another error
    with pytest.raises(KeepLoRAError, match=message):
        leaderboard.evaluate_saved(leaderboard.read_run(run.path), None)


def test_differences_name_task_and_both_scores(tmp_path: Path) -> None:
    run = leaderboard.read_run(write_run(tmp_path / "run"))
    assert leaderboard.find_differences(run.scores, run.scores) == []
    fresh = {**run.scores, "tools": {**run.scores["tools"], "native": 0.25}}
    (line,) = leaderboard.find_differences(run.scores, fresh)
    assert line.startswith("tools: 0.5 in the run") and "0.25 here" in line


@pytest.mark.parametrize("n, native_max", [(200, 1.0), (200, 100.0), (5000, 1.0)])
def test_what_differing_batches_explain_is_no_difference_on_a_gpu(n: int, native_max: float) -> None:
    """A question of a hundred either way; not a score that is another model's, nor fewer questions."""

    def scores(right: float, asked: int = n) -> dict[str, Any]:
        value = right / n
        return {
            "a": {"value": value, "native": value * native_max, "native_max": native_max, "stderr": None, "n": asked}
        }

    inside = scores(0.8 * n)
    near, far = scores(0.8 * n - (0.02 * n) ** 0.5), scores(0.8 * n - 4 * (0.02 * n) ** 0.5)
    for flips in (False, True):
        assert leaderboard.find_differences(inside, inside, flips) == []
        assert len(leaderboard.find_differences(inside, far, flips)) == 1
        assert len(leaderboard.find_differences(inside, scores(0.8 * n, n - 1), flips)) == 1
    assert leaderboard.find_differences(inside, near, flips=True) == []
    assert len(leaderboard.find_differences(inside, near)) == 1
    assert "differing batches explain" in leaderboard.find_differences(inside, far, flips=True)[0]


@pytest.mark.parametrize(
    "settings, cuda, flips",
    [
        ({}, False, False),
        ({}, True, True),  # auto takes the GPU
        ({"device": "cpu"}, True, False),
        ({"compute_dtype": "bfloat16", "device": "cpu"}, False, True),
    ],
)
def test_replies_are_compared_exactly_in_fp32_on_a_cpu_alone(
    settings: dict[str, Any], cuda: bool, flips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert leaderboard.replies_may_flip(ModelConfig(**settings)) == flips


# --- What is generated, and how little of it ---


def long_stream(root: Path, answers: dict[int, str] | None = None) -> Stream:
    """A task each of three scores, with room for replies that are longer than any answer."""
    write_data(root, 6, answers)
    shared: dict[str, Any] = {"train": "test.json", "test": "test.json", "max_new_tokens": 40}
    return Stream("long", root, tuple(TaskSpec(m, metric=m, **shared) for m in ("exact", "contains", "dcl_med")))


def test_replies_that_end_where_their_score_is_settled_score_as_whole_ones(
    live: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(answers: dict[int, str] | None = None) -> tuple[dict[str, Any], dict[str, list[str]]]:
        stream = long_stream(tmp_path / "data", answers)
        write_task_files(stream, tmp_path / "tasks")
        return evaluate(live, stream, tmp_path), {t.name: read_replies(tmp_path, t.name) for t in stream.tasks}

    with monkeypatch.context() as patch:
        patch.setattr(lmms_model, "settled", lambda documents: None)
        _, said = row()
        # Of right answers one is a whole reply, one begins a reply, one is in its middle.
        words = [reply.split() for reply in said["exact"]]
        answers = {0: said["exact"][0], 1: " ".join(words[1][:3]), 2: " ".join(words[2][9:12])}
        expected, whole = row(answers)
    found, ended = row(answers)
    assert found == expected and 0 < found["exact"]["value"] < found["contains"]["value"] < 1
    for name, cut in (("exact", {1, 2, 3, 4, 5}), ("contains", {1, 2}), ("dcl_med", set())):
        assert {n for n, reply in enumerate(ended[name]) if reply.endswith(CUT_MARK)} <= cut
        for full, short in zip(whole[name], ended[name], strict=True):
            assert full == short or full.startswith(short.removesuffix(CUT_MARK)) and len(short) < len(full)
    assert sum(reply.endswith(CUT_MARK) for replies in ended.values() for reply in replies) > 3


TEXTS = ["日本語の文章です、長い。", "😀👩‍👩‍👧 and é, е́ ё", "a" * 40]


@pytest.mark.parametrize("text", TEXTS)
def test_a_rule_sees_only_what_later_tokens_leave_as_it_is(text: str) -> None:
    """Tokens of single bytes: of a character that is not yet whole, a tokenizer makes others."""
    backend = Tokenizer(models.BPE({c: n for n, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 3 * LOOK_EVERY and tokenizer.decode(tokens) == text
    seen: list[str] = []
    looking = _Settled(tokenizer, 2, [None, lambda begun: bool(seen.append(begun))])
    for end in range(1, len(tokens) + 1):
        done = looking(torch.tensor([[0, 0, *tokens[:end]]] * 2), torch.zeros(0))
        assert done.tolist() == [False, False]
    assert len(seen) == len(tokens) // LOOK_EVERY and len(seen[-1]) > 4
    assert all(text.startswith(begun) for begun in seen)


def test_a_reply_that_ends_by_itself_is_not_marked(live: tuple[Any, Any]) -> None:
    """Neither one that the model ended before it was looked at, nor one that is as long as it may be."""
    model, processor = live
    form = chat_form(processor)
    asked = [[Message("user", (question,))] for question in QUESTIONS]
    inputs = prepare_questions(processor, asked, model.device, form)
    with inference_state(model):
        for length in (LOOK_EVERY, 40):
            whole = generate_replies(model, processor, form, inputs, length)
            ended = generate_replies(model, processor, form, inputs, length, settled=[lambda _: True] * len(asked))
            for full, short in zip(whole, ended, strict=True):
                tokens = len(processor.tokenizer(full, add_special_tokens=False)["input_ids"])
                assert short == full if tokens < LOOK_EVERY or length <= LOOK_EVERY else short.endswith(CUT_MARK)


def test_what_shows_and_asks_the_same_is_generated_once(
    live: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record keeps its own reference answer, and other pictures with the same words are asked for themselves."""
    records = write_data(tmp_path / "data", 4)
    again = [{**records[n], "question_id": 9, "answer": answer} for n, answer in ((0, "x"), (1, "y"))]
    elsewhere = {**records[0], "image": records[1]["image"]}
    (tmp_path / "data" / "test.json").write_text(json.dumps([*records, *again, elsewhere]))
    stream = Stream("t", tmp_path / "data", (TaskSpec("t", "test.json", "test.json", "exact", max_new_tokens=4),))
    write_task_files(stream, tmp_path / "tasks")
    rows: list[int] = []
    generate = lmms_model.generate_replies

    def counted(model: Any, processor: Any, form: Any, inputs: Any, *rest: Any, **rules: Any) -> list[str]:
        rows.append(len(inputs["input_ids"]))
        return generate(model, processor, form, inputs, *rest, **rules)

    monkeypatch.setattr(lmms_model, "generate_replies", counted)
    assert evaluate(live, stream, tmp_path)["t"]["n"] == 7
    replies = read_replies(tmp_path, "t")
    assert sum(rows) == 5 and replies[4:6] == replies[:2] and replies[6] != replies[0]


def test_questions_that_show_most_come_first_and_answers_in_order(
    live: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data", 6)
    sizes = [(32, 32), (64, 32), (128, 64), (64, 64), (16, 16), (256, 64)]
    for number, size in enumerate(sizes):
        path = tmp_path / "data" / "images" / f"{number}.png"
        Image.open(path).resize(size).save(path)
    stream = Stream("t", tmp_path / "data", (TaskSpec("t", "test.json", "test.json", "exact", max_new_tokens=4),))
    write_task_files(stream, tmp_path / "tasks")
    asked: list[int] = []
    prepare = lmms_model.prepare_questions

    def seen(processor: Any, questions: Any, *rest: Any) -> Any:
        asked.extend(part.width * part.height for messages in questions for part in messages[-1].parts[:1])
        return prepare(processor, questions, *rest)

    monkeypatch.setattr(lmms_model, "prepare_questions", seen)
    evaluate(live, stream, tmp_path, batch_size=2)
    assert asked == sorted((width * height for width, height in sizes), reverse=True)
    together = read_replies(tmp_path, "t")
    evaluate(live, stream, tmp_path, batch_size=1)
    assert together == read_replies(tmp_path, "t") and len(set(together)) > 2


def test_a_batch_is_prepared_while_the_one_before_is_answered(
    live: tuple[Any, Any], stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch is answered before the next one is ready; the last has none after it."""
    expected = evaluate(live, stream, tmp_path, names=["birds"], batch_size=2)
    ready, to_wait_for = threading.Semaphore(0), [2, 1, 1, 0]  # 7 questions
    prepare, generate = lmms_model.prepare_questions, lmms_model.generate_replies

    def prepared(*inputs: Any) -> Any:
        found = prepare(*inputs)
        ready.release()
        return found

    def answered(*inputs: Any, **rules: Any) -> list[str]:
        assert all(ready.acquire(timeout=60) for _ in range(to_wait_for.pop(0)))
        return generate(*inputs, **rules)

    monkeypatch.setattr(lmms_model, "prepare_questions", prepared)
    monkeypatch.setattr(lmms_model, "generate_replies", answered)
    assert evaluate(live, stream, tmp_path, names=["birds"], batch_size=2) == expected
    assert not to_wait_for


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A device that takes `most` questions together; the sizes of all batches that it is given."""
    rows: list[int] = []
    generate = lmms_model.generate_replies

    def refusing(model: Any, processor: Any, form: Any, inputs: Any, *rest: Any, **rules: Any) -> list[str]:
        rows.append(len(inputs["input_ids"]))
        if rows[-1] > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(model, processor, form, inputs, *rest, **rules)

    monkeypatch.setattr(lmms_model, "generate_replies", refusing)
    return rows


def test_batches_that_the_device_has_no_memory_for_are_halved(
    live: tuple[Any, Any],
    stream: Stream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings: dict[str, Any] = {"names": ["birds"], "batch_size": 7}
    expected = evaluate(live, stream, tmp_path, **settings)
    replies = read_replies(tmp_path, "birds")
    rows = short_of_memory(monkeypatch, 2)
    assert evaluate(live, stream, tmp_path, **settings) == expected
    assert read_replies(tmp_path, "birds") == replies
    assert rows == [7, 3, *[1] * 7]
    said = [record.message for record in caplog.records if "too little memory" in record.message]
    assert len(said) == 2 and "evaluation.batch_size" in said[0]


def test_memory_that_is_too_little_for_one_question_stops_the_evaluation(
    live: tuple[Any, Any], stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 0)
    with pytest.raises(EvaluationError, match="OutOfMemoryError"):
        evaluate(live, stream, tmp_path)
