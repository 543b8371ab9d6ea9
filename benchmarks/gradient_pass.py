"""Rows 2 and 3: a task gradient by probe (E2) beside full-weight gradients, and how exact it is.

    python benchmarks/gradient_pass.py          a CPU: about 10 minutes
    python benchmarks/gradient_pass.py --quick

Row 2, cost, on a LLaVA-1.5 of random weights. Here: `sketch_gradients` on NF4, q = 128 = 4 r columns at 7B's
width and in proportion at smaller ones. Beside stands what the public code does. It makes the weights of all
target layers trainable on a dense model (bf16 on a GPU, fp32 on a CPU). After each batch it adds their
gradients to one running mean per weight, in the model's dtype; the gradients stay allocated.

On a GPU the model has LLaVA-1.5-7B's shape, and a batch is one sample of 640 tokens. On a CPU the language
layers have half that width, the vision layers the true one. For the time there are two and one of them, and a
batch is four samples of 128 tokens, since a 4-bit weight is dequantised once a batch and pass. For the memory
there are eight and six, so that what exists for one layer at a time weighs as little as at 7B. A batch is then
one sample of 320 tokens, which is for the width as many as 640 at 7B.

Peak memory is beyond the model, each side in a process of its own. "The pass itself" is the peak when next to
nothing is measured (q = 1; one trainable bias): activations and, here, the largest dequantised weight.

Row 3, exactness, on the two small base models and two tasks of each, at the untouched base with M its weight
bases. Exact gradients G come from autograd on a dequantised copy over the same probe sample.

    A's energy          ||G^ A^T||^2 over that of the exact gradient's A, G^ = G (I - M M^T); fractions, over
                        all modules (sums above and below) and of the worst module
    feature directions  what E8 adds until M holds eps_f of G, by sketch and exactly, all modules together

With the config's r = 16, q = 64 is half of a layer's 128 inputs; r = 4, q = 16 is nearer to what 7B meets.

How few samples do: A and the feature basis come from n evenly spaced samples. They are judged on the exact
gradient over all of the task's training samples, relative to A and feature basis from a sketch over all of
them. Feature bases are meant for the model after training; the untouched base stands in, as the estimator is
the same.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from matplotlib.figure import Figure
from measure import (
    Options,
    Peaks,
    Row,
    benchmark,
    energy,
    in_own_process,
    in_turns,
    megabytes,
    milliseconds,
    ratio,
)
from shapes import TINY, TRUE, Shape, all_linear, llava_config, random_batch, random_model, settings_for
from small_streams import small_config
from torch import Tensor, nn

from mllm_keeplora.continual.run import Run
from mllm_keeplora.data.records import select_evenly
from mllm_keeplora.linalg.lora_init import lora_a_from_gradient
from mllm_keeplora.linalg.sketch import extend_basis_from_sketch, refined_directions
from mllm_keeplora.linalg.subspace import extend_basis, project_to_residual
from mllm_keeplora.methods.context import StageContext
from mllm_keeplora.modeling.loss import supervised_positions
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.planning.skeleton import skeleton_of
from mllm_keeplora.probes.gradients import back_project_gradients, sketch_gradients

Gradients = dict[str, Tensor]
Batch = Mapping[str, Tensor]

COLUMNS_PER_RANK = 4
# Row 2
WIDTH_OF_A_COLUMN = 32  # 4096 / 128
BATCHES = 2
HALF = Shape(2048, 5632, 8, 32, 1024, 4096, 7, 16, 112, 2048)
WANTED_MEMORY, WANTED_TIME = 0.1, 0.7
# Row 3
RANKS = (16, 4)
WANTED_CAPTURED, WANTED_REFINED = 0.98, 0.995
SAMPLES = (8, 16, 32, 64, 128, 256)
ENOUGH = 0.99
SEED = 0


# Row 2


@dataclass(frozen=True)
class Size:
    """What a pass goes over: a model, and samples of `length` tokens, `batch` at a time."""

    shape: Shape
    length: int
    batch: int

    @classmethod
    def for_time(cls, device: torch.device, quick: bool) -> "Size":
        """What is timed there."""
        if quick:
            return cls(TINY, 48, 1)
        if device.type == "cuda":
            return cls(TRUE, 640, 1)
        return cls(replace(HALF, layers=2, vision_layers=2), 128, 4)

    @classmethod
    def for_memory(cls, device: torch.device, quick: bool) -> "Size":
        """Where memory is measured."""
        return cls(HALF, 320, 1) if device.type == "cpu" and not quick else cls.for_time(device, quick)

    @property
    def columns(self) -> int:
        """q."""
        return self.shape.hidden // WIDTH_OF_A_COLUMN

    def __str__(self) -> str:
        samples = f"{self.batch} x {self.length} tokens"
        return f"{self.shape.layers} layers {self.shape.hidden} wide, {samples}, q = {self.columns}"

    def batches(self, device: torch.device) -> list[Batch]:
        """Two of them."""
        return [random_batch(self.shape, self.batch, self.length, device, seed) for seed in range(BATCHES)]


def make_model(device: torch.device, size: Size) -> tuple[Any, list[Target]]:
    """The NF4 model of random weights and the layers to measure."""
    model = random_model(llava_config(size.shape), settings_for(device), device)
    return model, all_linear(model)


def dequantise(model: Any) -> Any:
    """The same model on dense weights, frozen, in place."""
    model.dequantize()
    return model.requires_grad_(False)


def probe(model: Any, targets: Sequence[Target], batches: Sequence[Batch], columns: int) -> Gradients:
    """This project's pass."""
    every = dict.fromkeys((t.name for t in targets), columns)
    return sketch_gradients(model, targets, every, lambda: batches, SEED)


def running_means(model: nn.Module, parameters: Sequence[nn.Parameter], batches: Sequence[Batch]) -> list[Tensor]:
    """The public code's pass: full gradients, their running means over batches in the model's dtype."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    means = [torch.zeros_like(parameter) for parameter in parameters]
    for number, batch in enumerate(batches, 1):
        model(**batch).loss.backward()
        for mean, parameter in zip(means, parameters, strict=True):
            gradient = gradient_of(parameter)
            mean.lerp_(gradient, 1.0 / number)
            gradient.zero_()
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return means


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient after a backward pass.

    Raises:
        RuntimeError: it has none.
    """
    if parameter.grad is None:
        raise RuntimeError(f"a target of shape {tuple(parameter.shape)} received no gradient")
    return parameter.grad


def target_weights(model: nn.Module, targets: Sequence[Target]) -> list[nn.Parameter]:
    """Their weights, dense."""
    return [model.get_parameter(f"{t.name}.weight") for t in targets]


def peaks(side: str, device: str, quick: bool, checkpointing: bool) -> dict[str, float]:
    """Bytes beyond the model, by a pass that measures nothing and by the true one, in this process.

    Args:
        side: `probe` or `full`.
        device: where the model lies.
        quick: see `Options`.
        checkpointing: keep layers' inputs alone and compute their activations again.
    """
    size = Size.for_memory(torch.device(device), quick)
    model, targets = make_model(torch.device(device), size)
    batches = size.batches(torch.device(device))
    if side == "probe":
        passes: dict[str, Callable[[], Any]] = {
            "itself": partial(probe, model, targets, batches, 1),
            "all": partial(probe, model, targets, batches, size.columns),
        }
    else:
        dequantise(model).train()  # a probe trains, too: else nothing is checkpointed
        bias = model.get_parameter(f"{targets[0].name}.bias")
        passes = {
            "itself": partial(running_means, model, [bias], batches),
            "all": partial(running_means, model, target_weights(model, targets), batches),
        }
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = Peaks(torch.device(device))
    for name, run in passes.items():
        with found.phase(name):
            run()
    return {name: phase["bytes"] for name, phase in found.found.items()}


def least_bytes(targets: Sequence[Target], columns: int, size: int) -> tuple[int, int]:
    """What must exist, bytes: (Omega and Omega^T G in fp32; gradient and mean of `size` a number)."""
    ours = sum(4 * columns * (t.in_features + t.out_features) for t in targets)
    return ours, sum(2 * size * t.in_features * t.out_features for t in targets)


def pass_operations(targets: Sequence[Target], size: Size) -> float:
    """Multiplications of the target layers here over those beside, per sample.

    Both: W x and W^T dy. Beside: dy x^T. Here: Omega^T dy and (Omega^T dy) x^T.
    """
    ours = beside = 0
    for t in targets:
        tokens = size.shape.image_tokens + 1 if t.tower == "vision" else size.length
        weight = t.in_features * t.out_features
        ours += tokens * (2 * weight + size.columns * (t.in_features + t.out_features))
        beside += tokens * 3 * weight
    return ours / beside


def memory_row(options: Options, checkpointing: bool) -> Row:
    """Peaks of both sides."""
    size = Size.for_memory(options.device, options.quick)
    targets = all_linear(skeleton_of(llava_config(size.shape), settings_for(options.device)))
    arguments = (options.device.type, options.quick, checkpointing)
    ours, beside = (in_own_process(peaks, side, *arguments) for side in ("probe", "full"))
    found = ours["all"] / beside["all"]
    dtype, itemsize = ("bf16", 2) if options.device.type == "cuda" else ("fp32", 4)
    least = least_bytes(targets, size.columns, itemsize)
    how = ", activations checkpointed" if checkpointing else ""

    def text(peak: Mapping[str, float]) -> str:
        return f"{megabytes(peak['all'])}; the pass itself {megabytes(peak['itself'])}"

    return Row(
        number=2,
        what=f"gradient pass, peak memory beyond the model, {size}{how}",
        ours=text(ours),
        beside=f"full gradients, {dtype}: {text(beside)}",
        result=f"{found:.3f} of it",
        goal=f"<= {WANTED_MEMORY}",
        met=found <= WANTED_MEMORY,
        floor=f"Omega and Omega^T G {megabytes(least[0])} over gradients and means {megabytes(least[1])}: "
        f"{least[0] / least[1]:.3f}",
    )


def time_row(options: Options) -> Row:
    """Seconds, in turns; the probe on the dense model, too, to tell what 4-bit weights cost."""
    size = Size.for_time(options.device, options.quick)
    model, targets = make_model(options.device, size)
    batches = size.batches(options.device)
    dense = dequantise(copy.deepcopy(model))
    ways: dict[str, Callable[[], Any]] = {
        "probe": partial(probe, model, targets, batches, size.columns),
        "on dense": partial(probe, dense, targets, batches, size.columns),
        "full": partial(running_means, dense, target_weights(dense, targets), batches),
    }
    seconds = in_turns(ways, options.repeats, options.device)
    found = ratio(seconds["probe"], seconds["full"])
    a_sample = {way: milliseconds([s / (BATCHES * size.batch) for s in found_]) for way, found_ in seconds.items()}
    return Row(
        number=2,
        what=f"gradient pass, time a sample, {size}",
        ours=f"{a_sample['probe']}; on dense weights {a_sample['on dense']}",
        beside=f"full gradients: {a_sample['full']}",
        result=f"{found} of it; on dense weights {ratio(seconds['on dense'], seconds['full'])}",
        goal=f"<= {WANTED_TIME}",
        met=found.median <= WANTED_TIME,
        floor=f"operations of the target layers: {pass_operations(targets, size):.3f}",
    )


def cost_rows(options: Options) -> list[Row]:
    """Row 2."""
    checkpointing = (False,) if options.quick else (False, True)
    return [time_row(options), *(memory_row(options, how) for how in checkpointing)]


# Row 3


@dataclass(frozen=True)
class Task:
    """A task at the untouched base model.

    Attributes:
        stage: its stage; the model is the untouched base.
        dense: the model, dequantised, weights of the targets trainable.
        bases: module name -> M [in, k].
    """

    stage: StageContext
    dense: Any
    bases: dict[str, Tensor]

    def batches(self, indices: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """These training samples as model inputs."""
        size = self.stage.run.config.probe.batch_size
        for start in range(0, len(indices), size):
            chosen = [self.stage.samples[i] for i in indices[start : start + size]]
            yield self.stage.run.to_device(self.stage.collator(chosen))

    def exact(self, indices: Sequence[int]) -> Gradients:
        """G [out, in] fp32 by autograd."""
        parameters = target_weights(self.dense, self.stage.targets)
        tokens = 0
        for batch in self.batches(indices):
            self.dense(**batch, num_items_in_batch=1).loss.backward()
            tokens += int(supervised_positions(batch["labels"]).sum())
        gradients = {}
        for target, parameter in zip(self.stage.targets, parameters, strict=True):
            gradients[target.name] = gradient_of(parameter).cpu() / tokens
            parameter.grad = None
        return gradients

    def sketch(self, indices: Sequence[int], rank: int) -> Gradients:
        """Omega^T G [4 r, in] fp32."""
        columns = dict.fromkeys(self.bases, COLUMNS_PER_RANK * rank)
        return sketch_gradients(self.stage.run.model, self.stage.targets, columns, lambda: self.batches(indices), SEED)

    def refine(self, sketches: Gradients, indices: Sequence[int]) -> Gradients:
        """The second pass over the same samples."""
        spans = {name: self.factor(name, sketch, len(sketch)) for name, sketch in sketches.items()}
        out_features = {t.name: t.out_features for t in self.stage.targets}
        images = back_project_gradients(self.stage.run.model, spans, out_features, lambda: self.batches(indices))
        return {name: refined_directions(span, images[name]) for name, span in spans.items()}

    def factor(self, name: str, gradient: Tensor, rank: int) -> Tensor:
        """A [r, in] of a gradient or a sketch."""
        return lora_a_from_gradient(gradient, self.bases[name], rank)

    def eps_f(self, target: Target) -> float:
        """Share of energy that the feature basis must hold."""
        return self.stage.run.config.towers()[target.tower].eps_f


@dataclass(frozen=True)
class Shares:
    """Energies held over energies that could be, fractions.

    Attributes:
        overall: sums over all modules.
        worst: of the modules.
    """

    overall: float
    worst: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Shares":
        """From (held, could be) of each module; modules without energy are left out."""
        held, possible = (sum(values) for values in zip(*pairs, strict=True))
        return cls(held / possible, min(a / b for a, b in pairs if b > 0.0))

    def __str__(self) -> str:
        return f"{self.overall:.4f} (worst {self.worst:.3f})"


def captured(task: Task, residuals: Gradients, estimates: Gradients, best: Gradients, rank: int) -> Shares:
    """Energy of the residual gradient along A of `estimates`, over that along A of `best`."""
    return Shares.of(
        [
            (
                energy(residual @ task.factor(name, estimates[name], rank).T),
                energy(residual @ task.factor(name, best[name], rank).T),
            )
            for name, residual in residuals.items()
        ]
    )


def residuals_of(task: Task, gradients: Gradients) -> Gradients:
    """G^ of every module."""
    return {name: project_to_residual(g, task.bases[name]) for name, g in gradients.items()}


def factor_row(task: Task, label: str, exact: Gradients, indices: Sequence[int], rank: int) -> Row:
    """How much of the best A's energy the sketched ones hold."""
    residuals = residuals_of(task, exact)
    sketches = task.sketch(indices, rank)
    once = captured(task, residuals, sketches, exact, rank)
    twice = captured(task, residuals, task.refine(sketches, indices), exact, rank)
    return Row(
        number=3,
        what=f"{label}: A's energy, r = {rank}, q = {COLUMNS_PER_RANK * rank}, {len(indices)} samples",
        ours=f"one pass {once}; refined {twice}",
        beside="exact gradient: 1",
        result=f"{once.overall:.4f}; refined {twice.overall:.4f}",
        goal=f">= {WANTED_CAPTURED}; refined >= {WANTED_REFINED}",
        met=once.overall >= WANTED_CAPTURED and twice.overall >= WANTED_REFINED,
        floor="1",
    )


def feature_row(task: Task, label: str, exact: Gradients, sketches: Gradients) -> Row:
    """How many directions E8 adds."""
    found = needed = saturated = 0
    pairs = []
    for t in task.stage.targets:
        basis, gradient = task.bases[t.name], exact[t.name]
        extended = extend_basis_from_sketch(basis, sketches[t.name], task.eps_f(t))
        found += extended.basis.shape[1] - basis.shape[1]
        saturated += extended.saturated
        needed += extend_basis(basis, gradient, task.eps_f(t)).shape[1] - basis.shape[1]
        pairs.append((energy(gradient @ extended.basis), energy(gradient)))
    return Row(
        number=3,
        what=f"{label}: feature directions, eps_f {task.eps_f(task.stage.targets[0])}, {len(pairs)} modules",
        ours=f"{found}, saturated modules {saturated}",
        beside=f"exact gradient: {needed}",
        result=f"{found / max(needed, 1):.2f} times as many; hold of the exact gradient {Shares.of(pairs)}",
    )


class Held(NamedTuple):
    """What a probe of some samples holds, relative to the reference."""

    factors: Shares  # by A
    features: Shares  # inside M and its feature basis
    directions: int  # of the feature bases of all modules


def sample_shares(task: Task, numbers: Sequence[int]) -> dict[int, Held]:
    """n -> what n samples give, judged on the exact gradient over the last n, relative to a sketch of it."""
    rank = RANKS[0]
    chosen = {n: select_evenly(len(task.stage.samples), 1.0, n) for n in numbers}
    exact = task.exact(chosen[numbers[-1]])
    residuals = residuals_of(task, exact)
    sketches = {n: task.sketch(indices, rank) for n, indices in chosen.items()}

    def extended(target: Target, n: int) -> Tensor:
        name = target.name
        return extend_basis_from_sketch(task.bases[name], sketches[n][name], task.eps_f(target)).basis

    best = {t.name: energy(exact[t.name] @ extended(t, numbers[-1])) for t in task.stage.targets}
    found = {}
    for n in numbers:
        bases = {t.name: extended(t, n) for t in task.stage.targets}
        features = Shares.of([(energy(exact[name] @ m), best[name]) for name, m in bases.items()])
        directions = sum(m.shape[1] - task.bases[name].shape[1] for name, m in bases.items())
        factors = captured(task, residuals, sketches[n], sketches[numbers[-1]], rank)
        found[n] = Held(factors, features, directions)
    return found


def sample_row(label: str, held: Mapping[int, Held]) -> Row:
    """The curve in words."""
    *few, reference = held
    enough = next(n for n, h in held.items() if min(h.factors.overall, h.features.overall) >= ENOUGH)
    return Row(
        number=3,
        what=f"{label}: A (r = {RANKS[0]}) and feature basis from n samples",
        ours="; ".join(f"n {n}: A {held[n].factors}, features {held[n].features} by {held[n].directions}" for n in few),
        beside=f"{reference} samples: 1 by {held[reference].directions} directions",
        result=f"both {ENOUGH} from {enough} samples on",
    )


def draw(curves: Mapping[str, Mapping[int, Held]], file: Path) -> None:
    """Two panels: energy held by A and by M with its feature basis, against the number of samples."""
    figure = Figure(figsize=(11, 4), layout="tight")
    panels = figure.subplots(1, 2)
    titles = ("energy along A", "energy inside M and feature basis")
    for place, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        for number, (label, held) in enumerate(curves.items()):
            shares = [(h.factors, h.features)[place] for h in held.values()]
            panel.plot(list(held), [s.overall for s in shares], "o-", color=f"C{number}", label=label)
            panel.plot(list(held), [s.worst for s in shares], ":", color=f"C{number}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(SAMPLES, [str(n) for n in SAMPLES])
        panel.set(xlabel="samples in the probe", ylabel="relative to all samples", title=title)
    panels[0].legend(title="all modules; dotted: the worst")
    figure.savefig(file, dpi=120)


def open_tasks(kind: Literal["vqa", "video"], folder: Path, quick: bool) -> Iterator[tuple[str, Task]]:
    """The first and the third task of a small stream; the first alone where `quick`."""
    places = {"run_dir": str(folder / kind), "cache_dir": str(folder / "cache")}
    with Run.open(small_config(kind, **places)) as run:
        dense = dequantise(copy.deepcopy(run.context.model))
        for number in (1,) if quick else (1, 3):
            stage = run.stage_context(number, {})
            for weight in target_weights(dense, stage.targets):
                weight.requires_grad_(True)
            bases = {t.name: stage.bases.weight_basis(t).cpu() for t in stage.targets}
            yield f"{run.stream.name} / {stage.task.name}", Task(stage, dense, bases)


def exactness_rows(options: Options) -> list[Row]:
    """Row 3."""
    kinds: tuple[Literal["vqa", "video"], ...] = ("vqa",) if options.quick else ("vqa", "video")
    found, curves = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for label, task in open_tasks(kind, Path(folder), options.quick):
                indices = task.stage.probe_indices[: 8 if options.quick else None]
                exact = task.exact(indices)
                found += [factor_row(task, label, exact, indices, rank) for rank in RANKS]
                found.append(feature_row(task, label, exact, task.sketch(indices, RANKS[0])))
                numbers = (8, 16) if options.quick else (*SAMPLES, len(task.stage.samples))
                curves[label] = sample_shares(task, numbers)
                found.append(sample_row(label, curves[label]))
    if (picture := options.picture("probe_samples.png")) is not None:
        draw(curves, picture)
    return found


def rows(options: Options) -> list[Row]:
    """Rows 2 and 3."""
    return [*cost_rows(options), *exactness_rows(options)]


if __name__ == "__main__":
    benchmark(__doc__, rows)
