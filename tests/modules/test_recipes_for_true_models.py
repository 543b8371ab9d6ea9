"""The shipped recipes for 7B models: prompts as published, and headers that say what --plan says."""

import re
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import ProcessorMixin

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig, parse_config
from mllm_keeplora.data.collator import ChatCollator, render_prompt
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.modeling.loading import load_base, load_processor
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.planning.text import format_plan
from mllm_keeplora.units import GB
from tests.conversations import Turn, ask, sample
from tests.recipes import test_tutorial

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes/configs"
PATHS = [path for kind in ("vqa", "video") for path in sorted((CONFIGS / kind).glob("*.yaml"))]
TRUE = [path for path in PATHS if not path.stem.startswith("sm")]  # the small ones and smollm2
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
VICUNA = "recipes/templates/vicuna_v1.jinja"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name files from the repository's folder."""
    monkeypatch.chdir(ROOT)


def settings(*configs: Path) -> RunConfig:
    return parse_config("", configs[0], [part for path in configs for part in ("--config", str(path))])


@pytest.mark.parametrize("path", TRUE, ids=lambda p: p.stem)
def test_a_recipe_for_a_gpu_does_not_run_on_a_cpu_in_silence(path: Path) -> None:
    assert settings(path).model.device == "cuda"


def global_batch(config: RunConfig, processes: int = 1) -> int:
    train = config.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * processes


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B's config and processor, without weights."""
    folder = ROOT / "benchmarks"
    # It imports its neighbours, as a script does.
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        noise = runpy.run_path(str(folder / "noise_run.py"))
        shapes = runpy.run_path(str(folder / "shapes.py"))
    directory, family = tmp_path_factory.mktemp("llava_7b"), noise["FAMILIES"]["llava"]
    family.config(shapes["TRUE"]).save_pretrained(directory)
    noise["make_processor"](family, 336).save_pretrained(directory)
    return directory


# Hardware


@pytest.mark.parametrize("path", TRUE, ids=lambda p: p.stem)
def test_a_recipe_opens_with_its_own_command_and_hardware(path: Path) -> None:
    text = path.read_text()
    first, *rest = text.splitlines()
    script = "run_video_stream" if path.parent.name == "video" else "run_vqa_stream"
    assert first.startswith(f"# bash scripts/{script}.sh --config {path.relative_to(ROOT)} --data_root ")
    header = "\n".join(line for line in rest if line.startswith("#"))
    assert "GPU of" in header and "ime: not measured" in header
    assert (ROOT / settings(path).stream).is_file()


@pytest.mark.parametrize("path", TRUE, ids=lambda p: p.stem)
def test_hardware_changes_no_global_batch(path: Path) -> None:
    kind = path.parent.name
    plain = settings(path)
    for file in HARDWARE:
        if file.name.startswith(kind):
            processes = 4 if "4x" in file.name else 1
            changed = settings(path, file)
            assert global_batch(changed, processes) == global_batch(plain) == (16 if kind == "video" else 64)
            assert changed.train.learning_rate == plain.train.learning_rate
            assert changed.language == plain.language


@pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_says_which_form_of_the_method_it_has(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    small = path not in TRUE
    says, other = ("paper", "general") if not small else ("general", "paper")
    assert f"methods/{other}.yaml" in header and f"methods/{says}.yaml" not in header
    assert ("The paper's form." in header) != ("KeepLoRA with general samples" in header) == small

    def of(*files: Path) -> dict[str, Any]:
        found = settings(path, *files)
        samples = "some" if found.general.samples != "none" else "none"
        same_samples = replace(found, general=replace(found.general, samples=samples))
        return {**asdict(same_samples), "method_options": asdict(load_method(found))}

    expected = of(CONFIGS / f"methods/{says}.yaml")
    if small and path.parent.name == "video":  # of its own, as its header says
        assert "scaled by depth" in header and "eps_g 0.99" in header
        expected["vision"]["gamma"], expected["general"]["eps_g"] = 0.2, 0.99
    assert expected == of() != of(CONFIGS / f"methods/{other}.yaml")


@pytest.mark.parametrize("path", [p for p in TRUE if p.stem.startswith("llava15")], ids=lambda p: p.stem)
def test_the_memory_in_a_header_is_the_plans(path: Path, llava_7b: Path) -> None:
    named = re.search(r"One GPU of (\d+) GB: peak ([\d.]+) GB by --plan", path.read_text())
    assert named is not None
    size, peak = float(named[1]), float(named[2])
    for file, memory in ((None, size), (CONFIGS / "hardware/vqa_1x80gb.yaml", 80.0)):
        config = settings(path, *([file] if file else []))

        config = replace(config, model=replace(config.model, base_model=str(llava_7b)))
        plan = make_plan(config, memory)
        assert plan.memory.peak() / GB * 1.12 < memory
        if file is None:
            assert plan.memory.peak() / GB == pytest.approx(peak, abs=0.06)
            disk = re.search(r"Disk (\d+) GB at most", path.read_text())
            said = re.search(r"disk, GB\n.*?\n  sum +([\d.]+)", format_plan(plan), re.S)
            assert disk is not None and said is not None
            assert 0 <= float(disk[1]) - float(said[1]) < 1


def test_the_guides_run_for_ones_own_data_fits_its_card(llava_7b: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/your_own_data.md").read_text()
    assert "keeplora plan --config my_run.yaml --memory_gb 24" in page
    for name in ("my_stream.yaml", "my_run.yaml"):
        block = re.search(rf"\*\*`{name}`\*\*\n\n```yaml\n(.*?)```", page, re.S)
        assert block is not None
        (tmp_path / name).write_text(block[1].replace("stream: my_stream.yaml", f"stream: {tmp_path}/my_stream.yaml"))
    config = settings(tmp_path / "my_run.yaml")
    plan = make_plan(replace(config, model=replace(config.model, base_model=str(llava_7b))), 24.0)
    assert plan.memory.peak() / GB * 1.12 < 24


def test_the_tutorial_quotes_the_plan_of_its_run(
    llava_7b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text, commands in test_tutorial.STEPS.findall(test_tutorial.PAGE):
        if "keeplora plan" in commands:
            break
        if name:
            test_tutorial.write(Path(name), text)
    config = settings(Path("my_run.yaml"))
    plan = make_plan(replace(config, model=replace(config.model, base_model=str(llava_7b))), 24.0)
    [quoted] = re.findall(r"^  peak .*$", test_tutorial.PAGE, re.M)
    assert quoted in format_plan(plan).splitlines()


# Prompts


def published_vicuna(turns: list[tuple[str, str | None]]) -> str:
    """LLaVA's `Conversation.get_prompt` for separator style TWO, by hand."""
    text = SYSTEM + " "
    for question, answer in turns:
        text += f"USER: {question} ASSISTANT:"
        if answer is not None:
            text += f" {answer}</s>"
    return text


@pytest.fixture
def vicuna(tiny_llava: Path) -> ProcessorMixin:
    return load_processor(ModelConfig(chat_template=VICUNA), str(tiny_llava))


def test_vicuna_v1_is_the_published_conversation(vicuna: ProcessorMixin) -> None:
    def message(role: str, text: str, media: str | None = None) -> dict[str, Any]:
        parts = [{"type": media}] if media else []
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def rendered(*messages: dict[str, Any], prompt: bool = False) -> str:
        return vicuna.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    asked = message("user", "What is this?", "image")
    assert rendered(asked, prompt=True) == published_vicuna([("<image>\nWhat is this?", None)])
    both = [asked, message("assistant", "A cat."), message("user", "Sure?"), message("assistant", "Yes.")]
    turns: list[tuple[str, str | None]] = [("<image>\nWhat is this?", "A cat."), ("Sure?", "Yes.")]
    assert rendered(*both) == published_vicuna(turns)
    assert rendered(message("user", "Why?", "video"), prompt=True) == published_vicuna([("<video>\nWhy?", None)])
    assert rendered(message("user", "Why?"), prompt=True) == published_vicuna([("Why?", None)])


def test_training_supervises_answers_and_end_tokens_alone(vicuna: ProcessorMixin, tmp_path: Path) -> None:
    turns = (Turn("what is this ?", "red"), Turn("is this red ?", "yes no"))
    batch = ChatCollator(vicuna)([sample("0", None, turns)])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    supervised = vicuna.tokenizer.convert_ids_to_tokens(ids[labels != -100].tolist())  # type: ignore[attr-defined]
    assert supervised == ["red", "</s>", "yes", "no", "</s>"]
    prompt = render_prompt(vicuna, ask("what is this ?"))
    asked = vicuna.tokenizer(prompt)["input_ids"]  # type: ignore[attr-defined]
    assert torch.equal(ids[: len(asked)], torch.tensor(asked))


@pytest.mark.parametrize("path", TRUE, ids=lambda p: p.stem)
def test_the_published_template_is_used_where_the_benchmarks_used_it(path: Path) -> None:
    """LLaVA-1.5 and Video-LLaVA; other families keep their processor's own."""
    expected = VICUNA if path.stem.startswith(("llava15", "video_llava")) else None
    assert settings(path).model.chat_template == expected


def test_load_base_gives_the_template_to_all_who_ask(tiny_llava: Path) -> None:
    model = ModelConfig(base_model=str(tiny_llava), device="cpu", chat_template=VICUNA)
    assert load_base(model)[1].chat_template == Path(VICUNA).read_text()


def test_a_missing_template_is_named(tiny_llava: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.chat_template none.jinja cannot be read"):
        load_processor(ModelConfig(chat_template="none.jinja"), str(tiny_llava))
