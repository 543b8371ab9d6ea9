"""General samples: the base's own replies, protected inputs, distillation, the guard."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_keeplora.config import ConfigError, GeneralConfig, RunConfig
from mllm_keeplora.continual import general
from mllm_keeplora.continual.general import Batches, Distillation, held_out_divergence
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.trainer import StageTrainer
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling import loss
from mllm_keeplora.modeling.adapters import STAGE, active_adapters, adapters_off, attach_accumulated, detach
from mllm_keeplora.modeling.loss import as_teacher, divergence, reply_logits, teacher_divergence
from mllm_keeplora.probes.hooks import hooked
from mllm_keeplora.runs.files import ArtifactError, load_tensors
from tests.modules.test_methods import config, open_stage, stage_adapter
from tests.modules.test_methods import stream_file as stream_file  # a fixture

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


Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_llava: Path, stream_file: Path, tmp_path: Path, prompts: Path) -> Settings:
    def make(method: str = "keeplora", **given: Any) -> RunConfig:
        made = GeneralConfig(**{"samples": str(prompts), "max_new_tokens": 4, **given})
        return replace(config(tiny_llava, stream_file, tmp_path, method), general=made)

    return make


def test_a_run_keeps_its_promises(settings: Settings) -> None:
    """Inputs protected, distilled, guarded; what is continued is checked against the same settings."""
    asked = settings(eps_g=0.9, share=0.25, budget=1e-4)
    run_stream(asked)
    with Run.open(asked) as run:
        first, second = run.history.manifests[1:]
        replies = json.loads(run.directory.general_replies.read_text())
        energy = json.loads(run.directory.general_energy.read_text())
    assert len(replies) == 12 and all(entry["reply"] != "never read" for entry in replies)
    for name, fact in energy.items():
        assert fact["held"] >= 0.9 - 1e-6 or fact["saturated"], name
    for manifest in (first, second):
        assert all(row["leakage"] < 1e-6 for row in manifest["modules"])
        assert sum(row["k_g"] for row in manifest["modules"]) == sum(fact["k_g"] for fact in energy.values()) > 0
        guard = manifest["guard"]
        assert guard["after"] <= guard["before"] + 1e-4 + 1e-9
    with pytest.raises(ArtifactError, match="general.eps_g: 0.9 there, 0.8 now"):
        run_stream(settings(eps_g=0.8, share=0.25, budget=1e-4))


@pytest.mark.parametrize("method", ["keeplora", "inflora", "gpm"])
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


@pytest.fixture
def taught(settings: Settings) -> tuple[StageContext, Any]:
    """A stage with a random update on it, and its model."""
    stage, _ = open_stage(settings(eps_g=None, share=0.5))
    model = stage_adapter(stage.run.model)
    yield stage, model
    detach(model)


def test_the_teacher_is_the_base_and_nothing_else_changes(taught: tuple[StageContext, Any]) -> None:
    stage, model = taught
    batch = stage.run.to_device(
        ChatCollator(stage.run.processor)([lesson.sample for lesson in stage.run.general.learnt[:2]])
    )
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
    joined, loss_of = distillation(batch, 0)
    outputs = model(**joined)
    assert float(outputs.loss.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-4)  # the task's
    found = loss_of(outputs.logits)
    total, tokens = 0.0, 0
    for number in Distillation(stage, stage.run.general.learnt)._drawn(0):
        alone = run.to_device(ChatCollator(run.processor)([run.general.learnt[number].sample]))
        logits = reply_logits(model, alone).log_softmax(-1)
        with torch.no_grad(), adapters_off(model):
            base = reply_logits(model, alone).log_softmax(-1)
        labels = alone["labels"][:, 1:]
        said = labels[labels != -100]
        if distil == "kl":
            total += float((base.exp() * (base - logits)).detach().sum())
        else:
            total -= float(logits[torch.arange(len(said)), said].detach().sum())
        tokens += len(said)
    assert float(found.detach()) == pytest.approx(total / tokens, rel=1e-4)
    found.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B.stage" in n and "language" in n)


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
    assert again._drawn(4) == order[4 * 2 : 4 * 2 + 2]


def _steps(stage: StageContext, model: Any, step: int) -> list[int]:
    return Distillation(stage, stage.run.general.learnt)._drawn(step)


@pytest.mark.parametrize("distil", ["kl", "replies"])
def test_past_tasks_are_rehearsed_by_the_models_own_replies(distil: str, settings: Settings) -> None:
    """Questions alone are asked, of the model as it was before the stage; what it said is a phase of the stage."""
    asked = settings(samples="none", rehearsed=3, share=0.5, distil=distil)
    run_stream(asked)
    with Run.open(asked) as run:
        past = run.accumulated(1)
        stage, model = run.stage_context(2, past), attach_accumulated(run.context.model, past)
        prompts = general.past_prompts(stage)
        first, second = (run.directory.stage(n, task.name) for n, task in enumerate(run.stream.tasks, start=1))
        facts = json.loads(second.facts("recall").read_text())
        found = general.recall(stage, model)
        detach(model)
    assert not first.facts("recall").exists() and first.manifest.exists()
    assert len(prompts) == len(facts["replies"]) == 3 and {p.messages[-1].role for p in prompts} == {"user"}
    assert found.facts == facts
    assert second.tensors("recall").exists() == (distil == "kl")
    if distil == "kl":
        written = load_tensors(second.tensors("recall"))
        assert all(torch.equal(tensor, written[name]) for name, tensor in found.tensors.items())


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


def test_a_guard_needs_an_update(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="trains one adapter on throughout"):
        run_stream(settings("lora_throughout", budget=0.1))


def test_the_builtin_prompts_are_read() -> None:
    """Every form of theirs: pictures, two pictures, earlier turns, text alone."""
    found = general.prompts(GeneralConfig(samples="builtin"), Preflight())
    assert len(found) == 256 and all(sample.messages[-1].role == "user" for sample in found)
    assert {len(sample.media) for sample in found} == {0, 1, 2}
    assert any(len(sample.messages) > 2 for sample in found)


def test_prompts_that_a_test_asks_are_refused(settings: Settings, stream_file: Path, tmp_path: Path) -> None:
    """The same words about another picture are another question; so are other words about the same."""
    asked = json.loads((stream_file.parent / "first_test.json").read_text())[0]
    prompts = [{**asked, "question_id": n, "text": f"is this {word} ?"} for n, word in enumerate(WORDS)]
    prompts.append({**asked, "question_id": 4, "image": "second1.png"})
    for watched in (False, True):
        records = [*prompts, {**asked, "question_id": 5, "text": "What  is this ?"}] if watched else prompts
        path = stream_file.parent / f"prompts-{watched}.json"
        path.write_text(json.dumps(records))
        made = settings()
        made = replace(made, general=replace(made.general, samples=str(path)))
        if watched:
            with pytest.raises(ConfigError, match="prompt '5'.* is a question of first"), Run.open(made):
                pass
        else:
            with Run.open(made):
                pass


def test_a_base_without_replies_is_refused(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "greedy_replies", lambda model, processor, asked, length: [""] * len(asked))
    with pytest.raises(ConfigError, match="answers 12 of 12 prompts with nothing"):
        run_stream(replace(settings(), cache_dir=str(tmp_path / "cache")))  # of the base's replies, a new one
