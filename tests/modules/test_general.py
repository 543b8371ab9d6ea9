"""General samples: the base's own replies, protected inputs, distillation, the guard; in words, and as a CLIP's."""

import html
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, CLIPModel

from mllm_keeplora.config import ConfigError, GeneralConfig, RunConfig
from mllm_keeplora.continual import general
from mllm_keeplora.continual.general import Batches, Distillation, held_out_divergence
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.stage import StageError
from mllm_keeplora.continual.trainer import StageTrainer
from mllm_keeplora.data.collator import collator_of
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import load_records
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.methods.context import General, Lesson, StageContext
from mllm_keeplora.modeling import loss
from mllm_keeplora.modeling.adapters import STAGE, active_adapters, adapters_off, attach_accumulated, detach
from mllm_keeplora.modeling.loss import as_teacher, divergence, reply_logits, teacher_divergence
from mllm_keeplora.probes.hooks import hooked
from mllm_keeplora.reports.page import write_report
from mllm_keeplora.runs.files import ArtifactError, load_tensors
from tests.modules.test_classification import COLORS, draw_picture
from tests.modules.test_classification import clip as clip  # a fixture, as those below
from tests.modules.test_classification import data as data
from tests.modules.test_methods import config, open_stage, stage_adapter
from tests.modules.test_methods import stream_file as stream_file

WORDS = ("red", "blue", "yes", "no")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions, every third without a picture; their answers are not to be read."""
    root = tmp_path_factory.mktemp("general")
    rng = np.random.default_rng(7)
    records = []
    for number in range(12):
        record: dict[str, Any] = {
            "question_id": number,
            "text": f"is this {WORDS[number % 4]} ?",
            "answer": "never read",
        }
        if number % 3:
            record["image"] = f"{number}.png"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / f"{number}.png")
        records.append(record)
    path = root / "general.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of a CLIP, with texts of one length."""
    root = tmp_path_factory.mktemp("reference")
    rng = np.random.default_rng(7)
    for number in range(12):
        draw_picture(rng, list(COLORS.values())[number % 4], root / f"pictures/{number:02d}.png")
    classes = {"templates": ["a picture of {}."], "names": ["red", "green", "blue", "pink"]}
    path = root / "general.yaml"
    path.write_text(yaml.safe_dump({"pictures": "pictures", "classes": classes}))
    return path


Settings = Callable[..., RunConfig]


def maker(base: Path, stream_file: Path, samples: Path, directory: Path) -> Settings:
    def make(method: str = "keeplora", **given: Any) -> RunConfig:
        made = GeneralConfig(**{"samples": str(samples), "max_new_tokens": 4, **given})
        return replace(config(base, stream_file, directory, method), general=made)

    return make


@pytest.fixture
def in_words(tiny_llava: Path, stream_file: Path, prompts: Path, tmp_path: Path) -> Settings:
    """Of a model that answers in words."""
    return maker(tiny_llava, stream_file, prompts, tmp_path)


@pytest.fixture
def in_classes(clip: Path, data: Path, reference: Path, tmp_path: Path) -> Settings:
    """Of a CLIP."""
    return maker(clip, data / "stream.yaml", reference, tmp_path)


@pytest.fixture(params=["in_words", "in_classes"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Of either."""
    made: Settings = request.getfixturevalue(request.param)
    return made


def collated(stage: StageContext, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    run = stage.run
    return run.to_device(collator_of(run.processor, None)([lesson.sample for lesson in lessons]))


def test_a_run_keeps_its_promises(settings: Settings) -> None:
    """Inputs protected, distilled, guarded, shown; what is continued is checked against the same settings."""
    asked = settings(eps_g=0.9, share=0.25, budget=1e-4)
    run_stream(asked)
    write_report(saved := load_run(asked.run_dir))
    with Run.open(asked) as run:
        first, second = run.history.manifests[1:]
        replies = json.loads(run.directory.general_replies.read_text())
        energy = json.loads(run.directory.general_energy.read_text())
    assert len(replies) == 12 and all(entry["reply"] != "never read" for entry in replies)
    page = saved.directory.report.read_text()
    assert all(f">{html.escape(entry['prompt'])}<" in page for entry in replies)
    for name, fact in energy.items():
        assert fact["held"] >= 0.9 - 1e-6 or fact["saturated"], name
    for manifest in (first, second):
        assert all(row["leakage"] < 1e-6 for row in manifest["modules"])
        assert sum(row["k_g"] for row in manifest["modules"]) == sum(fact["k_g"] for fact in energy.values()) > 0
        guard = manifest["guard"]
        assert guard["after"] <= guard["before"] + 1e-4 + 1e-9
    with pytest.raises(ArtifactError, match="general.eps_g: 0.9 there, 0.8 now"):
        run_stream(settings(eps_g=0.8, share=0.25, budget=1e-4))


@pytest.mark.parametrize("method", ["keeplora", "inflora", "gpm", "loda"])
def test_an_update_cannot_use_the_energy_of_general_inputs(method: str, settings: Settings) -> None:
    """||dW x|| <= ||dW|| ||(I - M M^T) x||, and M holds eps_g of what the x have together."""
    asked = settings(method, eps_g=0.95)
    run_stream(asked)
    with Run.open(asked) as run:
        stage, factors = run.stage_context(1, {}), run.accumulated(1)
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in factors}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, given: inputs[name].append(given[0].detach().reshape(-1, given[0].shape[-1]))

        batches = Batches(run.context, [run.context.general.learnt[0].sample])
        with torch.no_grad(), hooked(run.context.model, {name: keep(name) for name in factors}, "before"):
            for batch in batches():
                run.context.model(**{key: value for key, value in batch.items() if key != "labels"})
    for target in stage.targets:
        a, b = factors[target.name]
        x, basis = torch.cat(inputs[target.name]).double(), stage.bases.load(target).double()
        outside = (x - x @ basis @ basis.T).norm()
        update = (b @ a).double()
        assert (x @ update.T).norm() <= torch.linalg.matrix_norm(update, 2) * outside + 1e-6
        energy = json.loads(run.directory.general_energy.read_text())[target.name]
        assert energy["saturated"] or outside.square() <= 0.15 * x.square().sum(), target.name


@pytest.mark.parametrize(
    "method, eps_g", [("keeplora", 0.95), ("inflora", 0.95), ("gpm", 0.95), ("gpm", 1.0), ("loda", 0.95), ("loda", 1.0)]
)
def test_modules_that_general_inputs_leave_less_room_learn_with_what_is_left(
    method: str, eps_g: float, in_words: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """How much they take depends on the sample: no mistake in the settings, unlike a rank beyond the weights' space."""
    asked = in_words(method, eps_g=eps_g)
    with Run.open(asked) as run:
        context = run.stage_context(1, {})
        sizes = {t.name: context.bases.sizes(t) for t in context.targets}
        rank = min(t.in_features - sizes[t.name][0] for t in context.targets)
        narrow = {t.name for t in context.targets if rank > t.in_features - sum(sizes[t.name])}
        assert narrow
    tower = replace(asked.language, rank=rank)
    wide = replace(asked, language=tower, vision=tower, run_dir=f"{asked.run_dir}_wide")
    run_stream(wide)
    assert f"{len(narrow)} of {len(sizes)} modules have fewer directions left than their rank" in caplog.text
    with Run.open(wide) as run:
        rows = {row["name"]: row for row in run.history.manifests[1]["modules"]}
    for name in narrow & rows.keys():
        assert rows[name]["leakage"] < 1e-6
    beyond = {w: replace(tower, rank=rank + 1) for w in ("language", "vision")}
    with pytest.raises(StageError, match=f"rank {rank + 1} exceeds its residual space of .* lower .*eps_w"):
        run_stream(replace(wide, **beyond, run_dir=f"{asked.run_dir}_beyond"))


@pytest.fixture
def taught(settings: Settings) -> tuple[StageContext, Any]:
    """A stage with a random update on it, and its model."""
    stage, _ = open_stage(settings(eps_g=None, share=0.5))
    model = stage_adapter(stage.run.model)
    yield stage, model
    detach(model)


def test_the_teacher_is_the_base_and_nothing_else_changes(taught: tuple[StageContext, Any]) -> None:
    stage, model = taught
    batch = collated(stage, stage.run.general.learnt[:2])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        changed = reply_logits(model, batch)
        with adapters_off(model):
            base = reply_logits(model, batch)
        assert torch.equal(reply_logits(model, batch), changed)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert active_adapters(model) == [STAGE]
    detach(model)
    with torch.no_grad():
        assert torch.equal(reply_logits(stage.run.model, batch), base)
    assert not torch.equal(base, changed)


@pytest.mark.parametrize("distil", ["kl", "replies"])
def test_distillation_is_the_mean_over_reply_tokens(distil: str, taught: tuple[StageContext, Any]) -> None:
    """Against a loop over single samples; kl is zero where the update is."""
    stage, model = taught
    run = replace(stage.run, config=replace(stage.run.config, general=replace(stage.run.config.general, distil=distil)))
    stage = replace(stage, run=run)
    batch = run.to_device(stage.collator(stage.samples[:2]))
    distillation = Distillation(stage, stage.run.general.learnt)
    joined, loss_of = distillation(batch, 0, 1)
    outputs = model(**joined)
    assert float(outputs.loss.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-4)  # the task's
    found = loss_of(outputs.logits)
    total, tokens = 0.0, 0
    for number in Distillation(stage, stage.run.general.learnt)._drawn(0, 1):
        alone = collated(stage, [run.general.learnt[number]])
        logits = reply_logits(model, alone).log_softmax(-1)
        with torch.no_grad(), adapters_off(model):
            base = reply_logits(model, alone).log_softmax(-1)
        labels = alone["labels"][:, 1:]
        said = labels[labels != -100]
        if distil == "replies" and run.general.learnt[number].cut:
            said, logits = said[:-1], logits[:-1]
        if distil == "kl":
            total += float((base.exp() * (base - logits)).detach().sum())
        else:
            total -= float(logits[torch.arange(len(said)), said].detach().sum())
        tokens += len(said)
    assert float(found.detach()) == pytest.approx(total / tokens, rel=1e-4, abs=1e-7)
    found.backward()
    learning = [
        p for n, p in model.named_parameters() if "lora_B.stage" in n and ("language" in n or "text_model" in n)
    ]
    assert learning and all(p.grad is not None for p in learning)


@pytest.mark.parametrize("of", ["general samples", "past tasks"])
def test_a_reply_that_was_cut_does_not_teach_to_stop(
    of: str, in_words: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole one the end is learnt as well."""
    texts = ("no", "no yes", "no yes red", "no yes red no")  # of four tokens at most
    said = [texts[number % 4] for number in range(12)]
    monkeypatch.setattr(general, "greedy_replies", lambda model, processor, asked, length: said[: len(asked)])
    monkeypatch.setattr(general, "_longest_recalled", lambda stage: 4)
    made = in_words(eps_g=None, share=0.5, rehearsed=6, distil="replies")
    stage, run = open_stage(replace(made, cache_dir=str(tmp_path / "cache")), 2)
    lessons = stage.run.general.learnt
    if of == "past tasks":
        recalled = general.recall(stage, run.method, stage.run.model)
        lessons = general.recalled(stage, run.method, SimpleNamespace(facts=recalled.facts))
    learnt: list[torch.Tensor] = []
    monkeypatch.setattr(general, "cross_entropy", lambda found, labels, **_: learnt.append(labels) or found.sum())
    batch = stage.run.to_device(stage.collator(stage.samples[:2]))
    for lesson in lessons:
        joined, loss_of = Distillation(stage, [lesson])(batch, 0, 1)
        with torch.no_grad():
            loss_of(stage.run.model(**joined).logits)
        reply = lesson.sample.messages[-1].text.split()
        assert lesson.cut == (len(reply) >= 3)
        expected = 2 * (reply if lesson.cut else [*reply, "</s>"])  # it comes twice beside two samples
        assert stage.run.processor.tokenizer.convert_ids_to_tokens(learnt.pop()) == expected
    assert {lesson.cut for lesson in lessons} == {True, False}


@pytest.mark.parametrize("kept", [3, 7, 1000])
def test_the_likeliest_words_bound_the_divergence_from_below(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside torch's own over all words, and beside the sum over words and rest in fp64; the gradient too."""
    torch.manual_seed(kept)
    base, logits = 4 * torch.randn(5, 40), (4 * torch.randn(5, 40)).requires_grad_()
    monkeypatch.setattr(loss, "TEACHER_WORDS", kept)
    found = teacher_divergence(as_teacher(base), logits)
    p, q = base.double().softmax(-1), logits.double().softmax(-1)
    words = base.topk(min(kept, 40)).indices
    inside = (p * (p / q).log()).gather(-1, words).sum()
    rest = [1 - x.gather(-1, words).sum(-1) for x in (p, q)]
    expected = inside + (0 if kept > 40 else (rest[0] * (rest[0] / rest[1]).log()).sum())
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    whole = float(divergence(base, logits.detach()))
    assert float(found.detach()) <= whole + 1e-5 and (
        kept < 40 or float(found.detach()) == pytest.approx(whole, rel=1e-5)
    )
    [gradient] = torch.autograd.grad(found, logits, retain_graph=True)
    [other] = torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, other, atol=1e-5)


def test_a_model_that_is_its_teacher_has_no_divergence() -> None:
    logits = (6 * torch.randn(4, 300)).requires_grad_()
    found = teacher_divergence(as_teacher(logits.detach()), logits)
    [gradient] = torch.autograd.grad(found, logits)
    assert abs(float(found.detach())) < 1e-5 and float(gradient.abs().max()) < 1e-6


def test_what_a_step_sees_depends_on_the_step_alone(taught: tuple[StageContext, Any]) -> None:
    stage, model = taught
    order = [number for step in range(6) for number in _steps(stage, model, step)]
    known = len(stage.run.general.learnt)
    assert len(set(order[:known])) == known  # all of them before any comes again
    again = Distillation(stage, stage.run.general.learnt)
    again._step = 4  # as after a resumption: no step before was seen
    assert again._drawn(4, 1) == order[4 * 2 : 4 * 2 + 2]


def _steps(stage: StageContext, model: Any, step: int) -> list[int]:
    return Distillation(stage, stage.run.general.learnt)._drawn(step, 1)


@pytest.mark.parametrize(
    ("batch", "passes", "share", "whole"),
    [
        (8, 1, 0.2, 2),
        (1, 8, 0.2, 2),
        (4, 16, 0.2, 16),
        (1, 64, 0.2, 16),
        (3, 5, 0.25, 5),
        (2, 3, 0.4, 4),
        (1, 4, 0.01, 1),
    ],
)
def test_a_steps_share_is_spread_over_its_forwards(batch: int, passes: int, share: float, whole: int) -> None:
    found = GeneralConfig(samples="builtin", share=share).beside(batch, passes)
    assert len(found) == passes and sum(found) == whole and max(found) - min(found) <= 1


@pytest.mark.parametrize("distil", ["kl", "replies"])
@pytest.mark.parametrize("passes", [1, 2, 8, 3])
def test_a_step_sees_the_same_general_samples_however_it_accumulates(
    passes: int, distil: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of the task and two beside them, whose mean counts once; 3 of 8 passes are an epoch's last step."""
    monkeypatch.setattr(general, "greedy_replies", lambda model, processor, asked, length: ["no"] * len(asked))
    made = replace(settings(eps_g=None, share=0.2, distil=distil), cache_dir=str(tmp_path / "cache"))
    size, full = (1, 8) if passes == 3 else (8 // passes, passes)
    train = replace(made.train, per_device_train_batch_size=size, gradient_accumulation_steps=full)
    stage, _ = open_stage(replace(made, train=train))
    lessons, model = stage.run.general.learnt, stage_adapter(stage.run.model)
    batch = stage.run.to_device(stage.collator(stage.samples[:2]))

    def step(stage: StageContext, passes: int) -> tuple[float, int]:
        distillation, total, seen = Distillation(stage, lessons), 0.0, 0
        for _ in range(passes):
            if (beside := distillation(batch, 3, passes)) is not None:
                joined, loss_of = beside
                total += float(loss_of(model(**joined).logits).detach())
                seen += len(joined["labels"]) - len(batch["labels"])
        return total / passes, seen

    at_once = replace(stage, train=replace(train, per_device_train_batch_size=8, gradient_accumulation_steps=1))
    found, expected = step(stage, passes), step(at_once, 1)
    if passes == 3:  # one sample, of those at the step's first place
        first = Distillation(stage, lessons)._sample(3 * 2)
        batch_of_it = collated(stage, [lessons[first]])
        with torch.no_grad():
            logits = reply_logits(model, batch_of_it)
            with adapters_off(model):
                base = reply_logits(model, batch_of_it)
        said = batch_of_it["shift_labels"][batch_of_it["shift_labels"] != -100]
        alone = divergence(base, logits) if distil == "kl" else cross_entropy(logits, said, reduction="sum")
        expected = float(alone) / len(said), 1
    detach(model)
    assert found[1] == expected[1] and found[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("distil", ["kl", "replies"])
def test_past_tasks_are_rehearsed_by_the_models_own_replies(distil: str, settings: Settings) -> None:
    """Questions alone are asked, of the model as it was before the stage; what it said is a phase of the stage."""
    asked = settings(samples="none", rehearsed=3, share=0.5, distil=distil)
    run_stream(asked)
    with Run.open(asked) as run:
        past = run.accumulated(1)
        stage, model = run.stage_context(2, past), attach_accumulated(run.context.model, past)
        prompts = general.past_prompts(stage, run.method)
        first, second = (run.directory.stage(n, task.name) for n, task in enumerate(run.stream.tasks, start=1))
        facts = json.loads(second.facts("recall").read_text())
        found = general.recall(stage, run.method, model)
        detach(model)
    assert not first.facts("recall").exists() and first.manifest.exists()
    assert len(prompts) == len(facts["replies"]) == 3 and {p.messages[-1].role for p in prompts} == {"user"}
    assert found.facts == facts
    assert second.tensors("recall").exists() == (distil == "kl")
    if distil == "kl":
        written = load_tensors(second.tensors("recall"))
        assert all(torch.equal(tensor, written[name]) for name, tensor in found.tensors.items())


def dialogues(folder: Path) -> Path:
    """Records of two questions each, of which the second shows a picture."""
    records = []
    for number in range(8):
        draw_picture(np.random.default_rng(number), COLORS["red"], folder / f"{number}.png")
        shown = [
            {"type": "image", "image": f"{number}.png"},
            {"type": "text", "text": f"is this {WORDS[number % 4]} ?"},
        ]
        texts = ("what is this ?", "red", shown, "blue")
        turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 2, texts, strict=True)]
        records.append({"id": number, "messages": turns})
    file = folder / "dialogues.json"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.parametrize("distil", ["kl", "replies"])
@pytest.mark.parametrize("of", ["general samples", "held-out ones", "past tasks"])
def test_of_a_conversation_the_models_own_reply_alone_is_learnt(
    of: str, distil: str, in_words: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier answers stand in the file: the prompt holds them, and no loss, teacher or budget looks at them."""
    monkeypatch.setattr(general, "greedy_replies", lambda model, processor, asked, length: ["no"] * len(asked))
    made = in_words(samples=str(file := dialogues(tmp_path)), eps_g=None, share=0.5, rehearsed=8, distil=distil)
    stage, run = open_stage(replace(made, cache_dir=str(tmp_path / "cache")), 2)
    if of == "past tasks":
        records = {**stage.run.records, "first": load_records(file, tmp_path)}
        stage = replace(stage, run=replace(stage.run, records=records))
        outcome = general.recall(stage, run.method, stage.run.model)
        lessons = general.recalled(stage, run.method, SimpleNamespace(facts=outcome.facts, tensors=outcome.tensors))
    elif of == "general samples":
        lessons = stage.run.general.learnt
    else:
        lessons = [Lesson(sample, None) for sample in stage.run.general.held_out]
    tokenizer, turned = stage.run.processor.tokenizer, 0
    for lesson in lessons:
        batch = collator_of(stage.run.processor, None)([lesson.sample])
        said = batch["labels"][batch["labels"] != -100]
        assert tokenizer.decode(said).split() == ["no", "</s>"]
        turned += "red" in tokenizer.decode(batch["input_ids"][0]).split()
        assert (lesson.teacher is not None) == (distil == "kl" and of != "held-out ones")
        assert lesson.teacher is None or len(lesson.teacher.words) == len(said)
    assert turned == len(lessons) / (2 if of == "past tasks" else 1)  # of those every other is a first question


def test_a_killed_training_goes_on_to_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(eps_g=0.9, share=0.25, rehearsed=2)
    asked = replace(asked, train=replace(asked.train, save_steps=1))
    whole = replace(asked, run_dir=str(tmp_path / "whole"))
    run_stream(whole)
    step = StageTrainer.training_step

    def killed(trainer: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", killed)
        run_stream(asked)
    run_stream(asked)
    found, expected = (load_tensors(Path(c.run_dir, "adapter/adapter_model.safetensors")) for c in (asked, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_guard_takes_the_largest_update_that_fits(settings: Settings) -> None:
    """Twice the factor would not have fitted; a budget that everything fits scales nothing."""
    for budget, whole in ((1e-5, False), (1e3, True)):
        asked = settings(eps_g=None, budget=budget)
        asked = replace(asked, run_dir=f"{asked.run_dir}-{budget}", train=replace(asked.train, learning_rate=0.1))
        run_stream(asked)
        with Run.open(asked) as run:
            facts = run.history.manifests[1]["guard"]
            factors = facts["factors"]
            assert (factors == {"vision": 1.0, "language": 1.0}) is whole
            context, learnt = run.context, run.accumulated(1)
            model = attach_accumulated(context.model, learnt)
            found = held_out_divergence(model, Batches(context, context.general.held_out))
            detach(model)
        assert found == pytest.approx(facts["after"], rel=1e-3, abs=1e-9)
        assert facts["after"] <= budget


@pytest.mark.parametrize(
    ("vision", "language", "most"),
    [(0.1, 0.2, 2), (3.0, 0.2, 19), (0.2, 3.0, 19), (3.0, 4.0, 19), (90.0, 0.2, 19), (90.0, 90.0, 19), (0.0, 3.0, 19)],
)
def test_the_guard_measures_no_factor_twice(
    vision: float, language: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a divergence grows with each tower's factor: both kept in the budget, neither could be a step larger."""
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(general, "Batches", lambda run, samples: None)
    monkeypatch.setattr(general, "held_out_divergence", lambda model, batches: seen.append(model) or divergence(model))

    def divergence(c: dict[str, float]) -> float:
        return 0.5 + vision * c.get("vision", 0.0) + language * c.get("language", 0.0)

    settings = SimpleNamespace(general=GeneralConfig(samples="builtin", budget=1.0))
    stage: Any = SimpleNamespace(
        run=SimpleNamespace(config=settings, general=General([], [])),
        name="stage 1",
        targets=[SimpleNamespace(tower=tower) for tower in ("vision", "vision", "language")],
        accumulated={},
        scaled=lambda c: SimpleNamespace(folded_scales=c),
    )
    method: Any = SimpleNamespace(fold=lambda past, factors, scales: scales)
    found = general.guard(stage, method, lambda folded: folded, {})
    assert len(seen) <= most and len({str(c) for c in seen}) == len(seen)
    factors = found["factors"]
    assert found["after"] == divergence(factors) <= found["before"] + 1.0 == 1.5
    assert found["unscaled"] == divergence({"vision": 1.0, "language": 1.0})
    for tower in factors:
        more = {**factors, tower: factors[tower] + 1 / 16}
        assert factors[tower] == 1.0 or divergence(more) > 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "none", "share": 0.2}, "general.share need prompts"),
        ({"samples": "none", "budget": 0.2}, "general.budget need prompts"),
        ({"share": 1.0}, "general.share"),
        ({"rehearsed": 8}, "general.rehearsed needs a general.share above 0"),
        ({"samples": "none", "rehearsed": 8, "share": 0.2, "budget": 0.1}, "general.budget need prompts"),
        ({"budget": 0.0}, "general.budget"),
        ({"eps_g": 1.5}, "general.eps_g"),
        ({"max_samples": 3}, "general.max_samples"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneralConfig(**{"samples": "builtin", **change})


def test_a_guard_needs_an_update(in_words: Settings) -> None:
    with pytest.raises(ConfigError, match="trains one adapter on throughout"):
        run_stream(in_words("lora_throughout", budget=0.1))


def test_the_builtin_prompts_are_read() -> None:
    """Every form of theirs: pictures, two pictures, earlier turns, text alone."""
    found = general.prompts(GeneralConfig(samples="builtin"), Preflight())
    assert len(found) == 256 and all(sample.messages[-1].role == "user" for sample in found)
    assert {len(sample.media) for sample in found} == {0, 1, 2}
    assert any(len(sample.messages) > 2 for sample in found)


def test_prompts_that_a_test_asks_are_refused(in_words: Settings, stream_file: Path, tmp_path: Path) -> None:
    """The same words about another picture are another question; so are other words about the same."""
    asked = json.loads((stream_file.parent / "first_test.json").read_text())[0]
    prompts = [{**asked, "question_id": n, "text": f"is this {word} ?"} for n, word in enumerate(WORDS)]
    prompts.append({**asked, "question_id": 4, "image": "second1.png"})
    for watched in (False, True):
        records = [*prompts, {**asked, "question_id": 5, "text": "What  is this ?"}] if watched else prompts
        path = stream_file.parent / f"prompts-{watched}.json"
        path.write_text(json.dumps(records))
        made = in_words()
        made = replace(made, general=replace(made.general, samples=str(path)))
        if watched:
            with pytest.raises(ConfigError, match="prompt '5'.* is a question of first"), Run.open(made):
                pass
        else:
            with Run.open(made):
                pass


def test_a_base_without_replies_is_refused(in_words: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "greedy_replies", lambda model, processor, asked, length: [""] * len(asked))
    with pytest.raises(ConfigError, match="answers 12 of 12 prompts with nothing"):
        run_stream(replace(in_words(), cache_dir=str(tmp_path / "cache")))  # of the base's replies, a new one


# --- A CLIP's ---


def test_a_clip_keeps_its_distribution_over_the_texts(in_classes: Settings, clip: Path) -> None:
    """Replies and what the stages learn from, beside transformers' own CLIP."""
    made = in_classes(eps_g=None, share=0.5)
    stage, run = open_stage(replace(made, model=replace(made.model, quantization="none", compute_dtype="float32")))
    stock: Any = CLIPModel.from_pretrained(clip)
    processor: Any = AutoProcessor.from_pretrained(clip)
    names = ["red", "green", "blue", "pink"]
    pictures = [Image.open(sample.media[0].path) for sample in run.history.prompts]
    texts = [f"a picture of {name}." for name in names]
    with torch.no_grad():
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        expected = stock(**inputs).logits_per_image.log_softmax(-1)
    replies = json.loads(run.directory.general_replies.read_text())
    assert [entry["reply"] for entry in replies] == [names[n] for n in expected.argmax(-1).tolist()]
    assert {entry["prompt"] for entry in replies} == {"a picture of ___."}
    assert [entry["id"] for entry in replies] == [f"{number:02d}.png" for number in range(12)]
    learnt = [number for number in range(12) if number % 4 != 3]
    assert len(stage.run.general.held_out) == 3
    for number, lesson in zip(learnt, stage.run.general.learnt, strict=True):
        found = torch.empty(4).scatter_(0, lesson.teacher.words[0], lesson.teacher.log_probabilities[0])
        assert torch.allclose(found, expected[number], atol=1e-4)


def test_pictures_of_a_step_are_each_compared_with_their_own_texts(in_classes: Settings) -> None:
    """General ones and those of two past tasks beside a third's, against single ones."""
    stage, _ = open_stage(in_classes(eps_g=None, share=0.75))
    records = [sample for samples, _ in stage.run.records.values() for sample in samples[4:8]]
    said = general._said(stage.run, stage.run.model, records)
    lessons = [*general._lessons(stage.run, records, said, 1), *stage.run.general.learnt]
    assert len({lesson.sample.classes for lesson in lessons}) == 3
    model = stage_adapter(stage.run.model)
    distillation = Distillation(stage, lessons)
    [drawn, again] = [Distillation(stage, lessons)._drawn(0, 1), distillation._drawn(0, 1)]
    assert drawn == again and len({lessons[number].sample.classes for number in drawn}) > 1
    batch = stage.run.to_device(stage.collator(stage.samples[:2]))
    joined, loss_of = Distillation(stage, lessons)(batch, 0, 1)
    found, total = loss_of(model(**joined).logits), 0.0
    for number in drawn:
        alone = collated(stage, [lessons[number]])
        with torch.no_grad():
            logits = reply_logits(model, alone).log_softmax(-1)
            with adapters_off(model):
                base = reply_logits(model, alone).log_softmax(-1)
        total += float((base.exp() * (base - logits)).sum())
    detach(model)
    assert float(found.detach()) == pytest.approx(total / len(drawn), rel=1e-3, abs=1e-7)


def write_reference(folder: Path, form: str) -> Path:
    """The same eight pictures and two texts, said in one of four ways."""
    names, pictures, rng = ["red", "pale pink"], "shown", np.random.default_rng(1)
    classes: Any = {"templates": ["a picture of {}."], "names": names}
    for number in range(8):
        name = names[number // 4].replace(" ", "_")
        place = f"shown/{name}/{number}.png" if form == "folders" else f"shown/{number}.png"
        draw_picture(rng, COLORS[name], folder / place)
    if form == "folders":
        del classes["names"]
    if form == "records":
        (folder / "shown.json").write_text(json.dumps([{"image": f"shown/{n}.png", "id": f"{n}"} for n in range(8)]))
        pictures = "shown.json"
    if form == "a file of classes":
        (folder / "classes.yaml").write_text(yaml.safe_dump(classes))
        classes = "classes.yaml"
    (folder / "general.yaml").write_text(yaml.safe_dump({"pictures": pictures, "classes": classes}))
    return folder / "general.yaml"


@pytest.mark.parametrize("place", ["general.yaml", "general.yml"])
def test_a_reference_is_found_from_elsewhere(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names lies beside it, wherever the command runs; pictures may be there twice."""
    file = write_reference(tmp_path / "in/here", "pictures").rename(tmp_path / "in/here" / place)
    shutil.copy(file.parent / "shown/0.png", file.parent / "shown/8.png")
    monkeypatch.chdir(tmp_path / "in")
    found = general.prompts(GeneralConfig(samples=f"here/{place}"), Preflight())
    assert [sample.media[0].path.stem for sample in found] == [str(number) for number in range(9)]


@pytest.mark.parametrize("form", ["folders", "pictures", "records", "a file of classes"])
def test_pictures_and_texts_have_four_forms(form: str, tmp_path: Path) -> None:
    found = general.prompts(GeneralConfig(samples=str(write_reference(tmp_path, form))), Preflight())
    assert sorted(sample.media[0].path.stem for sample in found) == [str(number) for number in range(8)]
    [classes] = {sample.classes for sample in found}
    assert sorted(classes.prompts(classes.templates[0])) == ["a picture of pale pink.", "a picture of red."]
    assert all([message.role for message in sample.messages] == ["user"] for sample in found)


@pytest.mark.parametrize("change", ["a picture", "a name", "a template", "an unused template", "the folder"])
def test_what_pictures_are_compared_with_is_part_of_a_runs_identity(change: str, tmp_path: Path) -> None:
    def found(folder: Path, **changes: Any) -> str:
        file = write_reference(folder, "pictures")
        entry = yaml.safe_load(file.read_text())
        entry["classes"] |= changes
        file.write_text(yaml.safe_dump(entry))
        if change == "a picture" and folder.name == "two":
            draw_picture(np.random.default_rng(5), (0, 0, 0), folder / "shown/3.png")
        return general.prompts_hash(general.prompts(GeneralConfig(samples=str(file))))

    changes: dict[str, Any] = {"a name": {"names": ["red", "pink"]}, "a template": {"templates": ["{}"]}}
    changes["an unused template"] = {"templates": ["a picture of {}.", "{}"]}
    same = found(tmp_path / "one") == found(tmp_path / "two", **changes.get(change, {}))
    assert same == (change in ("an unused template", "the folder"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pictures": "shown"}, "expected the lines 'pictures: FOLDER' and 'classes: ..'"),
        (
            {"pictures": "shown", "classes": {"templates": ["{}"], "names": ["a", "b"]}, "root": "x"},
            "expected the lines",
        ),
        ({"pictures": 3, "classes": {"templates": ["{}"]}}, "pictures is 3; expected a folder"),
        ({"pictures": "shown", "classes": {"templates": ["{}"]}}, "names is missing; only folders of pictures"),
        ({"pictures": "shown", "classes": {"templates": ["a"], "names": ["a", "b"]}}, "each with one {} for the"),
        ({"pictures": "shown", "classes": ["a"]}, "expected templates and names"),
        (
            {"pictures": "gone", "classes": {"templates": ["{}"], "names": ["a", "b"]}},
            "pictures: .*gone is not there; name a folder",
        ),
        (
            {"pictures": "a" * 5000, "classes": {"templates": ["{}"], "names": ["a", "b"]}},
            "pictures: .* is not there; name a folder",
        ),
        (
            {"pictures": "shown", "classes": {"templates": ["{}"], "names": ["a", "b"], 1: "a", "x": "b"}},
            "unknown key 1; known keys: templates, names",
        ),
        *(
            ({"pictures": "shown", "classes": {"templates": ["{}"], "names": names}}, "names is .* all texts")
            for names in ([["a"], "b"], [{"a": "b"}, "c"], [1, 2], [], "a, b", {"a": ["b"]}, {1: "a", 2: "b"})
        ),
        *(
            ({"pictures": "shown", "classes": {"templates": ["{}"], "names": names}}, "which are one to a CLIP")
            for names in (["a", "A "], ["a red", "a  red"], {"n1": "a", "n2": "a"}, ["a\tred", "A red"])
        ),
        ({"pictures": "shown", "classes": {"templates": ["{}"], "names": ["a"]}}, "one class alone"),
        ({"pictures": "shown", "classes": "gone.yaml"}, "general.yaml: classes: gone.yaml: cannot be read"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named(entry: Any, message: str, tmp_path: Path) -> None:
    file = write_reference(tmp_path, "pictures")
    file.write_text(yaml.safe_dump(entry))
    with pytest.raises(KeepLoRAError, match=message):
        general.prompts(GeneralConfig(samples=str(file)), Preflight())


def test_a_picture_that_a_test_shows_is_refused(in_classes: Settings, data: Path, tmp_path: Path) -> None:
    """Whatever is asked about it: a CLIP is shown nothing else."""
    file = write_reference(tmp_path, "pictures")
    asked = in_classes(samples=str(file))
    with Run.open(asked):
        pass
    shutil.copy(data / "all/test/red/0.png", tmp_path / "shown/7.png")
    with (
        pytest.raises(
            ConfigError, match="'7.png' is a picture of all, which measures what is kept; take pictures that"
        ),
        Run.open(asked),
    ):
        pass


def test_a_folder_in_the_place_of_a_file_is_named(in_classes: Settings, reference: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file of prompts, for a CLIP a YAML of pictures"):
        run_stream(in_classes(samples=str(reference.parent / "pictures")))


def test_samples_of_the_other_kind_are_refused(in_classes: Settings, in_words: Settings, reference: Path) -> None:
    with pytest.raises(ConfigError, match="ask for words, and the base model is a CLIP: name a YAML"):
        run_stream(in_classes(samples="builtin"))
    with pytest.raises(ConfigError, match="pictures with classes, and the base model answers in words: name a file"):
        run_stream(in_words(samples=str(reference)))
