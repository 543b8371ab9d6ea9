"""The plan before a run: what it counts is what a run then has, and nothing is loaded or written for it."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from torch import nn
from torch.utils import _pytree as pytree
from transformers import AutoModelForImageTextToText

from mllm_keeplora.commands.run import parse_flags
from mllm_keeplora.config import (
    ConfigError,
    GeneralConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.data.collator import ChatCollator, collator_of, join_batches, ready_batch
from mllm_keeplora.data.conversation import Classes, MediaFile, Message, Sample
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.methods.base import method_names
from mllm_keeplora.modeling.adapters import STAGE, attach
from mllm_keeplora.modeling.adapters import activate as activate_adapters
from mllm_keeplora.modeling.families import FAMILIES, Media
from mllm_keeplora.modeling.loading import load_base, load_base_processor
from mllm_keeplora.modeling.loss import answers_alone
from mllm_keeplora.modeling.targets import left_out, targets_of
from mllm_keeplora.planning import skeleton as skeleton_module
from mllm_keeplora.planning.memory_model import MemoryModel, base_bytes, optimizer_state
from mllm_keeplora.planning.plan import (
    PROBING,
    PlanError,
    _smaller,
    check_fits,
    check_run,
    find_fitting,
    make_plan,
    measured_rates,
    needed,
    optimizer_steps,
)
from mllm_keeplora.planning.skeleton import (
    ASSUMED_CLASSES,
    ASSUMED_TEXT_TOKENS,
    assumed_shape,
    build_processor,
    build_skeleton,
    describe_weights,
    sample_shape,
)
from mllm_keeplora.planning.text import _general_lines, format_plan
from mllm_keeplora.planning.time_model import TimeModel
from mllm_keeplora.probes.gradients import _ThinGradient
from mllm_keeplora.probes.hooks import hooked
from mllm_keeplora.runs.files import ArtifactError
from mllm_keeplora.units import GB, format_bytes, format_count
from tests import forked
from tests.clips import write_clip
from tests.modules.test_families import MAIN_MEDIA, reader, samples, write_stream
from tests.modules.tiny_families import BUILDERS

ROOT = Path(__file__).resolve().parents[2]
# The formula against the bytes that autograd really keeps. On models this small what it rounds up
# (embeddings, a vision layer behind the features) weighs more than at true widths.
LEAST, MOST = 0.95, 1.6


@pytest.fixture(scope="module")
def media_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned_media")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / f"{number}.png")
        write_clip(root / f"{number}.mp4", list(rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)))
    return root


def config_of(base: Path, **settings: Any) -> RunConfig:
    tower = TowerConfig(rank=8)
    model = ModelConfig(base_model=str(base), device="cpu")
    nowhere = "runs/of_no_test"  # a run that lies in the default one would be spoken of
    return replace(RunConfig(run_dir=nowhere, model=model, language=tower, vision=tower, report_to=[]), **settings)


def memory_of(config: RunConfig, batch: dict[str, Any], media: Media) -> MemoryModel:
    skeleton = build_skeleton(config.model)
    shape = sample_shape(batch, skeleton.config, media, "")
    return MemoryModel(skeleton, targets_of(skeleton, config, {media}), config, shape, 1, 4, on_cpu=True)


def batch_of(
    family: str, processor: Any, media_files: Path, number: int = 1, media: Media | None = None
) -> dict[str, torch.Tensor]:
    """One sample of a family, so many times."""
    [sample, *_] = samples(media_files, media or MAIN_MEDIA.get(family, "image"))
    if FAMILIES[family].classifies:
        shown = Message("user", (MediaFile("image", media_files / "0.png"), ""))
        names = ("red", "green", "blue", "pink", "a red", "a blue")
        sample = Sample("0", (shown, Message("assistant", ("red",))), Classes(names, names, ("a picture of {}.",)))
    return collator_of(processor, reader())([sample] * number)


def kept_for_backward(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes of the distinct tensors that autograd keeps, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_the_bytes_and_the_targets_of_the_loaded_model(family: str, tiny: Any) -> None:
    config = config_of(tiny(family))
    model, _ = load_base(config.model)
    packed = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            stored = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            packed += module.weight.nbytes + sum(tensor.nbytes for tensor in stored)
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit))
    skeleton = build_skeleton(config.model)
    assert base_bytes(skeleton, config.model) == (packed, rest + sum(b.nbytes for b in model.buffers()))

    media: set[Media] = {MAIN_MEDIA.get(family, "image")}
    targets = targets_of(skeleton, config, media)
    assert targets == targets_of(model, config, media)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(targets) + sum(left_out(skeleton, targets, config).values()) == linears


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, False)])
def test_embeddings_are_planned_as_often_as_they_are_loaded(tied: tuple[bool, bool], tmp_path: Path) -> None:
    """InternVL3-8B's whole config ties them to lm_head by default, its language model's does not, and it has both."""
    model_config, processor = BUILDERS["internvl"]()
    model_config.tie_word_embeddings, model_config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(model_config)
    if not all(tied):
        model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = config_of(tmp_path, model=ModelConfig(str(tmp_path), device="cpu", quantization="none"))
    loaded, _ = load_base(config.model)
    held = sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))
    assert sum(base_bytes(build_skeleton(config.model), config.model)) == held


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_spread_base_is_whole_in_an_evaluation_alone(family: str, quantization: str, tiny: Any) -> None:
    """Beside the share that a process keeps; in training one layer of the two is gathered at a time."""
    config = config_of(tiny(family), model=ModelConfig(str(tiny(family)), device="cpu", quantization=quantization))
    skeleton = build_skeleton(config.model)
    shape = assumed_shape(build_processor(config.model), skeleton, config)
    alone = MemoryModel(skeleton, targets_of(skeleton, config, {"image"}), config, shape, 1, 4, on_cpu=True)
    layers = skeleton.get_decoder().layers
    assert len(layers) == 2
    shared = sum(base_bytes(skeleton, config.model, layers))
    assert shared == sum(sum(base_bytes(skeleton, config.model, layer)) for layer in layers) > 0

    def base(spread: int) -> dict[str, int]:
        phases = replace(alone, spread=spread).phases()
        return {name: sum(n for item, n in items.items() if item.startswith("base")) for name, items in phases.items()}

    whole = sum(base_bytes(skeleton, config.model))
    assert base(1) == dict.fromkeys(("weight bases", "probe", "train", "evaluation"), whole)
    for spread in (2, 8):
        training = pytest.approx(whole - shared + shared / spread + shared / 2, abs=4)
        answering = pytest.approx(whole + shared / spread, abs=4)
        assert base(spread) == {"weight bases": whole, "probe": training, "train": training, "evaluation": answering}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str, dtype: str, tiny: Any, media_files: Path) -> None:
    config = config_of(tiny(family))
    config = replace(config, model=replace(config.model, compute_dtype=dtype))
    model, processor = load_base(config.model)
    batch = ready_batch(batch_of(family, processor, media_files), model.dtype)
    memory = memory_of(config, batch, MAIN_MEDIA.get(family, "image"))
    pixels = sum(batch[key].nbytes for key in ("pixel_values", "pixel_values_videos") if key in batch)
    model.train()
    sums = {t.name: _ThinGradient(model.device, 32, t.in_features) for t in memory.targets}
    with hooked(model, {name: thin.watch for name, thin in sums.items()}, "after"):
        measured = kept_for_backward(model, batch) + pixels
    planned, _ = memory.activations(1, "weights")
    assert LEAST < planned / measured < MOST, (planned, measured)

    factors = {t.name: (torch.ones(8, t.in_features), torch.zeros(t.out_features, 8)) for t in memory.targets}
    adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    for trained in ("B", "both"):
        activate_adapters(adapted, [STAGE], STAGE, trained)
        adapted.train()
        measured = kept_for_backward(adapted, batch) + pixels
        planned, _ = memory.activations(1, trained)
        assert LEAST < planned / measured < MOST, (trained, planned, measured)


@pytest.mark.parametrize("general", [False, True])
def test_a_clips_prompts_pass_once_beside_any_batch(general: bool, tiny: Any, media_files: Path) -> None:
    """Those of general pictures likewise."""
    config = config_of(tiny("clip"), general=GeneralConfig(samples="any", share=0.25 if general else 0.0))
    config = replace(config, train=TrainConfig(per_device_train_batch_size=6))
    model, processor = load_base(config.model)
    memory = memory_of(config, batch_of("clip", processor, media_files), "image")
    memory = replace(memory, shape=memory.shape._replace(prompts_beside=6 * general))
    batch = answers_alone(batch_of("clip", processor, media_files, 6))
    if general:
        beside = answers_alone(batch_of("clip", processor, media_files, config.general.beside(6, 1)[0]))
        batch = join_batches(batch, beside, processor.tokenizer.pad_token_id)
        assert batch["input_ids"].shape[0] == 12 and len(batch["labels"]) == 8
    batch = ready_batch(batch, model.dtype)
    factors = {t.name: (torch.ones(8, t.in_features), torch.zeros(t.out_features, 8)) for t in memory.targets}
    adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    activate_adapters(adapted, [STAGE], STAGE, "B")
    adapted.train()
    measured = kept_for_backward(adapted, batch) + batch["pixel_values"].nbytes
    assert LEAST < memory.phases()["train"]["activations"] / measured < MOST


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_what_the_model_has_and_counts_its_rows(family: str, tiny: Any, media_files: Path) -> None:
    """A wrong name of a layer would change the plan in silence."""
    facts = FAMILIES[family]
    model, processor = load_base(config_of(tiny(family)).model)
    inside = {  # of any layer
        layers: {name: module for layer in model.get_submodule(layers) for name, module in layer.named_modules()}
        for layers in facts.towers
    }
    linears = {
        layers: {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        for layers, modules in inside.items()
    }
    last = {name.rsplit(".", 1)[-1] for names in linears.values() for name in names}
    assert {*facts.writers, *facts.fused} <= last
    assert {facts.keys, *facts.head_norms.values()} <= linears[facts.language_layers]
    assert {*facts.head_norms, facts.recurrence} - {None} <= set(inside[facts.language_layers])

    for media, layers in facts.vision_layers.items():
        batch = batch_of(family, processor, media_files, media=media)
        rows: list[int] = []
        with model.get_submodule(f"{layers}.0").register_forward_pre_hook(
            lambda _, inputs, rows=rows: rows.append(inputs[0].shape[:-1].numel())
        ):
            model(**batch)
        assert sample_shape(batch, model.config, media, "").vision_tokens == sum(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "qwen3_5"])
def test_what_is_cached_is_planned(family: str, dtype: str, tiny: Any, media_files: Path) -> None:
    """Keys and values of every layer that has them, and the states of those that keep one instead."""
    config = config_of(tiny(family))
    config = replace(config, model=replace(config.model, compute_dtype=dtype))
    model, processor = load_base(config.model)
    batch = ready_batch(batch_of(family, processor, media_files, 3), model.dtype)
    language = memory_of(config, batch_of(family, processor, media_files), MAIN_MEDIA[family]).towers(3, "B")[0]
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    held = [vars(layer).values() for layer in cache.layers]
    tensors = [t for found in held for t in pytree.tree_leaves(list(found)) if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == sum(kind.number * kind.cache(0) for kind in language.kinds)


def test_what_lowers_memory_lowers_the_plan(tiny: Any, media_files: Path) -> None:
    config = config_of(tiny("llava"), train=TrainConfig(per_device_train_batch_size=8))
    processor = load_base_processor(config.model)
    memory = memory_of(config, ChatCollator(processor)(samples(media_files, "image")[:1]), "image")

    def sums(**settings: Any) -> dict[str, int]:
        changed = replace(memory, config=replace(config, **settings))
        changed = replace(changed, targets=targets_of(memory.model, changed.config, {"image"}))
        return {phase: sum(items.values()) for phase, items in changed.phases().items()}

    full, train = sums(), config.train
    assert list(full) == ["weight bases", "probe", "train", "evaluation"]
    assert sums(train=replace(train, activation_checkpointing=True))["train"] < full["train"]
    assert sums(train=replace(train, per_device_train_batch_size=4))["train"] < full["train"]
    assert sums(train=replace(train, optim="adamw_8bit"))["train"] < full["train"]
    assert sums(vision=TowerConfig(adapt=False))["train"] < full["train"]
    assert sums(language=TowerConfig(adapt=False))["train"] < full["train"]
    assert sums(probe=ProbeConfig(batch_size=4))["probe"] < full["probe"]
    assert sums(language=TowerConfig(rank=4))["probe"] < full["probe"]
    unpacked = replace(memory, config=replace(config, model=replace(config.model, quantization="none")))
    assert sum(unpacked.phases()["evaluation"].values()) > full["evaluation"]
    assert sum(replace(memory, stages=5).phases()["evaluation"].values()) > full["evaluation"]
    # Its gradients are those of both factors, which keep more than the sketches of the weights' do.
    ewc = replace(memory, config=replace(config, method="ewc")).phases()["probe"]
    assert ewc["activations"] == memory.activations(config.probe.batch_size, "both")[0]
    assert ewc["activations"] > memory.phases()["probe"]["activations"]


def test_optimizer_states_have_their_size() -> None:
    parameter = nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    state = sum(t.nbytes for t in optimizer.state[parameter].values() if t.numel() > 1)
    assert optimizer_state("adamw_torch") * 1000 == state
    assert optimizer_state("adamw_torch_fused") == 8
    assert optimizer_state("paged_adamw_8bit") == 2
    assert optimizer_state("sgd") == 0


@pytest.mark.parametrize("samples_, batch, accumulation, epochs", [(10, 4, 1, 1.0), (10, 4, 2, 3.0), (7, 2, 3, 0.5)])
def test_steps_are_the_trainers(samples_: int, batch: int, accumulation: int, epochs: float, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight - x).square().mean()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(1)} for _ in range(samples_)]
    trainer = Trainer(model=Line(), args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    train = TrainConfig(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
    )
    assert optimizer_steps(train, samples_) == trainer.state.global_step


PASSES = {
    "keeplora": 2,
    "gradient_lora": 1,
    "inflora": 2,
    "joint_gradient_lora": 1,
    "loda": 2,
    "gpm": 1,
    "ewc": 1,
}  # over the probe sample; others make none


@pytest.mark.parametrize("method", method_names())
def test_probe_passes_are_the_methods(method: str, tiny: Any, media_files: Path, tmp_path: Path) -> None:
    """In what is planned, in what an earlier run's seconds are divided by, and on the page."""
    config = config_of(
        tiny("llava"),
        method=method,
        run_dir=str(tmp_path / "runs/new"),
        stream=str(write_stream(tmp_path, media_files, "image")),
        probe=ProbeConfig(fraction=1.0),
        cache_dir=str(tmp_path / "cache"),
    )
    manifest = {
        "stage": 1,
        "config": asdict(config),
        "base_model": {"hash": "of the base"},
        "counts": {"steps": 10},
        "timings": {"train": 20.0, "evaluate": 3.0, **dict.fromkeys(PROBING, 12.0 / len(PROBING))},
        "probe_indices": [0, 1, 2, 3],
        "scores": {"colours": {"n": 2}},
    }
    stage = tmp_path / "runs/old/stages/01-colours"
    stage.mkdir(parents=True)
    (stage / "manifest.json").write_text(json.dumps(manifest))
    assert measured_rates(config, "of another base") is None
    rates, passes = measured_rates(config, "of the base"), PASSES.get(method, 0)
    assert rates is not None
    assert rates[1:] == (2.0, 12.0 / (4 * passes) if passes else 0.0, 1.5, 0.0, 0.0)

    plan = replace(make_plan(config, memory_gb=1.0), rates=rates)
    [work] = plan.work
    learns = method != "zero_shot"
    probed = 4 - (method == "lines")  # which holds one out
    assert (work.probe_passes, work.probe_samples, work.steps) == (passes, probed * learns, 1 * learns)
    # One step, and the rows before and after it with two questions each.
    assert plan.seconds(rates) == pytest.approx(2.0 * learns + 12.0 * bool(passes) + 2 * 2 * 1.5)
    text = format_plan(plan)
    assert ("a probe sample" in text) == (f"{passes} x 4" in text) == bool(passes)


@pytest.mark.parametrize(("share", "beside"), [(0.0, 0), (0.2, 4), (0.5, 16), (0.01, 1)])
def test_general_samples_beside_a_batch_are_planned(share: float, beside: int, tiny: Any, media_files: Path) -> None:
    config = replace(config_of(tiny("llava")), general=GeneralConfig(samples="builtin", share=share, budget=0.02))
    more = replace(
        config, general=GeneralConfig(), train=replace(config.train, per_device_train_batch_size=16 + beside)
    )
    config = replace(config, train=replace(config.train, per_device_train_batch_size=16))
    batch = ChatCollator(load_base_processor(config.model))(samples(media_files, "image")[:1])
    found, expected = (memory_of(c, batch, "image").phases()["train"] for c in (config, more))
    assert found == expected
    said = f"inputs protected; {beside} beside each 16 of a task's, by kl" if share else "inputs protected; each stage"
    plan = SimpleNamespace(memory=memory_of(config, batch, "image"))
    [line] = _general_lines(plan)
    assert said in line and "by at most 0.02 nats a token" in line


def test_general_samples_of_an_accumulated_step_are_planned(tiny: Any, media_files: Path) -> None:
    """A quarter as many as the task's, however few pass at once: every fourth pass has one, and that needs most."""
    config = replace(config_of(tiny("llava")), general=GeneralConfig(samples="builtin", share=0.2))
    batch = ChatCollator(load_base_processor(config.model))(samples(media_files, "image")[:1])

    def planned(size: int, passes: int, share: float) -> MemoryModel:
        train = replace(config.train, per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        settings = replace(config, train=train, general=replace(config.general, share=share))
        return memory_of(settings, batch, "image")

    whole, alone, two = planned(1, 64, 0.2), planned(1, 64, 0.0), planned(2, 16, 0.0)
    [line] = _general_lines(SimpleNamespace(memory=whole))
    assert "16 beside each 64 of a task's" in line
    assert whole.phases()["train"] == two.phases()["train"]
    passed, more = TimeModel(alone).step, TimeModel(two).step
    assert TimeModel(whole).step.products == pytest.approx(passed.products * 48 / 64 + more.products)


def test_rates_come_from_stages_at_the_same_pace_alone(tmp_path: Path) -> None:
    config = replace(RunConfig(), run_dir=str(tmp_path / "new"))
    manifest = {
        "stage": 1,
        "config": asdict(config),
        "base_model": {"hash": "base"},
        "counts": {"steps": 10},
        "timings": {"train": 20.0, "evaluate": 3.0, **dict.fromkeys(PROBING, 5.0)},
        "probe_indices": [0],
        "scores": {},
    }
    file = tmp_path / "old/stages/01-task/manifest.json"
    file.parent.mkdir(parents=True)

    def found(**changed: Any) -> bool:
        file.write_text(json.dumps({**manifest, **changed}))
        return measured_rates(config, "base") is not None

    assert found()
    assert not found(stage=0)
    assert not found(counts={"steps": 0})
    assert not found(base_model={"hash": "other"})
    assert not found(timings={"train": 20.0})
    assert not found(config={**asdict(config), "method": "lora"})
    assert not found(config={**asdict(config), "method_options": {"features_from": "activations"}})
    assert not found(config={**asdict(config), "probe": asdict(ProbeConfig(refine=True))})
    assert not found(config={**asdict(config), "train": asdict(TrainConfig(activation_checkpointing=True))})
    assert not found(config={"of": "another version"})


@pytest.mark.parametrize(
    "number, size, count",
    [(0, "0 B", "0"), (999, "999 B", "999"), (3_072_512, "3.07 MB", "3.07 M"), (999_999, "1 MB", "1 M")],
)
def test_sizes_and_counts_are_read_at_a_glance(number: int, size: str, count: str) -> None:
    assert (format_bytes(number), format_count(number)) == (size, count)


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*"))}


def test_a_plan_before_and_after_a_run(tiny: Any, media_files: Path, tmp_path: Path) -> None:
    """Before: bounds, and nothing measured. After: the cached bases' own sizes, the run's own seconds."""
    threads = torch.get_num_threads()
    config = config_of(
        tiny("llava"),
        run_dir=str(tmp_path / "runs" / "one"),
        stream=str(write_stream(tmp_path, media_files, "image")),
        language=TowerConfig(rank=2),
        vision=TowerConfig(rank=2),
        probe=ProbeConfig(fraction=1.0, columns_per_rank=4, batch_size=3),
        train=TrainConfig(per_device_train_batch_size=2),
        cache_dir=str(tmp_path / "cache"),
    )
    before = tree(tmp_path)
    plan = make_plan(config)
    text = format_plan(plan)
    assert tree(tmp_path) == before
    assert "nothing measured" in text and "0 of 26 cached" in text and "colours, record" in text
    [work] = plan.work
    assert (work.samples, work.probe_samples, work.questions) == (4, 4, 2)

    run_stream(config)
    torch.set_num_threads(threads)
    after = tree(tmp_path)
    manifest = json.loads((tmp_path / "runs/one/stages/01-colours/manifest.json").read_text())
    again = make_plan(config)
    assert tree(tmp_path) == after
    assert again.cached_bases == {m["name"]: m["k_w"] for m in manifest["modules"]}
    assert all(
        m["k_w"] <= again.memory.most_k(t) for m, t in zip(manifest["modules"], again.memory.targets, strict=True)
    )
    assert work.steps == manifest["counts"]["steps"]
    assert again.rates is not None
    assert again.rates.step == pytest.approx(manifest["timings"]["train"] / manifest["counts"]["steps"])
    assert "(exact;" in format_plan(again) and "minutes" in format_plan(again)
    other = replace(config, train=replace(config.train, per_device_train_batch_size=4))
    assert make_plan(other).rates is None
    check_run(config)  # what the run itself continues
    with pytest.raises(ArtifactError, match="was written with other settings .*seed"):
        check_run(replace(config, seed=7))
    assert tree(tmp_path) == after


def others_folder(config: RunConfig) -> RunConfig:
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    return config


def asked_by_the_test(config: RunConfig) -> RunConfig:
    stream = load_stream(Path(config.stream))
    samples = GeneralConfig(samples=str(stream.test_file(stream.tasks[0])), media_root=str(stream.data_root))
    return replace(config, general=samples)


UNUSABLE: dict[str, Callable[[RunConfig], RunConfig]] = {
    "method": lambda c: replace(c, method="kept"),
    "option of a method": lambda c: replace(c, method_options={"features_form": "activations"}),
    "run_dir that holds the data": lambda c: replace(c, run_dir=str(Path(c.stream).parent)),
    "run_dir below a file": lambda c: replace(c, run_dir=f"{c.stream}/run"),
    "run_dir of somebody's own": others_folder,
    "logger": lambda c: replace(c, report_to=["tensorbord"]),
    "optimizer": lambda c: replace(c, train=TrainConfig(optim="adamm")),
    "settings of no task": lambda c: replace(c, train_overrides={"birds": {"max_steps": 3}}),
    "budget of one adapter": lambda c: replace(c, method="ewc", general=GeneralConfig("builtin", budget=0.1)),
    "prompts that a test asks": asked_by_the_test,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_the_plan_refuses_what_the_run_refuses(kind: str, tiny: Any, media_files: Path, tmp_path: Path) -> None:
    """In the same words, and without a trace."""
    folders = {"run_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    config = config_of(tiny("llava"), stream=str(write_stream(tmp_path, media_files, "image")), **folders)
    check_run(config)
    config = UNUSABLE[kind](config)
    before = tree(tmp_path)
    with pytest.raises(KeepLoRAError) as by_plan:
        check_run(config)
    assert tree(tmp_path) == before
    with pytest.raises(KeepLoRAError) as by_run, Run.open(config):
        raise AssertionError("opened")
    assert (type(by_plan.value), str(by_plan.value)) == (type(by_run.value), str(by_run.value))
    assert tree(tmp_path) == before


def test_without_weights_and_data_the_plan_says_what_it_assumed(tiny: Any, tmp_path: Path) -> None:
    base = shutil.copytree(tiny("llava_next_video"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    task = {"name": "later", "train": "train.json", "test": "test.json", "metric": "exact"}
    stream = {"name": "absent", "data_root": str(tmp_path / "nowhere"), "tasks": [task]}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(stream))
    plan = make_plan(config_of(base, stream=str(tmp_path / "stream.yaml")))
    text = format_plan(plan)
    assert "by the config" in plan.weights and "no safetensors weights" in plan.weights
    assert "assumed: a clip of 8 frames" in text and "the data are not there" in text
    assert (plan.work[0].samples, plan.work[0].steps) == (None, None)


def test_the_headers_of_another_model_are_noticed(tiny: Any, tmp_path: Path) -> None:
    config = config_of(tiny("llava"))
    own = describe_weights(config.model, build_skeleton(config.model))
    assert "safetensors" in own and "belong" not in own
    base = shutil.copytree(tiny("llava"), tmp_path / "base")
    shutil.copy(tiny("qwen3_vl") / "model.safetensors", base / "model.safetensors")
    mixed = config_of(base)
    assert "do not belong" in describe_weights(mixed.model, build_skeleton(mixed.model))


def test_a_hub_model_whose_headers_cannot_be_read_is_counted_by_its_config(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(skeleton_module, "get_safetensors_metadata", offline)
    skeleton = build_skeleton(config_of(tiny("llava")).model)
    text = describe_weights(ModelConfig(base_model="somebody/model"), skeleton)
    assert "by the config" in text and "offline mode is enabled" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_assumed_samples_pass_every_processor(family: str, tiny: Any) -> None:
    config = config_of(tiny(family))
    processor = load_base_processor(config.model)
    shape = assumed_shape(processor, build_skeleton(config.model), config)
    assert shape.media == MAIN_MEDIA.get(family, "image")
    chooses = FAMILIES[family].classifies
    assert shape.vision_tokens > 0 and (shape.tokens > ASSUMED_TEXT_TOKENS) == (not chooses)
    assert shape.prompts == (ASSUMED_CLASSES if chooses else 0)


def test_what_does_not_fit_is_refused_with_settings_that_do(tiny: Any, tmp_path: Path) -> None:
    task = {"name": "later", "train": "train.json", "test": "test.json", "metric": "exact"}
    stream = {"name": "absent", "data_root": str(tmp_path), "tasks": [task]}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(stream))
    train = TrainConfig(per_device_train_batch_size=16, gradient_accumulation_steps=2)
    config = config_of(tiny("llava"), stream=str(tmp_path / "stream.yaml"), train=train)
    plan = make_plan(config, memory_gb=0.04)
    assert needed(plan.memory) > plan.available
    found = find_fitting(plan.memory, plan.available)
    assert found is not None
    fitting, changes = found
    assert needed(fitting) <= 0.04 * GB
    assert fitting.config.train.activation_checkpointing
    smaller = fitting.config.train
    assert smaller.per_device_train_batch_size * smaller.gradient_accumulation_steps == 32
    with pytest.raises(PlanError, match=r"It fits, .*train.activation_checkpointing: true") as caught:
        check_fits(plan)
    for name, value in changes.items():
        assert f"{name}: {str(value).lower()}" in str(caught.value)
        assert attrgetter(name)(fitting.config) == value != attrgetter(name)(config)

    with pytest.raises(PlanError, match="larger device"):
        check_fits(make_plan(config, memory_gb=1e-4))


def test_a_hub_model_that_cannot_be_fetched_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing.*config\.json.*--model\.base_model DIRECTORY"):
        build_skeleton(ModelConfig(base_model="nobody/nothing"))


def test_the_flags_are_no_settings() -> None:
    assert not {"plan", "memory_gb"} & {field.name for field in fields(RunConfig)}
    flags, rest = parse_flags(["--plan", "--seed", "3", "--memory_gb", "24"])
    assert (flags.plan, flags.memory_gb, rest) == (True, 24.0, ["--seed", "3"])
    assert parse_flags(["--seed", "3"])[1] == ["--seed", "3"]
    assert parse_flags(["--measure", "--plan"])[0].measure
    with pytest.raises(ConfigError, match="--measure: it goes with --plan"):
        parse_flags(["--measure"])
    for wrong in (["--memory_gb", "24"], ["--plan", "--memory_gb", "much"], ["--plan", "--memory_gb", "0"]):
        with pytest.raises(ConfigError, match="memory_gb"):
            parse_flags(wrong)


def test_the_command_writes_nothing_and_ends_with_2_where_it_does_not_fit(tmp_path: Path) -> None:
    command = ["recipes/vqa.py", "--plan", "--data_root", str(tmp_path / "none")]
    command += ["--run_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.run([*command, *arguments])

    planned = run()
    assert planned.returncode == 0, planned.stderr
    assert "memory, GB" in planned.stdout and "52 cached" in planned.stdout
    refused = run("--memory_gb", "0.05")
    assert refused.returncode == 2
    assert "does NOT fit" in refused.stdout and "Traceback" not in refused.stderr
    (tmp_path / "run.yaml").write_text("plan: true\n")
    assert "plan" in run("--config", str(tmp_path / "run.yaml")).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("batch, accumulation", [(2, 1), (3, 1), (5, 1), (5, 3), (7, 2), (8, 4)])
def test_a_smaller_batch_leaves_a_step_its_samples(batch: int, accumulation: int) -> None:
    """What the plan advises trains on as many samples a step as were asked for, as a run's own advice does."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    config = RunConfig(train=TrainConfig(**settings, activation_checkpointing=True))  # type: ignore[arg-type]
    smaller = _smaller(config, "train")
    half = smaller["train.per_device_train_batch_size"]
    assert half < batch
    assert half * smaller["train.gradient_accumulation_steps"] >= batch * accumulation
