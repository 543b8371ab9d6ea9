"""Time of a run on cards that are not here: what its phases compute, move and launch, over what a card can do.

It is arithmetic and no measurement. `keeplora plan --measure` replaces it on the machine at hand.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mllm_keeplora.planning.memory_model import CHUNK, LayerMemory, MemoryModel, Seen, TowerMemory, nf4_bytes

# Shares of a card's peaks that a training of this kind is assumed to reach, and a launch from Python.
PRODUCTS, DECOMPOSITIONS, TRAFFIC, LAUNCH_SECONDS = 0.5, 0.05, 0.7, 8e-6
# Operations of a layer's forward: norms, attention and additions, and a linear layer with its adapters. Twice as many
# in a backward pass. benchmarks/low_rank.py counts 326 for a language and a vision layer, 13 linear layers, both ways.
LAYER_LAUNCHES, LINEAR_LAUNCHES, DEQUANTISING_LAUNCHES = 20, 5, 2
# Likewise of a gated delta rule without a kernel of its own, once and for every chunk, as torch dispatches them.
RECURRENCE_LAUNCHES, CHUNK_LAUNCHES = 46, 9
# Readings and writings of the residual stream between a layer's products: two norms, two additions, attention.
STREAM_PASSES = 12


class Card(NamedTuple):
    """What a maker's data sheet says."""

    name: str
    bf16: float  # FLOP/s of dense tensor-core products, accumulated in fp32
    fp32: float  # FLOP/s without TF32
    bandwidth: float  # bytes/s of its memory


CARDS = (
    Card("RTX 4090", 165e12, 82.6e12, 1.01e12),
    Card("A100 80 GB", 312e12, 19.5e12, 2.04e12),
    Card("H100 SXM", 989e12, 67e12, 3.35e12),
)


class Cost(NamedTuple):
    """What a piece of work takes."""

    products: float = 0  # FLOPs in the compute dtype
    exact: float = 0  # FLOPs of products in fp32
    decompositions: float = 0  # FLOPs of eigenproblems and SVDs in fp32
    moved: float = 0  # bytes
    launches: float = 0

    def seconds(self, card: Card, compute_fp32: bool) -> float:
        """On a card: its own work, or the host's launches where those take longer."""
        peak = card.fp32 if compute_fp32 else card.bf16
        computing = self.products / (PRODUCTS * peak) + self.exact / (PRODUCTS * card.fp32)
        computing += self.decompositions / (DECOMPOSITIONS * card.fp32)
        return max(computing + self.moved / (TRAFFIC * card.bandwidth), self.launches * LAUNCH_SECONDS)


def total(costs: Sequence[Cost], times: float = 1) -> Cost:
    """The sum of some work, done so many times."""
    return Cost(*(times * sum(column) for column in zip(*costs, strict=True)))


class Rates(NamedTuple):
    """Seconds of the parts that a run is made of."""

    source: str  # where they are from
    step: float  # of the optimizer
    probe: float  # a sample in a probe pass; 0 without passes
    question: float  # of an evaluation
    stage: float = 0.0  # once a stage, whatever the number of samples
    weight_bases: float = 0.0  # once a base model


@dataclass(frozen=True)
class TimeModel:
    """Seconds from shapes: every sample is as long as the longest, the past as it is halfway through the stream."""

    memory: MemoryModel

    def rates(self, card: Card) -> Rates:
        """On one card of that kind."""
        fp32 = self.memory.config.model.compute_dtype == "float32"
        costs = (self.step, self.probe, self.question, self.stage, self.weight_bases)
        return Rates(card.name, *(cost.seconds(card, fp32) for cost in costs))

    @cached_property
    def step(self) -> Cost:
        """Forward and backward of what accumulates to one step of the optimizer."""
        config = self.memory.config
        train, batch = config.train, config.train.per_device_train_batch_size
        again = int(train.activation_checkpointing)
        training = TimeModel(self.memory.training)
        beside = Counter(config.general.beside(batch, train.gradient_accumulation_steps))
        passed = [
            total([training._passed(batch + general, "B", forward=1 + again, backward=1)], times)
            for general, times in beside.items()
        ]
        return total(passed, self.memory.method.step_passes())

    @cached_property
    def probe(self) -> Cost:
        """A sample's share of a gradient pass and of its sketch (E2)."""
        batch = self.memory.config.probe.batch_size
        again = int(self.memory.config.train.activation_checkpointing)
        passed = self._passed(batch, "weights", forward=1 + again, backward=1)
        rows = {tower.name: tower.rows for tower in self.memory.towers(batch, "weights")}
        sketched = sum(
            2 * rows.get(t.tower, 0) * self.memory.columns(t) * (t.in_features + t.out_features)
            for t in self.memory.targets
        )
        return total([passed, Cost(exact=sketched)], 1 / batch)

    @cached_property
    def question(self) -> Cost:
        """Its share of a batch: the prompt, then an answer as long as the longest sample's, token by token.

        A CLIP's answer is there at once; its prompts are reckoned with every batch, and pass once a task.
        """
        memory, batch = self.memory, self.memory.config.evaluation.batch_size
        if memory.shape.prompts:
            return total([self._passed(batch, "B", forward=1, backward=0)], 1 / batch)
        tokens = min(memory.shape.supervised, memory.new_tokens)
        language, layers = memory.towers(batch, "B")[0], []
        for kind in language.kinds:
            linears = [self._linear(language, m.in_features, m.out_features, batch) for m in kind.linears.values()]
            launches = LAYER_LAUNCHES + (kind.recurrence is not None) * RECURRENCE_LAUNCHES
            layer = total([*linears, Cost(moved=kind.cache(0), launches=launches)])
            layers.append(total([layer], kind.number))
        token = total([*layers, self._words(batch, passes=1)])
        return total([self._passed(batch, "B", forward=1, backward=0), total([token], tokens)], 1 / batch)

    @cached_property
    def stage(self) -> Cost:
        """A (E4) and the feature bases (E8): sketches freed of M, and their SVDs."""
        work, launches = 0.0, 0
        for t in self.memory.targets:
            q, k = self.memory.columns(t), self.memory.most_k(t)
            work += 2 * (8 * q * k * t.in_features + 14 * q * q * t.in_features)
            launches += 60
        return Cost(decompositions=work, launches=launches)

    @cached_property
    def weight_bases(self) -> Cost:
        """Gram matrix and eigenproblem of every adapted weight (E1)."""
        if not self.memory.method.protects_weights:
            return Cost()
        gram, solved = 0.0, 0.0
        for t in self.memory.targets:
            n, m = sorted((t.in_features, t.out_features))
            gram += 2 * n * n * m
            solved += 9 * n**3
        return Cost(exact=gram, decompositions=solved)

    def _passed(self, batch: int, seen: Seen, forward: int, backward: int) -> Cost:
        """Both towers and the loss; a vision tower that is not adapted needs no backward pass."""
        costs = []
        for tower in self.memory.towers(batch, seen):
            adapted = tower.name == "language" or self.memory.config.vision.adapt
            ways = (forward, backward) if adapted else (1, 0)
            for kind in tower.kinds:
                there, mixed = self._layer(kind), self._recurrence(kind)
                # To the inputs alone: no gradient of a weight, and A x is not computed again.
                back = there._replace(exact=0, moved=2 * there.moved, launches=2 * there.launches)
                costs += [total([there, mixed], ways[0] * kind.number)]
                costs += [total([back, mixed, mixed], ways[1] * kind.number)]
        supervised = batch * self.memory.shape.supervised if backward else batch
        return total([*costs, self._words(supervised, passes=1 + backward)])

    def _layer(self, kind: LayerMemory) -> Cost:
        """A layer's forward, less a recurrence."""
        tower = kind.tower
        attended = 4 * tower.rows * tower.sample_rows * tower.hidden * (kind.recurrence is None)
        between = STREAM_PASSES * tower.rows * tower.hidden * self.memory.itemsize
        linears = [self._linear(tower, m.in_features, m.out_features, tower.rows) for m in kind.linears.values()]
        return total([*linears, Cost(products=attended, moved=between, launches=LAYER_LAUNCHES)])

    def _recurrence(self, kind: LayerMemory) -> Cost:
        """Its forward in fp32: products and solutions inside chunks, and of each chunk with the state."""
        rule, tower = kind.recurrence, kind.tower
        if rule is None:
            return Cost()
        inside = CHUNK * (4 * rule.key + 2 * rule.value + rule.key + rule.value)
        across = 6 * rule.key * rule.value
        chunks = -(-tower.sample_rows // CHUNK)
        return Cost(
            exact=tower.batch * chunks * CHUNK * rule.heads * (inside + across),
            moved=2 * rule.kept(tower.batch, tower.sample_rows, self.memory.itemsize),
            launches=RECURRENCE_LAUNCHES + CHUNK_LAUNCHES * chunks,
        )

    def _linear(self, tower: TowerMemory, inputs: int, outputs: int, rows: int) -> Cost:
        """A linear layer with its adapters: the product with the dequantised weight, A x in fp32, B u."""
        memory, nf4 = self.memory, self.memory.config.model.quantization == "nf4"
        adapted = memory.config.towers().get(tower.name)
        rank = adapted.rank * (1 + memory.stages // 2) if adapted else 0
        weight = inputs * outputs * memory.itemsize
        return Cost(
            products=2 * rows * outputs * (inputs + rank),
            exact=2 * rows * inputs * rank,
            moved=weight + nf4 * (weight + nf4_bytes(inputs * outputs)) + rows * (inputs + outputs) * memory.itemsize,
            launches=LINEAR_LAUNCHES + nf4 * DEQUANTISING_LAUNCHES,
        )

    def _words(self, rows: int, passes: int) -> Cost:
        """Logits, and their way back."""
        numbers = self.memory.model.config.get_text_config().hidden_size * self.memory.words
        return Cost(products=2 * passes * rows * numbers, moved=passes * numbers * self.memory.itemsize, launches=10)
