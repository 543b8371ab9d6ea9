"""Methods: each one's property beside a reference, and all of them through two stages on NF4, both towers."""

import importlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from peft import PeftModel
from PIL import Image

from mllm_keeplora.config import (
    ConfigError,
    GeneralConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)
from mllm_keeplora.continual import history, learning
from mllm_keeplora.continual import run_stream as continual_stream
from mllm_keeplora.continual.general import past_prompts
from mllm_keeplora.continual.learning import as_factors, learn
from mllm_keeplora.continual.memory import DeviceMemoryError
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.trainer import StageTrainer, train_stage
from mllm_keeplora.data.collator import SampleDataset
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import extend_basis_from_covariance
from mllm_keeplora.linalg.subspace import orthonormality_error
from mllm_keeplora.methods import lines
from mllm_keeplora.methods.base import load_method, method_names
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.methods.ewc import fisher_diagonal, weighted_distance
from mllm_keeplora.methods.gpm import project_factors
from mllm_keeplora.methods.hooks import Hooks, Step
from mllm_keeplora.methods.inflora import risen
from mllm_keeplora.methods.layerwise import block_of, squared_norms
from mllm_keeplora.methods.lines import GAMMAS, Lines, best_gamma
from mllm_keeplora.methods.loda import AlignedGradients, answer_halves, energy_ratio_rows, energy_rows, recalibration
from mllm_keeplora.methods.lora_throughout import LoraThroughout
from mllm_keeplora.methods.olora import overlap
from mllm_keeplora.modeling.adapters import (
    ACCUMULATED,
    STAGE,
    Factors,
    activate,
    attach,
    attach_accumulated,
    detach,
    factor_parameters,
    read_factors,
)
from mllm_keeplora.modeling.loss import IGNORED_LABEL, reply_logits
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import GradientError, module_generator
from mllm_keeplora.runs.files import ArtifactError, load_tensors
from mllm_keeplora.runs.record import StageRecord
from tests.conversations import shown_by
from tests.modules.conftest import WORDS, all_targets, batch, read_adapter

RANK = 2
TASKS = ("first", "second")
COVERED = {
    "ewc",
    "gpm",
    "gradient_lora",
    "inflora",
    "joint",
    "joint_gradient_lora",
    "keeplora",
    "layerwise",
    "lines",
    "loda",
    "lora",
    "lora_throughout",
    "olora",
    "replay",
    "zero_shot",
}


@pytest.fixture(scope="module")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of six noise images each; answers differ between them."""
    root = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    tasks = []
    for task, answers in zip(TASKS, (("red", "blue"), ("yes", "no")), strict=True):
        records = []
        for number in range(6):
            name = f"{task}{number}.png"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / name)
            turns = [
                {"from": "human", "value": "<image>\nwhat is this ?"},
                {"from": "gpt", "value": answers[number % 2]},
            ]
            records.append({"id": number, "image": name, "conversations": turns})
        (root / f"{task}.json").write_text(json.dumps(records))
        asked = {"question_id": 0, "image": f"{task}0.png", "text": "what is this ?", "answer": answers[0]}
        (root / f"{task}_test.json").write_text(json.dumps([asked]))
        entry = {"train": f"{task}.json", "test": f"{task}_test.json", "metric": "exact", "max_new_tokens": 2}
        tasks.append({"name": task, **entry})
    path = root / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "data_root": str(root), "tasks": tasks}))
    return path


def config(tiny_llava: Path, stream_file: Path, directory: Path, method: str, **options: Any) -> RunConfig:
    tower = TowerConfig(rank=RANK)
    return RunConfig(
        run_dir=str(directory / "run"),
        stream=str(stream_file),
        method=method,
        method_options=options,
        alpha=2.0,
        model=ModelConfig(base_model=str(tiny_llava), device="cpu"),
        language=tower,
        vision=tower,
        probe=ProbeConfig(fraction=1.0, columns_per_rank=8, batch_size=3),
        train=TrainConfig(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2),
        cache_dir=str(directory.parent / "cache"),
        report_to=[],
    )


def open_stage(settings: RunConfig, number: int = 1, accumulated: Factors | None = None) -> tuple[StageContext, Any]:
    """A stage as a run opens it, and the run; the run is let go of again, so that others may open it."""
    with Run.open(settings) as run:
        return run.stage_context(number, accumulated or {}), run


def stage_adapter(model: Any, rank: int = RANK) -> PeftModel:
    """A random stage adapter on every layer, both factors trainable."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        t.name: (
            torch.randn(rank, t.in_features, generator=generator),
            torch.randn(t.out_features, rank, generator=generator) / 100,
        )
        for t in all_targets(model)
    }
    adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    activate(adapted, [STAGE], STAGE, "both")
    return adapted


# Finding a method


def test_every_method_is_covered_here() -> None:
    assert set(method_names()) == COVERED


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("keeplor", {}, "did you mean 'keeplora'"),
        ("replay", {"shar": 0.1}, "did you mean 'share'"),
        ("lora", {"share": 0.1}, "takes no options"),
        ("replay", {"share": 0.0}, r"method_options.share: expected a number in \(0, 1\], found 0.0"),
        ("replay", {"share": "much"}, "method_options.share: expected a number .*, found 'much'"),
        ("ewc", {"strength": -1.0}, r"method_options.strength: expected a number in \[0, .*found -1.0"),
        ("olora", {"strength": -1.0}, r"method_options.strength: expected a number in \[0, .*found -1.0"),
        ("inflora", {"final_eps_f": 0.0}, r"method_options.final_eps_f: expected a number in \(0, 1\], found 0.0"),
        ("inflora", {"energy_of": "weights"}, "covariance or inputs"),
        ("layerwise", {"blocks": 0}, r"method_options.blocks: expected a whole number in \[1, .*found 0"),
        ("layerwise", {"stability": -1.0}, r"method_options.stability: expected a number in \[0, .*found -1.0"),
        ("lines", {"held_out": 1.0}, r"method_options.held_out: expected a number in \[0, 1\), found 1.0"),
        ("loda", {"rho": -1.0}, r"method_options.rho: expected a number in \[0, .*found -1.0"),
        ("loda", {"ridge": 0.0}, r"method_options.ridge: expected a number in \(0, .*found 0.0"),
        ("keeplora", {"features_from": "weights"}, "gradients or activations"),
    ],
)
def test_an_unknown_method_or_option_is_refused(method: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_method(RunConfig(method=method, method_options=options))


# Whole runs


def assert_equal(found: Factors, expected: Factors) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for n in expected for x, y in zip(expected[n], found[n], strict=True))


@pytest.mark.parametrize("method", sorted(COVERED))
def test_two_stages(
    method: str, tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself refuses a function changed at the start and an update that reaches what is protected."""
    passes, probe_batches = [], StageContext.probe_batches
    monkeypatch.setattr(
        StageContext,
        "probe_batches",
        lambda stage, **sizes: passes.append(stage.number) or probe_batches(stage, **sizes),
    )
    retention = run_stream(config(tiny_llava, stream_file, tmp_path, method))
    assert [set(row["scores"]) for row in retention["rows"]] == [set(TASKS)] * 3
    with Run.open(config(tiny_llava, stream_file, tmp_path, method)) as run:
        first, chosen = run.accumulated(1), run.method
        second = read_adapter(run.directory.adapter)
        assert_equal(run.accumulated(2), second)
        stages = run.history.manifests[1:]
        manifest = stages[1]
    planned = make_plan(config(tiny_llava, stream_file, tmp_path, method), memory_gb=1.0).work
    for number, (work, found) in enumerate(zip(planned, stages, strict=True), start=1):
        assert work.probe_passes == passes.count(number)
        assert (work.samples, work.steps) == (found["counts"]["train_samples"], found["counts"]["steps"])
        looks = work.probe_passes and found["counts"]["steps"]
        assert len(found["probe_indices"]) == (
            work.probe_samples if looks else 0
        )  # what nothing looked at is not named
        assert (found["counts"]["trainable_parameters"] > 0) == (found["counts"]["steps"] > 0)
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (adapter["rank_pattern"], adapter["alpha_pattern"]) == ({}, {})
    assert adapter["lora_alpha"] == adapter["r"] == len(next(iter(second.values()))[0])

    for name, (a, b) in first.items():
        later_a, later_b = second[name]
        if not chosen.learns(2):  # the past is all there is
            assert torch.equal(later_a, a) and torch.equal(later_b, b)
        elif isinstance(chosen, LoraThroughout):  # it was trained on, in place
            assert later_a.shape == a.shape
            assert not torch.equal(later_b, b)
        else:  # it is kept bit for bit beside the new factors
            assert torch.equal(later_a[: len(a)], a) and torch.equal(later_b[:, : b.shape[1]], b)
            assert len(later_a) == len(a) + RANK
    assert any(b.abs().max() > 0 for _, b in second.values()) == (method != "zero_shot")

    assert manifest["counts"]["steps"] == (3 if chosen.learns(2) else 0)
    protected = sum(m["k_w"] + m["k_f"] for m in manifest["modules"])
    assert (protected > 0) == (chosen.protects_weights or chosen.protects_features)


def test_what_a_stage_collects_over_all_modules_keeps_nothing_else_alive(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """A slice of a module's basis would hold all of it, on a 7B model gigabytes over all modules."""
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "keeplora"))
    model = stage.run.model
    kept = [*run.method.initial_a(stage, model).values()]
    kept += run.method.features(stage, model).directions.values()
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(t.nbytes for t in kept) > 0


def test_a_killed_stage_that_remembers_continues(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """What EWC keeps between stages is read back, not measured again or lost."""
    settings = config(tiny_llava, stream_file, tmp_path, "ewc")
    run_stream(settings)
    expected = read_adapter(tmp_path / "run/adapter")
    second = tmp_path / "run/stages/02-second"
    for name in ("manifest.json", "factors.safetensors", "factors.json", "feature_basis.json"):
        (second / name).unlink()
    (tmp_path / "run/retention.json").unlink()
    run_stream(settings)
    found = read_adapter(tmp_path / "run/adapter")
    assert_equal(found, expected)


@pytest.mark.parametrize("method, options", [("loda", {"rho": 0.5}), ("layerwise", {"blocks": 2})])
def test_a_training_by_other_gradients_continues_where_it_was_killed(
    method: str,
    options: dict[str, Any],
    tiny_llava: Path,
    stream_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Halves, lengths and the block whose turn it is belong to a step, whatever came before it."""
    found = []
    for name, kills in (("whole", ()), ("killed", (3, 2))):
        settings = config(tiny_llava, stream_file, tmp_path / name, method, **options)
        settings = replace(settings, train=replace(settings.train, max_steps=4, save_steps=1))
        for steps in kills:
            with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
                patch.setattr(StageTrainer, "training_step", until(StageTrainer.training_step, steps))
                run_stream(settings)
        run_stream(settings)
        found.append(read_adapter(tmp_path / name / "run/adapter"))
    assert_equal(*found)


def until(step: Any, last: int) -> Any:
    """A training step that fails after so many."""
    taken = iter(range(last))

    def training_step(*arguments: Any, **settings: Any) -> Any:
        if next(taken, None) is None:
            raise OSError("power cut")
        return step(*arguments, **settings)

    return training_step


@pytest.mark.parametrize("phase", ["protect", "rehearse", "evaluate"])
def test_a_stage_that_ran_out_of_memory_goes_on_with_what_its_message_names(
    phase: str, tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete stages stay valid, and so do the finished phases of this one."""
    settings, compute = config(tiny_llava, stream_file, tmp_path, "keeplora"), StageRecord.phase

    def fails(record: StageRecord, name: str, *given: Any) -> Any:
        if name == phase and record.directory.path.name == "02-second":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(record, name, *given)

    with monkeypatch.context() as patch, pytest.raises(DeviceMemoryError) as raised:
        patch.setattr(StageRecord, "phase", fails)
        run_stream(settings)
    for name, value in raised.value.smaller.items():
        group, key = name.split(".")
        settings = replace(settings, **{group: replace(getattr(settings, group), **{key: value})})
    monkeypatch.setattr(learning, "train_stage", fails)  # it is not called again
    assert raised.value.smaller and len(run_stream(settings)["rows"]) == 3


def test_stages_of_earlier_versions_go_on_with_other_probe_batches(
    tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their manifests hold what was compared then."""
    settings, found = config(tiny_llava, stream_file, tmp_path, "lora"), history.identity

    def earlier(settings: RunConfig, task: str | None) -> dict[str, Any]:
        values = found(settings, task)
        if task is not None:
            values["probe"]["batch_size"] = settings.probe.batch_size
            values["train"]["activation_checkpointing"] = settings.train.activation_checkpointing
        return values

    with monkeypatch.context() as patch:
        patch.setattr(history, "identity", earlier)
        run_stream(settings)
    smaller = replace(settings, probe=replace(settings.probe, batch_size=1))
    run_stream(smaller)
    with pytest.raises(ArtifactError, match=r"other settings \(probe.fraction: 1.0 there, 0.5 now\)"):
        run_stream(replace(smaller, probe=replace(smaller.probe, fraction=0.5)))


# Input activations


def exact_inputs(model: Any, targets: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """X of every target by a plain hook on a model without adapters, padding included."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(t.name).register_forward_pre_hook(
            lambda _, x, name=t.name: found.update({name: x[0].reshape(-1, x[0].shape[-1])})
        )
        for t in targets
    ]
    with torch.no_grad():
        model(**{k: v for k, v in inputs.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return found


def test_a_sketch_of_inputs_spans_the_inputs(nf4_model: Any) -> None:
    targets, inputs = all_targets(nf4_model), batch(2)
    exact = exact_inputs(nf4_model, targets, inputs)
    columns = {t.name: 64 for t in targets}
    sketches = sketch_inputs(nf4_model, targets, columns, lambda: [inputs], seed=0)
    for t in targets:
        x, y = exact[t.name], sketches[t.name]
        assert y.shape == (64, t.in_features)
        outside = y - y @ torch.linalg.pinv(x) @ x
        assert outside.norm() < 1e-3 * y.norm(), t.name
        # E||Y||^2 = q ||X||^2 / tokens; a draw of 64 columns stays within a third of it.
        energy = float(x.square().sum()) / len(x)
        assert float(y.square().sum()) / 64 == pytest.approx(energy, rel=0.35), t.name


def test_padding_does_not_count(nf4_model: Any) -> None:
    targets, inputs = [t for t in all_targets(nf4_model) if t.tower == "language"], batch(2)
    width = inputs["input_ids"].shape[1]

    def sketch(pad_word: int) -> dict[str, torch.Tensor]:
        padded = dict(inputs)
        for key, value in (("input_ids", pad_word), ("attention_mask", 0), ("labels", IGNORED_LABEL)):
            padded[key] = torch.cat([inputs[key], torch.full((2, 3), value)], dim=1)
        assert padded["input_ids"].shape[1] == width + 3
        columns = {t.name: 16 for t in targets}
        return sketch_inputs(nf4_model, targets, columns, lambda: [padded], seed=0)

    one, other = sketch(WORDS.index("<pad>")), sketch(WORDS.index("red"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_module_without_inputs_is_named(nf4_model: Any) -> None:
    targets = all_targets(nf4_model)
    text = {k: v[:, -7:] for k, v in batch(2).items() if k != "pixel_values"}
    with pytest.raises(GradientError, match="vision_tower.*received no input"):
        sketch_inputs(nf4_model, targets, {t.name: 4 for t in targets}, lambda: [text], seed=0)


# Single methods


def test_olora_penalises_exactly_the_overlap(nf4_model: Any) -> None:
    name = all_targets(nf4_model)[0].name
    model = stage_adapter(nf4_model)
    a = factor_parameters(model, STAGE, name)[0]
    past = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(2))
    expected = sum(float(p @ row) ** 2 for p in past for row in a.detach())
    value = overlap(model, {name: past})
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert a.grad is not None
    gradient = 2 * a.detach() @ past.T @ past
    assert (a.grad - gradient).norm() / gradient.norm() < 1e-5
    orthogonal = torch.linalg.qr(a.detach().T, mode="complete").Q[:, RANK : RANK + 3].T
    assert float(overlap(model, {name: orthogonal}).detach()) < 1e-8 * float(value.detach())


def test_the_penalty_is_added_once_a_step_whatever_the_accumulation(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """With a penalty alone (no loss moves an A while B = 0) accumulated and whole batches give one A."""
    found = []
    for number, (size, accumulation) in enumerate(((4, 1), (2, 2))):
        settings = config(tiny_llava, stream_file, tmp_path / str(number), "lora")
        stage, _ = open_stage(settings)
        targets = stage.targets
        adapted = attach(
            stage.run.model,
            STAGE,
            {t.name: (torch.ones(RANK, t.in_features), torch.zeros(t.out_features, RANK)) for t in targets},
            {t.name: 1.0 for t in targets},
        )
        activate(adapted, [STAGE], STAGE, "A")
        first = factor_parameters(adapted, STAGE, targets[0].name)[0]
        train_stage(
            adapted,
            SampleDataset(stage.samples),
            stage.collator,
            replace(
                settings.train,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                lr_scheduler_type="constant",
                warmup_ratio=0.0,
                max_grad_norm=1e6,
            ),
            seed=0,
            directory=tmp_path / f"train{number}",
            log_dir=tmp_path / f"log{number}",
            mixed=False,
            report_to=[],
            device=torch.device("cpu"),
            hooks=Hooks(penalty=lambda _, first=first: 3.0 * first.sum()),  # type: ignore[misc]
        )
        found.append(first.detach().clone())
        assert torch.allclose(found[-1], 1.0 - 3.0 * settings.train.learning_rate * torch.ones_like(first))
    assert torch.allclose(*found)


def test_gpm_keeps_a_trained_update_out_of_the_protected_space(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """AdamW moves A everywhere; the projection after each step takes it back."""
    settings = config(tiny_llava, stream_file, tmp_path, "gpm")
    run_stream(settings)
    first = tmp_path / "run/stages/01-first"
    directions = load_tensors(first / "feature_basis.safetensors")
    second = load_tensors(tmp_path / "run/stages/02-second/factors.safetensors")
    untouched = load_tensors(tmp_path / "run/stages/02-second/lora_a.safetensors")
    assert sum(m.shape[1] for m in directions.values()) > 0
    for name, m in directions.items():
        update = second[f"{name}.B"] @ second[f"{name}.A"]
        assert (update @ m).norm() <= 1e-6 * update.norm()
        assert not torch.equal(second[f"{name}.A"], untouched[name])


@pytest.fixture
def interference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of that name, which imports its neighbours."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("interference")


def test_interference_is_measured_where_gpm_leaves_none(
    tiny_llava: Path, stream_file: Path, tmp_path: Path, interference: ModuleType
) -> None:
    """What GPM protects holds eps_f of the earlier inputs' energy, so its update hardly answers them."""
    reached = {}
    for method in ("gpm", "lora"):
        settings = config(tiny_llava, stream_file, tmp_path / method, method)
        # As many columns as the noise images have directions.
        settings = replace(settings, probe=replace(settings.probe, columns_per_rank=64))
        run_stream(settings)
        with Run.open(settings) as run:
            interference.check_measurable(run)
            measured = interference.measure(run, 2)
        assert list(measured) == ["first"]
        for tower, shares in measured["first"].items():
            reached[method, tower] = shares.reached
            assert (shares.protected > 0.95) == (method == "gpm")
    for tower in ("vision", "language"):
        assert reached["gpm", tower] < 0.4 * reached["lora", tower]


def test_interference_is_refused_where_stages_add_no_updates(
    tiny_llava: Path, stream_file: Path, tmp_path: Path, interference: ModuleType
) -> None:
    for method in ("lora_throughout", "joint", "zero_shot"):
        settings = config(tiny_llava, stream_file, tmp_path / method, method)
        with Run.open(settings) as run, pytest.raises(ArtifactError, match="3 of 3 stages are missing"):
            interference.check_measurable(run)
        run_stream(settings)
        with Run.open(settings) as run, pytest.raises(ArtifactError, match=f"method {method} add no updates"):
            interference.check_measurable(run)


def test_gpm_projects_exactly_onto_the_complement(nf4_model: Any) -> None:
    t = all_targets(nf4_model)[0]
    model = stage_adapter(nf4_model)
    a = factor_parameters(model, STAGE, t.name)[0]
    before = a.detach().clone()
    m = torch.linalg.qr(torch.randn(t.in_features, 5, generator=torch.Generator().manual_seed(3))).Q
    project_factors(model, {t.name: m})
    assert torch.allclose(a, before - before @ m @ m.T, atol=1e-5)
    assert (a @ m).norm() < 1e-6 * a.norm()


@pytest.mark.parametrize(
    ("method", "options"),
    [("gpm", {}), ("inflora", {"energy_of": "inputs"}), ("keeplora", {"features_from": "activations"})],
)
def test_a_module_without_directions_left_is_skipped(
    method: str, options: dict[str, str], tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """After a task whose inputs fill a layer's whole input side, and beside one that leaves few directions (E9)."""
    settings = config(tiny_llava, stream_file, tmp_path, method, **options)
    tower = replace(settings.language, rank=48, eps_w=0.01, eps_f=1.0)
    run_stream(replace(settings, language=tower, vision=tower))
    rows = json.loads((tmp_path / "run/stages/02-second/manifest.json").read_text())["modules"]
    left = {row["name"]: row["in_features"] - row["k_w"] - row["k_f"] for row in rows}
    assert 0 in left.values() and any(0 < room < 48 for room in left.values()), left
    for row in rows:
        room = min(48, left[row["name"]])
        assert row["rank"] == room if method == "gpm" else row["rank"] <= room  # or the rank of what others learn along
        assert row["leakage"] < 1e-6
    second = load_tensors(tmp_path / "run/stages/02-second/factors.safetensors")
    assert {name.removesuffix(".A") for name in second if name.endswith(".A")} == {
        row["name"] for row in rows if row["rank"]
    }


@pytest.mark.parametrize("method", ["keeplora", "gpm", "inflora", "loda"])
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (1, 2), (3, 1)])
def test_the_smallest_sketches_are_enough(
    rank: int, columns: int, method: str, tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    options = {"energy_of": "inputs"} if method == "inflora" else {}
    settings = config(tiny_llava, stream_file, tmp_path, method, **options)
    tower = replace(settings.language, rank=rank)
    probe = replace(settings.probe, columns_per_rank=columns)
    run_stream(replace(settings, language=tower, vision=tower, probe=probe))
    rows = json.loads((tmp_path / "run/stages/02-second/manifest.json").read_text())["modules"]
    assert all(row["rank"] == rank and row["leakage"] < 1e-6 for row in rows)


def test_inflora_learns_where_the_inputs_are_and_the_past_is_not(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    settings = config(tiny_llava, stream_file, tmp_path, "inflora")
    run_stream(settings)
    first = tmp_path / "run/stages/01-first"
    past = load_tensors(first / "feature_basis.safetensors")
    a = load_tensors(tmp_path / "run/stages/02-second/lora_a.safetensors")
    stage, run = open_stage(settings, 2)
    model = attach_accumulated(stage.run.model, run.accumulated(1))
    inputs = stage.sketch_inputs(model, 0)
    for name, rows in a.items():
        assert (rows @ past[name]).norm() < 1e-6 * max(1.0, float(rows.norm()))
        expected = lora_a_from_gradient(inputs[name], past[name], RANK)
        assert torch.allclose(rows, expected, atol=1e-5)


def published_gpm(covariances: list[np.ndarray], shares: list[float]) -> list[int]:
    """How many directions M has after each task, by the rule that InfLoRA's code states, on covariances [in, in]."""
    m, sizes = np.zeros((len(covariances[0]), 0)), []
    for c, share in zip(covariances, shares, strict=True):
        residual = c - m @ (m.T @ c)
        u, s, _ = np.linalg.svd(residual)
        held, total, added = (c**2).sum() - (residual**2).sum(), (c**2).sum(), 0
        while held / total < share:
            held += s[added] ** 2
            added += 1
        m = np.hstack([m, u[:, :added]])
        sizes.append(m.shape[1])
    return sizes


@pytest.mark.parametrize(("first", "last"), [(0.95, 1.0), (0.98, 1.0), (0.9, 0.9)])
def test_inflora_protects_as_much_as_its_published_rule(first: float, last: float) -> None:
    """Over five tasks, at the shares of the published code: lamb + (lame - lamb) t / T with t from 0."""
    rng, tasks = np.random.default_rng(0), 5
    inputs = [rng.normal(size=(40, 24)) * np.geomspace(1, 0.02, 24)[rng.permutation(24)] for _ in range(tasks)]
    shares = [risen(first, last, number / tasks) for number in range(tasks)]
    assert shares == pytest.approx([(last - first) * number / tasks + first for number in range(tasks)])
    basis, sizes = torch.zeros(24, 0), []
    for x, share in zip(inputs, shares, strict=True):
        basis, captured, saturated = extend_basis_from_covariance(basis, torch.from_numpy(x).float(), share)
        c = x.T @ x
        inside = (basis.numpy().T @ c) ** 2
        assert captured == pytest.approx(inside.sum() / (c**2).sum(), abs=1e-5) and captured >= share and not saturated
        sizes.append(basis.shape[1])
    assert orthonormality_error(basis) < 1e-5
    assert sizes == published_gpm([x.T @ x / len(x) for x in inputs], shares)
    assert 0 < sizes[0] < sizes[-1] < 24


@pytest.mark.parametrize("energy_of", ["covariance", "inputs"])
def test_inflora_asks_for_more_of_later_tasks(
    energy_of: str, tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """A run whose share rises protects more of the second task, and as much of the first."""
    held = {}
    for last in (1.0, 0.5):
        options = {"final_eps_f": last, "energy_of": energy_of}
        settings = config(tiny_llava, stream_file, tmp_path / str(last), "inflora", **options)
        settings = replace(settings, **{t: replace(settings.towers()[t], eps_f=0.5) for t in ("language", "vision")})
        run_stream(settings)
        with Run.open(settings) as run:
            held[last] = [stage["modules"] for stage in run.history.manifests[1:]]
    captured = {last: [[m["captured"] for m in modules] for modules in found] for last, found in held.items()}
    assert captured[1.0][0] == captured[0.5][0]
    assert all(m["captured"] >= 0.75 - 1e-5 or m["saturated"] for m in held[1.0][1])
    assert any(share < 0.75 for share in captured[0.5][1])


def test_gradient_lora_takes_the_leading_directions_of_the_unprojected_gradient(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """In the second stage as well, where KeepLoRA projects; and B alone trains."""
    settings = config(tiny_llava, stream_file, tmp_path, "gradient_lora")
    run_stream(settings)
    second = tmp_path / "run/stages/02-second"
    start, learnt = load_tensors(second / "lora_a.safetensors"), load_tensors(second / "factors.safetensors")
    stage, run = open_stage(settings, 2)
    gradients = stage.sketch(attach_accumulated(stage.run.model, run.accumulated(1)), 0)
    for name, rows in start.items():
        leading = torch.linalg.svd(gradients[name].double()).Vh[:RANK]
        assert torch.allclose(torch.linalg.svdvals(rows.double() @ leading.T), torch.ones(RANK).double(), atol=1e-5)
        assert torch.equal(learnt[f"{name}.A"], rows)
    assert any(b.abs().max() > 0 for name, b in learnt.items() if name.endswith(".B"))


@pytest.mark.parametrize("method", ["lora_throughout", "ewc"])
@pytest.mark.parametrize("left_out", ["vision", "language"])
def test_an_adapter_throughout_trains_beside_the_past_of_what_it_does_not_reach(
    method: str, left_out: str, tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training starts from the function that the past has left, also where that changes more modules."""
    settings = config(tiny_llava, stream_file, tmp_path, method)
    tower = replace(getattr(settings, left_out), adapt=False)
    stage, run = open_stage(replace(settings, **{left_out: tower}))
    generator = torch.Generator().manual_seed(0)
    past = {
        t.name: (
            torch.randn(RANK, t.in_features, generator=generator),
            torch.randn(t.out_features, RANK, generator=generator) / 30,
        )
        for t in all_targets(stage.run.model)
    }
    stage, model = replace(stage, accumulated=past), attach_accumulated(stage.run.model, past)
    inputs = stage.run.to_device(stage.collator(stage.samples[:2]))

    def begins(adapted: PeftModel, *_: Any, **__: Any) -> dict[str, Any]:
        with torch.no_grad():
            found.append(reply_logits(adapted.eval(), inputs))
        trained.extend(name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
        return {"steps": 0, "repeated_samples": 0, "loss": []}

    with torch.no_grad():
        expected = reply_logits(model.eval(), inputs)
    found: list[torch.Tensor] = []
    trained: list[str] = []
    monkeypatch.setattr(learning, "train_stage", begins)
    learnt = as_factors(learn(stage, run.method, model, run.method.initial_a(stage, model), []).tensors)
    assert (found[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(trained) == 2 * len(stage.targets) < 2 * len(past)
    folded = run.method.fold(past, learnt, stage.folded_scales)
    model = attach_accumulated(stage.run.model, folded)
    with torch.no_grad():
        assert (reply_logits(model.eval(), inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
    detach(model)


def test_joint_training_along_the_gradient_is_both(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """A from all tasks' gradient, B alone trained, in the first stage alone, with the steps of all."""
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "joint_gradient_lora"))
    assert {shown_by(s) for s in stage.samples} == {shown_by(s) for task in TASKS for s in stage.run.task_samples(task)}
    assert (stage.train.max_steps, run.method.trains) == (2 * 3, "B")
    assert [run.method.learns(n) for n in (1, 2)] == [True, False]
    gradients = stage.sketch(stage.run.model, 0)
    for name, rows in run.method.initial_a(stage, stage.run.model).items():
        leading = torch.linalg.svd(gradients[name].double()).Vh[:RANK]
        assert torch.allclose(torch.linalg.svdvals(rows.double() @ leading.T), torch.ones(RANK).double(), atol=1e-5)


def moments(*sketches: torch.Tensor) -> torch.Tensor:
    """sum_i Y_i^T Y_i / q_i, fp64."""
    return sum(y.double().T @ y.double() / len(y) for y in sketches)  # type: ignore[return-value]


def test_loda_isolates_by_the_generalised_eigenproblem() -> None:
    generator = torch.Generator().manual_seed(0)
    new, *old = (torch.randn(12, 10, generator=generator) for _ in range(3))
    for sketch in old:
        sketch[:, :6] *= 30.0  # the first six directions belong to the past
    rows = energy_ratio_rows(new, old, 0.01, 3)
    assert orthonormality_error(rows.T) < 1e-6
    bottom = moments(*old) + 0.01 * moments(new).trace() / 10 * torch.eye(10)
    _, vectors = scipy.linalg.eigh(moments(new).numpy(), bottom.numpy())
    leading = torch.from_numpy(np.linalg.qr(vectors[:, -3:])[0])
    cosines = torch.linalg.svdvals(rows.double() @ leading)
    assert torch.allclose(cosines, torch.ones(3, dtype=torch.double), atol=1e-6)
    assert rows[:, :6].norm() < 0.2 * rows.norm()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-7, 1.0])
def test_loda_isolates_whatever_is_left_of_the_new_inputs(size: float) -> None:
    """Beside a past whose sketch has fewer rows than the layer has inputs; of nothing there are no directions."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(8, 64, generator=generator) for _ in range(2))
    rows = energy_ratio_rows(size * new, [100 * old], 0.01, 3)
    assert len(rows) == (3 if size else 0) and torch.isfinite(rows).all()
    assert orthonormality_error(rows.T) < 1e-6 if size else rows.shape == (0, 64)


def test_loda_shares_what_has_energy_in_old_and_new_inputs() -> None:
    """The leading eigenvectors of the sum of both; of its directions each task has more energy there than elsewhere."""
    generator = torch.Generator().manual_seed(0)
    sketches = [torch.randn(20, 10, generator=generator) for _ in range(3)]
    for number, sketch in enumerate(sketches):
        sketch[:, :2] *= 5.0  # what all tasks have
        sketch[:, 2 + number] *= 3.0  # what one has
    rows = energy_rows(sketches, 2)
    _, vectors = torch.linalg.eigh(moments(*sketches))
    assert torch.allclose(torch.linalg.svdvals(rows.double() @ vectors[:, -2:]), torch.ones(2).double(), atol=1e-6)
    for sketch in sketches:
        inside = (rows.double() @ moments(sketch) @ rows.double().T).trace()
        assert inside / 2 > 3 * (moments(sketch).trace() - inside) / 8  # a direction, beside the mean of the others


def test_loda_without_a_past_takes_the_leading_inputs() -> None:
    new = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    rows, expected = energy_rows([new], 3), torch.linalg.svd(new).Vh[:3]
    assert torch.allclose(torch.linalg.svdvals(rows @ expected.T), torch.ones(3), atol=1e-5)


def test_loda_recalibrates_by_least_squares() -> None:
    """Beside numpy's solver on the features themselves: old ones to stay, new ones to change in full."""
    generator = torch.Generator().manual_seed(0)
    new, *old = (torch.randn(size, 10, generator=generator) for size in (30, 20, 25))
    rows, b = torch.randn(4, 10, generator=generator), torch.randn(7, 4, generator=generator)
    found = recalibration(rows, new, old, 3.0)
    for i in range(4):
        parts = [(y @ rows[i] / len(y) ** 0.5)[:, None] * b[:, i] for y in (new, *old)]
        changed, *disturbed = (part.flatten().numpy() for part in parts)
        left = np.concatenate([3.0**0.5 * changed, *disturbed])
        right = np.concatenate([3.0**0.5 * changed, *(np.zeros_like(part) for part in disturbed)])
        [expected] = np.linalg.lstsq(left[:, None], right, rcond=None)[0]
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(recalibration(rows, new, [], 3.0), torch.ones(4))
    assert torch.equal(recalibration(rows, torch.zeros(3, 10), [torch.zeros(3, 10)], 3.0), torch.ones(4))
    assert torch.allclose(recalibration(rows, torch.zeros(3, 10), old, 3.0), torch.zeros(4))


def test_loda_recalibrates_the_shared_half_alone(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """A of the second stage as its parts say; of the trained B the isolated columns stay as they are."""
    settings = config(tiny_llava, stream_file, tmp_path, "loda", rho=0.0)
    run_stream(settings)
    start = load_tensors(tmp_path / "run/stages/02-second/lora_a.safetensors")
    [old] = [load_tensors(tmp_path / "run/stages/01-first/rehearsal.safetensors")]
    stage, run = open_stage(settings, 2, None)
    stage = replace(stage, earlier=[run.history.stage(1)])
    past = attach_accumulated(stage.run.model, run.accumulated(1))
    new = stage.sketch_inputs(past, 0)
    for name, rows in start.items():
        assert torch.allclose(rows.norm(dim=1), torch.tensor([0.5, 1.0]), atol=1e-5)
        for row, expected in zip(
            rows,
            (energy_rows([new[name], old[name]], 1), energy_ratio_rows(new[name], [old[name]], 0.01, 1)),
            strict=True,
        ):
            assert abs(float(row @ expected[0])) == pytest.approx(float(row.norm()), rel=1e-3), name
    past.unload()
    model = stage_adapter(stage.run.model)
    trained = read_factors(model, STAGE, [t.name for t in stage.targets])
    found, inputs = run.method.finish(stage, model, trained).factors, stage.sketch_inputs(model, 1)
    for name, (a, b) in found.items():
        assert torch.equal(a, trained[name][0]) and torch.equal(b[:, 1], trained[name][1][:, 1])
        kept = recalibration(a[:1], inputs[name], [old[name]], 3.0)
        assert torch.equal(b[:, :1], trained[name][1][:, :1] * kept) and 0 < float(kept) < 1
    model.unload()


def test_halves_of_a_batch_have_no_answer_in_common() -> None:
    nothing = IGNORED_LABEL
    labels = torch.tensor(
        [[nothing, 1, 2], [1, 2, nothing], [3, nothing, 4], [nothing, 5, 5], [nothing] * 3, [6, 6, 6]]
    )
    seen = set()
    for seed in range(20):
        halves = answer_halves(labels, torch.Generator().manual_seed(seed))
        assert halves is not None
        first, second = halves
        assert first[0] == first[1] and not (first & second).any()
        assert (first | second).tolist() == [True, True, True, True, False, True]
        assert len({tuple(row) for row, of in zip(labels.tolist(), first.tolist(), strict=True) if of}) in (2, 3)
        seen.add(tuple(first.tolist()))
    assert len(seen) > 3
    assert answer_halves(labels[:2], torch.Generator()) is None
    assert answer_halves(labels[4:], torch.Generator()) is None


def test_layerwise_blocks_learn_one_after_another(
    tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block waits at its start, moves in every step of its turn, and stays as it is from then on."""
    settings = config(tiny_llava, stream_file, tmp_path, "layerwise")
    train = replace(settings.train, max_steps=4, gradient_accumulation_steps=2, warmup_ratio=0.0)
    stage, run = open_stage(replace(settings, train=train))
    start = run.method.initial_a(stage, stage.run.model)
    states: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    hooks_of = type(run.method).hooks

    def watched(method: Any, stage: StageContext, model: PeftModel) -> Hooks:
        def keep() -> None:
            pairs = ((t.name, factor_parameters(model, STAGE, t.name)) for t in stage.targets)
            states.append({name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in pairs})

        return hooks_of(method, stage, model)._replace(after_step=keep)

    monkeypatch.setattr(type(run.method), "hooks", watched)
    learnt = as_factors(learn(stage, run.method, stage.run.model, start, []).tensors)
    first = {t.name: (start[t.name], torch.zeros(t.out_features, RANK)) for t in stage.targets}
    assert {(t.tower, block_of(t, 2)) for t in stage.targets} == {
        (w, k) for w in ("vision", "language") for k in (0, 1)
    }
    for t in stage.targets:
        path = [first[t.name], *(state[t.name] for state in states)]
        moved = [not torch.equal(before[1], after[1]) for before, after in pairwise(path)]
        assert moved == ([True, True, False, False] if block_of(t, 2) == 0 else [False, False, True, True]), t.name
        still = [torch.equal(before[0], after[0]) for before, after in pairwise(path)]
        assert all(stays for stays, moves in zip(still, moved, strict=True) if not moves)
        assert all(torch.equal(x, y) for x, y in zip(learnt[t.name], path[-1], strict=True))


def test_layerwise_with_one_block_and_no_penalty_is_sequential_lora(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    for name, method, options in (("lora", "lora", {}), ("one", "layerwise", {"blocks": 1, "stability": 0.0})):
        run_stream(config(tiny_llava, stream_file, tmp_path / name, method, **options))
    assert_equal(*(read_adapter(tmp_path / name / "run/adapter") for name in ("one", "lora")))


def test_layerwise_bounds_how_an_update_answers_inputs_that_are_near() -> None:
    """The penalty is the mean squared answer to unit noise in the inputs, which autograd lowers."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator).requires_grad_()
    value = squared_norms({"one": (2.0, a, b), "other": (0.5, a, b)})
    assert torch.allclose(value, (2.0**2 + 0.5**2) * (b @ a).square().sum(), rtol=1e-5)
    noise = torch.randn(200_000, 7, generator=generator)
    answered = (noise @ (2.0 * b @ a).detach().T).square().sum(dim=1).mean()
    assert torch.allclose(squared_norms({"one": (2.0, a, b)}), answered, rtol=0.02)
    value.backward()
    assert torch.allclose(b.grad, 2 * (2.0**2 + 0.5**2) * b.detach() @ a @ a.T, rtol=1e-4)


@pytest.mark.parametrize(
    "blocks, steps, message",
    [
        (3, 9, r"method_options.blocks: expected at most 2, the layers of the \w+ tower, found 3"),
        (2, 1, r"method_options.blocks: 2 blocks need as many steps, the stage has 1"),
    ],
)
def test_layerwise_refuses_blocks_that_could_not_learn(
    blocks: int, steps: int, message: str, tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    settings = config(tiny_llava, stream_file, tmp_path, "layerwise", blocks=blocks)
    with pytest.raises(ConfigError, match=message):
        run_stream(replace(settings, train=replace(settings.train, max_steps=steps)))


@pytest.mark.parametrize("rho", [1e-12, 0.3])
def test_aligned_gradients_look_along_the_other_half(rho: float) -> None:
    """On a quadratic per answer, where the gradient at B - e is known: H (B - e - C). B is where it was."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 2, generator=generator).requires_grad_()
    a = torch.randn(2, 6, generator=generator)
    hessians = [torch.diag(torch.rand(5, generator=generator) + 0.5) for _ in range(2)]
    centres = [torch.randn(5, 2, generator=generator) for _ in range(2)]
    labels, passes = torch.tensor([[7], [8]]), []

    def backward(batch: Any, alone: bool) -> torch.Tensor:
        of = [n for n in range(2) if batch["labels"][n, 0] != IGNORED_LABEL]
        loss = sum(0.5 * ((b - centres[n]) * (hessians[n] @ (b - centres[n]))).sum() for n in of)
        loss.backward()  # type: ignore[union-attr]
        passes.append((of, alone))
        return loss.detach()  # type: ignore[union-attr]

    before, earlier = b.detach().clone(), torch.randn(5, 2, generator=generator)
    b.grad = earlier.clone()
    aligned = AlignedGradients([(a, b)], rho, seed=3)
    loss = aligned({"labels": labels}, Step(4, 9), backward)
    assert torch.equal(b, before)
    (first,), (second,) = (of for of, _ in passes[:2])
    assert passes == [([first], True), ([second], True), ([second], True), ([first], False)]

    # The length is drawn before the halves, which differ between processes.
    u = float(torch.rand((), generator=module_generator(3, "answers/4")))
    gradients = [h @ (before - c) for h, c in zip(hessians, centres, strict=True)]
    moves = [rho * u * g / (g @ a).norm() for g in gradients]
    expected = earlier + sum(hessians[n] @ (before - moves[1 - n] - centres[n]) for n in range(2))
    assert torch.allclose(b.grad, expected, atol=1e-5)
    assert u > 0 and float(loss) > 0
    # Where the halves agree, a step along it lowers both: no loss rises to first order.
    agree = AlignedGradients([(a, b)], rho, seed=3)
    centres[1], b.grad = centres[0] + 0.01, None
    agree({"labels": labels}, Step(4, 9), backward)
    assert all(float((b.grad * (h @ (before - c))).sum()) > 0 for h, c in zip(hessians, centres, strict=True))


def test_a_training_by_aligned_gradients_near_zero_is_the_plain_one(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """Through the Trainer, accumulation included: masks of labels, the count of tokens and added losses are right."""
    learnt = {}
    for name, rho in (("plain", 0.0), ("aligned", 1e-9), ("further", 0.5)):
        settings = config(tiny_llava, stream_file, tmp_path / name, "loda", rho=rho)
        train = replace(settings.train, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.5)
        stage, run = open_stage(replace(settings, train=train))
        start = run.method.initial_a(stage, stage.run.model)
        learnt[name] = as_factors(learn(stage, run.method, stage.run.model, start, []).tensors)
    moved = max(float(b.abs().max()) for _, b in learnt["plain"].values())
    assert moved > 0
    for name, (_, b) in learnt["plain"].items():
        assert torch.allclose(learnt["aligned"][name][1], b, atol=1e-3 * moved), name
    assert any(
        not torch.allclose(learnt["further"][n][1], b, atol=1e-2 * moved) for n, (_, b) in learnt["plain"].items()
    )


def test_fisher_is_the_mean_squared_gradient_of_single_samples(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    stage, _ = open_stage(config(tiny_llava, stream_file, tmp_path, "ewc"))
    start = stage_adapter(stage.run.model)
    factors = read_factors(start, STAGE, [t.name for t in stage.targets])
    start.unload()
    model = attach(stage.run.model, ACCUMULATED, factors, dict.fromkeys(factors, 1.0))
    found = fisher_diagonal(stage, model)
    assert not any(p.requires_grad for p in model.parameters())

    activate(model, [ACCUMULATED], ACCUMULATED, "both")
    name = stage.targets[-1].name
    a, b = factor_parameters(model, ACCUMULATED, name)
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for sample in stage.samples:
        loss = model(**stage.collator([sample]), num_items_in_batch=1).loss
        for total, gradient in zip((expected_a, expected_b), torch.autograd.grad(loss, (a, b)), strict=True):
            total += gradient.square() / len(stage.samples)
    assert torch.allclose(found[f"{name}.A"], expected_a, rtol=1e-3, atol=1e-9)
    assert torch.allclose(found[f"{name}.B"], expected_b, rtol=1e-3, atol=1e-9)


def test_ewc_pulls_back_to_the_past_in_proportion_to_its_fisher_information() -> None:
    theta = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    anchor, fisher = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0, 7.0, 0.0])
    value = weighted_distance({"x": theta}, {"x": anchor}, {"x": fisher})
    [gradient] = torch.autograd.grad(value, theta)
    assert float(value.detach()) == 7.0
    assert torch.equal(gradient, torch.tensor([0.0, 14.0, 0.0]))


@pytest.mark.parametrize("past", ["vision", "language", "both", "other modules"])
def test_ewc_looks_at_what_past_tasks_and_this_one_reach(
    past: str, tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two vision towers, say, tasks may reach one each: then nothing pulls back."""
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "ewc", strength=2.0), 2)
    model = stage_adapter(stage.run.model)
    known = {
        f"{t.name}.{factor}": torch.ones_like(p)
        for t in stage.targets
        if past in (t.tower, "both")
        for factor, p in zip("AB", factor_parameters(model, STAGE, t.name), strict=True)
    }
    fisher = {**known, "of.another.tower.A": torch.ones(RANK, 4)}
    monkeypatch.setattr(StageContext, "rehearsals", lambda _: [fisher])
    penalty = run.method.hooks(stage, model).penalty
    if past == "other modules":
        assert penalty is None
        return
    assert float(penalty(0).detach()) == 0.0
    with torch.no_grad():
        for t in stage.targets:
            for parameter in factor_parameters(model, STAGE, t.name):
                parameter.add_(0.5)
    assert float(penalty(0).detach()) == pytest.approx(0.25 * sum(f.numel() for f in known.values()), rel=1e-5)


def test_ewc_adds_up_the_information_of_past_tasks(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    run_stream(config(tiny_llava, stream_file, tmp_path, "ewc"))
    first, second = (
        load_tensors(tmp_path / "run/stages" / d / "rehearsal.safetensors") for d in ("01-first", "02-second")
    )
    assert first.keys() == second.keys()
    assert all((second[name] >= first[name]).all() for name in first)
    assert any((second[name] > first[name]).any() for name in first)


def test_a_continuing_method_starts_where_the_past_ended(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """The scale that folding put into B is taken out again: start * scale is the past."""
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "lora_throughout"), 2)
    model = stage_adapter(stage.run.model)
    stage = replace(stage, accumulated=read_factors(model, STAGE, [t.name for t in stage.targets]))
    model.unload()
    start, replaces_past = run.method.start(stage, run.method.initial_a(stage, stage.run.model))
    assert replaces_past
    for name, (a, b) in stage.accumulated.items():
        assert torch.equal(start[name][0], a)
        assert torch.allclose(start[name][1] * stage.scales[name], b)


def test_lines_scales_what_was_learnt_not_how(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """The same seed trains the same factors as sequential LoRA; folding scales them by depth."""
    learnt = {}
    for method, options in (("lora", {}), ("lines", {"held_out": 0.0})):
        stage, run = open_stage(config(tiny_llava, stream_file, tmp_path / method, method, **options))
        start = run.method.initial_a(stage, stage.run.model)
        learnt[method] = as_factors(learn(stage, run.method, stage.run.model, start, []).tensors)
    assert all(torch.equal(learnt["lora"][n][1], learnt["lines"][n][1]) for n in learnt["lora"])
    assert isinstance(run.method, Lines)
    for t in stage.targets:
        deepest, gamma = t.depth == t.num_layers - 1, 0.2
        share = stage.folded_scales[t.name] / stage.scales[t.name]
        assert share == pytest.approx(1.0 if deepest else gamma if t.depth == 0 else share)
        assert gamma <= share <= 1.0


def published_choice(found: dict[float, list[float]], fine_tuned: float, zero_shot: list[float]) -> float:
    """The coefficient that LiNeS's code takes: the first of the best, its weight of the target being 2."""
    best, chosen = 0.0, 1.0
    for coefficient, (target, *controls) in found.items():
        normalised = np.mean([c / z for c, z in zip(controls, zero_shot, strict=True)])
        if 2.0 * target / fine_tuned + normalised > best:
            best, chosen = 2.0 * target / fine_tuned + normalised, coefficient
    return chosen


def test_lines_chooses_as_its_published_code() -> None:
    rng, chosen = np.random.default_rng(0), set()
    for _ in range(50):
        full, zero_shot = rng.uniform(0.2, 1.0), [float(z) for z in rng.uniform(0.2, 1.0, 3)]
        found = {g: [full * rng.uniform(0.7, 1), *(z * rng.uniform(0.5, 1) for z in zero_shot)] for g in GAMMAS}
        found[1.0][0] = full
        assert (gamma := best_gamma(found, [0.1, *zero_shot])) == published_choice(found, full, zero_shot)
        chosen.add(gamma)
    assert len(chosen) > 5
    equal = {g: [0.5, 0.5] for g in GAMMAS}
    assert best_gamma(equal, [0.1, 0.5]) == 1.0
    assert best_gamma({g: [g, 0.0] for g in reversed(GAMMAS)}, [0.1, 0.0]) == 1.0  # nothing was there to be kept


def test_lines_searches_on_records_that_no_stage_trains_on(
    tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks' held-out records decide, and the factors are folded as the chosen gamma has them."""
    settings = config(tiny_llava, stream_file, tmp_path, "lines", held_out=0.3)
    seen: list[set[str]] = []
    accuracy = lines.token_accuracy
    monkeypatch.setattr(
        lines,
        "token_accuracy",
        lambda stage, model, samples: seen.append({shown_by(s) for s in samples}) or accuracy(stage, model, samples),
    )
    monkeypatch.setattr(lines, "best_gamma", lambda found, before: sorted(found)[3])
    run_stream(settings)
    with Run.open(settings) as run:
        manifests = run.history.manifests[1:]
        contexts = [run.stage_context(number, {}) for number in (1, 2)]
        own = [{shown_by(s) for s in run.context.task_samples(task)} for task in TASKS]
    held = [whole - {shown_by(s) for s in context.samples} for whole, context in zip(own, contexts, strict=True)]
    assert [len(found) for found in held] == [2, 2]
    assert seen == [held[0]] * 12 + [held[1], held[0]] * 12
    for manifest, controls in zip(manifests, (0, 1), strict=True):
        assert manifest["finish"]["gamma"] == 0.3
        assert len(manifest["finish"]["accuracies"]) == 11
        assert all(len(row) == 1 + controls for row in manifest["finish"]["accuracies"])
        assert all(m["lambda"] == 1.0 for m in manifest["modules"])


def test_lines_folds_what_it_measured(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """The accuracies of a gamma are those of the model with B scaled by it; at 1 it is what was trained."""
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "lines", held_out=0.5))
    model = stage_adapter(stage.run.model)
    trained = read_factors(model, STAGE, [t.name for t in stage.targets])
    finished = run.method.finish(stage, model, trained)
    gamma = finished.facts["gamma"]
    for t in stage.targets:
        assert torch.equal(finished.factors[t.name][1], trained[t.name][1] * lines.scale_of(t, gamma))
    model.unload()
    held = lines.Lines(0.5)._split(stage.run, "first")[1]
    for number, gamma in enumerate(GAMMAS):
        scaled = {t.name: (trained[t.name][0], trained[t.name][1] * lines.scale_of(t, gamma)) for t in stage.targets}
        beside = attach(stage.run.model, STAGE, scaled, dict.fromkeys(scaled, 1.0))
        activate(beside, [STAGE])
        right, tokens = 0, 0
        for sample in held:
            batch = stage.collator([sample])
            with torch.no_grad():
                said = beside(**batch).logits[:, :-1].argmax(-1)
            labels = batch["labels"][:, 1:]
            right += int((said == labels)[labels != IGNORED_LABEL].sum())
            tokens += int((labels != IGNORED_LABEL).sum())
        assert finished.facts["accuracies"][number] == [pytest.approx(right / tokens)]
        beside.unload()


def test_lines_rehearses_nothing_that_it_holds_out(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    """However many prompts of past tasks are asked for."""
    for rehearsed, expected in ((3, 3), (6, 4)):
        settings = config(tiny_llava, stream_file, tmp_path, "lines", held_out=0.3)
        settings = replace(settings, general=GeneralConfig(rehearsed=rehearsed, share=0.3))
        stage, run = open_stage(settings, 2)
        held = {shown_by(s) for s in lines.Lines(0.3)._split(stage.run, "first")[1]}
        asked = {shown_by(s) for s in past_prompts(stage, run.method)}
        assert (len(held), len(asked)) == (2, expected) and not held & asked


@pytest.mark.parametrize("records", [(6, 1), (1, 6)])
def test_lines_says_before_the_first_stage_that_nothing_would_be_left(
    records: tuple[int, int], tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    file = with_records(stream_file, tmp_path / "data", records=records)
    with pytest.raises(ConfigError, match="held_out leaves none of the 1 records of"):
        run_stream(settings := config(tiny_llava, file, tmp_path, "lines"))
    assert not list((tmp_path / "run/stages").glob("*"))
    run_stream(replace(settings, method_options={"held_out": 0.0}))


def with_records(
    stream_file: Path, root: Path, records: tuple[int, int] = (6, 6), more: tuple[str, str] = ("", "")
) -> Path:
    """The stream with so many records in each task, and words behind their questions."""
    shutil.copytree(stream_file.parent, root)
    for task, count, words in zip(TASKS, records, more, strict=True):
        found = json.loads((root / f"{task}.json").read_text())[:count]
        for record in found:
            record["conversations"][0]["value"] += words
        (root / f"{task}.json").write_text(json.dumps(found))
    stream = yaml.safe_load(stream_file.read_text())
    (root / "stream.yaml").write_text(yaml.safe_dump({**stream, "data_root": str(root)}))
    return root / "stream.yaml"


@pytest.mark.parametrize(
    ("method", "short"),
    [("lines", "second"), ("replay", "second"), ("joint", "first"), ("joint_gradient_lora", "first")],
)
def test_a_stage_sees_records_of_other_tasks_that_its_own_task_may_not_have(
    method: str, short: str, tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """Each was held to its own task's `max_length`."""
    more = {"first": ("", " is this red ?" * 3), "second": (" is this red ?" * 3, "")}[short]
    file = with_records(stream_file, tmp_path / "data", more=more)
    settings = config(tiny_llava, file, tmp_path, method)
    run_stream(replace(settings, train_overrides={short: {"max_length": 27}}))
    everywhere = replace(settings, run_dir=str(tmp_path / "other"), train=replace(settings.train, max_length=27))
    with pytest.raises(KeepLoRAError, match="max_length is 27"):
        run_stream(everywhere)


def test_lines_watches_general_samples_longer_than_a_task_may_have(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    longer = " ".join(["is this red ?"] * 8)
    asked = [{"question_id": n, "text": longer + " yes" * n} for n in range(8)]
    (tmp_path / "general.json").write_text(json.dumps(asked))
    settings = config(tiny_llava, stream_file, tmp_path, "lines", held_out=0.3)
    settings = replace(settings, train=replace(settings.train, max_length=27))
    run_stream(replace(settings, general=GeneralConfig(samples=str(tmp_path / "general.json"), max_new_tokens=4)))


def test_replay_adds_a_share_of_every_earlier_task(tiny_llava: Path, stream_file: Path, tmp_path: Path) -> None:
    settings = config(tiny_llava, stream_file, tmp_path, "replay", share=0.5)
    (first, _), (second, _) = open_stage(settings, 1), open_stage(settings, 2)
    own = [s.id for s in second.run.task_samples("second")]
    assert [s.id for s in first.samples] == [s.id for s in first.run.task_samples("first")]
    assert [s.id for s in second.samples[:6]] == own
    kept = second.samples[6:]
    assert len(kept) == 3
    assert {shown_by(s) for s in kept} < {shown_by(s) for s in second.run.task_samples("first")}


def first_task_alone(stream_file: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the stream without its second task, and the text of its file with both."""
    file = with_records(stream_file, folder)
    whole = file.read_text()
    stream = yaml.safe_load(whole)
    file.write_text(yaml.safe_dump({**stream, "tasks": stream["tasks"][:1]}))
    return file, whole


@pytest.mark.parametrize("method", ["joint", "joint_gradient_lora", "zero_shot", "lora"])
def test_a_task_appended_behind_joint_training_is_refused(
    method: str, tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    """It would never be learnt; a method that learns it, or nothing at all, goes on."""
    file, whole = first_task_alone(stream_file, tmp_path / "data")
    settings = config(tiny_llava, file, tmp_path, method)
    run_stream(settings)
    file.write_text(whole)
    if method.startswith("joint"):
        with pytest.raises(ArtifactError, match=rf"method {method} learns all .* has not seen second; use another"):
            run_stream(settings)
    else:
        assert len(run_stream(settings)["rows"]) == 3


@pytest.mark.parametrize("killed", ["train_stage", "check_no_leakage"])
@pytest.mark.parametrize("method", ["joint", "joint_gradient_lora", "lora"])
def test_a_task_appended_while_the_first_stage_learns_is_learnt(
    method: str, killed: str, tiny_llava: Path, stream_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joint training begins anew with the records of all tasks; a method that learns one by one goes on."""
    file, whole = first_task_alone(stream_file, tmp_path / "data")
    settings = config(tiny_llava, file, tmp_path, method)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(learning if killed == "train_stage" else continual_stream, killed, until(None, 0))
        run_stream(settings)
    file.write_text(whole)
    run_stream(settings)
    manifest = json.loads((tmp_path / "run/stages/01-first/manifest.json").read_text())
    joint = method.startswith("joint")
    assert (manifest["counts"]["train_samples"], manifest["counts"]["steps"]) == ((12, 6) if joint else (6, 3))
    if joint:
        fresh = replace(settings, run_dir=str(tmp_path / "fresh"))
        run_stream(fresh)
        assert_equal(read_adapter(tmp_path / "run/adapter"), read_adapter(tmp_path / "fresh/adapter"))


def test_joint_training_sees_all_tasks_for_the_steps_of_all(
    tiny_llava: Path, stream_file: Path, tmp_path: Path
) -> None:
    stage, run = open_stage(config(tiny_llava, stream_file, tmp_path, "joint"))
    assert {shown_by(s) for s in stage.samples} == {shown_by(s) for task in TASKS for s in stage.run.task_samples(task)}
    assert stage.train.max_steps == 2 * 3
    epochs = replace(stage.run.config.train, max_steps=-1)
    assert run.method.train_config(stage.run, epochs).max_steps == -1
    assert [run.method.learns(n) for n in (1, 2, 3)] == [True, False, False]
