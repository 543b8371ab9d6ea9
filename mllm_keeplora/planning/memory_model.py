"""Memory of a run on its device, phase by phase, from the shapes of a model without weights.

It is what the device holds on top of an idle process. On a GPU that is what torch allocates; the CUDA context
and the allocator's fragmentation come on top. On a CPU the copies that a stage keeps on the host count too.
How far the estimate is from a measured peak: docs/plan.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from mllm_keeplora.config import ModelConfig, RunConfig, Tower, TrainConfig
from mllm_keeplora.methods.base import Method, load_method
from mllm_keeplora.modeling.clip import PROMPTS
from mllm_keeplora.modeling.families import ModelFamily, family_of
from mllm_keeplora.modeling.linear4bit import is_linear
from mllm_keeplora.modeling.loading import DTYPES
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.planning.skeleton import SampleShape

# bitsandbytes' NF4: one scale per block of 64 weights, itself stored in 8 bits with one fp32 scale per 256.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_CODES = 4 * (16 + 256 + 1)  # both code books and the offset
# fp32 numbers per supervised token and word of the vocabulary at the peak of the loss: log-softmax and two gradients.
LOGITS_FACTOR = 3
# fp32 [n, n] matrices alive in an eigenproblem: Gram matrix, vectors, and twice that of LAPACK's workspace.
EIGH_FACTOR = 4
# Bytes of optimizer state per trained parameter, by what an optimizer's name holds; AdamW's 8 otherwise.
_OPTIMIZER_STATE = {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4}

# Tokens that transformers' gated delta rule takes at a time.
CHUNK = 64

# What gets a gradient: the weights, sketched (E2), or a stage's factors.
Seen = Literal["weights", "B", "both"]


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on the device per phase, from shapes."""

    model: PreTrainedModel  # without weights
    targets: Sequence[Target]
    config: RunConfig
    shape: SampleShape  # of the longest sample
    stages: int  # of the stream; the last one holds the largest accumulated adapter
    new_tokens: int  # most tokens generated for an answer
    on_cpu: bool  # the model lies in host memory, where a stage's host copies count too
    spread: int = 1  # processes that hold a share of the language layers each, in place of all of them

    @cached_property
    def method(self) -> Method:
        """What `config.method` names."""
        return load_method(self.config)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return DTYPES[self.config.model.compute_dtype].itemsize

    def rank(self, target: Target) -> int:
        """r of a module."""
        return self.config.towers()[target.tower].rank

    def columns(self, target: Target) -> int:
        """q of a module."""
        return self.config.probe.columns_per_rank * self.rank(target)

    def most_k(self, target: Target) -> int:
        """Bound on k: a spectrum without any decay needs eps_w of all directions, every other one fewer."""
        eps_w = self.config.towers()[target.tower].eps_w
        return math.ceil(eps_w * min(target.in_features, target.out_features))

    def factors(self, side: str = "both") -> int:
        """Numbers of one stage's factors: A, B, or both."""
        a, b = side != "B", side != "A"
        return sum(self.rank(t) * (a * t.in_features + b * t.out_features) for t in self.targets)

    @property
    def words(self) -> int:
        """What a logit is given for: the vocabulary, or the classes of a sample."""
        return self.shape.prompts or int(self.model.config.get_text_config().vocab_size)

    @property
    def training(self) -> "MemoryModel":
        """With the prompts that pass beside a batch in training."""
        shape = self.shape
        return replace(self, shape=shape._replace(prompts=shape.prompts + shape.prompts_beside))

    def train_settings(self) -> list[TrainConfig]:
        """Those of all tasks."""
        return [self.config.train, *(self.config.train_for(task) for task in self.config.train_overrides)]

    def phases(self) -> dict[str, dict[str, int]]:
        """Phase -> item -> bytes."""
        base, spread, answering = self._bases()
        adapter = 4 * self.stages * self.factors() * (2 if self.on_cpu else 1)
        return {
            "weight bases": {**base, "largest temporary": self._decomposition()},
            "probe": {**spread, "accumulated adapter": adapter, **self._probe()},
            "train": {**spread, "accumulated adapter": adapter - 4 * self.factors(), **self._train()},
            "evaluation": {**answering, "accumulated adapter": adapter, **self._evaluation()},
        }

    def peak(self) -> int:
        """Largest sum of a phase."""
        return max(sum(items.values()) for items in self.phases().values())

    def _bases(self) -> list[dict[str, int]]:
        """The base: whole, spread with one language layer gathered, and gathered wholly beside this process's share."""
        layers = self.model.get_submodule(family_of(self.model.config).language_layers)
        whole = base_bytes(self.model, self.config.model)
        shared = base_bytes(self.model, self.config.model, layers)
        sizes: list[Sequence[int]] = [whole, whole, whole]
        if self.spread > 1:
            shares = [size // self.spread for size in shared]
            one = [size // len(list(layers.children())) for size in shared]
            spread = [w - s + own + o for w, s, own, o in zip(whole, shared, shares, one, strict=True)]
            sizes[1:] = [spread, [w + own for w, own in zip(whole, shares, strict=True)]]
        return [{"base, 4-bit layers": packed, "base, compute dtype": rest} for packed, rest in sizes]

    def _decomposition(self) -> int:
        """E1 on the layer that needs most: the dequantised weight in fp32, its eigenproblem, the basis."""
        largest = 0
        for t in self.targets if self.method.protects_weights else ():
            weight, n = t.in_features * t.out_features, min(t.in_features, t.out_features)
            # Mapped back to a larger input side: in fp64, the matrix, Q, and their fp32 copies.
            basis = t.in_features * self.most_k(t) * (24 if t.in_features > t.out_features else 4)
            largest = max(largest, 4 * weight + 4 * EIGH_FACTOR * n * n + basis)
        return largest

    def _probe(self) -> dict[str, int]:
        if self.method.gradient_passes == 0:
            return {}
        sketch = 4 * sum(self.columns(t) * t.in_features for t in self.targets)
        omega = 4 * sum(self.columns(t) * t.out_features for t in self.targets)
        seen: Seen = "weights" if self.method.gradients_of == "weights" else "both"
        kept, working = self.activations(self.config.probe.batch_size, seen)
        found = sketch if self.on_cpu else 0  # the gradients' copies, once the activations are gone
        # E4 and E8 on the layer that needs most: M twice in fp32, once in fp64, the sketch's SVD.
        directions = max(t.in_features * (16 * self.most_k(t) + 24 * self.columns(t)) for t in self.targets)
        return {
            "stage's adapter or Omega": omega,
            "its gradient": sketch,
            "activations": max(kept, found - working),
            "largest temporary": max(working, directions - kept),
        }

    def _train(self) -> dict[str, int]:
        seen: Seen = "both" if self.method.trains == "both" else "B"
        trained, work = self.factors(seen), []
        for train in self.train_settings():
            state = optimizer_state(train.optim) * trained
            batch = train.per_device_train_batch_size
            # General samples pass beside the batch and wait for the same backward pass.
            beside = max(self.config.general.beside(batch, train.gradient_accumulation_steps))
            work.append((state, *self.training.activations(batch + beside, seen)))
        state, kept, working = max(work, key=sum)
        return {
            "stage's adapter or Omega": 4 * (self.factors() + self.on_cpu * self.factors("A")),
            "its gradient": 4 * trained * self.method.step_passes(),
            "optimizer state": state,
            "activations": kept,
            "largest temporary": working,
        }

    def _evaluation(self) -> dict[str, int]:
        """What is cached of prompt and answer, and the forward of the prompt; of a CLIP, that of its larger tower."""
        batch = self.config.evaluation.batch_size
        if self.shape.prompts:
            asked = replace(self, shape=self.shape._replace(prompts=PROMPTS))
            towers = asked.towers(batch, "B")
            work = [tower.working() + 3 * tower.rows * tower.hidden * self.itemsize for tower in towers]
            return {"activations": batch * self.shape.pixels * self.itemsize, "largest temporary": max(work)}
        language, *vision = self.towers(batch, "B")
        seeing = sum(tower.hidden_states() + tower.working() for tower in vision)
        return {
            "keys and values": sum(kind.number * kind.cache(self.new_tokens) for kind in language.kinds),
            "activations": batch * self.shape.pixels * self.itemsize
            + language.rows * language.hidden * 3 * self.itemsize,
            "largest temporary": max(seeing, language.working(), 8 * batch * self.words),
        }

    def activations(self, batch: int, seen: Seen) -> tuple[int, int]:
        """(bytes kept for the backward pass, bytes of the largest temporary beside them).

        The temporary is what the loss needs, or the work on one layer in the backward pass; with activation
        checkpointing that is a whole layer's activations.
        """
        text, tokens = self.model.config.get_text_config(), self.shape.texts(batch) * self.shape.tokens
        # Embeddings, what the media's features are written into, and the last norm's fp32 copy.
        kept = batch * self.shape.pixels * self.itemsize + tokens * text.hidden_size * (3 * self.itemsize + 4)
        working = LOGITS_FACTOR * 4 * batch * self.shape.supervised * self.words
        for tower in self.towers(batch, seen):
            if tower.name == "vision" and not self.config.vision.adapt:
                kept += tower.hidden_states()
            elif self.config.train.activation_checkpointing:
                kept += tower.hidden_states()
                working = max(working, *(kind.kept() + kind.working() for kind in tower.kinds))
            else:
                kept += sum(kind.number * kind.kept() for kind in tower.kinds)
                working = max(working, tower.working())
        return kept, working

    def towers(self, batch: int, seen: Seen) -> list["TowerMemory"]:
        """The language tower, and the vision tower where the sample shows something."""
        family, shape = family_of(self.model.config), self.shape
        towers: list[tuple[Tower, str, int, int]] = [
            ("language", family.language_layers, shape.tokens, shape.texts(batch))
        ]
        if shape.media is not None:
            towers.append(("vision", family.vision_layers[shape.media], shape.vision_tokens, batch))
        return [
            TowerMemory(self, family, name, list(self.model.get_submodule(layers).children()), rows, number, seen)
            for name, layers, rows, number in towers
        ]


@dataclass(frozen=True)
class TowerMemory:
    """What a tower's layers leave behind and work with for one batch, in bytes."""

    memory: MemoryModel
    family: ModelFamily
    name: Tower
    layers: Sequence[nn.Module]
    sample_rows: int  # tokens or patches
    batch: int  # samples; prompts of a CLIP
    seen: Seen

    @property
    def rows(self) -> int:
        """Tokens or patches of the batch."""
        return self.batch * self.sample_rows

    @cached_property
    def kinds(self) -> list["LayerMemory"]:
        """The tower's layers, those with the same linear layers together."""
        alike: dict[object, list[LayerMemory]] = {}
        for layer in self.layers:
            linears = {name: module for name, module in layer.named_modules() if is_linear(module)}
            shapes = tuple((name, m.in_features, m.out_features) for name, m in linears.items())
            alike.setdefault(shapes, []).append(LayerMemory(self, layer, linears))
        return [replace(kind[0], number=len(kind)) for kind in alike.values()]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        first = self.kinds[0]
        return next(module.in_features for name, module in first.linears.items() if not first.writes(name))

    def hidden_states(self) -> int:
        """The input of every layer."""
        return (len(self.layers) + 1) * self.rows * self.hidden * self.memory.itemsize

    def working(self) -> int:
        """Work on the layer that needs most."""
        return max(kind.working() for kind in self.kinds)


@dataclass(frozen=True)
class LayerMemory:
    """What a layer leaves behind and works with for its tower's batch, in bytes."""

    tower: TowerMemory
    layer: nn.Module
    linears: dict[str, nn.Linear]  # those inside it
    number: int = 1  # of such layers

    @property
    def recurrence(self) -> "Recurrence | None":
        """Of a layer that keeps a state in place of keys and values."""
        name = self.tower.family.recurrence
        if name is None or not any(linear.startswith(f"{name}.") for linear in self.linears):
            return None
        text = self.tower.memory.model.config.get_text_config()
        return Recurrence(
            text.linear_num_value_heads,
            text.linear_key_head_dim,
            text.linear_value_head_dim,
            2 * text.linear_num_key_heads * text.linear_key_head_dim,
            text.linear_conv_kernel_dim,
        )

    def cache(self, new_tokens: int) -> int:
        """Keys and values of prompts and answers; of a recurrence its states, whatever the length."""
        tower, itemsize = self.tower, self.tower.memory.itemsize
        if self.recurrence is not None:
            return tower.batch * self.recurrence.state(itemsize)
        width = self.linears[tower.family.keys].out_features
        return 2 * (tower.rows + tower.batch * new_tokens) * width * itemsize

    def writes(self, name: str) -> bool:
        """Whether a linear layer writes to the residual stream; the others read it."""
        return name.rsplit(".", 1)[-1] in self.tower.family.writers

    def kept(self) -> int:
        """What the layer keeps for the backward pass: inputs of what writes to the residual stream, outputs
        of the other linear layers, and what norms, adapters and attention add."""
        tower, itemsize = self.tower, self.tower.memory.itemsize
        linear = sum(m.in_features if self.writes(n) else m.out_features for n, m in self.linears.items())
        # Values are a view of a fused layer's whole output, which stays beside the turned queries and keys.
        fused = (m for n, m in self.linears.items() if n.rsplit(".", 1)[-1] in tower.family.fused)
        linear += sum(2 * m.out_features // 3 for m in fused)
        kept = tower.rows * (linear * itemsize + self._norms() + self._lora() + self._scores())
        if self.recurrence is not None:
            kept += self.recurrence.kept(tower.batch, tower.sample_rows, itemsize)
        return kept

    def _norms(self) -> int:
        """LayerNorm keeps its input; an RMSNorm of transformers keeps it in fp32."""
        total, tower = 0, self.tower
        for name, module in self.layer.named_modules():
            if type(module).__name__.endswith("Norm"):
                heads = tower.family.head_norms.get(name)
                width = tower.hidden if heads is None else self.linears[heads].out_features
                total += width * (tower.memory.itemsize if isinstance(module, nn.LayerNorm) else 4)
        return total

    def _lora(self) -> int:
        """Inputs of what gets a gradient: x for a probe, x in fp32 for A, A x for B."""
        tower, config = self.tower, self.tower.memory.config
        targets = (t for t in tower.memory.targets if t.tower == tower.name)
        names = {t.name.split(f".{t.depth}.", 1)[-1] for t in targets}
        inputs = {name: module.in_features for name, module in self.linears.items() if name in names}
        if not inputs:
            return 0
        # Layers with one input share it, where it is kept as it is.
        shared = 2 * tower.hidden + max((n for name, n in inputs.items() if self.writes(name)), default=0)
        if tower.seen == "weights":
            return shared * tower.memory.itemsize
        total = 4 * config.towers()[tower.name].rank * len(inputs)
        if config.train.lora_dropout > 0:
            total += sum(inputs.values())  # the mask
        if tower.seen == "both":
            total += 4 * (shared if tower.memory.itemsize == 4 else sum(inputs.values()))
        return total

    def _scores(self) -> int:
        """Eager attention keeps its scores, in fp32 and in the compute dtype; fused attention none."""
        tower, memory = self.tower, self.tower.memory
        if memory.config.model.attn_implementation != "eager" or self.recurrence is not None:
            return 0
        config = memory.model.config
        heads = config.get_text_config() if tower.name == "language" else config.vision_config
        return int(heads.num_attention_heads) * tower.sample_rows * (4 + memory.itemsize)

    def working(self) -> int:
        """Work on a layer's largest linear: its weight dequantised, input, result and update in fp32; of a
        probe, in the backward pass, gradients of input and output, and input and dY in fp32. Or on a recurrence:
        what a forward holds of it at once, and gradients of as much."""
        tower, itemsize = self.tower, self.tower.memory.itemsize
        nf4 = tower.memory.config.model.quantization == "nf4"
        inputs, outputs = 4, 8 + 2 * itemsize
        if tower.seen == "weights":
            inputs = outputs = itemsize + 4 * (itemsize < 4)
        largest = max(
            m.in_features * m.out_features * itemsize * nf4
            + tower.rows * (inputs * m.in_features + outputs * m.out_features)
            for m in self.linears.values()
        )
        if self.recurrence is not None:
            largest = max(largest, self.recurrence.kept(tower.batch, tower.sample_rows, itemsize))
        return largest


class Recurrence(NamedTuple):
    """A gated delta rule as transformers computes it without a kernel of its own: in fp32, chunk by chunk.

    With one (flash-linear-attention) less is kept: chunks' products are computed again.
    """

    heads: int  # of values; queries and keys are repeated to as many
    key: int  # width of a head of queries or keys
    value: int
    queries_and_keys: int  # their widths together, before they are repeated
    kernel: int  # tokens that the convolution in front of it sees

    @property
    def convolved(self) -> int:
        """Width of queries, keys and values as they come from their linear layer."""
        return self.queries_and_keys + self.heads * self.value

    def state(self, itemsize: int) -> int:
        """Bytes of what a sample carries to its next token: the state in fp32, and the convolution's last inputs."""
        return 4 * self.heads * self.key * self.value + self.convolved * self.kernel * itemsize

    def kept(self, batch: int, tokens: int, itemsize: int) -> int:
        """Bytes kept for the backward pass beside the linear layers' own."""
        chunks = batch * -(-tokens // CHUNK)
        keys, values = self.heads * self.key, self.heads * self.value
        # Queries, keys, both decayed, keys times beta, keys that read the state; values, and two corrections of them.
        chunk = CHUNK * (6 * keys + 3 * values)
        # Decays; keys against keys and against queries, before and after the decay; a state.
        chunk += 5 * CHUNK * CHUNK * self.heads + keys * self.value
        # Queries and keys before they are normed, what the gated norm works with, and what the convolution gives.
        rows = 4 * (2 * keys + 3 * values) + itemsize * (self.convolved + 2 * values)
        return 4 * chunks * chunk + batch * tokens * rows


def optimizer_state(name: str) -> int:
    """Bytes of state per trained fp32 parameter of a transformers optimizer."""
    return next((size for part, size in _OPTIMIZER_STATE.items() if part in name), 8)


def base_bytes(model: PreTrainedModel, config: ModelConfig, part: nn.Module | None = None) -> tuple[int, int]:
    """(bytes of the 4-bit layers, bytes of everything that stays in the compute dtype) of the loaded base, or a part.

    Args:
        model: without weights.
        config: how it is loaded.
        part: module of the model; None for all of it.
    """
    part, itemsize = model if part is None else part, DTYPES[config.compute_dtype].itemsize
    own = {id(parameter) for parameter in part.parameters()}
    apart = tuple(f"{name}." for name in family_of(model.config).not_quantised)
    packed = {
        id(module.weight): nf4_bytes(module.weight.numel())
        for name, module in model.named_modules()
        # Exactly nn.Linear: the output layer of nn.MultiheadAttention, a subclass, is left as it is.
        if config.quantization == "nf4" and type(module) is nn.Linear and not f"{name}.".startswith(apart)
        if id(module.weight) in own
    }
    rest = sum(p.numel() * itemsize for p in part.parameters() if id(p) not in packed)
    return sum(packed.values()), rest + sum(b.nbytes for b in part.buffers())


def nf4_bytes(numbers: int) -> int:
    """Bytes of one double-quantised 4-bit weight as bitsandbytes stores it."""
    blocks = -(-numbers // NF4_BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) + NF4_CODES
