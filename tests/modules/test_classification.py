"""CLIP: data in folders and records, the stage's promises on both towers, replies, what is saved, and refusals."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, BitsAndBytesConfig, CLIPModel

from mllm_keeplora.commands.chat import main as chat
from mllm_keeplora.commands.export import main as export_command
from mllm_keeplora.config import (
    EvaluationConfig,
    GeneralConfig,
    JudgeConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)
from mllm_keeplora.continual.export import export
from mllm_keeplora.continual.learning import read_stage_factors
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.trainer import StageTrainer
from mllm_keeplora.data.classification import ClassCollator, tokenise
from mllm_keeplora.data.collator import classes_in, join_batches
from mllm_keeplora.data.conversation import Classes, MediaFile, Message, Sample
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.stream import data_hash, load_stream, load_training_records
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.eval.leaderboard import evaluate_saved, find_differences, read_run
from mllm_keeplora.evaluation.answer import answer
from mllm_keeplora.evaluation.judge import JudgeError, judge_run
from mllm_keeplora.evaluation.metrics import summarize
from mllm_keeplora.evaluation.task_files import follow_move
from mllm_keeplora.methods import loda
from mllm_keeplora.modeling.adapters import Factors
from mllm_keeplora.modeling.linear4bit import guard_linear4bit
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.targets import TargetError, find_targets
from mllm_keeplora.planning.check_stream import check_stream
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import gaussian_probe, sketch_gradients
from mllm_keeplora.reports.card import write_card
from mllm_keeplora.reports.comparison import compare_runs
from mllm_keeplora.reports.page import write_report
from mllm_keeplora.reports.tables import format_table
from mllm_keeplora.runs.run_directory import RunDirectory
from tests.modules.conftest import BOTH_TOWERS, all_targets, read_adapter
from tests.modules.test_gradients import autograd_gradients, columns, relative_error
from tests.modules.tiny_families import save_tiny
from tests.recipes.conftest import run_example

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "pale_pink": (240, 190, 200)}
TASKS = {"warm": ("red", "pale_pink"), "cold": ("green", "blue")}
TEMPLATES = ["a picture of {}.", "this is {} or so"]
TRAINED, TESTED = 6, 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random CLIP."""
    directory = tmp_path_factory.mktemp("tiny_clip")
    save_tiny("clip", directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks in the folder layout and their stream; all four colours again as a benchmark, of records."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for task, names in {**TASKS, "all": tuple(COLORS)}.items():
        for half, count in (("train", TRAINED), ("test", TESTED)):
            for name in names:
                for index in range(count):
                    draw_picture(rng, COLORS[name], root / task / half / name / f"{index}.png")
    names = {name: name.replace("_", " ") for name in COLORS}
    records = [{"image": f"{name}/0.png", "class": name} for name in COLORS]
    (root / "all.json").write_text(json.dumps(records))
    classes = {"templates": TEMPLATES}
    tasks = [{"name": t, "train": f"{t}/train", "test": f"{t}/test", "metric": "exact"} for t in TASKS]
    general = {"name": "all", "test": "all.json", "media_root": "all/test", "metric": "exact", "classes": "all.yaml"}
    stream = {"name": "s", "data_root": str(root), "tasks": [{**t, "classes": classes} for t in tasks]}
    (root / "stream.yaml").write_text(yaml.safe_dump({**stream, "general": [general]}, sort_keys=False))
    (root / "all.yaml").write_text(yaml.safe_dump({"templates": TEMPLATES[:1], "names": names}, sort_keys=False))
    return root


def draw_picture(rng: np.random.Generator, color: tuple[int, int, int], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((40, 56, 3), color) + rng.normal(0, 12, (40, 56, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def settings(clip: Path, data: Path, folder: Path, **changes: Any) -> RunConfig:
    tower = TowerConfig(rank=4, eps_w=0.6)
    config = RunConfig(
        run_dir=str(folder / "run"),
        stream=str(data / "stream.yaml"),
        cache_dir=str(folder / "cache"),
        model=ModelConfig(base_model=str(clip), quantization="nf4", compute_dtype="float32", device="cpu"),
        method_options={"features_from": "activations"},
        vision=tower,
        language=replace(tower, eps_w=0.2),
        probe=ProbeConfig(fraction=1.0, batch_size=5),
        train=TrainConfig(learning_rate=2e-2, max_steps=6, per_device_train_batch_size=6, save_steps=2),
        evaluation=EvaluationConfig(batch_size=4),
        report_to=[],
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(clip: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = settings(clip, data, tmp_path_factory.mktemp("finished"))
    run_stream(config)
    return config


def load(clip: Path, quantization: str = "none") -> tuple[Any, Any]:
    return load_base(ModelConfig(base_model=str(clip), quantization=quantization, device="cpu"))  # type: ignore[arg-type]


def batch_of(clip: Path, data: Path, task: str | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """Of one task, or of a few samples of both."""
    records = load_training_records(load_stream(data / "stream.yaml"))
    samples = records[task][0] if task else [s for found, _ in records.values() for s in found[::4]]
    batch = ClassCollator(AutoProcessor.from_pretrained(clip))(samples)
    return {**batch, "shift_labels": batch["labels"][:, 1:], **changes}


def stages(config: RunConfig) -> list[dict[str, Any]]:
    found = RunDirectory(Path(config.run_dir)).found_stages()
    return [json.loads(stage.manifest.read_text()) for stage in found]


# --- The run ---


def test_a_row_has_every_task_and_benchmark_and_the_metrics_are_zscls(finished: RunConfig) -> None:
    retention = json.loads(RunDirectory(Path(finished.run_dir)).retention.read_text())
    assert [row["task"] for row in retention["rows"]] == [None, *TASKS]
    counts = {name: score["n"] for name, score in retention["rows"][0]["scores"].items()}
    assert counts == {"warm": 2 * TESTED, "cold": 2 * TESTED, "all": 4}
    matrix = [[row["scores"][task]["value"] for task in TASKS] for row in retention["rows"]]
    assert {key: retention["metrics"][key] for key in ("transfer", "average", "last")} == {
        key: value for key, value in summarize(matrix).items() if key in ("transfer", "average", "last")
    }
    assert matrix[1][0] == matrix[2][1] == 1.0  # learnt


def test_updates_are_orthogonal_to_what_is_protected_in_both_towers(finished: RunConfig) -> None:
    for manifest in stages(finished)[1:]:
        rows = manifest["modules"]
        assert {row["tower"] for row in rows} == {"vision", "language"}
        assert len(rows) == 2 * 2 * 6
        assert all(row["leakage"] < 1e-6 and row["k_w"] > 0 for row in rows)
        assert any(row["rank"] > 0 for row in rows if row["tower"] == "language")
    assert [row["lambda"] for row in rows if row["tower"] == "vision"] == pytest.approx([0.2] * 6 + [1.0] * 6)


def test_folding_is_exact(finished: RunConfig) -> None:
    """The saved adapter is the sum of what the stages learnt, each with its own scale."""
    directory = RunDirectory(Path(finished.run_dir))
    adapter: Factors = read_adapter(directory.adapter)
    expected: dict[str, torch.Tensor] = {}
    for stage, manifest in list(zip(directory.found_stages(), stages(finished), strict=True))[1:]:
        scales = {row["name"]: row["scale"] for row in manifest["modules"]}
        for name, (a, b) in read_stage_factors(stage).items():
            expected[name] = expected.get(name, torch.zeros(len(b), a.shape[1])) + scales[name] * b @ a
    assert expected.keys() == adapter.keys()
    for name, (a, b) in adapter.items():
        assert torch.allclose(b @ a, expected[name], atol=1e-6), name


@pytest.mark.parametrize(("method", "options"), [("loda", {"rho": 0.05}), ("lines", {"held_out": 0.2})])
def test_methods_that_read_answers_read_classes(
    method: str, options: dict[str, Any], clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoDA's halves of a batch, and LiNeS's accuracy on held-out pictures."""
    split, halves = loda.answer_halves, []
    monkeypatch.setattr(loda, "answer_halves", lambda *given: halves.append(split(*given)) or halves[-1])
    run_stream(config := settings(clip, data, tmp_path, method=method, method_options=options))
    for manifest in stages(config)[1:]:
        assert manifest["counts"]["steps"] == 6
        if method == "lines":
            assert all(0 <= share <= 1 for row in manifest["finish"]["accuracies"] for share in row)
            assert manifest["counts"]["train_samples"] == 2 * TRAINED - 2
    if method == "loda":
        assert len(halves) == 2 * 6
        assert all(found is None or (found[0] ^ found[1]).all() for found in halves)
        assert sum(found is not None for found in halves) > 6


def _until(step: Callable[..., torch.Tensor], last: int) -> Callable[..., torch.Tensor]:
    taken = iter(range(last))

    def training_step(*arguments: Any, **named: Any) -> torch.Tensor:
        if next(taken, None) is None:
            raise OSError("power cut")
        return step(*arguments, **named)

    return training_step


def test_an_interrupted_stage_ends_as_the_uninterrupted_one(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(finished.run_dir).parent, tmp_path, dirs_exist_ok=True)
    config = replace(finished, run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
    directory = RunDirectory(Path(config.run_dir))
    before = directory.adapter_weights.read_bytes()
    [*_, last] = directory.found_stages()
    for path in (last.manifest, last.tensors("train"), directory.retention):
        path.unlink()
    step = StageTrainer.training_step
    monkeypatch.setattr(StageTrainer, "training_step", _until(step, 4))
    with pytest.raises(OSError, match="power"):
        run_stream(config)
    assert [path.name for path in last.checkpoints.iterdir()] == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.setattr(StageTrainer, "training_step", _until(step, 2))  # what is left
    run_stream(config)
    assert directory.adapter_weights.read_bytes() == before


def test_stock_peft_loads_the_adapter_onto_the_stock_model(finished: RunConfig, clip: Path, data: Path) -> None:
    directory = RunDirectory(Path(finished.run_dir))
    quantization = json.loads((directory.adapter / "quantization_config.json").read_text())
    stock = CLIPModel.from_pretrained(clip, quantization_config=BitsAndBytesConfig.from_dict(quantization))
    guard_linear4bit(stock)  # with AVX512-BF16 bitsandbytes computes in bf16 by itself
    assert json.loads((directory.adapter / "adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "CLIPModel",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
    processor: Any = AutoProcessor.from_pretrained(directory.adapter)
    pictures = [Image.open(path) for path in sorted((data / "all/test").glob("*/*.png"))]
    names = sorted(name.replace("_", " ") for name in COLORS)
    prompts = [TEMPLATES[0].format(name) for name in names]
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    ours, _ = load(clip, "nf4")
    ours = PeftModel.from_pretrained(ours, directory.adapter).eval()
    candidates = torch.ones(len(pictures), len(names), dtype=torch.bool)
    with torch.no_grad():
        plain = stock(**inputs).logits_per_image
        logits = PeftModel.from_pretrained(stock, directory.adapter).eval()(**inputs).logits_per_image
        found = ours(**inputs, candidates=candidates).logits[:, 0]
    assert torch.allclose(found, logits, atol=1e-4)
    assert not torch.allclose(plain, logits, atol=1e-2)  # it has learnt something


def test_a_reply_is_the_class_whose_prompts_are_nearest_on_average(finished: RunConfig, clip: Path, data: Path) -> None:
    """ZSCL's: features of all templates averaged, then normalised; against transformers' own CLIP."""
    directory = RunDirectory(Path(finished.run_dir))
    stage = next(iter(directory.found_stages()))
    lines = [json.loads(line) for line in (stage.replies / "warm.jsonl").read_text().splitlines()]
    model: Any = CLIPModel.from_pretrained(clip, quantization_config=load(clip, "nf4")[0].config.quantization_config)
    processor: Any = AutoProcessor.from_pretrained(clip)
    names = ["pale pink", "red"]
    with torch.no_grad():
        prompts = [[template.format(name) for template in TEMPLATES] for name in names]
        tokens = [processor(text=each, padding=True, return_tensors="pt") for each in prompts]
        features = [model.get_text_features(**each).pooler_output for each in tokens]
        means = torch.stack([(each / each.norm(dim=1, keepdim=True)).mean(0) for each in features])
        pictures = [Image.open(line["doc"]["image"]) for line in lines]
        shown = model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
        nearest = (shown @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1).tolist()
    assert [line["reply"] for line in lines] == [names[index] for index in nearest]
    assert [line["target"] for line in lines] == names * TESTED  # in turn, so that a limit asks all classes
    assert [line["score"] for line in lines] == [float(line["reply"] == line["target"]) for line in lines]


def test_the_cards_example_prints_what_the_run_was_answered(finished: RunConfig, tmp_path: Path) -> None:
    run = load_run(finished.run_dir)
    write_card(run)
    write_report(run)
    card = (run.directory.adapter / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert "vLLM" not in card
    lines = [json.loads(line) for line in ([*run.directory.found_stages()][-1].replies / "cold.jsonl").open()]
    printed, said = run_example(card, Path(lines[0]["doc"]["image"]), tmp_path)
    assert printed == said == lines[0]["reply"]
    page = run.directory.report.read_text()
    assert "this is" not in page
    assert "a picture of ___." in page
    assert ">pale pink<" in page


def test_reports_speak_of_pictures_and_classes(finished: RunConfig, clip: Path, data: Path, tmp_path: Path) -> None:
    """Where other models have questions, prompts and answers; also with general samples and beside another run."""
    (tmp_path / "general.yaml").write_text(
        "pictures: all/train\nclasses: {templates: ['a {}'], names: [dog, cat, car]}"
    )
    general = GeneralConfig(
        samples=str(tmp_path / "general.yaml"), media_root=str(data), share=0.2, rehearsed=2, budget=0.02
    )
    config = settings(clip, data, tmp_path, general=general)
    run_stream(config)
    run = load_run(config.run_dir)
    write_card(run)
    write_report(run)
    compare_runs([Path(config.run_dir), Path(finished.run_dir)], tmp_path / "compared")
    page, beside = run.directory.report.read_text(), (tmp_path / "compared/comparison.html").read_text()
    card = (run.directory.adapter / "README.md").read_text()
    for text in (page, beside, card, format_table(run.retention, run.guard_note())):
        shown = re.sub(r"<(style|script|dl).*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)  # settings have names
        assert not re.findall(r"(?i)\b(?:question|answer|token)s?\b", shown)
    assert ">General pictures <" in page
    assert "held-out general pictures by more than 0.02 nats a picture" in page
    assert '<summary><b>warm</b> <span class="muted">&ensp;6 pictures: ' in page
    assert f"{2 * 2 * 6} modules ({2 * 6} of them in the vision tower)" in card


@pytest.mark.parametrize("name", ["warm", "cold", "all"])
def test_chat_names_the_class_that_evaluation_named(
    finished: RunConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = [*RunDirectory(Path(finished.run_dir)).found_stages()][-1]
    lines = [json.loads(line) for line in (stage.replies / f"{name}.jsonl").read_text().splitlines()][:2]
    run = load_run(finished.run_dir)
    assert [run.name_class(line["doc"]["image"], name) for line in lines] == [line["reply"] for line in lines]
    chat([finished.run_dir, "--image", lines[0]["doc"]["image"], "--task", name])
    assert capsys.readouterr().out == f"{lines[0]['reply']}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "warm"], "a CLIP names the class of a picture: give --image, its --task, and no question"),
        (["--image", "a.png", "--task", "warm", "What?"], "and no question"),
        (["--video", "a.mp4", "--task", "warm"], "give --image"),
        (["--image", "a.png"], "the classes of one task; name warm, cold, all"),
        (["--image", "a.png", "--task", "hot"], "the run has no task 'hot'; name warm, cold, all"),
        (["--image", "a.png", "--task", "warm"], "a.png does not exist"),
    ],
)
def test_chat_refuses_what_names_no_class(finished: RunConfig, options: list[str], said: str) -> None:
    with pytest.raises(KeepLoRAError, match=said):
        chat([finished.run_dir, *options])


def test_a_judge_has_nothing_to_grade(finished: RunConfig) -> None:
    with pytest.raises(JudgeError, match="its replies are names of classes, each right or wrong"):
        judge_run(Path(finished.run_dir), JudgeConfig(judge="some/model"))


def test_an_export_is_the_stock_model_and_is_compared_on_pictures_of_all_classes(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    collate = ClassCollator.__call__
    monkeypatch.setattr(ClassCollator, "__call__", lambda self, s: shown.extend(s[0].answers) or collate(self, s))
    export(Path(finished.run_dir), tmp_path / "two", "float32", questions=2)
    assert shown == ["blue", "green"]
    export_command([finished.run_dir, "--out", str(tmp_path / "out")])
    assert re.search(
        r"on 6 test pictures, logits differ by .* of their norm, and \d.* % of them have the same nearest class",
        capsys.readouterr().out,
    )
    model, processor = CLIPModel.from_pretrained(tmp_path / "two"), AutoProcessor.from_pretrained(tmp_path / "two")
    stage = [*RunDirectory(Path(finished.run_dir)).found_stages()][-1]
    lines = [json.loads(line) for line in (stage.replies / "cold.jsonl").read_text().splitlines()]
    names = ["blue", "green"]
    with torch.no_grad():
        inputs: Any = [
            processor(text=[t.format(n) for n in names], padding=True, return_tensors="pt") for t in TEMPLATES
        ]
        features = [model.get_text_features(**each).pooler_output for each in inputs]
        classes = torch.nn.functional.normalize(sum(torch.nn.functional.normalize(f) for f in features))
        pictures: Any = processor(images=[Image.open(x["doc"]["image"]) for x in lines], return_tensors="pt")
        nearest = (model.get_image_features(**pictures).pooler_output @ classes.T).argmax(1).tolist()
    assert [names[index] for index in nearest] == [line["reply"] for line in lines]


def test_the_leaderboard_asks_the_same_again(finished: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])  # which it replaces
    run = read_run(Path(finished.run_dir))
    scores = evaluate_saved(run, None)
    assert not find_differences(run.scores, scores)


def test_a_moved_runs_task_files_name_its_classes(finished: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(RunDirectory(Path(finished.run_dir)).task_files, tmp_path / "moved")
    follow_move(tmp_path / "moved")
    for file in (tmp_path / "moved").glob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        named = (task["generation_kwargs"]["classes"], task["dataset_kwargs"]["data_files"]["test"])
        assert all(Path(path).parent == tmp_path / "moved" and Path(path).is_file() for path in named)


# --- Model, probes, batches ---


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_probes_are_autograds_gradients_on_both_towers(clip: Path, data: Path, quantization: str) -> None:
    model, _ = load(clip, quantization)
    batches = [batch_of(clip, data, "warm"), batch_of(clip, data)]
    exact = autograd_gradients(
        model, [{k: v for k, v in b.items() if k != "labels"} | {"labels": b["shift_labels"]} for b in batches]
    )
    sketches = sketch_gradients(model, all_targets(model), columns(model), lambda: batches, seed=3)
    assert {target.tower for target in all_targets(model)} == {"vision", "language"}
    for target in all_targets(model):
        expected = gaussian_probe(target, columns(model)[target.name], 3).T @ exact[target.name]
        assert relative_error(sketches[target.name], expected) < 1e-5, target.name


def test_the_loss_is_the_cross_entropy_among_the_classes_of_a_pictures_own_task(clip: Path, data: Path) -> None:
    model, processor = load(clip)
    mixed = batch_of(clip, data)
    found = model(**mixed)
    stock = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        inputs = {key: mixed[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        logits = stock(**inputs).logits_per_image.masked_fill(~mixed["candidates"], -torch.inf)
    assert mixed["candidates"].sum(1).tolist() == [2] * len(logits)
    assert torch.allclose(found.logits[:, 0], logits, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits, mixed["labels"][:, 1])
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    apart = [batch_of(clip, data, task) for task in TASKS]
    both = [float(model(**{**one, "num_items_in_batch": 1}).loss) for one in apart]
    assert sum(both) / sum(len(one["labels"]) for one in apart) == pytest.approx(
        float(model(**_joined(clip, data)).loss), rel=1e-4
    )


def test_batches_of_two_tasks_join_to_that_of_both(clip: Path, data: Path) -> None:
    """Also where their prompts differ in length."""
    warm, cold = (found[::5] for found, _ in load_training_records(load_stream(data / "stream.yaml")).values())
    collator = ClassCollator(AutoProcessor.from_pretrained(clip))
    first, second = collator(warm), collator(cold)
    assert first["input_ids"].shape[1] != second["input_ids"].shape[1]
    expected = collator([*warm, *cold])
    found = join_batches(first, second, collator.processor.tokenizer.pad_token_id)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert classes_in(found) == 4


def _joined(clip: Path, data: Path) -> dict[str, torch.Tensor]:
    records = load_training_records(load_stream(data / "stream.yaml"))
    batch = ClassCollator(AutoProcessor.from_pretrained(clip))([s for found, _ in records.values() for s in found])
    return {**batch, "shift_labels": batch["labels"][:, 1:]}


def test_activations_leave_padding_out_and_take_every_patch(clip: Path, tmp_path: Path) -> None:
    """Also where prompts happen to have the shape of pictures: here both are [17 classes or pictures, 17 tokens]."""
    model, processor = load(clip)
    names = ("a", *("a " * n + "red" for n in range(13)), "b", "c", "d")
    classes = Classes(names, names, ("{}",))
    Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "one.png")
    shown = Message("user", (MediaFile("image", tmp_path / "one.png"), ""))
    batch = ClassCollator(processor)([Sample("0", (shown, Message("assistant", (n,))), classes) for n in names])
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 17 - batch["input_ids"].shape[1]))
    batch["attention_mask"] = torch.nn.functional.pad(
        batch["attention_mask"], (0, 17 - batch["attention_mask"].shape[1])
    )
    targets = [t for t in all_targets(model) if t.name.endswith("layers.0.self_attn.q_proj")]
    read: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(t.name).register_forward_pre_hook(
            lambda _, given, name=t.name: read.__setitem__(name, given[0].detach())
        )
        for t in targets
    ]
    found = sketch_inputs(model, targets, {t.name: 2000 for t in targets}, lambda: [batch], seed=0)
    for hook in hooks:
        hook.remove()
    for t in targets:
        rows = read[t.name]
        assert rows.shape[:2] == (17, 17)
        rows = rows.flatten(0, 1) if t.tower == "vision" else rows[batch["attention_mask"].bool()]
        energy = float(rows.norm() ** 2) / len(rows)
        assert float(found[t.name].norm() ** 2) / 2000 == pytest.approx(energy, rel=0.1), t.tower


# --- Data ---


def _folder(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def _edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stream = yaml.safe_load((root / "stream.yaml").read_text())
    stream["data_root"] = str(root)
    change(stream)
    (root / "stream.yaml").write_text(yaml.safe_dump(stream, sort_keys=False))


def _classes(names: Any = None, templates: Any = TEMPLATES) -> Callable[[Path], None]:
    entry = {"templates": templates} | ({} if names is None else {"names": names})
    return lambda root: _edit(root, lambda stream: stream["tasks"][0].update(classes=entry))


def _rename(root: Path, old: str, new: str) -> None:
    for half in ("train", "test"):
        (root / "warm" / half / old).rename(root / "warm" / half / new)


def _records(*records: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "warm.json").write_text(json.dumps(records))
        entry = {
            "train": "warm.json",
            "media_root": "warm/train",
            "classes": {"templates": TEMPLATES, "names": ["red", "pale_pink"]},
        }
        _edit(root, lambda stream: stream["tasks"][0].update(entry))

    return change


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty class": (lambda root: (root / "warm/train/white").mkdir(), "the class has no picture"),
    "no class": (lambda root: shutil.rmtree(root / "warm/train/red"), "'red' is none of the 1 classes|one class alone"),
    "a class that training lacks": (
        lambda root: shutil.move(root / "warm/test/red", root / "warm/test/rot"),
        r"warm/test: 3 of 6 records cannot be used\n  row 4: the class 'rot' is none of the 2 classes",
    ),
    "a class to be learnt that nothing shows": (
        _classes({"red": "red", "pale_pink": "pink", "blue": "blue"}),
        "1 of 3 classes have no picture to learn from, 'blue' first",
    ),
    "a file beside the classes": (lambda root: (root / "warm/train/a.csv").touch(), "'a.csv' beside them"),
    "no picture": (
        lambda root: (root / "warm/train/red/5.png").write_text("text"),
        "1 of 12 records cannot be used\n  row 12: .*5.png",
    ),
    "a damaged picture of the test": (
        lambda root: (root / "warm/test/red/1.png").write_bytes((root / "warm/test/red/1.png").read_bytes()[:99]),
        "row 5: .*1.png",
    ),
    "two classes of one name": (
        _classes({"red": "Red", "pale_pink": "red "}),
        "classes 'red' and 'pale_pink' have the names 'Red' and 'red ', which are one to a CLIP",
    ),
    "two names of the same letters": (
        _classes({"red": "caf\u00e9", "pale_pink": "cafe\u0301"}),
        r"'caf\\xe9' and 'cafe\\u0301', which are one to a CLIP",
    ),
    "two names that the tokenizer tells not apart": (
        _classes({"red": "\u8d64", "pale_pink": "\u6843"}),
        "warm/train: classes: the prompts 'a picture of \u8d64.' and 'a picture of \u6843.' are the same tokens",
    ),
    "a folder without letters": (
        lambda root: _rename(root, "red", "__"),
        "the folder '__' names no class; rename it, or give names",
    ),
    "a folder whose name is no text": (
        lambda root: (root / "warm/train/red").rename(root / os.fsdecode(b"warm/train/r\xe9d")),
        r"warm/train: the names of 1 entries are not UTF-8, 'r\\udce9d' first; rename them",
    ),
    "a picture whose name is no text": (
        lambda root: (root / "warm/train/red/0.png").rename(root / os.fsdecode(b"warm/train/red/\xe9.png")),
        "warm/train/red: the names of 1 entries are not UTF-8",
    ),
    "pictures of a class beside the folder of the other": (
        lambda root: (
            [shutil.move(f, root / "warm/train") for f in (root / "warm/train/red").iterdir()]
            and (root / "warm/train/red").rmdir()
        ),
        "expected one folder a class with pictures in it, found '0.png' beside them; move it elsewhere",
    ),
    "a folder that is not there": (
        lambda root: _edit(root, lambda stream: stream["tasks"][0].update(train="warm/trian")),
        "not found under the data root .*warm/trian",
    ),
    "folders without classes": (
        lambda root: _edit(root, lambda stream: stream["tasks"][0].pop("classes")),
        "train is 'warm/train'; expected a file ending in .*. A folder of pictures needs `classes`",
    ),
    "one name twice in a list": (_classes(["red", "red"]), "two classes have the name 'red'"),
    "names that are numbers": (_classes({1: "red", 2: "pink"}), "classes.names: expected names that are text, found 1"),
    "no place for the name": (_classes(templates=["a picture"]), "each with one {} for the name"),
    "no template": (_classes(templates=[]), "templates is"),
    "records without names": (
        lambda root: _edit(root, lambda stream: stream["general"][0].update(classes={"templates": TEMPLATES})),
        "names is missing; only folders of pictures name the classes",
    ),
    "another metric": (
        lambda root: _edit(root, lambda stream: stream["tasks"][0].update(metric="contains")),
        "expected the metric exact alone",
    ),
    "a suffix": (
        lambda root: _edit(root, lambda stream: stream["tasks"][0].update(prompt_suffix="Answer.")),
        "found prompt_suffix beside them",
    ),
    "no file of classes": (
        lambda root: _edit(root, lambda stream: stream["tasks"][0].update(classes="gone.yaml")),
        "gone.yaml",
    ),
    "a record without class": (_records({"image": "red/0.png"}), 'expected {"image": PATH, "class": CLASS}'),
    "a record of another class": (_records({"image": "red/0.png", "class": "rad"}), "did you mean 'red'"),
    "a record whose class is a list": (_records({"image": "red/0.png", "class": ["red"]}), "none of the 2 classes"),
    "a record outside": (_records({"image": "../../x.png", "class": "red"}), "lies outside the media root"),
    "a record with a question": (_records({"image": "red/0.png", "class": "red", "text": "?"}), 'and "id" at most'),
    "a prompt that is too long": (
        _classes({"red": "red " * 40, "pale_pink": "pink"}),
        "warm/train: classes: the prompt 'a picture of red .* has 4[0-9] tokens, the model takes at most 24; shorten",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_used_is_named(clip: Path, data: Path, tmp_path: Path, kind: str) -> None:
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    change, said = WRONG[kind]
    change(root)
    with pytest.raises(KeepLoRAError, match=said):
        processor = AutoProcessor.from_pretrained(clip)
        load_training_records(load_stream(root / "stream.yaml"), checker=Preflight(processor=processor))


TOLD = (
    *(
        "an empty class",
        "a class that training lacks",
        "no picture",
        "a prompt that is too long",
        "no place for the name",
    ),
    *("two names that the tokenizer tells not apart", "a folder whose name is no text", "a folder without letters"),
)


@pytest.mark.parametrize("kind", TOLD)
def test_the_checker_reports_the_same(clip: Path, data: Path, tmp_path: Path, kind: str) -> None:
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    sound = check_stream(load_stream(root / "stream.yaml"), Preflight(processor=AutoProcessor.from_pretrained(clip)))
    assert (sound.problems, sound.counts[0].train, sound.trained["warm"]) == ((), 12, ["12 pictures of 2 classes"])
    WRONG[kind][0](root)
    processor: Any = AutoProcessor.from_pretrained(clip)
    found = check_stream(load_stream(root / "stream.yaml"), Preflight(processor=processor))
    assert [problem.task for problem in found.problems if problem.stops] == ["warm"]  # once, of train and test alike
    said = "\n".join((found.problems[0].title, *found.problems[0].details))
    assert re.search(WRONG[kind][1].replace("\\n", "\n").replace("\n  ", "\n").removeprefix("warm/train: "), said)


def test_the_checker_tells_of_pictures_that_are_copies_and_of_classes_without_a_test(
    data: Path, tmp_path: Path
) -> None:
    """By their bytes: in folders of classes no path comes twice."""
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    assert not check_stream(load_stream(root / "stream.yaml"), Preflight()).problems
    shutil.copy(root / "warm/train/red/3.png", root / "warm/test/red/leak.png")
    shutil.copy(root / "warm/train/red/2.png", root / "warm/train/pale_pink/other.png")
    shutil.copy(root / "warm/train/red/1.png", root / "warm/train/red/again.png")  # no harm
    shutil.rmtree(root / "cold/test/blue")
    found = check_stream(load_stream(root / "stream.yaml"), Preflight()).problems
    assert not any(problem.stops for problem in found)
    said = {(problem.task, problem.title.split(": ", 1)[1]): problem.details for problem in found}
    assert said == {
        ("warm", "1 pictures are in the training file too (same media and words)"): (
            "red/leak.png of the test is red/3.png of the training",
        ),
        ("warm", "1 pictures stand in another class too"): ("red/2.png is pale_pink/other.png",),
        ("cold", "1 of 2 classes have no picture, 'blue' first; scores say nothing about them"): (),
    }


def test_folders_may_hold_links_to_pictures_below_the_media_root(data: Path, tmp_path: Path) -> None:
    """By default the data root: halves of one set are often made as folders of links."""
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    for file in [*(root / "warm/train/red").iterdir()]:
        moved = file.rename(root / f"whole-{file.name}")
        file.symlink_to(moved)
    assert len(load_training_records(load_stream(root / "stream.yaml"))["warm"][0]) == 2 * TRAINED
    _edit(root, lambda stream: stream["tasks"][0].update(media_root="warm"))
    with pytest.raises(KeepLoRAError, match=r"'red/0.png' lies outside the media root .*/warm \(links resolved\)"):
        load_training_records(load_stream(root / "stream.yaml"))


def test_hidden_files_are_no_pictures_and_records_say_the_same_as_folders(data: Path, tmp_path: Path) -> None:
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    first = load_training_records(load_stream(root / "stream.yaml"))["warm"][0]
    (root / "warm/train/.DS_Store").touch()
    (root / "warm/train/red/.DS_Store").touch()
    assert load_training_records(load_stream(root / "stream.yaml"))["warm"][0] == first
    assert [s.answers[0] for s in first] == ["pale pink"] * TRAINED + ["red"] * TRAINED
    rows = [{"image": f"{n}/{i}.png", "class": n} for n in ("pale_pink", "red") for i in range(TRAINED)]
    _records(*rows)(root)
    again = load_training_records(load_stream(root / "stream.yaml"))["warm"][0]
    assert [(s.media[0].path.name, s.answers[0].replace("_", " ")) for s in again] == [
        (s.media[0].path.name, s.answers[0]) for s in first
    ]


@pytest.mark.parametrize("change", ["a picture", "a name", "a template", "nothing"])
def test_a_tasks_data_hash_covers_pictures_names_and_prompts(data: Path, tmp_path: Path, change: str) -> None:
    root = _folder(data, tmp_path)
    _edit(root, lambda stream: None)
    spec = (before := load_stream(root / "stream.yaml")).tasks[0]
    first = data_hash(before, spec)
    if change == "a picture":
        shutil.copy(root / "warm/train/red/0.png", root / "warm/train/red/99.png")
    elif change == "a name":
        _classes({"red": "red", "pale_pink": "rose"})(root)
    elif change == "a template":
        _classes(templates=TEMPLATES[:1])(root)
    after = load_stream(root / "stream.yaml")
    assert (data_hash(after, after.tasks[0]) == first) == (change == "nothing")


def test_a_stream_of_the_other_kind_is_refused(clip: Path, data: Path, tmp_path: Path, tiny_llava: Path) -> None:
    config = settings(clip, data, tmp_path)
    words = replace(config, model=replace(config.model, base_model=str(tiny_llava)))
    with pytest.raises(KeepLoRAError, match="'warm' has `classes`, and the base model answers in words: take a CLIP"):
        run_stream(words)
    root = _folder(data, tmp_path)
    stock = {"name": "pope", "lmms_eval_task": "pope", "score": "pope_accuracy", "native_max": 1.0}
    _edit(root, lambda stream: stream["general"].append(stock))
    processor: Any = AutoProcessor.from_pretrained(clip)
    with pytest.raises(KeepLoRAError, match="'pope' has no `classes`, and the base model chooses among classes"):
        load_training_records(load_stream(root / "stream.yaml"), checker=Preflight(processor=processor))


def test_what_asks_for_words_is_refused(clip: Path) -> None:
    model, processor = load(clip)
    with pytest.raises(KeepLoRAError, match="a CLIP chooses among classes and writes no answers"):
        answer(model, processor, "what is this?", None)
    with pytest.raises(TargetError, match="clip has no projector"):
        find_targets(model, BOTH_TOWERS, protect_projector=True)


def test_prompts_are_padded_behind_their_end(clip: Path) -> None:
    """The text tower reads a prompt at its first end token."""
    processor: Any = AutoProcessor.from_pretrained(clip)
    processor.tokenizer.padding_side = "left"
    tokens = tokenise(processor, ["red", "a picture of red."])
    end = processor.tokenizer.eos_token_id
    assert tokens["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert tokens["input_ids"][0, 2] == tokens["input_ids"][1, -1] == end
