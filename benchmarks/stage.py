"""Row 4: a whole KeepLoRA++ stage beside plain QLoRA by TRL and PEFT: same base, data, batches and steps.

    python benchmarks/stage.py

The first task of the small image stream, with the recipe's own settings but half its steps. Evaluation and
loading are left out on both sides. QLoRA is TRL's SFTTrainer on PEFT's LoRA of the same rank on the same
layers, both factors trained, with this project's collator. The stage is `run_stage`: probe, A, training,
checks, fold, feature basis. Its weight bases are cached, or computed as in a run's first stage.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import datasets
import torch
from measure import Options, Row, benchmark, in_turns, ratio
from peft import LoraConfig, get_peft_model
from small_streams import small_config
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mllm_keeplora.config import RunConfig, TrainConfig
from mllm_keeplora.continual.run import Run
from mllm_keeplora.continual.run_stream import run_stage
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.methods.context import RunContext
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.probes.protected_bases import weight_basis_files

STEPS = 400  # beside which the probe weighs twice what it does in the recipe


def settings(folder: Path, quick: bool) -> RunConfig:
    """The recipe's, evaluated on next to nothing."""
    places = {"run_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}
    config = small_config("vqa", **places, report_to=[])
    config = replace(config, evaluation=replace(config.evaluation, limit=1))
    if not quick:
        return replace(config, train=replace(config.train, max_steps=STEPS))
    train = replace(config.train, max_steps=2, per_device_train_batch_size=4)
    return replace(config, train=train, probe=replace(config.probe, max_samples=8))


class FirstStage:
    """A run's first stage, from its beginning at every call.

    Attributes:
        evaluation: seconds of each call that went into evaluation.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.evaluation: list[float] = []

    def __call__(self) -> None:
        """Does it again."""
        history = self.run.history
        history.manifests.clear()
        shutil.rmtree(history.stage(1).path, ignore_errors=True)
        run_stage(self.run, 1, {})
        self.evaluation.append(history.manifests[-1]["timings"]["evaluate"])


def qlora(context: RunContext, folder: Path) -> "SFTTrainer":
    """TRL's trainer, ready to train."""
    config = context.config
    base, processor = load_base(config.model)
    names = [t.name for t in context.targets]
    rank = config.language.rank
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=int(config.alpha), target_modules=names))
    samples = context.task_samples(context.stream.tasks[0].name)
    collator = ChatCollator(processor, config.train.max_length, context.reader)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config.train, folder),
        train_dataset=datasets.Dataset.from_dict({"number": list(range(len(samples)))}),
        data_collator=lambda rows: collator([samples[row["number"]] for row in rows]),
        processing_class=processor,
    )
    for parameter in model.parameters():  # TRL halves what trains on a 4-bit base; both sides train in fp32
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _arguments(train: TrainConfig, folder: Path) -> SFTConfig:
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


def compare(run: Run, options: Options, folder: Path) -> list[Row]:
    """Row 4: with cached weight bases, and with the time of computing them added."""
    stage, train = FirstStage(run), run.config.train
    trainers = [qlora(run.context, folder) for _ in range(options.repeats + 1)]
    ways: dict[str, Callable[[], object]] = {"stage": stage, "qlora": lambda: trainers.pop().train()}
    seconds = in_turns(ways, options.repeats, options.device)
    own = [s - e for s, e in zip(seconds["stage"], stage.evaluation[1:], strict=True)]
    first = [s + bases_seconds(run.context, folder / "bases") for s in own]
    what = f"a stage of {train.max_steps} steps of {train.per_device_train_batch_size}"
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


def bases_seconds(context: RunContext, folder: Path) -> float:
    """Seconds of computing all weight bases."""
    eps_w = {name: tower.eps_w for name, tower in context.config.towers().items()}
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    weight_basis_files(context.model, context.targets, eps_w, folder)
    return time.perf_counter() - started


def rows(options: Options) -> list[Row]:
    """Row 4."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Run.open(settings(folder, options.quick)) as run:
            return compare(run, options, folder)


if __name__ == "__main__":
    benchmark(__doc__, rows)
