"""Too little memory: the phase is named with what lowers it, and a run says beforehand what its plan needs."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mllm_keeplora.commands import run as run_command
from mllm_keeplora.config import ConfigError, RunConfig, TrainConfig
from mllm_keeplora.continual import run_stream
from mllm_keeplora.continual.memory import DeviceMemoryError, memory_explained
from mllm_keeplora.continual.stage import Stage
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.planning import plan as planning
from mllm_keeplora.planning.plan import PlanError, make_plan, smaller_figures, warn_of_memory
from mllm_keeplora.runs.record import StageRecord
from mllm_keeplora.runs.run_directory import RunDirectory

CONFIG = RunConfig(train=TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2))
# As torch, Python, numpy, cuBLAS and the driver raise them.
ERRORS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError,
    "numpy": lambda: np._core._exceptions._ArrayMemoryError((9, 9), np.dtype("f4")),  # type: ignore[attr-defined]
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
}
PHASES = {
    "load": "loading the base model: .*larger device",
    "probe": r"stage 1 \(birds\), phase 'probe': .*probe.batch_size: 4, train.activation_checkpointing: true",
    "train": r"train.per_device_train_batch_size: 4, train.gradient_accumulation_steps: 4, .*; smaller images",
    "protect": "probe.batch_size: 4",
    "rehearse": "probe.batch_size: 4",
    "general": r"the base at the general samples: .*: evaluation.batch_size: 16, probe.batch_size: 4; .*max_new_tokens",
    "recall": "evaluation.batch_size: 16, probe.batch_size: 4; .*max_new_tokens",
    "guard": "probe.batch_size: 4; .*shorter prompts in general.samples",
    "fold": "lower rank",
    "evaluate": "evaluation.batch_size: 16; .*max_new_tokens",
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_names_what_lowers_it(phase: str, error: Callable[[], Exception]) -> None:
    with pytest.raises(DeviceMemoryError, match=PHASES[phase]), memory_explained(phase, CONFIG, 1, "birds"):
        raise error()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ConfigError("out of memory"), ValueError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_explained("train", CONFIG, 1, "birds"):
        raise error
    assert raised.value is error


def test_a_true_failure_of_torch_on_the_cpu_is_recognised() -> None:
    expected = r"stage 2 \(tools\), phase 'train'.*train_overrides.tools.per_device"
    with pytest.raises(DeviceMemoryError, match=expected), memory_explained("train", CONFIG, 2, "tools"):
        torch.empty(1 << 55)


@pytest.mark.parametrize("batch, halved, steps", [(8, 4, 4), (5, 2, 5), (3, 1, 6)])
def test_the_optimizers_step_keeps_its_samples(batch: int, halved: int, steps: int) -> None:
    config = RunConfig(train=TrainConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=2))
    with pytest.raises(DeviceMemoryError) as raised, memory_explained("train", config, 1, "t"):
        raise MemoryError
    smaller = raised.value.smaller
    assert smaller["train.per_device_train_batch_size"] == halved
    assert smaller["train.gradient_accumulation_steps"] == steps
    assert halved * steps >= batch * 2


def test_nothing_is_left_to_halve() -> None:
    config = RunConfig(train=TrainConfig(per_device_train_batch_size=1, activation_checkpointing=True))
    expected = "What lowers it: smaller images"
    with pytest.raises(DeviceMemoryError, match=expected) as raised, memory_explained("train", config, 1, "t"):
        raise MemoryError
    assert raised.value.smaller == {}


def test_a_phase_of_a_stage_says_so(tmp_path: Path) -> None:
    stage = Stage.__new__(Stage)
    stage.run = SimpleNamespace(config=CONFIG)  # type: ignore[assignment]
    stage.header = {"stage": 3, "task": "birds"}
    stage.record = StageRecord(RunDirectory(tmp_path).stage(3, "birds"), {})

    def fail() -> Any:
        raise ERRORS["torch"]()

    with pytest.raises(DeviceMemoryError, match=r"stage 3 \(birds\), phase 'probe': out of memory \(CUDA out of mem"):
        stage.phase("probe", fail)


# --- the plan ---


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The small stream, without its data."""
    folder = tmp_path_factory.mktemp("plan")
    return RunConfig(data_root=str(folder / "data"), run_dir=str(folder / "run"), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("share, outcome", [(2.0, "fits"), (0.8, "warns"), (0.4, "refuses")])
def test_a_run_compares_its_plan_with_the_device(
    config: RunConfig, share: float, outcome: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = int(share * make_plan(config).memory.peak())
    monkeypatch.setattr(planning, "get_max_memory", lambda: {"cpu": free})
    monkeypatch.setattr(planning, "logger", logging.getLogger("plan"))
    if outcome == "refuses":
        with pytest.raises(PlanError, match="GB are there .*does not begin: it needs over 2 times"):
            warn_of_memory(config)
    else:
        warn_of_memory(config)
    assert ("GB are there (free memory of this machine (CPU))" in caplog.text) == (outcome == "warns")


def test_a_base_that_is_spread_is_planned_in_shares(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_plan(config).memory.phases()
    monkeypatch.setattr(planning, "sharding_asked", lambda: True)
    monkeypatch.setattr(planning, "num_processes", lambda: 4)
    shares = make_plan(config).memory.phases()
    item = "base, 4-bit layers"
    assert shares["train"][item] < whole["train"][item] < shares["evaluation"][item]


def test_a_plan_that_cannot_be_made_leaves_the_word_to_the_run(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_memory(replace(config, stream="gone.yaml"))
    assert not caplog.records


@pytest.mark.parametrize("phase", ["probe", "train", "evaluate"])
def test_the_plan_has_figures_for_the_smaller_settings(config: RunConfig, phase: str) -> None:
    with pytest.raises(DeviceMemoryError) as raised, memory_explained(phase, config, 1, "t"):
        raise MemoryError
    words = smaller_figures(config, phase, raised.value.smaller).split()
    before, after = (float(words[n - 1]) for n, word in enumerate(words) if word.startswith("GB"))
    assert before > after > 0


def test_the_command_adds_them(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: RunConfig, *after_stage: Any) -> Any:
        with memory_explained("train", config, 1, "digits"):
            raise ERRORS["torch"]()

    monkeypatch.setattr(run_stream, "run_stream", fail)
    monkeypatch.setattr("mllm_keeplora.recipes.small.streams.draw_small_stream", lambda *_: None)
    with pytest.raises(
        KeepLoRAError, match=r"stage 1 \(digits\), phase 'train'.*By the plan the phase takes 0\.\d+ GB"
    ):
        run_command._run(config)
