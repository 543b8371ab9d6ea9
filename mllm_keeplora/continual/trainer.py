"""Training one stage's LoRA factor with the HF Trainer.

Factors are fp32. Training can be resumed, and it stops at NaN. The base computes in its own dtype (bf16 on GPUs, set
when it is loaded). PEFT casts the LoRA path to the factors' fp32. Autocast stays off: under it an fp32 A would answer
protected inputs with an error of 2e-3 in place of rounding.

Several processes train by DDP on one global batch. Its size is per_device_train_batch_size x processes x
gradient_accumulation_steps. The Trainer divides by the number of supervised tokens of all processes, so one step equals
one process's step on that batch.

An epoch's last batches may lack samples for some processes. accelerate then fills them with the epoch's first samples
(even_batches). So all processes take the same number of steps, which is the number that one process takes. Fewer than
per_device_train_batch_size x processes samples count twice, and their number is logged and recorded. Filling stays on,
since a process without a batch would leave the others waiting.
"""

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import integration_utils
from transformers.trainer_utils import get_last_checkpoint

from mllm_keeplora.config import ConfigError, TrainConfig
from mllm_keeplora.data.collator import ready_batch
from mllm_keeplora.distributed.processes import from_main, num_processes
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.methods.hooks import Batch, Hooks, Step
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.runs.files import (
    ArtifactError,
    WriteError,
    hash_files,
    read_sealed,
    remove,
    umask_kept,
    write_sealed,
)

logger = get_logger(__name__)

STAGE_WEIGHTS = "stage.safetensors"
COMPLETE = "complete"
# What the Trainer logs of a step and the report shows.
CURVES = ("loss", "learning_rate", "grad_norm")


class TrainingError(KeepLoRAError, RuntimeError):
    """Training that must not go on."""


# The batch with further samples behind it, which the task's loss leaves out, and their own loss of its logits.
Joined = tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]
# Given a batch, the steps so far and the forwards of this one; None where nothing passes beside that batch.
Beside = Callable[[Mapping[str, Tensor], int, int], Joined | None]


class StageTrainer(Trainer):
    """HF Trainer that checkpoints exactly the trainable parameters.

    Stock resuming loads only the first active adapter (here the frozen past), makes its factors trainable and
    then fails on the optimizer's group size; hence saving and loading the stage's own parameters.
    """

    def __init__(
        self,
        *args: Any,
        finite: "FiniteGradients",
        hooks: Hooks = Hooks(),  # noqa: B008 (immutable)
        beside: Beside | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Qwen's models say that they take no number of tokens, and take it. The Trainer would give them a mean of the
        # batches' means, and divide what is added to the loss a second time by the forwards of a step.
        self.model_accepts_loss_kwargs = True
        self._finite, self._hooks, self._beside = finite, hooks, beside
        self._task_alone = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; beside it the method's penalty, and that of what passes with the batch.

        The forwards of one step share both. Training calls it, and asks for no outputs.
        """
        step, forwards, more = self.state.global_step, self.current_gradient_accumulation_steps, []
        if self._hooks.penalty is not None and not self._task_alone:
            more.append(self._hooks.penalty(step))
        beside = self._beside(inputs, step, forwards) if self._beside is not None and not self._task_alone else None
        if beside is None:
            loss: Any = super().compute_loss(model, inputs, False, num_items_in_batch)
        else:
            joined, loss_of = beside
            loss, outputs = super().compute_loss(model, joined, True, num_items_in_batch)
            more.append(loss_of(outputs["logits"]))
        return loss + sum(more) / forwards if more else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward, or what the method has in place of it; `FiniteGradients` looks at the loss."""

        def backward(batch: Batch, task_alone: bool) -> Tensor:
            self._task_alone = task_alone
            return super(StageTrainer, self).training_step(model, dict(batch), num_items_in_batch)

        gradients, step = self._hooks.gradients, Step(self.state.global_step, self.state.max_steps)
        loss = gradients(inputs, step, backward) if gradients else backward(inputs, False)
        self._finite.losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate walks through all modules at each step and is not read."""
        return 0

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """DDP, which leaves frozen parameters alone, where they lie.

        accelerate's own refuses a sharded base, and takes a process's number for that of its GPU: where a launcher
        shows each process its own GPU alone, every process but the first would look for one that is not there.
        """
        if num_processes() == 1:
            return super()._wrap_model(model, *args, **kwargs)
        unused = bool(self.args.ddp_find_unused_parameters)
        return DistributedDataParallel(model, find_unused_parameters=unused)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        model: PeftModel = self.model  # type: ignore[assignment]
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(str(output_dir or self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        with umask_kept(directory / STAGE_WEIGHTS):
            save_file(
                {n: p.detach().cpu().contiguous() for n, p in self._trainable().items()},
                directory / STAGE_WEIGHTS,
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            return  # the Trainer would take one more step on resuming from the last one
        try:
            super()._save_checkpoint(model, trial)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch reports a full disk as a RuntimeError
            raise WriteError(
                f"cannot write a checkpoint to {self.args.output_dir}: {error}. Make room and run "
                "the same command again; "
                "it continues from the checkpoint before"
            ) from error
        # Marks a checkpoint whose every file is written, each process's generators included: a kill in the
        # middle leaves one without the mark. The hashes in it tell a file that was changed later.
        self.accelerator.wait_for_everyone()
        mark = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}", COMPLETE)
        from_main(lambda: _write_mark(mark))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, STAGE_WEIGHTS))
        parameters = self._trainable()
        if saved.keys() != parameters.keys():
            raise TrainingError(
                f"{resume_from_checkpoint} holds {len(saved)} parameters, the stage trains {len(parameters)}; delete it"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def _write_mark(mark: Path) -> None:
    write_sealed(mark, {"processes": num_processes(), "files": hash_files(mark.parent, skip=(mark.name,))})


class FiniteGradients(TrainerCallback):
    """Stops before the optimizer would write a NaN gradient into the factor.

    The host waits for the device once in an optimizer step, however many forwards that has.

    Attributes:
        losses: of the forwards since the last step.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the losses, and every trainable parameter's gradient.

        Raises:
            TrainingError: a loss or a gradient that is NaN or infinite.
        """
        losses, self.losses = self.losses, []
        # The optimizer knows what trains; walking through all modules of the model again costs time.
        groups = kwargs["optimizer"].param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if torch.isfinite(torch.stack([*losses, norms.sum()])).all():
            return
        wrong = [loss for loss in losses if not torch.isfinite(loss)]
        what = f"the loss is {wrong[0].item()}" if wrong else "a gradient is not finite"
        raise TrainingError(
            f"{what} at step {state.global_step + 1}: lower train.learning_rate"
            f"{' or check the data' if wrong else ''}; completed stages are untouched"
        )


class Progress(TrainerCallback):
    """Shows how far a stage's training has come, with the last mean loss."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After what a checkpoint has brought."""
        self._bar = progress("training", "steps", total=state.max_steps, initial=state.global_step)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After every optimizer step."""
        self._bar.update()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Every `logging_steps`."""
        if "loss" in (logs := kwargs["logs"]):
            self._bar.set_postfix_str(f"loss {logs['loss']:.3g}", refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """When the last step is done."""
        self._bar.close()


class AfterStep(TrainerCallback):
    """Calls the method's hook when the optimizer has moved the factors."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        self._after_step = after_step

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """After every optimizer step."""
        self._after_step()


def train_stage(
    model: PeftModel,
    samples: Dataset[Any],
    collator: Any,
    config: TrainConfig,
    *,
    seed: int,
    directory: Path,
    log_dir: Path,
    mixed: bool,
    report_to: Sequence[str],
    device: torch.device,
    hooks: Hooks = Hooks(),  # noqa: B008 (immutable)
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Trains the model's trainable parameters on one task.

    Args:
        model: with the adapters active and exactly the stage's factor trainable, in fp32.
        samples: the task's training samples.
        collator: samples -> model inputs with labels.
        config: settings.
        seed: of the order of samples and of dropout.
        directory: where checkpoints inside the stage go; an interrupted training continues from the last
            complete one that the same number of processes wrote.
        log_dir: where TensorBoard finds the curves.
        mixed: whether samples differ in what they show (an image, a clip, nothing): a batch may then leave
            the vision tower out, on some processes or on all.
        report_to: the Trainer's loggers.
        device: where the model lies.
        hooks: what the method adds to each step.
        beside: what passes through the model together with each batch.

    Returns:
        {"steps", "repeated_samples": how many an epoch shows twice, "loss": [[step, mean loss since the last
        entry], ..], "learning_rate" and "grad_norm" (before clipping) likewise, of that step alone}; the same on all
        processes.

    Raises:
        TrainingError: a trainable parameter that is not fp32; a loss or gradient that is NaN or infinite.
        WriteError: no room for a checkpoint.
        PrecisionError: a device whose fp32 products are not.
    """
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise TrainingError(f"{len(wrong)} trainable parameters are not fp32, {wrong[0]} first")
    exact_products(device)
    checkpoint = from_main(lambda: _begin(directory, log_dir))
    repeated = _repeated_samples(samples, config)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_dir)
    _leave_frozen_parameters_alone(model)
    finite = FiniteGradients()
    trainer = StageTrainer(
        model=model,
        finite=finite,
        args=_arguments(config, seed, directory, report_to, device, mixed),
        train_dataset=samples,
        data_collator=partial(_collated, collator, cast(torch.dtype, model.get_base_model().dtype)),
        callbacks=[finite, Progress(), *([AfterStep(hooks.after_step)] if hooks.after_step else [])],
        hooks=hooks,
        beside=beside,
    )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries
    trainer.train(resume_from_checkpoint=checkpoint)
    log = trainer.state.log_history
    curves = {name: [[entry["step"], entry[name]] for entry in log if name in entry] for name in CURVES}
    return {"steps": trainer.state.global_step, "repeated_samples": repeated, **curves}


def _collated(collator: Any, dtype: torch.dtype, samples: Any) -> dict[str, Tensor]:
    return ready_batch(collator(samples), dtype)


def _begin(directory: Path, log_dir: Path) -> str | None:
    checkpoint = last_complete_checkpoint(directory)
    if checkpoint is None:  # whatever lies there is redone from its start, the curves too
        remove(directory)
        remove(log_dir)
    elif not log_dir.is_dir():
        remove(log_dir)
    return checkpoint


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that can be continued; those that cannot are removed.

    They are half-written or were changed since. So are those of another number of processes: which samples each
    of them has seen depends on it.
    """
    for entry in directory.iterdir() if directory.is_dir() else ():
        if not entry.is_dir():  # the Trainer would make a folder of that name
            remove(entry)
    while directory.is_dir() and (found := get_last_checkpoint(str(directory))) is not None:
        reason = _why_not_continued(Path(found))
        if reason is None:
            return found
        if Path(found, COMPLETE).exists():
            logger.warning(f"{found} {reason}: it is not continued")
        shutil.rmtree(found)
    return None


def _why_not_continued(checkpoint: Path) -> str | None:
    try:
        mark = read_sealed(checkpoint / COMPLETE, "it is removed")
    except ArtifactError:
        return "is not complete"
    if mark["processes"] != num_processes():
        return f"was written by {mark['processes']} process(es) and the run now has {num_processes()}"
    if mark["files"] != hash_files(checkpoint, skip=(COMPLETE,)):
        return "was changed since it was written"
    return None


def _repeated_samples(samples: Any, config: TrainConfig) -> int:
    """Samples that accelerate shows twice in an epoch so that its last batches are full (even_batches)."""
    if num_processes() == 1:
        return 0
    repeated: int = -len(samples) % (config.per_device_train_batch_size * num_processes())
    if repeated:
        logger.info(f"{repeated} of {len(samples)} samples come twice in an epoch, to fill every batch")
    return repeated


def _leave_frozen_parameters_alone(model: PeftModel) -> None:
    """DDP would send the frozen base, buffers included, from one process to all; each has loaded it."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*frozen, *buffers})


def check_settings(config: TrainConfig, device: torch.device) -> None:
    """Lets the Trainer judge the settings before a run has cost anything, on one weight.

    Raises:
        ConfigError: a value that it refuses, such as an unknown optimizer or one whose package is not installed, or a
            schedule that needs settings of its own.
    """
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    try:
        arguments = _arguments(config, 0, Path(), (), device, mixed=False)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        get_scheduler(arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train: optim or lr_scheduler_type cannot be used: {error}") from error


def check_loggers(report_to: Sequence[str]) -> None:
    """Looks for each logger before a run has cost anything.

    Raises:
        ConfigError: one that transformers does not know, whose package is not installed, or wandb without a login.
    """
    names = loggers(report_to)
    try:
        callbacks = integration_utils.get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from error
    for name, callback in zip(names, callbacks, strict=True):
        try:
            callback()  # made as the Trainer makes it, which looks for its package
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"report_to: the package of {name} is not installed; install it, or leave {name} out ({error})"
            ) from error
    if "wandb" in names and not _wandb_can_log():
        raise ConfigError(
            "report_to: wandb has no login here; run `wandb login`, set WANDB_MODE=offline, or leave wandb out"
        )


def loggers(report_to: Sequence[str]) -> list[str]:
    """The loggers' names, `all` and `none` resolved."""
    return list(_arguments(TrainConfig(), 0, Path(), report_to, torch.device("cpu"), mixed=False).report_to or ())


def _wandb_can_log() -> bool:
    wandb = importlib.import_module("wandb")
    return wandb.setup().settings.mode in ("offline", "disabled") or bool(wandb.api.api_key)


def _arguments(
    config: TrainConfig,
    seed: int,
    directory: Path,
    report_to: Sequence[str],
    device: torch.device,
    mixed: bool,
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.activation_checkpointing else None,
        optim=config.optim,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.dataloader_num_workers,
        remove_unused_columns=False,
        report_to=list(report_to),
        disable_tqdm=True,  # `Progress` has a bar of its own
        seed=seed,
        data_seed=seed,
        accelerator_config={"non_blocking": device.type == "cuda"},  # there batches come in pinned memory
        bf16=False,
        fp16=False,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=mixed,
    )
    if arguments.n_gpu > 1:  # one process trains on one GPU; the Trainer would split batches over all it sees
        arguments._n_gpu = 1
    return arguments
