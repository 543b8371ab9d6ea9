"""Training a stage: what must move, what must not, resuming, and fatal NaNs."""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset
from transformers import TrainingArguments

from mllm_keeplora.config import ConfigError, ModelConfig, TrainConfig
from mllm_keeplora.continual import trainer as trainer_module
from mllm_keeplora.continual.trainer import (
    COMPLETE,
    StageTrainer,
    TrainingError,
    last_complete_checkpoint,
    train_stage,
)
from mllm_keeplora.data.collator import ready_batch
from mllm_keeplora.distributed.processes import start_processes
from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, activate, attach, factor_parameters
from mllm_keeplora.modeling.loading import load_base, resolve_device
from mllm_keeplora.modeling.loss import answers_alone
from mllm_keeplora.probes.gradients import sketch_gradients
from mllm_keeplora.runs.files import WriteError
from tests.modules.conftest import all_targets, batch, model_config

CPU = torch.device("cpu")


class Rows(Dataset[int]):
    """Row numbers; the collator makes them model inputs."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    whole = batch(12)
    return {key: value[rows] for key, value in whole.items()}


def prepare(tiny_llava: Path, trainable: str = "B") -> PeftModel:
    model: Any = load_base(model_config(tiny_llava, "nf4"))[0]
    targets = all_targets(model)
    torch.manual_seed(0)
    past = {t.name: (0.1 * torch.randn(3, t.in_features), 0.1 * torch.randn(t.out_features, 3)) for t in targets}
    new = {t.name: (torch.randn(2, t.in_features), torch.zeros(t.out_features, 2)) for t in targets}
    adapted = attach(model, ACCUMULATED, past, dict.fromkeys(past, 1.0))
    adapted = attach(adapted, STAGE, new, dict.fromkeys(new, 1.0))
    activate(adapted, [ACCUMULATED, STAGE], STAGE, trainable)  # type: ignore[arg-type]
    return adapted


def train(model: PeftModel, directory: Path, **settings: Any) -> dict[str, Any]:
    config = TrainConfig(**{"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, **settings})
    return train_stage(
        model,
        Rows(),
        collate,
        config,
        seed=1,
        directory=directory / "checkpoints",
        log_dir=directory / "logs",
        mixed=False,
        report_to=[],
        device=CPU,
    )


def parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("trainable, moving", [("B", ["lora_B"]), ("both", ["lora_A", "lora_B"])])
def test_exactly_the_stages_trainable_factors_move(
    tiny_llava: Path, tmp_path: Path, trainable: str, moving: list[str]
) -> None:
    model = prepare(tiny_llava, trainable)
    before = parameters(model)
    with mock.patch("transformers.trainer.logger.warning") as warned:
        account = train(model, tmp_path)
    warned.assert_not_called()  # a stage's settings fit each other
    moved = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    expected = {n for n in before if f".{STAGE}." in n and any(factor in n for factor in moving)}
    assert moved == expected
    assert account["steps"] == 6


@pytest.mark.parametrize(
    "name, asked",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_a_launchers_file_does_not_change_what_a_stage_computes(
    tiny_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    asked: str,
) -> None:
    """`accelerate config` proposes bf16: autocast rounds A x, so that A answers protected inputs with 2e-3."""
    plain, launched = prepare(tiny_llava), prepare(tiny_llava)
    train(plain, tmp_path / "plain", max_steps=2)
    monkeypatch.setenv(name, asked)
    with caplog.at_level("WARNING", "mllm_keeplora"):
        start_processes(cpu=True)
    assert [asked in record.getMessage() for record in caplog.records] == [True]
    train(launched, tmp_path / "launched", max_steps=2)
    expected = parameters(plain)
    assert all(torch.equal(p, expected[key]) for key, p in parameters(launched).items())


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_an_engine_of_training_that_runs_do_not_have_is_refused(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{engine}.*recipes/accelerate/ddp.yaml"):
        start_processes(cpu=True)


@pytest.mark.parametrize("visible", [1, 4])
def test_a_process_trains_where_its_model_lies(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: int
) -> None:
    """Process 3 of a machine, whose launcher shows it its own GPU alone or all: DDP moves a batch to no other one."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert resolve_device(ModelConfig(device="cuda")) == torch.device("cuda", 3 % visible)
    monkeypatch.undo()
    trainer: Any = object.__new__(StageTrainer)
    trainer.args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, ddp_find_unused_parameters=False)
    trainer.accelerator = mock.Mock(unwrap_model=lambda model, **_: model)
    model = prepare(tiny_llava)
    trainer.is_fsdp_xla_enabled = False
    monkeypatch.setattr(trainer_module, "num_processes", lambda: 2)
    with mock.patch.object(trainer_module, "DistributedDataParallel") as ddp:
        trainer._wrap_model(model)
    ddp.assert_called_once_with(model, find_unused_parameters=False)  # no device_ids: the model's own device


def test_a_trained_update_never_leaves_the_row_space_of_a(tiny_llava: Path, tmp_path: Path) -> None:
    """E6, with weight decay and clipping at work: dW M stays 0 for M orthogonal to A."""
    model = prepare(tiny_llava)
    train(model, tmp_path, weight_decay=0.1, max_grad_norm=0.5)
    for target in all_targets(load_base(model_config(tiny_llava, "nf4"))[0]):
        a, b = (p.detach().double() for p in factor_parameters(model, STAGE, target.name))
        complement = torch.linalg.qr(a.T, mode="complete").Q[:, a.shape[0] :]
        assert ((b @ a) @ complement).norm() / (b @ a).norm() < 1e-6, target.name


def test_a_resumed_training_equals_the_uninterrupted_one(tiny_llava: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    uninterrupted = prepare(tiny_llava)
    account = train(uninterrupted, whole, save_steps=2, logging_steps=1)
    # The state that a kill after step 2 leaves: its checkpoint, and one torn off in the middle.
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", half / "checkpoints" / "checkpoint-2")
    torn = shutil.copytree(whole / "checkpoints" / "checkpoint-4", half / "checkpoints" / "checkpoint-4")
    (torn / COMPLETE).unlink()
    resumed = prepare(tiny_llava)
    assert train(resumed, half, save_steps=2, logging_steps=1) == account
    expected = parameters(uninterrupted)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(resumed).items())


def test_a_training_that_ended_without_being_recorded_takes_no_further_step(tiny_llava: Path, tmp_path: Path) -> None:
    """A kill after the last step, before its result is written; a further step would still move it."""
    settings = {"save_steps": 2, "lr_scheduler_type": "constant"}
    first, again = prepare(tiny_llava), prepare(tiny_llava)
    account = train(first, tmp_path, **settings)
    assert train(again, tmp_path, **settings)["steps"] == account["steps"] == 6
    expected = parameters(first)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(again).items())


def test_checkpoints_hold_the_trainable_parameters_and_no_pickled_weights(tiny_llava: Path, tmp_path: Path) -> None:
    train(prepare(tiny_llava), tmp_path, save_steps=3)
    found = last_complete_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    names = {path.name for path in Path(found).iterdir()}
    assert "stage.safetensors" in names
    assert not {"training_args.bin", "pytorch_model.bin"} & names


def test_no_room_for_a_checkpoint_is_said_plainly(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("transformers.trainer.torch.save", full_disk)
    with pytest.raises(WriteError, match="cannot write a checkpoint.*run the same command again"):
        train(prepare(tiny_llava), tmp_path, save_steps=3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_training(tiny_llava: Path, tmp_path: Path, where: str) -> None:
    model = prepare(tiny_llava)
    if where == "loss":
        with torch.no_grad():
            factor_parameters(model, STAGE, all_targets_of(model)[0])[0].fill_(float("nan"))
        message = "the loss is nan at step 1"
    else:
        parameter = factor_parameters(model, STAGE, all_targets_of(model)[0])[1]
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        message = "a gradient is not finite at step 1"
    with pytest.raises(TrainingError, match=message):
        train(model, tmp_path)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_in_no_forward_of_ours(tiny_llava: Path, tmp_path: Path) -> None:
    """Beside what transformers' own forward waits for; and once in an optimizer step, whatever is accumulated."""
    model, inputs = prepare(tiny_llava), ready_batch(collate([0, 1, 2, 3]), torch.float32)
    with Waits() as own:
        model(**inputs, num_items_in_batch=3).loss.backward()
    forward, found = own.count, {}
    for accumulated in (1, 3):
        model = prepare(tiny_llava)
        # What a worker process makes on the CPU is no wait.
        with mock.patch.object(trainer_module, "_collated", lambda *_: dict(inputs)), Waits() as waits:
            train(model, tmp_path / str(accumulated), max_steps=1, gradient_accumulation_steps=accumulated)
        found[accumulated] = waits.count
    assert found[3] - found[1] == 2 * forward
    base, steps = load_base(model_config(tiny_llava, "nf4"))[0], {}
    for number in (1, 3):
        batches = [answers_alone(batch(3, seed)) for seed in range(number)]
        with Waits() as waits:
            sketch_gradients(
                base, all_targets(base), {t.name: 2 for t in all_targets(base)}, lambda batches=batches: batches, 0
            )
        steps[number] = waits.count
    assert steps[3] - steps[1] == 2 * forward


def all_targets_of(model: PeftModel) -> list[str]:
    return [
        n.removeprefix("base_model.model.").split(".lora_A")[0]
        for n, _ in model.named_parameters()
        if f"lora_A.{STAGE}" in n
    ]


def test_half_precision_factors_are_refused(tiny_llava: Path, tmp_path: Path) -> None:
    model = prepare(tiny_llava)
    parameter = factor_parameters(model, STAGE, all_targets_of(model)[0])[1]
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(TrainingError, match="not fp32"):
        train(model, tmp_path)
