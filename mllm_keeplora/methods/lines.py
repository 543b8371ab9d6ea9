"""LiNeS (arXiv 2410.17146): sequential LoRA whose updates are scaled by depth once they are learnt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from accelerate.logging import get_logger
from peft import PeftModel

from mllm_keeplora.config import ConfigError, RunConfig
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.records import select_evenly
from mllm_keeplora.distributed.processes import sum_of_all
from mllm_keeplora.linalg.layer_scaling import layer_scales
from mllm_keeplora.methods.base import Learnt, Method
from mllm_keeplora.methods.context import RunContext, StageContext
from mllm_keeplora.modeling.adapters import STAGE, Factors, factor_parameters
from mllm_keeplora.modeling.loss import IGNORED_LABEL, reply_logits
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.settings import Range

logger = get_logger(__name__)

GAMMAS = tuple(tenths / 10 for tenths in range(10, -1, -1))  # those that its code tries, in its order
TARGET_WEIGHT = 2.0  # of the new task beside what is to be kept, `tradeoff_target_weight` of its code
MOST_HELD_OUT = 100  # records of a task, which tell accuracies a few points apart


@dataclass(frozen=True)
class Lines(Method):
    """Train at scale 1, fold lambda_l s B A with lambda_l = gamma + (1 - gamma) l / (L - 1) (its eq. 2).

    LiNeS scales the task vector of a whole fine-tuning; here every stage's update is one. KeepLoRA++ has the same
    lambda_l in training already, so that learning can make up for it.

    As in its code, gamma is searched once the update is learnt, one for both towers, over 1, 0.9 .. 0. The best has the
    largest 2 x the new task's accuracy, over that at gamma 1, + the mean accuracy on what is to be kept, over that
    before the stage. Accuracies are those of held-out records: the share of answer tokens that the model ranks first.
    What is to be kept are the earlier tasks' held-out records and, where there are any, the held-out general samples.

    Args:
        held_out: share of a task's training records, 100 at most, that no stage trains on. 0 searches nothing: gamma is
            then the tower's own setting.
    """

    held_out: Annotated[float, Range(0, 1, "[)")] = 0.1

    def task_samples(self, run: RunContext, task: str) -> list[Sample]:
        """Without those held out."""
        return self._split(run, task)[0]

    def folded_layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l within the tower; 1 where the search has put it into B."""
        return 1.0 if self.held_out else scale_of(target, config.towers()[target.tower].gamma)

    def finish(self, stage: StageContext, model: PeftModel, factors: Factors) -> Learnt:
        """B scaled by the lambda_l of the best gamma."""
        if not self.held_out:
            return Learnt(factors)
        tasks = stage.run.stream.tasks[: stage.number]
        watched = [self._split(stage.run, task.name)[1] for task in reversed(tasks)]
        if stage.run.general is not None:
            watched.append(stage.run.general.held_out)

        def measure(scale: Callable[[Target], float]) -> list[float]:
            with torch.no_grad():
                for t in stage.targets:
                    factor_parameters(model, STAGE, t.name)[1].copy_(factors[t.name][1] * scale(t))
            return [token_accuracy(stage, model, samples) for samples in watched]

        before = measure(lambda _: 0.0)
        found = {gamma: measure(partial(scale_of, gamma=gamma)) for gamma in GAMMAS}
        gamma = best_gamma(found, before)
        logger.info(f"{stage.name}: gamma {gamma:g} is best on held-out records")
        scaled = {t.name: (factors[t.name][0], factors[t.name][1] * scale_of(t, gamma)) for t in stage.targets}
        return Learnt(scaled, {"gamma": gamma, "before": before, "accuracies": list(found.values())})

    def _split(self, run: RunContext, task: str) -> tuple[list[Sample], list[Sample]]:
        """What stages may train on of a task, and what is held out of it."""
        samples = run.task_samples(task)
        chosen = set(select_evenly(len(samples), self.held_out, MOST_HELD_OUT) if self.held_out else ())
        kept = [sample for place, sample in enumerate(samples) if place not in chosen]
        if not kept:
            raise ConfigError(
                f"method_options.held_out leaves none of the {len(samples)} records of {task} to train on; set it to "
                "0, so that nothing is searched"
            )
        return kept, [samples[place] for place in sorted(chosen)]


def scale_of(target: Target, gamma: float) -> float:
    """lambda_l of a module."""
    return layer_scales(target.num_layers, gamma)[target.depth]


def best_gamma(found: dict[float, list[float]], before: Sequence[float]) -> float:
    """The gamma of the best trade between the new task and what is to be kept; the first of equals.

    Args:
        found: gamma -> accuracies at it, fractions, of the new task first; 1 is among them.
        before: the same before the stage. Of what had none right, nothing is to be kept.
    """
    full = found[1.0][0]

    def trade(gamma: float) -> float:
        target, *controls = found[gamma]
        kept = [control / was for control, was in zip(controls, before[1:], strict=True) if was > 0]
        learnt = target / full if full > 0 else 0.0
        return TARGET_WEIGHT * learnt + (sum(kept) / len(kept) if kept else 0.0)

    return max(found, key=trade)


@torch.no_grad()
def token_accuracy(stage: StageContext, model: PeftModel, samples: Sequence[Sample]) -> float:
    """Share of the samples' answer tokens that the model ranks first, given those before; the same on all processes."""
    model.eval()
    counts = torch.zeros(2, device=stage.run.device)
    for batch in stage.batches(samples, "held-out records"):
        labels = batch["shift_labels"]
        said = labels[labels != IGNORED_LABEL]
        right = reply_logits(model, batch).argmax(-1) == said
        counts += torch.stack([right.sum(), torch.tensor(len(said), device=right.device)])
    right_of_all, all_of_them = sum_of_all(counts).tolist()
    return float(right_of_all / all_of_them)
