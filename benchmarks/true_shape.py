"""One KeepLoRA++ stage on a model of its true shape: seconds and memory per phase, beside the plan's.

    python benchmarks/true_shape.py           LLaVA-1.5-7B on a GPU, samples of 640 tokens, batches of 1 and 8
    python benchmarks/true_shape.py --family video_llava      Video-LLaVA-7B, clips of 8 frames, 2304 tokens
    python benchmarks/true_shape.py --depth 0.1 --length 96 --image_size 112 --vocab 2048     a CPU, minutes
    python benchmarks/true_shape.py --plan --activation_checkpointing     the plan alone, for bf16 on a GPU

Nothing is downloaded. The weights are random, made and quantised to NF4 one layer at a time, so that neither
the host nor the device ever holds a dense model. Widths are the true ones (language 4096/11008, vision
1024/4096); --depth scales the numbers of layers. The stage is `run_stage` on generated images or clips, whose
samples all have --length tokens. Random weights have a flat spectrum: their bases are larger, and the
decompositions slower, than those of trained ones.

Each batch size has a process of its own. A phase's figure is its peak less what the process held before the
model was made: of torch's allocations on a GPU, of the resident set on a CPU (Linux), where freed tensors
above 1 MB return to the system at once.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import lmms_eval.evaluator  # noqa: F401  # imported now, so that the baseline holds it
import torch
from measure import Peaks, device_name, in_own_process
from noise_run import FAMILIES, Noise, NoiseRun, noise_config
from shapes import TRUE, Shape, random_model

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.config import ModelConfig, RunConfig, TrainConfig
from mllm_keeplora.continual.run_stream import run_stage
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.runs.record import StageRecord
from mllm_keeplora.units import GB

# Measured phase -> the plan's.
PLANNED = {"weight bases": "weight bases", "probe": "probe", "train": "train", "protect": "probe"}
PLANNED |= {"evaluate": "evaluation"}


def true_shape(options: Namespace) -> Shape:
    """LLaVA-1.5-7B's, the numbers of layers scaled."""
    return replace(
        TRUE,
        layers=max(1, round(TRUE.layers * options.depth)),
        vision_layers=max(2, round(TRUE.vision_layers * options.depth)),
        image_size=options.image_size,
        vocabulary=options.vocab,
    )


def noise_of(options: Namespace) -> Noise:
    """A stream of one task whose samples have --length tokens."""
    return Noise(true_shape(options), options.length, options.samples, options.questions, family=options.family)


def run_config(root: Path, options: Namespace, batch: int) -> RunConfig:
    """Settings of the stage; those of a GPU where it is only planned."""
    return noise_config(
        root,
        batch,
        options.rank,
        torch.device("cuda") if options.plan else resolve_device(ModelConfig()),
        options.probe_batches,
        run_dir=str(root / f"run{batch}"),
        cache_dir=str(root / "cache"),
        train=TrainConfig(
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            activation_checkpointing=options.activation_checkpointing,
            logging_steps=1,
        ),
    )


def measure(root: str, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """One stage, in this process; phase -> seconds, measured and planned bytes.

    Args:
        root: where the noise was written.
        batch: samples.
        options: the command line's.
    """
    config = run_config(Path(root), Namespace(**options), batch)
    plan = make_plan(config)
    run, device = NoiseRun(config), resolve_device(config.model)
    cached = Path(config.cache_dir).exists()  # by the batch size before
    peaks = Peaks(device)
    with peaks.phase("building the model"):
        model = random_model(plan.memory.model.config, config.model, device)
    with peaks.phase("weight bases, cached" if cached else "weight bases"):
        run.take(model)
    with phases_measured(peaks):
        run_stage(run, 1, {})
    planned = {name: sum(items.values()) for name, items in plan.memory.phases().items()}
    for name, found in peaks.found.items():
        found["planned"] = planned[PLANNED[name]] if name in PLANNED else 0
    return {
        "batch": batch,
        "tokens": plan.memory.shape.tokens,
        "device": device_name(device),
        "phases": peaks.found,
    }


@contextmanager
def phases_measured(peaks: Peaks) -> Iterator[None]:
    """Inside the block every phase that a stage times is measured, too."""
    timed = StageRecord.timed

    @contextmanager
    def measured(record: StageRecord, name: str) -> Iterator[None]:
        with timed(record, name), peaks.phase(name):
            yield

    with mock.patch.object(StageRecord, "timed", measured):
        yield


def print_plan(config: RunConfig, batch: int) -> None:
    """What the plan says of each phase, GB."""
    memory = make_plan(config).memory
    phases = {name: sum(items.values()) / GB for name, items in memory.phases().items()}
    print(
        f"batch {batch}, samples of {memory.shape.tokens} tokens, planned GB: "
        + ", ".join(f"{name} {size:.2f}" for name, size in phases.items())
    )


def print_result(result: dict[str, Any]) -> None:
    """One table a batch size."""
    print(f"\nbatch {result['batch']}, samples of {result['tokens']} tokens, {result['device']}")
    print(f"{'phase':20s}{'seconds':>9s}{'measured GB':>13s}{'planned GB':>12s}{'planned / measured':>20s}")
    for name, found in result["phases"].items():
        line = f"{name:20s}{found['seconds']:9.1f}{found['bytes'] / GB:13.3f}"
        if found["planned"]:
            line += f"{found['planned'] / GB:12.3f}{found['planned'] / found['bytes']:20.2f}"
        print(line)
    peak = max(found["bytes"] for found in result["phases"].values())
    planned = max(found["planned"] for found in result["phases"].values())
    print(f"{'peak':29s}{peak / GB:13.3f}{planned / GB:12.3f}{planned / peak:20.2f}", flush=True)


def parse_options() -> Namespace:
    """The command line."""
    parser = OptionParser("python benchmarks/true_shape.py", __doc__)
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--length", type=int, help="tokens of a sample, those of its media included")
    parser.add_argument("--image_size", type=int, help="pixels a side, a multiple of 14")
    parser.add_argument("--vocab", type=int, default=TRUE.vocabulary)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--probe_batches", type=int, default=2, help="of each probe pass")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--plan", action="store_true", help="measure nothing; print what the plan expects")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.read(sys.argv[1:])
    family = FAMILIES[options.family]
    options.length = options.length or family.length
    options.image_size = options.image_size or family.image_size
    return options


def main() -> None:
    """Plans or measures every batch size."""
    options = parse_options()
    results = []
    with tempfile.TemporaryDirectory() as root:
        noise_of(options).write(Path(root))
        for batch in options.batch_sizes:
            if options.plan:
                print_plan(run_config(Path(root), options, batch), batch)
            else:
                settings = {name: value for name, value in vars(options).items() if name != "json"}
                results.append(in_own_process(measure, root, batch, settings))
                print_result(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    with command():
        main()
