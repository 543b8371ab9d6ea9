"""Memory of a run on its device, phase by phase, from the shapes of a model without weights.

It is what the device holds on top of an idle process. On a GPU that is what torch allocates; the CUDA context
and the allocator's fragmentation come on top. On a CPU the copies that a stage keeps on the host count too.
How far the estimate is from a measured peak: docs/plan.md.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from mllm_keeplora.config import ModelConfig, RunConfig, Tower, TrainConfig
from mllm_keeplora.methods.base import Method, load_method
from mllm_keeplora.methods.lora_throughout import LoraThroughout
from mllm_keeplora.modeling.families import LANGUAGE_LAYERS, Media, family_of
from mllm_keeplora.modeling.linear4bit import is_linear
from mllm_keeplora.modeling.loading import DTYPES
from mllm_keeplora.modeling.targets import Target

# bitsandbytes' NF4: one scale per block of 64 weights, itself stored in 8 bits with one fp32 scale per 256.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_CODES = 4 * (16 + 256 + 1)  # both code books and the offset
# fp32 numbers per token and word of the vocabulary at the peak of the loss: log-softmax and two gradients.
LOGITS_FACTOR = 3
# fp32 [n, n] matrices alive in an eigenproblem: Gram matrix, vectors, and twice that of LAPACK's workspace.
EIGH_FACTOR = 4
# Linear layers that write to the residual stream: the backward pass needs their input, not their output.
_WRITERS = re.compile(r"(^|\.)(o_proj|out_proj|proj|down_proj|fc2|linear_fc2)$")
# Bytes of optimizer state per trained parameter, by what an optimizer's name holds; AdamW's 8 otherwise.
_OPTIMIZER_STATE = (("8bit", 2), ("adafactor", 0), ("sgd", 0), ("lion", 4), ("rmsprop", 4), ("adagrad", 4))

PHASES = ("weight bases", "probe", "train", "evaluation")
# What gets a gradient: the weights, thinned (E2), or a stage's factors.
Seen = Literal["probe", "B", "both"]


@dataclass(frozen=True)
class SampleShape:
    """The longest sample that the plan reckons with.

    Attributes:
        tokens: of the sample, media tokens included.
        vision_tokens: rows that its image or clip sends through the vision tower (patches of all tiles or
            frames, class tokens included).
        pixels: numbers of its pixel values.
        media: what it shows.
        source: where that is from.
    """

    tokens: int
    vision_tokens: int
    pixels: int
    media: Media | None
    source: str


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on the device per phase, from shapes.

    Attributes:
        model: without weights.
        targets: the adapted layers.
        config: settings.
        shape: the longest sample.
        stages: of the stream; the last one holds the largest accumulated adapter.
        new_tokens: most tokens generated for an answer.
        on_cpu: the model lies in host memory, where a stage's host copies count too.
    """

    model: PreTrainedModel
    targets: Sequence[Target]
    config: RunConfig
    shape: SampleShape
    stages: int
    new_tokens: int
    on_cpu: bool

    @cached_property
    def method(self) -> Method:
        """What `config.method` names."""
        return load_method(self.config)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return DTYPES[self.config.model.compute_dtype].itemsize

    @property
    def _pixels(self) -> int:
        """Bytes of one sample's pixel values, which processors give in fp32, and of their cast."""
        return self.shape.pixels * (4 + self.itemsize * (self.itemsize < 4))

    def rank(self, target: Target) -> int:
        """r of a module."""
        return self.config.towers()[target.tower].rank

    def columns(self, target: Target) -> int:
        """q of a module."""
        return self.config.probe.columns_per_rank * self.rank(target)

    def factors(self, side: str = "both") -> int:
        """Numbers of one stage's factors: A, B, or both."""
        sizes = {"A": lambda t: t.in_features, "B": lambda t: t.out_features}
        sizes["both"] = lambda t: t.in_features + t.out_features
        return sum(self.rank(t) * sizes[side](t) for t in self.targets)

    def phases(self) -> dict[str, dict[str, int]]:
        """Phase -> item -> bytes."""
        packed, rest = base_bytes(self.model, self.config.model)
        base = {"base, 4-bit layers": packed, "base, compute dtype": rest}
        past = 4 * self.stages * self.factors() * (2 if self.on_cpu else 1)
        return {
            "weight bases": {**base, "largest temporary": self._decomposition()},
            "probe": {**base, "accumulated adapter": past, **self._probe()},
            "train": {**base, "accumulated adapter": past - 4 * self.factors(), **self._train()},
            "evaluation": {**base, "accumulated adapter": past, **self._evaluation()},
        }

    def peak(self) -> int:
        """Largest sum of a phase."""
        return max(sum(items.values()) for items in self.phases().values())

    def _decomposition(self) -> int:
        """E1 on the layer that needs most: the dequantised weight in fp32, its eigenproblem, the basis."""
        largest = 0
        for t in self.targets if self.method.protects_weights else ():
            weight, n = t.in_features * t.out_features, min(t.in_features, t.out_features)
            k = most_columns(t, self.config)
            # Mapped back to a larger input side: in fp64, the matrix, Q, and their fp32 copies.
            basis = t.in_features * k * (24 if t.in_features > t.out_features else 4)
            largest = max(largest, 4 * weight + 4 * EIGH_FACTOR * n * n + basis)
        return largest

    def _probe(self) -> dict[str, int]:
        if self.method.gradient_passes == 0:
            return {}
        sketch = 4 * sum(self.columns(t) * t.in_features for t in self.targets)
        omega = 4 * sum(self.columns(t) * t.out_features for t in self.targets)
        seen: Seen = (
            "both" if isinstance(self.method, LoraThroughout) else "probe"
        )  # EWC's passes go to its own factors
        kept, working = self.activations(self.config.probe.batch_size, seen)
        found = sketch if self.on_cpu else 0  # the gradients' copies, once the activations are gone
        return {
            "stage's adapter or Omega": omega,
            "its gradient": sketch,
            "activations": max(kept, found - working),
            "largest temporary": max(working, self._residual_directions() - kept),
        }

    def _residual_directions(self) -> int:
        """E4 and E8 on the layer that needs most: M twice in fp32, once in fp64, the sketch's SVD."""
        return max(
            t.in_features * (16 * most_columns(t, self.config) + 24 * self.columns(t)) for t in self.targets
        )

    def _train(self) -> dict[str, int]:
        both = self.method.trains == "both"
        trained = self.factors(self.method.trains)
        work = []
        for train in self.train_settings():
            kept, working = self.activations(train.per_device_train_batch_size, "both" if both else "B")
            work.append((4 + optimizer_state(train.optim), kept, working))
        state, kept, working = max(work, key=lambda w: w[0] * trained + w[1] + w[2])
        return {
            "stage's adapter or Omega": 4 * (self.factors() + (self.factors("A") if self.on_cpu else 0)),
            "its gradient": 4 * trained,
            "optimizer state": (state - 4) * trained,
            "activations": kept,
            "largest temporary": working,
        }

    def train_settings(self) -> list[TrainConfig]:
        """Those of all tasks."""
        return [self.config.train, *(self.config.train_for(task) for task in self.config.train_overrides)]

    def activations(self, batch: int, seen: Seen) -> tuple[int, int]:
        """(bytes kept for the backward pass, bytes of the largest temporary beside them).

        The temporary is what the loss needs, or the work on one layer in the backward pass; with activation
        checkpointing that is a whole layer's activations.
        """
        tokens = batch * self.shape.tokens
        language = _Tower(self.model.get_submodule(LANGUAGE_LAYERS), self, "language", seen)
        towers = [(language, tokens)]
        kept = batch * self._pixels
        for vision in self._vision_towers(seen):
            if self.config.vision.adapt:
                towers.append((vision, batch * self.shape.vision_tokens))
            else:
                kept += vision.hidden_states(batch * self.shape.vision_tokens)
        text = self.model.config.get_text_config()
        # Embeddings, what the media's features are written into, and the last norm's fp32 copy.
        kept += tokens * text.hidden_size * (3 * self.itemsize + 4)
        working = LOGITS_FACTOR * 4 * tokens * text.vocab_size
        for tower, rows in towers:
            layer = tower.layer(rows)
            if self.config.train.activation_checkpointing:
                kept += tower.hidden_states(rows)
                working = max(working, layer + tower.working(rows))
            else:
                kept += len(tower.layers) * layer
                working = max(working, tower.working(rows))
        return kept, working

    def _vision_towers(self, seen: Seen) -> Iterator["_Tower"]:
        family = family_of(self.model.config)
        if self.shape.media is not None:
            layers = self.model.get_submodule(family.vision_layers[self.shape.media])
            yield _Tower(layers, self, "vision", seen)

    def _evaluation(self) -> dict[str, int]:
        """Keys and values of prompt and answer, and the forward of the prompt."""
        batch = self.config.evaluation.batch_size
        language = _Tower(self.model.get_submodule(LANGUAGE_LAYERS), self, "language", "B")
        rows = batch * self.shape.tokens
        cache = 2 * (rows + batch * self.new_tokens) * language.key_width * self.itemsize
        vision = sum(
            v.hidden_states(batch * self.shape.vision_tokens) + v.working(batch * self.shape.vision_tokens)
            for v in self._vision_towers("B")
        )
        seen = batch * self._pixels + rows * language.hidden * 3 * self.itemsize
        vocabulary = self.model.config.get_text_config().vocab_size
        return {
            "keys and values": cache * len(language.layers),
            "activations": seen,
            "largest temporary": max(vision, language.working(rows), 8 * batch * vocabulary),
        }


@dataclass(frozen=True)
class _Tower:
    """What one layer of a tower leaves behind and works with, per row (token or patch)."""

    layers: Any  # nn.ModuleList
    memory: MemoryModel
    tower: Tower
    seen: Seen

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers inside one layer; of the first, as all are alike."""
        return {name: module for name, module in self.layers[0].named_modules() if is_linear(module)}

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return next(iter(self.linears.values())).in_features

    @property
    def key_width(self) -> int:
        """Numbers of a token's key."""
        return next(m.out_features for name, m in self.linears.items() if name.endswith("k_proj"))

    def hidden_states(self, rows: int) -> int:
        """The input of every layer."""
        return (len(self.layers) + 1) * rows * self.hidden * self.memory.itemsize

    def layer(self, rows: int) -> int:
        """Bytes that one layer keeps for the backward pass."""
        itemsize = self.memory.itemsize
        linear = sum(m.in_features if _WRITERS.search(n) else m.out_features for n, m in self.linears.items())
        # Values are a view of a fused layer's whole output, which stays beside the turned queries and keys.
        linear += sum(2 * m.out_features // 3 for n, m in self.linears.items() if n.endswith("qkv"))
        return rows * (linear * itemsize + self._norms() + self._lora() + self._scores(rows))

    def _norms(self) -> int:
        """LayerNorm keeps its input; an RMSNorm of transformers keeps it in fp32."""
        total = 0
        for name, module in self.layers[0].named_modules():
            if not type(module).__name__.endswith("Norm"):
                continue
            # On queries and keys (Qwen3) it is as wide as all heads together.
            of = self.linears.get(re.sub("_norm$", "_proj", name))
            width = of.out_features if of is not None else self.hidden
            total += width * (self.memory.itemsize if isinstance(module, nn.LayerNorm) else 4)
        return total

    def _lora(self) -> int:
        """Inputs of what gets a gradient: x for a probe, x in fp32 for A, A x for B."""
        if not self._adapted:
            return 0
        # Layers with one input share it, where it is kept as it is.
        widest = max((m.in_features for n, m in self._adapted.items() if _WRITERS.search(n)), default=0)
        shared = 2 * self.hidden + widest
        if self.seen == "probe":
            return shared * self.memory.itemsize
        inputs = sum(m.in_features for m in self._adapted.values())
        total = 4 * self.memory.config.towers()[self.tower].rank * len(self._adapted)
        if self.memory.config.train.lora_dropout > 0:
            total += inputs  # the mask
        if self.seen == "both":
            total += 4 * (shared if self.memory.itemsize == 4 else inputs)
        return total

    @cached_property
    def _adapted(self) -> dict[str, nn.Linear]:
        """Those of `linears` that carry a factor somewhere in the tower."""
        names = {t.name.split(f".{t.depth}.", 1)[-1] for t in self.memory.targets if t.tower == self.tower}
        return {name: module for name, module in self.linears.items() if name in names}

    def _scores(self, rows: int) -> int:
        """Eager attention keeps its scores, in fp32 and in the compute dtype; fused attention none."""
        if self.memory.config.model.attn_implementation != "eager":
            return 0
        config, shape = self.memory.model.config, self.memory.shape
        if self.tower == "language":
            return (
                int(config.get_text_config().num_attention_heads) * shape.tokens * (4 + self.memory.itemsize)
            )
        vision = config.vision_config
        heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
        return int(heads) * shape.vision_tokens * (4 + self.memory.itemsize)

    def working(self, rows: int) -> int:
        """Work on the layer's largest linear: its weight dequantised, input, result and update in fp32; of a
        probe, in the backward pass, gradients of input and output, and input and dY in fp32."""
        itemsize, nf4 = self.memory.itemsize, self.memory.config.model.quantization == "nf4"
        if self.seen == "probe":
            inputs = outputs = itemsize + 4 * (itemsize < 4)
        else:
            inputs, outputs = 4, 8 + 2 * itemsize
        return max(
            (m.in_features * m.out_features * itemsize if nf4 else 0)
            + rows * (inputs * m.in_features + outputs * m.out_features)
            for m in self.linears.values()
        )


def most_columns(target: Target, config: RunConfig) -> int:
    """Bound on k: a spectrum without any decay needs eps_w of all directions, every other one fewer."""
    eps_w = config.towers()[target.tower].eps_w
    return math.ceil(eps_w * min(target.in_features, target.out_features))


def optimizer_state(name: str) -> int:
    """Bytes of state per trained fp32 parameter of a transformers optimizer."""
    return next((size for part, size in _OPTIMIZER_STATE if part in name), 8)


def base_bytes(model: PreTrainedModel, config: ModelConfig) -> tuple[int, int]:
    """(bytes of the 4-bit layers, bytes of everything that stays in the compute dtype) of the loaded base."""
    itemsize = DTYPES[config.compute_dtype].itemsize
    apart = family_of(model.config).not_quantised
    packed = {}
    if config.quantization == "nf4":
        packed = {
            id(module.weight): nf4_bytes(module.weight.numel())
            for name, module in model.named_modules()
            # Exactly nn.Linear: the output layer of nn.MultiheadAttention, a subclass, is left as it is.
            if type(module) is nn.Linear and not any(name == p or name.startswith(f"{p}.") for p in apart)
        }
    rest = sum(p.numel() * itemsize for p in model.parameters() if id(p) not in packed)
    return sum(packed.values()), rest + sum(b.nbytes for b in model.buffers())


def nf4_bytes(numbers: int) -> int:
    """Bytes of one double-quantised 4-bit weight as bitsandbytes stores it."""
    blocks = -(-numbers // NF4_BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) + NF4_CODES
