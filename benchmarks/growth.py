"""Row 10: what a stage costs after T stages, and on deeper models: time, memory, disk.

    python benchmarks/growth.py                     a LLaVA of 512/256 wide layers: CPU, one core, 5 minutes

On a GPU the layers have the widths of LLaVA-1.5-7B. The model is random and nothing is trained: T stages'
factors of rank 16 and T feature bases are drawn at random, since what they cost depends on their shapes
alone. T runs from 1 to 16 on 4 adapted layers a tower, the depth from 2 to 16 layers at T = 1. Measured at
each point, all points in turns:

    probe       both towers' sketches and A of every module (E2-E4), from two batches
    step        forward, backward and AdamW on one batch, without the Trainer's own time
    forward     prefill of one batch as an evaluation does it
    fold        the check of the new update, folding, attaching, writing the adapter (E7)
    memory      what a step holds, added up from its tensors. A resident set would also show what the
                allocator keeps: on a CPU tens of MB, another number in every process
    disk        the adapter, the T stages' own factors, the T feature bases, the weight bases

For each: the least-squares line a + b T, and the slope of log(cost) over log(T) between the two largest T,
which is at most 1 where a cost is linear.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Options, Row, benchmark, in_turns, megabytes, saved_bytes
from noise_run import Noise, NoiseRun, noise_config
from shapes import Shape, llava_config, random_factors, random_model

from mllm_keeplora.continual.stage import check_no_leakage
from mllm_keeplora.evaluation.answer import generation_settings, inference_state
from mllm_keeplora.linalg.subspace import orthonormal_complement
from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, activate, attach, detach
from mllm_keeplora.modeling.loading import save_adapter
from mllm_keeplora.modeling.low_rank import one_low_rank_path
from mllm_keeplora.runs.files import save_tensors

RANK = 16
# What a stage adds to each feature basis. After 16 stages the 256 inputs of a vision layer still have room
# for A: about 80 directions are the weight's.
DIRECTIONS = 8
LINEAR = 1.05  # a slope of 1, and what is left of noise in a median
Point = tuple[int, int]  # (layers a tower, stages learnt)
Costs = dict[str, list[list[float]]]  # cost -> per point the rounds' figures; seconds or bytes
TIMES = ("probe", "forward", "step", "fold")
STYLES = {"probe": "o-C0", "forward": "s-C1", "step": "D-C2", "fold": "^-C3", "memory": "vC4--"}
STYLES |= {"disk: adapter": "oC5--", "disk: factors of the stages": "sC6--"}
STYLES |= {"disk: feature bases": "XC8--", "disk: weight bases": "PC9--"}


@dataclass(frozen=True)
class Sizes:
    """Shapes of the model and its samples.

    Attributes:
        language, vision: (hidden, intermediate) widths.
        image_size: pixels a side.
        length: tokens of a sample, image tokens included.
        batch: samples.
        layers: adapted layers of each tower while T grows.
        lengths: T, ascending.
        depths: adapted layers of each tower at T = 1, ascending.
    """

    language: tuple[int, int] = (512, 1408)
    vision: tuple[int, int] = (256, 1024)
    image_size: int = 112
    length: int = 96
    batch: int = 4
    layers: int = 4
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    depths: tuple[int, ...] = (2, 4, 8, 16)

    def shape(self, layers: int) -> Shape:
        """LLaVA-1.5's in these widths, its heads as wide; the last vision layer takes no part in the result."""
        (hidden, intermediate), (vision_hidden, vision_intermediate) = self.language, self.vision
        return Shape(
            hidden,
            intermediate,
            layers,
            hidden // 128,
            vision_hidden,
            vision_intermediate,
            layers + 1,
            vision_hidden // 64,
            self.image_size,
            2048,
        )

    def noise(self) -> Noise:
        """A task for each stage, and one to be learnt after them."""
        return Noise(self.shape(self.layers), self.length, 2 * self.batch, 1, tasks=max(self.lengths) + 1)


QUICK = Sizes((128, 256), (128, 256), 56, 48, 2, 2, (1, 2), (2, 4))
GPU = Sizes((4096, 11008), (1024, 4096), 336, 640)


class AfterStages:
    """A model that has learnt some stages, and what the next stage does with it.

    Args:
        root: where the noise was written; the run, too, writes there.
        sizes: shapes.
        point: layers and stages.
        device: where the model is put.
    """

    def __init__(self, root: Path, sizes: Sizes, point: Point, device: torch.device) -> None:
        layers, stages = point
        run_dir, bases = str(root / f"run-{layers}-{stages}"), str(root / f"bases-{layers}")
        self.run = NoiseRun(noise_config(root, sizes.batch, RANK, device, run_dir=run_dir, cache_dir=bases))
        self.run.take(random_model(llava_config(sizes.shape(layers)), self.run.config.model, device))
        base, targets = self.run.context.model, self.run.context.targets
        factors = random_factors(targets, RANK * stages, "earlier", torch.device("cpu"))
        self.stage = self.run.stage_context(stages + 1, factors)
        self._write_stages()
        self.model = attach(base, ACCUMULATED, factors, dict.fromkeys(factors, 1))
        self.batch = self.run.context.to_device(self.stage.collator(self.stage.samples[: sizes.batch]))
        self.start = self.run.method.start(self.stage, self.probe()).factors
        self.training = ExitStack()

    def _write_stages(self) -> None:
        """What each stage left: its part of the factors, and random directions orthonormal to all others."""
        earlier, drawn = self.stage.earlier, torch.Generator().manual_seed(0)
        factors: list[dict[str, torch.Tensor]] = [{} for _ in earlier]
        features: list[dict[str, torch.Tensor]] = [{} for _ in earlier]
        for t in self.stage.targets:
            noise = torch.randn(t.in_features, DIRECTIONS * len(earlier), generator=drawn)
            basis = self.stage.bases.weight_basis(t)
            directions = orthonormal_complement(noise.to(basis.device), basis).cpu().split(DIRECTIONS, dim=1)
            a, b = self.stage.accumulated[t.name]
            for n, (rows, columns) in enumerate(zip(a.split(RANK), b.split(RANK, dim=1), strict=True)):
                factors[n] |= {f"{t.name}.A": rows, f"{t.name}.B": columns}
                features[n][t.name] = directions[n].contiguous()
        for directory, own_factors, own_features in zip(earlier, factors, features, strict=True):
            save_tensors(directory.tensors("train"), own_factors)
            save_tensors(directory.tensors("protect"), own_features)

    def disk(self) -> dict[str, float]:
        """Bytes of what the stages left."""
        self._save_adapter()

        def size(phase: str) -> float:
            return sum(stage.tensors(phase).stat().st_size for stage in self.stage.earlier)

        return {
            "disk: adapter": self.run.directory.adapter_weights.stat().st_size,
            "disk: factors of the stages": size("train"),
            "disk: feature bases": size("protect"),
            "disk: weight bases": sum(file.stat().st_size for file in self.run.context.weight_files.values()),
        }

    def _save_adapter(self) -> None:
        context = self.run.context
        generation = generation_settings(context.model, context.processor)
        save_adapter(self.run.directory.adapter, self.model, self.run.config.model, context.processor, generation)

    def probe(self) -> dict[str, torch.Tensor]:
        """A of every module for the next task."""
        return self.run.method.initial_a(self.stage, self.model)

    @torch.no_grad()
    def forward(self) -> None:
        """Prefill: the logits that the first answered token is read from."""
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        with inference_state(self.model):
            self.model(**inputs, logits_to_keep=1)

    def begin_training(self) -> None:
        """Attaches the stage's own adapter with B = 0, as `learn` does; `fold` takes it off."""
        attach(self.model, STAGE, self.start, self.stage.scales)
        activate(self.model, [ACCUMULATED, STAGE], STAGE, "B")
        self.training.enter_context(one_low_rank_path(self.model))
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])

    def step(self) -> None:
        """One optimizer step on B."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> float:
        """Bytes that a step holds; transient tensors of single layers are left out.

        The model with all its factors, the stage's copy of the accumulated ones, gradients and moments of B,
        and what the forward pass keeps for the backward pass.
        """
        kept = saved_bytes(self.model, self.step)
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        copy = sum(a.nbytes + b.nbytes for a, b in self.stage.accumulated.values())
        return float(self.model.get_memory_footprint() + copy + 3 * trained + kept)

    def fold(self) -> None:
        """What `run_stage` does between training and the next probe; B is random."""
        self.training.close()
        detach(self.model)
        factors = {name: (a, torch.randn(b.shape)) for name, (a, b) in self.start.items()}
        check_no_leakage(self.stage, factors, self.stage.bases)
        folded = self.run.method.fold(self.stage.accumulated, factors, self.stage.folded_scales)
        self.model = attach(self.run.context.model, ACCUMULATED, folded, dict.fromkeys(folded, 1))
        self._save_adapter()


def sweep(root: Path, sizes: Sizes, points: Sequence[Point], options: Options) -> Costs:
    """All costs at all points."""
    costs: Costs = {}
    models = {str(point): AfterStages(root, sizes, point, options.device) for point in points}

    def turns(way: Callable[[AfterStages], object]) -> list[list[float]]:
        ways = {name: partial(way, model) for name, model in models.items()}
        return list(in_turns(ways, options.repeats, options.device).values())

    disk = [model.disk() for model in models.values()]
    costs["probe"], costs["forward"] = turns(AfterStages.probe), turns(AfterStages.forward)
    for model in models.values():
        model.begin_training()
    costs["step"] = turns(AfterStages.step)
    costs["memory"] = [[model.memory()] for model in models.values()]
    costs["fold"] = turns(AfterStages.fold)  # last: it takes the adapters off
    return costs | {name: [[found[name]] for found in disk] for name in disk[0]}


def rows(options: Options) -> list[Row]:
    """A row per cost and direction of growth; draws growth.png."""
    sizes = QUICK if options.quick else GPU if options.device.type == "cuda" else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes.noise().write(root)
        lengths = sweep(root, sizes, [(sizes.layers, t) for t in sizes.lengths], options)
        depths = sweep(root, sizes, [(layers, 1) for layers in sizes.depths], options)
    if (picture := options.picture("growth.png")) is not None:
        draw(sizes, lengths, depths, picture)
    shapes = f"{sizes.language[0]} and {sizes.vision[0]} wide, {sizes.batch} samples of {sizes.length} tokens"
    over_t = f"over T stages learnt, {sizes.layers} layers a tower, {shapes}"
    over_l = f"over L layers a tower, one stage learnt, {shapes}"
    depths.pop("disk: factors of the stages")  # at T = 1 the adapter itself
    return [
        *(row(f"{name} {over_t}", "T", sizes.lengths, cost, name) for name, cost in lengths.items()),
        *(row(f"{name} {over_l}", "L", sizes.depths, cost, name) for name, cost in depths.items()),
    ]


def row(what: str, symbol: str, sizes: Sequence[int], cost: Sequence[Sequence[float]], name: str) -> Row:
    """One line of the table.

    Args:
        what: for the line.
        symbol: what the sizes are called.
        sizes: ascending.
        cost: per size the rounds' figures.
        name: of the cost; says the unit.
    """
    text = in_seconds if name in TIMES else in_megabytes
    middles = [statistics.median(found) for found in cost]
    b, a = (0.0 if abs(part) < 1e-6 * max(middles) else part for part in np.polyfit(sizes, middles, 1))
    slopes = [math.log(d / c) / math.log(sizes[-1] / sizes[-2]) for c, d in zip(*cost[-2:], strict=True)]
    slope = statistics.median(slopes)
    shown = [n for n in range(len(sizes)) if n % 2 == 0 or n == len(sizes) - 1]
    return Row(
        10,
        what,
        ", ".join(f"{symbol} = {sizes[n]}: {text(cost[n])}" for n in shown),
        f"the line {text([a])} {'-' if b < 0 else '+'} {text([abs(b)])} {symbol}",
        f"slope {slope:.2f} ({min(slopes):.2f} to {max(slopes):.2f})",
        f"linear or better: slope <= {LINEAR} from {symbol} = {sizes[-2]} to {sizes[-1]}",
        slope <= LINEAR,
    )


def in_seconds(found: Sequence[float]) -> str:
    """The median, as text."""
    return f"{statistics.median(found):.3g} s"


def in_megabytes(found: Sequence[float]) -> str:
    """The median of bytes, as text."""
    return megabytes(statistics.median(found))


def draw(sizes: Sizes, lengths: Costs, depths: Costs, path: Path) -> None:
    """Every cost relative to its first figure, over T and over depth."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    panel(left, sizes.lengths, lengths, "stages learnt, T", f"T = {sizes.lengths[0]}")
    panel(right, sizes.depths, depths, "layers a tower, L", f"L = {sizes.depths[0]}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def panel(axes: Axes, sizes: Sequence[int], costs: Costs, label: str, first: str) -> None:
    """One panel; both axes in powers of two, where a straight line of slope 1 is linear growth."""
    axes.plot(sizes, [size / sizes[0] for size in sizes], color="0.6", linewidth=4, label="linear")
    for name, cost in costs.items():
        middles = [statistics.median(found) for found in cost]
        relative = [middle / middles[0] for middle in middles]
        # Some lines lie on one another: open marks of their own tell them apart.
        axes.plot(sizes, relative, STYLES[name], markerfacecolor="none", markersize=7, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.set_ylabel(f"cost, times that at {first}")
    axes.grid(color="0.9")


if __name__ == "__main__":
    benchmark(__doc__, rows)
