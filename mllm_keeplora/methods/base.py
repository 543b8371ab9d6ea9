"""What a method decides about a stage, and how `method: NAME` finds it.

A new method is one file in this folder: a frozen dataclass derived from `Method`. Its fields are the settings
that `method_options` may hold, and `method: NAME` is the file's name. What it does not override is sequential
LoRA: a fresh adapter for each task, A and B trained, folded into the past, nothing protected.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor

import mllm_keeplora.methods
from mllm_keeplora.config import ConfigError, RunConfig, TrainConfig
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.distributed.processes import shared_out
from mllm_keeplora.errors import did_you_mean
from mllm_keeplora.linalg.folding import fold_factors
from mllm_keeplora.linalg.sketch import ExtendedBasis, extend_basis_from_sketch
from mllm_keeplora.methods.context import RunContext, StageContext
from mllm_keeplora.methods.hooks import Hooks
from mllm_keeplora.modeling.adapters import Factors, Model, Trainable
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.gradients import module_generator
from mllm_keeplora.settings import build, check_settings, hints_of

logger = get_logger(__name__)

OPTIONS = "method_options."  # before the names of a method's settings
NO_METHODS = ("base", "context", "hooks")  # files of this folder that are no methods


class Features(NamedTuple):
    """What a stage adds to the protected bases; only the main process's result is used."""

    directions: dict[str, Tensor]  # module name -> [in, added] fp32, orthonormal to what was protected
    facts: dict[str, dict[str, Any]]  # module name -> entries of its row in the manifest


class Start(NamedTuple):
    """Where a stage's training begins."""

    factors: Factors  # module name -> (A [r, in], B [out, r]) of every module that has room
    replaces_past: bool = False  # the factors hold their modules' past, which is then left out


class Learnt(NamedTuple):
    """What a stage's training ends with."""

    factors: Factors  # of the modules that trained
    facts: Mapping[str, Any] = {}  # for the manifest


@dataclass(frozen=True)
class Method:
    """Sequential LoRA, and the places where other methods differ from it.

    Attributes:
        trains: which factors move.
        projects: an update stays out of M; general inputs are then protected too (G2).
        protects_weights: the principal subspaces of the pre-trained weights are protected from the start
            (E1).
        protects_features: a stage adds feature directions to what is protected.
        gradient_passes: passes over the probe sample with gradients, per stage.
        gradients_of: what these passes differentiate: the weights (sketched, E2) or the accumulated factors.
        input_passes: forward passes over the probe sample, per stage.
        adds_updates: a stage adds its update to the past; a guard can scale that (G4).
    """

    trains: ClassVar[Trainable] = "both"
    projects: ClassVar[bool] = False
    protects_weights: ClassVar[bool] = False
    protects_features: ClassVar[bool] = False
    gradient_passes: ClassVar[int] = 0
    gradients_of: ClassVar[Literal["weights", "factors"]] = "weights"
    input_passes: ClassVar[int] = 0
    adds_updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, OPTIONS)

    def probe_passes(self, config: RunConfig, number: int) -> int:
        """Passes over the probe sample in stage `number` (1-based), of either kind."""
        return self.gradient_passes + self.input_passes

    def step_passes(self) -> int:
        """Forward and backward passes of a batch; each may keep a copy of what trains."""
        return 1

    def learns(self, number: int) -> bool:
        """Whether stage `number` (1-based) trains at all; one that does not leaves the model as it is."""
        return True

    def task_samples(self, run: RunContext, task: str) -> list[Sample]:
        """What of a task's samples stages may train on: all of them."""
        return run.task_samples(task)

    def samples(self, run: RunContext, number: int) -> list[Sample]:
        """What stage `number` trains on: the task's own samples."""
        return self.task_samples(run, run.stream.tasks[number - 1].name)

    def train_config(self, run: RunContext, config: TrainConfig) -> TrainConfig:
        """A stage's training settings, from those of its task."""
        return config

    def layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l in training, a fraction (E5)."""
        return 1.0

    def folded_layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l once the stage is folded."""
        return self.layer_scale(config, target)

    def initial_a(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """A of every module before training, [r, in] fp32; the main process's counts. PEFT's default here."""
        return {t.name: kaiming_a(t, stage.run.rank(t), stage.seed) for t in stage.targets}

    def start(self, stage: StageContext, lora_a: Mapping[str, Tensor]) -> Start:
        """The given A beside B = 0, for the modules that have room (E9)."""
        named = ((t, lora_a[t.name]) for t in stage.targets)
        return Start({t.name: (a, torch.zeros(t.out_features, len(a))) for t, a in named if len(a) > 0})

    def hooks(self, stage: StageContext, model: PeftModel) -> Hooks:
        """What happens at each training step beside the loss and the optimizer's step."""
        return Hooks()

    def finish(self, stage: StageContext, model: PeftModel, factors: Factors) -> Learnt:
        """What is stored and folded of the trained factors; the model still carries them. The same on all processes."""
        return Learnt(factors)

    def fold(self, accumulated: Factors, factors: Factors, scales: Mapping[str, float]) -> Factors:
        """The past and the new update as one (E7); a module of rank 0 in this stage is in the past alone."""
        folded = {}
        for name in dict.fromkeys([*accumulated, *factors]):
            earlier = [(*accumulated[name], 1.0)] if name in accumulated else []
            new = [(*factors[name], scales[name])] if name in factors else []
            folded[name] = fold_factors(earlier + new)
        return folded

    def features(self, stage: StageContext, model: Model) -> Features:
        """What the stage adds to the protected bases, measured at the model that has learnt the task."""
        nothing = {"k_f_added": 0, "captured": None, "saturated": False}
        empty = {t.name: torch.zeros(t.in_features, 0) for t in stage.targets}
        return Features(empty, {t.name: dict(nothing) for t in stage.targets})

    def rehearsal(self, stage: StageContext, model: Model) -> dict[str, Tensor]:
        """Anything else that later stages need; `StageContext.rehearsals` gives it to them. fp32 on the CPU."""
        return {}


def kaiming_a(target: Target, rank: int, seed: int) -> Tensor:
    """PEFT's default A, [rank, in] fp32, from a generator of the module's own."""
    a = torch.empty(rank, target.in_features)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=module_generator(seed, target.name))
    return a


def per_module(stage: StageContext, decompose: Callable[[Target], Tensor]) -> dict[str, Tensor]:
    """`decompose` of every module, shared out over the processes.

    Returns:
        Module name -> result on the CPU, the same on all processes.
    """
    found = shared_out(stage.targets, lambda t: on_cpu(decompose(t)), "residual subspaces")
    return {t.name: part for t, part in zip(stage.targets, found, strict=True)}


def on_cpu(part: Tensor) -> Tensor:
    """A copy: on a CPU, a part of a larger matrix would keep all of it."""
    return part.to("cpu", copy=True)


def extended_features(
    stage: StageContext,
    sketches: Mapping[str, Tensor],
    rule: Callable[[Tensor, Tensor, float], ExtendedBasis] = extend_basis_from_sketch,
    eps_f: Callable[[Target], float] | None = None,
) -> Features:
    """E8 on every module: the directions that bring what is protected to eps_f of a sketch's energy.

    Args:
        stage: just learnt.
        sketches: module name -> Y [q, in], of gradients or of input activations.
        rule: M, a sketch and eps_f -> the extended basis.
        eps_f: of a module; the tower's own setting where None.
    """
    bases, towers = stage.bases, stage.run.config.towers()

    def extend(t: Target) -> tuple[Tensor, dict[str, Any]]:
        basis, share = bases.load(t), eps_f(t) if eps_f else towers[t.tower].eps_f
        extended = rule(basis, sketches[t.name].to(bases.device), share)
        added = on_cpu(extended.basis[:, basis.shape[1] :])
        return added, {
            "k_f_added": added.shape[1],
            "captured": extended.captured,
            "saturated": extended.saturated,
        }

    found = shared_out(stage.targets, extend, "feature directions")
    directions = {t.name: added for t, (added, _) in zip(stage.targets, found, strict=True)}
    facts = {t.name: fact for t, (_, fact) in zip(stage.targets, found, strict=True)}
    saturated = [name for name, fact in facts.items() if fact["saturated"]]
    if saturated:
        logger.warning(
            f"{len(saturated)} of {len(facts)} modules need more directions than their sketch has to reach "
            f"eps_f, {saturated[0]} first ({facts[saturated[0]]['captured']:.3f} held); raise "
            "probe.columns_per_rank to protect more of this task"
        )
    return Features(directions, facts)


def method_names() -> list[str]:
    """The values of `method:`."""
    found = pkgutil.iter_modules(mllm_keeplora.methods.__path__)
    return sorted(module.name for module in found if module.name not in NO_METHODS)


def load_method(config: RunConfig) -> Method:
    """The method that a run's settings ask for.

    Raises:
        ConfigError: no method of that name, an option that it does not have, or a value that it refuses.
    """
    names = method_names()
    if config.method not in names:
        raise ConfigError(f"method {config.method!r} is none of {', '.join(names)}{did_you_mean(config.method, names)}")
    module = importlib.import_module(f"{mllm_keeplora.methods.__name__}.{config.method}")
    chosen = _method_in(module)
    if chosen is None:
        raise ConfigError(f"method {config.method}: {module.__file__} defines no class derived from Method")
    known = list(hints_of(chosen))
    for key in config.method_options:
        if key not in known:
            raise ConfigError(
                f"method_options.{key}: method {config.method} takes {', '.join(known) or 'no options'}"
                f"{did_you_mean(key, known)}"
            )
    return build(chosen, {f"{OPTIONS}{key}": value for key, value in config.method_options.items()}, OPTIONS)


def _method_in(module: ModuleType) -> type[Method] | None:
    """The class that a method's file defines; None where it defines none."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
            return value
    return None
