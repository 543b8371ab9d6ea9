"""Row 12: a step's low-rank work as one path, beside PEFT's own: operations, bytes and FLOPs counted, seconds of CPU.

    python benchmarks/low_rank.py

Counted on one layer of either tower of LLaVA-1.5-7B with adapters on every linear layer, A of the stage frozen: 8
samples of 640 tokens and 8 images, forward and backward. Nothing is computed: the tensors are
fake (`FakeTensorMode`), so shapes and dtypes alone count. The base is dense, as 4-bit layers cannot be faked; a 4-bit
one dequantises its weights besides, the same on both sides. Counted are

    operations   calls of ATen operators that compute, in-place ones included, views not: on a GPU kernels, roughly
    bytes        of their operands and results, each read or written once
    FLOPs        of products, a multiplication and an addition being 2

Timed is a small NF4 model on the CPU, whose width, ranks and tokens are an eighth of those counted, in seconds of the
process's CPU, so that other work on the machine changes little.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from measure import Options, Ratio, Row, benchmark, milliseconds, ratio
from shapes import TINY, TRUE, Shape, all_linear, llava_config, random_batch, random_factors, random_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import ACCUMULATED, STAGE, activate, attach, attach_accumulated
from mllm_keeplora.modeling.loading import DTYPES
from mllm_keeplora.modeling.low_rank import one_low_rank_path

SAMPLES, LENGTH = 8, 640
RANK, PAST_RANKS = 32, (32, 192, 512)
SMALLER = 8  # what is timed has widths, ranks and tokens of 1 / 8
COUNTED = replace(TRUE, layers=1, vision_layers=2, vocabulary=512)
SMALL = Shape(TRUE.hidden // SMALLER, TRUE.intermediate // SMALLER, 1, 4, 128, 512, 2, 2, 112, 512)
# The counter knows addmm alone.
ADDMM = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
Dtype = Literal["float32", "bfloat16"]
DTYPES_TRIED: tuple[Dtype, ...] = ("float32", "bfloat16")
PATHS = {"one path": one_low_rank_path, "PEFT": nullcontext}


@dataclass(frozen=True)
class Counts:
    """What a step costs."""

    operations: int
    bytes: int
    flops: int


class Counter(TorchDispatchMode):
    """Counts operators that compute, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, written = _tensors((args, kwargs or {})), _tensors(result)
        known = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in known for t in written)
        if not is_view and not name.startswith(("empty", "new_empty")):
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in [*read, *written])
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def adapted(base: Any, rank: int, past_rank: int) -> Any:
    """The model that trains B of a stage on top of a past."""
    device = torch.device("cpu")
    targets = all_linear(base)
    past = random_factors(targets, past_rank, "past", device) if past_rank else {}
    start = random_factors(targets, rank, "stage", device)
    model = attach(attach_accumulated(base, past), STAGE, start, dict.fromkeys(start, 0.5))
    activate(model, [ACCUMULATED, STAGE] if past else [STAGE], STAGE, "B")
    return model.train()


def counted(shape: Shape, dtype: Dtype, past_rank: int, path: Any) -> Counts:
    """What forward and backward of both towers cost; the last vision layer takes no part."""
    # Fake parameters cannot be moved to the device on which they lie.
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda self, *args, **kwargs: self):
        base = LlavaForConditionalGeneration._from_config(llava_config(shape), dtype=DTYPES[dtype])
        model = adapted(base, RANK, past_rank)
        towers = model.get_base_model().model
        words = torch.empty(SAMPLES, LENGTH, shape.hidden, dtype=DTYPES[dtype], requires_grad=True)
        pixels = torch.empty(SAMPLES, 3, shape.image_size, shape.image_size, dtype=DTYPES[dtype])
        with path(model), Counter() as counter, FlopCounterMode(display=False, custom_mapping=ADDMM) as flops:
            towers.language_model(inputs_embeds=words).last_hidden_state.sum().backward()
            towers.vision_tower(pixels, output_hidden_states=True).hidden_states[-2].sum().backward()
        return Counts(counter.operations, counter.bytes, flops.get_total_flops())


def counted_rows(shape: Shape, dtype: Dtype) -> list[Row]:
    """A row per rank of the past."""
    found = {(name, r): counted(shape, dtype, r, path) for name, path in PATHS.items() for r in (0, *PAST_RANKS)}
    rows = []
    for past_rank in PAST_RANKS:
        ours, theirs, first = (found[key] for key in (("one path", past_rank), ("PEFT", past_rank), ("one path", 0)))
        growth = max(ours.bytes / first.bytes, ours.flops / first.flops)
        wanted = past_rank == PAST_RANKS[-1]
        rows.append(
            Row(
                12,
                f"counted: a step on a past of rank {past_rank}, {dtype}, a layer of either tower of LLaVA-1.5-7B",
                in_words(ours),
                f"{in_words(theirs)}, PEFT; {in_words(first)}, one path without a past",
                f"{ours.operations / theirs.operations:.2f}, {ours.bytes / theirs.bytes:.2f} and "
                f"{ours.flops / theirs.flops:.2f} x PEFT's; {ours.bytes / first.bytes:.2f} x the bytes and "
                f"{ours.flops / first.flops:.2f} x the FLOPs without a past",
                "<= 1.3 x without a past" if wanted else "",
                growth <= 1.3 if wanted else None,
            )
        )
    return rows


def in_words(counts: Counts) -> str:
    """The three figures, as text."""
    return f"{counts.operations} operations, {counts.bytes / 1e9:.4g} GB, {counts.flops / 1e12:.4g} TFLOP"


def timed_rows(shape: Shape, dtype: Dtype, options: Options) -> list[Row]:
    """A row per rank of the past."""
    settings = ModelConfig("random", compute_dtype=dtype)
    batch = random_batch(shape, SAMPLES, LENGTH // SMALLER, torch.device("cpu"))
    batch["pixel_values"] = batch["pixel_values"].to(DTYPES[dtype])

    def step(past_rank: int, path: Any) -> Callable[[], None]:
        base = random_model(llava_config(shape), settings, torch.device("cpu"))
        model = adapted(base, RANK // SMALLER, past_rank // SMALLER)
        path(model).__enter__()  # never left: the model is thrown away as it is
        return lambda: model(**batch).loss.backward()

    steps = {(name, r): step(r, path) for name, path in PATHS.items() for r in (0, *PAST_RANKS)}
    seconds = cpu_seconds(steps, options.repeats)
    rows = []
    for past_rank in PAST_RANKS:
        ours, theirs, first = (seconds[key] for key in (("one path", past_rank), ("PEFT", past_rank), ("one path", 0)))
        found: tuple[Ratio, Ratio] = ratio(ours, theirs), ratio(ours, first)
        rows.append(
            Row(
                12,
                f"timed: a step on a past of rank {past_rank // SMALLER}, {dtype}, width {shape.hidden}, "
                f"{SAMPLES} x {LENGTH // SMALLER} tokens",
                milliseconds(ours),
                f"{milliseconds(theirs)}, PEFT; {milliseconds(first)}, one path without a past",
                f"{found[0]} x PEFT's; {found[1]} x without a past",
            )
        )
    return rows


def cpu_seconds(steps: dict[Any, Callable[[], None]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of CPU of every step in every round after the first, in turns."""
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(repeats + 1):
        for key, step in steps.items():
            started = time.process_time()
            step()
            seconds[key].append(time.process_time() - started)
    return {key: found[1:] for key, found in seconds.items()}


def rows(options: Options) -> list[Row]:
    """Row 12."""
    found = []
    for dtype in DTYPES_TRIED:
        found += counted_rows(TINY if options.quick else COUNTED, dtype)
        found += timed_rows(TINY if options.quick else SMALL, dtype, options)
    return found


if __name__ == "__main__":
    benchmark(__doc__, rows)
