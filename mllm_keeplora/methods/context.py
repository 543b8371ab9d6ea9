"""What a method works with: the objects of a run, the facts of one stage, and how both are probed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from mllm_keeplora.config import RunConfig, Tower, TrainConfig
from mllm_keeplora.data.classification import ClassCollator
from mllm_keeplora.data.collator import ChatCollator, SampleDataset, collator_of, ready_batch
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.records import SkippedRecord, select_evenly
from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import own_share
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.distributed.sharding import fillers
from mllm_keeplora.modeling.adapters import Factors, Model
from mllm_keeplora.modeling.loss import IGNORED_LABEL, Teacher
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import sketch_gradients
from mllm_keeplora.probes.protected_bases import ProtectedBases
from mllm_keeplora.runs.files import load_tensors
from mllm_keeplora.runs.run_directory import RunDirectory, StageDirectory


class Lesson(NamedTuple):
    """A sample with a model's own reply, which a stage learns beside its task (G3).

    Attributes:
        sample: prompt and reply.
        teacher: what that model said at each token of the reply; None where the reply alone is learnt.
        cut: whether the reply was ended by the longest length that it may have, and not by the model.
    """

    sample: Sample
    teacher: Teacher | None
    cut: bool = False


class General(NamedTuple):
    """General samples with the base's own replies (G1).

    Attributes:
        learnt: protected and learnt.
        held_out: neither; the budget is kept on them.
    """

    learnt: list[Lesson]
    held_out: list[Sample]


@dataclass(frozen=True)
class RunContext:
    """What all stages of a run share.

    Attributes:
        config, stream: what was asked for.
        directory: where the run writes.
        records: task name -> (its training samples, the records left out).
        model: the base model, without adapters between stages.
        processor: of the base model.
        reader: decodes clips, for probes, training and evaluation alike.
        targets: the modules that some task of the stream adapts.
        weight_files: module name -> file with its weight basis (E1); empty where no weights are protected.
        device: where the model lies.
        general: general samples with the base's own replies (G1); None where none were asked for.
        general_basis: file with the directions of their inputs (G2); None where they are not protected.
    """

    config: RunConfig
    stream: Stream
    directory: RunDirectory
    records: Mapping[str, tuple[list[Sample], list[SkippedRecord]]]
    model: PreTrainedModel
    processor: Any
    reader: VideoReader
    targets: Sequence[Target]
    weight_files: Mapping[str, Path]
    device: torch.device
    general: General | None = None
    general_basis: Path | None = None

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch with labels on the model's device, see `ready_batch`; the host does not wait for the copy."""
        ready = ready_batch(batch, self.model.dtype)
        return {key: value.to(self.device, non_blocking=True) for key, value in ready.items()}

    def task_samples(self, task: str) -> list[Sample]:
        """A task's own training samples."""
        return self.records[task][0]

    def rank(self, target: Target) -> int:
        """The nominal r of a module."""
        return self.config.towers()[target.tower].rank


@dataclass(frozen=True)
class StageContext:
    """One stage, with everything that the method decides about it resolved.

    Attributes:
        run: shared by all stages.
        number: 1-based.
        task: what is learnt.
        accumulated: factors of all earlier stages, scales absorbed in B; empty before the first.
        earlier: all earlier stages, oldest first.
        samples: what the stage trains on.
        train: how.
        targets: the modules that the samples reach: of Video-LLaVA's two vision towers the one for clips, say.
        layer_scales: module name -> lambda_l in training (E5).
        folded_layer_scales: the same once the stage is folded.
    """

    run: RunContext
    number: int
    task: TaskSpec
    accumulated: Factors
    earlier: Sequence[StageDirectory]
    samples: Sequence[Sample]
    train: TrainConfig
    targets: Sequence[Target]
    layer_scales: Mapping[str, float]
    folded_layer_scales: Mapping[str, float]

    @property
    def name(self) -> str:
        """For messages."""
        return f"stage {self.number} ({self.task.name})"

    @property
    def seed(self) -> int:
        """Seed of everything random in the stage."""
        return self.run.config.seed + self.number

    @cached_property
    def scales(self) -> dict[str, float]:
        """s_l = lambda_l * alpha / r with the nominal r, per module (E5)."""
        return self._scaled(self.layer_scales)

    @cached_property
    def folded_scales(self) -> dict[str, float]:
        """The same once the stage is folded."""
        return self._scaled(self.folded_layer_scales)

    def scaled(self, factors: Mapping[Tower, float]) -> "StageContext":
        """The stage with its folded update scaled by a factor per tower (G4)."""
        folded = {t.name: self.folded_layer_scales[t.name] * factors[t.tower] for t in self.targets}
        return replace(self, folded_layer_scales=folded)

    def _scaled(self, layer_scales: Mapping[str, float]) -> dict[str, float]:
        alpha = self.run.config.alpha
        return {t.name: layer_scales[t.name] * alpha / self.run.rank(t) for t in self.targets}

    @property
    def bases(self) -> ProtectedBases:
        """M, under which the stage trains: U_w (E1), general inputs (G2) and what earlier stages added (E8)."""
        features = [stage.tensors("protect") for stage in self.earlier]
        return ProtectedBases(self.run.weight_files, self.run.general_basis, features, self.run.device)

    def rehearsals(self) -> list[dict[str, Tensor]]:
        """What the method's `rehearsal` gave after each earlier stage, oldest first; fp32 on the CPU."""
        return [load_tensors(stage.tensors("rehearse")) for stage in self.earlier]

    @cached_property
    def collator(self) -> ChatCollator | ClassCollator:
        """Samples to model inputs; shared by probes and training because it remembers tokens.

        It refuses no length: each record has been held to its own task's `max_length`, and a stage also sees those of
        other tasks and general ones.
        """
        return collator_of(self.run.processor, self.run.reader)

    @cached_property
    def probe_indices(self) -> list[int]:
        """The samples from which task gradients are measured."""
        probe = self.run.config.probe
        return select_evenly(len(self.samples), probe.fraction, probe.max_samples)

    def probe_batches(self, batch_size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The probe sample as model inputs with labels, see `batches`."""
        return self.batches([self.samples[i] for i in self.probe_indices], "task gradients", batch_size)

    def batches(
        self, chosen: Sequence[Sample], what: str, batch_size: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Samples as model inputs with labels, in order; of several processes each takes its share.

        Batches are shared out whole: one process's batches are those of a run with one, padding included.

        Args:
            chosen: at least one.
            what: they are for, as progress is shown.
            batch_size: samples per forward; the probe's own when None.
        """
        samples = SampleDataset(chosen)
        size = batch_size or self.run.config.probe.batch_size
        rows = [list(range(len(samples)))[start : start + size] for start in range(0, len(samples), size)]
        own = own_share(rows)
        own_and_fillers = [*own, *fillers(self.run.model, own, rows[0])]
        loader = DataLoader(samples, batch_sampler=own_and_fillers, collate_fn=self.collator)
        for number, batch in enumerate(progress(what, "batches", loader)):
            if number >= len(own):
                batch["labels"].fill_(IGNORED_LABEL)
            yield self.run.to_device(batch)

    def sketch(self, model: Model, pass_number: int) -> dict[str, Tensor]:
        """Omega^T G of every module [q, in] (E2), q = columns_per_rank * r, at least 2; its own Omega a pass."""
        seed = 2 * self.seed + pass_number
        return sketch_gradients(model, self.targets, self._columns(), self.probe_batches, seed)

    def sketch_inputs(self, model: Model, pass_number: int) -> dict[str, Tensor]:
        """Omega^T X of every module's inputs [q, in], as `sketch` of its gradient."""
        seed = 2 * self.seed + pass_number
        return sketch_inputs(model, self.targets, self._columns(), self.probe_batches, seed)

    def _columns(self) -> dict[str, int]:
        per_rank = self.run.config.probe.columns_per_rank
        # Two at least: E8 builds directions from some and decides by the others.
        return {t.name: max(2, per_rank * self.run.rank(t)) for t in self.targets}
