"""What a stage works with: the run's shared objects, the stage's own facts, and how both are probed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from mllm_keeplora.config import RunConfig, TrainConfig
from mllm_keeplora.data.collator import IGNORED_LABEL, ChatCollator, SampleDataset
from mllm_keeplora.data.records import Sample, SkippedRecord, select_evenly
from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import hide_bar, own_share
from mllm_keeplora.distributed.sharding import fillers
from mllm_keeplora.modeling.adapters import ACCUMULATED, Factors, attach
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import sketch_gradients
from mllm_keeplora.probes.protected_bases import ProtectedBases
from mllm_keeplora.runs.files import load_tensors

if TYPE_CHECKING:
    from mllm_keeplora.methods.base import Method

Model = PreTrainedModel | PeftModel

# In a stage's directory, and in the run's.
FEATURES, MEMORY, FACTORS = "feature_basis.safetensors", "memory.safetensors", "factors.safetensors"
ADAPTER = "adapter"


@dataclass
class Workplace:
    """What all stages of a run share.

    Attributes:
        config, stream: what was asked for.
        method: what `config.method` names.
        records: task name -> (its training samples, the records left out).
        model: the base model, without adapters between stages.
        processor: of the base model.
        reader: decodes clips, for probes, training and evaluation alike.
        targets: the modules that some task of the stream adapts.
        weight_files: module name -> file with its weight basis; empty where nothing is protected.
        run_dir: where the run writes.
        device: where the model lies.
    """

    config: RunConfig
    method: "Method"
    stream: Stream
    records: Mapping[str, tuple[list[Sample], list[SkippedRecord]]]
    model: PreTrainedModel
    processor: Any
    reader: VideoReader
    targets: list[Target]
    weight_files: Mapping[str, Path]
    run_dir: Path
    device: torch.device

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device."""
        return {key: value.to(self.device) for key, value in batch.items()}


@dataclass
class Stage:
    """One stage's own facts.

    Attributes:
        work: shared by all stages.
        number: 1-based.
        task: what is learnt.
        accumulated: factors of all earlier stages, scales absorbed in B; empty before the first.
        past: their directories, oldest first.
    """

    work: Workplace
    number: int
    task: TaskSpec
    accumulated: Factors
    past: Sequence[Path]

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return stage_directory(self.work.run_dir, self.number, self.task.name)

    @property
    def seed(self) -> int:
        """Seed of everything random in the stage."""
        return self.work.config.seed + self.number

    @cached_property
    def train(self) -> TrainConfig:
        """Training settings, the task's overrides and the method's applied."""
        return self.work.method.train_config(self, self.work.config.train_for(self.task.name))

    @cached_property
    def samples(self) -> list[Sample]:
        """Training samples, in the method's choice."""
        return self.work.method.samples(self)

    def task_samples(self, task: str) -> list[Sample]:
        """A task's own training samples."""
        return self.work.records[task][0]

    @cached_property
    def collator(self) -> ChatCollator:
        """Samples to model inputs; shared by probes and training because it remembers tokens."""
        return ChatCollator(self.work.processor, self.train.max_length, self.work.reader)

    @cached_property
    def targets(self) -> list[Target]:
        """The modules that the task's samples reach; of Video-LLaVA's two vision towers, say, the one for
        clips."""
        media = {sample.media for sample in self.samples if sample.media is not None}
        return [target for target in self.work.targets if target.is_reached_by(media)]

    @cached_property
    def probe_indices(self) -> list[int]:
        """The samples from which task gradients are measured."""
        probe = self.work.config.probe
        return select_evenly(len(self.samples), probe.fraction, probe.max_samples)

    @property
    def bases(self) -> ProtectedBases:
        """M, under which the stage trains."""
        features = [directory / FEATURES for directory in self.past]
        return ProtectedBases(self.work.weight_files, features, self.work.device)

    def memories(self) -> list[dict[str, Tensor]]:
        """What the method's `remember` kept after each earlier stage, oldest first; fp32 on the CPU."""
        return [load_tensors(directory / MEMORY) for directory in self.past]

    @property
    def scales(self) -> dict[str, float]:
        """s_l = lambda_l * alpha / r with the nominal r, per module (E5)."""
        return {t.name: self.scale(t, self.work.method.layer_scale) for t in self.targets}

    @property
    def folded_scales(self) -> dict[str, float]:
        """The same once the stage is folded."""
        return {t.name: self.scale(t, self.work.method.folded_layer_scale) for t in self.targets}

    def scale(self, target: Target, layer_scale: Callable[[RunConfig, Target], float]) -> float:
        """s_l of one module for a lambda_l."""
        config = self.work.config
        return layer_scale(config, target) * config.alpha / self.rank(target)

    def rank(self, target: Target) -> int:
        """The nominal r of a module."""
        return self.work.config.towers()[target.tower].rank

    def probe_batches(self, batch_size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The probe sample as model inputs with labels, in order; of several processes each takes its share.

        Args:
            batch_size: samples per forward; the probe's own when None.

        Batches are shared out whole: one process's batches are those of a run with one, padding included.
        """
        samples = SampleDataset([self.samples[i] for i in self.probe_indices])
        size = batch_size or self.work.config.probe.batch_size
        rows = [list(range(len(samples)))[start : start + size] for start in range(0, len(samples), size)]
        own = own_share(rows)
        own_and_fillers = [*own, *fillers(self.work.model, own, rows[0])]
        loader = DataLoader(samples, batch_sampler=own_and_fillers, collate_fn=self.collator)
        progress = tqdm(loader, desc="task gradients", unit="batch", disable=hide_bar(), leave=False)
        for number, batch in enumerate(progress):
            if number >= len(own):
                batch["labels"].fill_(IGNORED_LABEL)
            yield self.work.to_device(batch)

    def sketch(self, model: Model, pass_number: int) -> dict[str, Tensor]:
        """Omega^T G of every module, q = columns_per_rank * r; each pass of the run draws its own Omega."""
        return sketch_gradients(
            model,
            self.targets,
            self._columns(),
            self.probe_batches,
            2 * self.seed + pass_number,
        )

    def sketch_inputs(self, model: Model, pass_number: int) -> dict[str, Tensor]:
        """Omega^T X of every module's inputs, as `sketch` of its gradient."""
        seed = 2 * self.seed + pass_number
        return sketch_inputs(model, self.targets, self._columns(), self.probe_batches, seed)

    def _columns(self) -> dict[str, int]:
        per_rank = self.work.config.probe.columns_per_rank
        return {t.name: per_rank * self.rank(t) for t in self.targets}


def stage_directory(run_dir: Path, number: int, task: str | None) -> Path:
    """`stages/00-base`, `stages/01-<task>`, .."""
    return run_dir / "stages" / f"{number:02d}-{task or 'base'}"


def attach_accumulated(model: PreTrainedModel, accumulated: Factors) -> Model:
    """The current model: the base, or the base with the folded past."""
    return attach(model, ACCUMULATED, accumulated, dict.fromkeys(accumulated, 1)) if accumulated else model


def detach(model: Model) -> None:
    """Takes every adapter off again."""
    if isinstance(model, PeftModel):
        model.unload()


def active_adapters(model: Model) -> list[str]:
    """The adapters that belong to the current model; none on the bare base."""
    return list(model.active_adapters) if isinstance(model, PeftModel) else []
