"""The time that a plan expects: operations against torch's own count, and seconds measured on this machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_keeplora.config import (
    ConfigError,
    GeneralConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
)
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.modeling.adapters import STAGE, activate, attach
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.loss import answers_alone
from mllm_keeplora.planning.measure import STEPS, measure
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.planning.text import format_plan
from mllm_keeplora.planning.time_model import CARDS, LAUNCH_SECONDS, PRODUCTS, TRAFFIC, Card, Cost, TimeModel, total
from tests.modules.test_families import MAIN_MEDIA, samples
from tests.modules.test_plan import batch_of, config_of, media_files, memory_of, tree, write_stream

__all__ = ["media_files"]  # a fixture
COUNTED = [
    ("llava", False),
    ("llava", True),
    ("qwen2_5_vl", False),
    ("video_llava", True),
    ("clip", False),
]  # --slow counts them all


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        pytest.param(family, again, marks=() if (family, again) in COUNTED else pytest.mark.slow)
        for family in FAMILIES
        for again in (False, True)
    ],
)
def test_the_operations_of_a_step_are_those_that_torch_counts(
    family: str, checkpointing: bool, tiny: Any, media_files: Path
) -> None:
    """Within what is left out (the projector, embeddings of patches, what a first layer need not give back),
    which weighs more than at true widths."""
    train = TrainConfig(per_device_train_batch_size=2, activation_checkpointing=checkpointing)
    config = config_of(tiny(family), train=train)
    config = replace(config, model=replace(config.model, quantization="none"))
    model, processor = load_base(config.model)
    memory = memory_of(config, batch_of(family, processor, media_files), MAIN_MEDIA.get(family, "image"))
    factors = {t.name: (torch.ones(8, t.in_features), torch.zeros(t.out_features, 8)) for t in memory.targets}
    adapted: Any = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    activate(adapted, [STAGE], STAGE, "B")
    if checkpointing:
        adapted.get_base_model().activation_checkpointing_enable()
    adapted.train()
    two = answers_alone(batch_of(family, processor, media_files, 2))
    with FlopCounterMode(display=False) as counter:
        adapted(**two).loss.backward()
    step = TimeModel(memory).step
    assert 0.8 < (step.products + step.exact) / counter.get_total_flops() < 1.35


def test_seconds_are_the_cards_or_the_launches() -> None:
    card = Card("", bf16=100.0, fp32=10.0, bandwidth=50.0)
    assert Cost(products=100).seconds(card, False) == pytest.approx(1 / PRODUCTS)
    assert Cost(products=100).seconds(card, True) == pytest.approx(10 / PRODUCTS)
    assert Cost(exact=10, moved=50).seconds(card, False) == pytest.approx(1 / PRODUCTS + 1 / TRAFFIC)
    assert Cost(moved=1e-9, launches=3).seconds(card, False) == pytest.approx(3 * LAUNCH_SECONDS)
    assert total([Cost(1, 2, 3, 4, 5), Cost(1, 1, 1, 1, 1)], 2) == Cost(4, 6, 8, 10, 12)


def test_more_work_takes_longer(tiny: Any, media_files: Path) -> None:
    config = config_of(tiny("llava"), train=TrainConfig(per_device_train_batch_size=4))
    _, processor = load_base(config.model)
    memory = memory_of(config, ChatCollator(processor)(samples(media_files, "image")[:1]), "image")

    def step(**changes: Any) -> Cost:
        return TimeModel(replace(memory, config=replace(config, **changes))).step

    plain, train = step(), config.train
    assert step(train=replace(train, gradient_accumulation_steps=3)) == total([plain], 3)
    assert step(train=replace(train, activation_checkpointing=True)).products > plain.products
    aligned = replace(config, method="loda")  # four passes of a batch, each of which may keep a gradient of B
    assert step(method="loda") == total([plain], 4) and step(method="loda", method_options={"rho": 0.0}) == plain
    found = [
        replace(memory, config=c).phases()["train"]["its gradient"]
        for c in (aligned, replace(config, method="inflora"))
    ]
    assert found[0] == 4 * found[1] > 0
    general = step(general=GeneralConfig(samples="builtin", share=0.5))
    assert general.launches == plain.launches and general.products > 1.9 * plain.products
    assert step(vision=TowerConfig(adapt=False)).launches < plain.launches
    assert step(model=replace(config.model, quantization="none")).moved < plain.moved
    longer = TimeModel(replace(memory, stages=8)).step
    assert longer.exact > plain.exact and longer.launches == plain.launches
    [short, long] = [
        TimeModel(replace(memory, new_tokens=n, shape=memory.shape._replace(supervised=9))) for n in (1, 9)
    ]
    assert long.question.launches > short.question.launches
    assert TimeModel(replace(memory, config=replace(config, method="lora"))).weight_bases == Cost()


@pytest.fixture
def small(tiny: Any, media_files: Path, tmp_path: Path) -> Iterator[RunConfig]:
    threads = torch.get_num_threads()
    yield RunConfig(
        run_dir=str(tmp_path / "runs/one"),
        stream=str(write_stream(tmp_path, media_files, "image")),
        model=ModelConfig(base_model=str(tiny("llava")), device="cpu"),
        language=TowerConfig(rank=2),
        vision=TowerConfig(rank=2),
        probe=ProbeConfig(fraction=1.0, columns_per_rank=4, batch_size=3),
        train=TrainConfig(per_device_train_batch_size=2, max_steps=400),
        cache_dir=str(tmp_path / "cache"),
        report_to=[],
    )
    torch.set_num_threads(threads)


def test_before_anything_is_measured_cards_are_named_with_what_is_assumed(small: RunConfig) -> None:
    text = format_plan(make_plan(small, memory_gb=24.0))
    assert all(card.name in text for card in CARDS) and "assumed: 50% of the peak" in text and "--measure" in text


def test_what_a_short_stage_took_is_what_the_plan_says(small: RunConfig, tmp_path: Path) -> None:
    before = tree(tmp_path)
    rates = measure(small)
    left = {path.split("/")[0] for path in set(tree(tmp_path)) - set(before)}
    assert left == {"cache"}
    assert min(rates.step, rates.probe, rates.question) > 0 and rates.stage >= 0
    text = format_plan(replace(make_plan(small, memory_gb=24.0), rates=rates))
    assert f"measured here: {STEPS} steps" in text and "about" in text and "assumed" not in text


def test_a_method_that_learns_nothing_cannot_be_measured(small: RunConfig) -> None:
    with pytest.raises(ConfigError, match="zero_shot learns nothing"):
        measure(replace(small, method="zero_shot"))
