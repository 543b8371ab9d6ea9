"""A whole KeepLoRA++ stage beside plain QLoRA by TRL and PEFT: same base, data, order of batches and steps.

    python benchmarks/stage.py

The first task of the embedded image stream, with the recipe's own settings but half its steps; evaluation
and loading are left out on both sides. QLoRA is TRL's SFTTrainer on PEFT's LoRA of the same rank on the same
layers, both factors trained, with this project's collator. The stage is `run_stage`: probe, A, training,
checks, fold, feature basis; its weight bases are cached, or computed as in a run's first stage.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import datasets
import torch
from measure import ROOT, Options, Row, benchmark, in_turns, ratio
from peft import LoraConfig, get_peft_model
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.continual.run import _History, _open_workplace
from mllm_keeplora.continual.stage import run_stage
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.distributed.processes import start_processes
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import Stage, Workplace
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.recipes.small.streams import draw_small_stream  # noqa: E402

STEPS = {"max_steps": 400}  # beside which the probe weighs twice what it does in the recipe
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4}


def settings(folder: Path, quick: bool) -> RunConfig:
    """The embedded recipe, evaluated on next to nothing."""
    config = parse_config("", Path("recipes/configs/vqa/small.yaml"), [])
    train = replace(config.train, **(QUICK if quick else STEPS))  # type: ignore[arg-type]
    return replace(
        config,
        run_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        train=train,
        probe=replace(config.probe, max_samples=8) if quick else config.probe,
        evaluation=replace(config.evaluation, limit=1),
        report_to=[],
    )


def open_workplace(config: RunConfig) -> Workplace:
    """What a run works with; weight bases computed."""
    stream = load_stream(Path(config.stream))
    history = _History.read(config, stream, Path(config.run_dir))
    write_task_files(stream, Path(config.run_dir) / "eval_tasks")
    return _open_workplace(history, load_method(config))


class KeepLoraStage:
    """Stages of one task, one after the other; `evaluation` collects the seconds to be left out."""

    def __init__(self, work: Workplace) -> None:
        self.work = work
        self.evaluation: list[float] = []

    def __call__(self) -> None:
        """One stage from its beginning."""
        stage = Stage(self.work, 1, self.work.stream.tasks[0], {}, [])
        shutil.rmtree(stage.directory, ignore_errors=True)
        stage.directory.mkdir(parents=True)
        timings = run_stage(stage, {"data": {}}).manifest["timings"]
        self.evaluation.append(timings["evaluation"])


def qlora(config: RunConfig, work: Workplace, folder: Path) -> "SFTTrainer":
    """TRL's trainer, ready to train."""
    base, processor = load_base(config.model)
    names = [t.name for t in work.targets]
    rank = config.language.rank
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=int(config.alpha), target_modules=names))
    samples = work.records[work.stream.tasks[0].name][0]
    collator = ChatCollator(processor, config.train.max_length, work.reader)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, folder),
        train_dataset=datasets.Dataset.from_dict({"number": list(range(len(samples)))}),
        data_collator=lambda rows: collator([samples[row["number"]] for row in rows]),
        processing_class=processor,
    )
    for parameter in model.parameters():  # TRL halves what trains on a 4-bit base; both sides train in fp32
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _arguments(config: RunConfig, folder: Path) -> SFTConfig:
    train = config.train
    return SFTConfig(
        output_dir=str(folder / "qlora"),
        learning_rate=train.learning_rate,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.logging_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
    )


def compare(options: Options, folder: Path) -> list[Row]:
    """Row 4: with cached weight bases, and with the time of computing them added."""
    config = settings(folder, options.quick)
    work = open_workplace(config)
    stage = KeepLoraStage(work)
    trainers = [qlora(config, work, folder) for _ in range(options.repeats + 1)]
    ways: dict[str, Any] = {"stage": stage, "qlora": lambda: trainers.pop().train()}
    seconds = in_turns(ways, options.repeats, options.device)
    own = [s - e for s, e in zip(seconds["stage"], stage.evaluation[1:], strict=True)]
    first = [s + bases_seconds(config, work, folder) for s in own]
    what = f"a stage of {config.train.max_steps} steps of {config.train.per_device_train_batch_size}"
    make = partial(_row, what, seconds["qlora"])
    return [make("weight bases cached", own, 1.10), make("weight bases computed", first, 1.25)]


def _row(what: str, beside: list[float], which: str, own: list[float], goal: float) -> Row:
    found = ratio(own, beside)
    return Row(
        4,
        f"{what}, {which}",
        f"{statistics.median(own):.1f} s",
        f"{statistics.median(beside):.1f} s, QLoRA by TRL and PEFT",
        f"{found} x the time",
        f"<= {goal:.2f}",
        found.median <= goal,
        "two passes over the probe sample beside the steps",
    )


def bases_seconds(config: RunConfig, work: Workplace, folder: Path) -> float:
    """Seconds of computing all weight bases."""
    eps_w = {name: tower.eps_w for name, tower in config.towers().items()}
    target = folder / "bases"
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    weight_basis_files(work.model, work.targets, eps_w, target)
    return time.perf_counter() - started


def rows(options: Options) -> list[Row]:
    """Row 4."""
    start_processes(cpu=options.device.type == "cpu")
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(ROOT):
        draw_small_stream("recipes/streams/small_vqa.yaml")
        return compare(options, Path(name))


if __name__ == "__main__":
    benchmark(__doc__ or "", rows)
