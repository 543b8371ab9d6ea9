"""One KeepLoRA++ stage on a model of its true shape: seconds and memory per phase, beside the plan's.

    python benchmarks/true_shape.py           LLaVA-1.5-7B on a GPU, samples of 640 tokens, batches of 1 and 8
    python benchmarks/true_shape.py --family video_llava      Video-LLaVA-7B, clips of 8 frames, 2304 tokens
    python benchmarks/true_shape.py --depth 0.1 --length 96 --image_size 112 --vocab 2048     a CPU, minutes
    python benchmarks/true_shape.py --plan --activation_checkpointing     the plan alone, for bf16 on a GPU

Nothing is downloaded: the weights are random, made and quantised to NF4 one layer at a time, so that neither
the host nor the device ever holds a dense model. Widths are the true ones (language 4096/11008, vision
1024/4096); --depth scales the numbers of layers. The stage is the repository's own (`run_stage`) on generated
images or clips and texts whose samples all have --length tokens. Random weights have a flat spectrum: their
bases are larger, and the decompositions slower, than those of trained ones.

Each batch size has a process of its own. Measured is the peak during a phase less what the process held
before the model was made: torch's allocations on a GPU, the resident set on a CPU (Linux), where every tensor
above 1 MB is made to return to the system when it is freed.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import av
import lmms_eval.evaluator  # noqa: F401  # imported now, so that the baseline holds it
import numpy as np
import transformers
import yaml
from measure import RETURN_FREED, Peaks, device_name
from PIL import Image
from shapes import PATCH, SPECIAL, TRUE, Shape, llava_config, random_model, video_llava_config
from tokenizers import Tokenizer, models, pre_tokenizers

from mllm_keeplora.config import (
    EvaluationConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TowerConfig,
    TrainConfig,
    VideoConfig,
)
from mllm_keeplora.continual import stage
from mllm_keeplora.data.collator import ChatCollator
from mllm_keeplora.data.media import MediaChecker
from mllm_keeplora.data.records import Sample, Turn
from mllm_keeplora.data.stream import load_stream, load_training_records
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.processes import start_processes
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import Stage, Workplace
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.modeling.targets import find_targets
from mllm_keeplora.planning.plan import make_plan
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.units import GB

TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<' + c['type'] + '>\n' }}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ANSWER = " ".join(f"w{n}" for n in range(15))
# Which of the plan's phases a measured one is compared with.
PLANNED = {"weight bases": "weight bases", "probe": "probe", "train": "train", "feature_basis": "probe"}
PLANNED |= {"evaluation": "evaluation"}


@dataclass(frozen=True)
class Family:
    """What a sample of a family's 7B model is.

    Attributes:
        config: of its model.
        media: what a record shows, the key of its file.
        suffix: of that file.
        image_size: pixels a side of an image or frame.
        length: tokens of a sample, those of its image or clip included.
    """

    config: Callable[[Shape], Any]
    media: Media
    suffix: str
    image_size: int
    length: int


FAMILIES = {
    "llava": Family(llava_config, "image", ".png", 336, 640),
    "video_llava": Family(video_llava_config, "video", ".mp4", 224, 2304),  # 8 frames of 257 tokens
}


def true_shape(options: argparse.Namespace) -> Shape:
    """LLaVA-1.5-7B's, the numbers of layers scaled."""
    return replace(
        TRUE,
        layers=max(1, round(TRUE.layers * options.depth)),
        vision_layers=max(2, round(TRUE.vision_layers * options.depth)),
        image_size=options.image_size,
        vocabulary=options.vocab,
    )


def make_processor(family: Family, image_size: int) -> Any:
    """The family's image and video processing, and a tokenizer of a few words."""
    words = [*SPECIAL, *(f"w{n}" for n in range(100))]
    vocabulary = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    side = {"height": image_size, "width": image_size}
    crop: dict[str, Any] = {"size": {"shortest_edge": image_size}, "crop_size": side}
    settings = {
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>", "<video>"],
        ),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }
    if family.media == "image":
        images = transformers.CLIPImageProcessor(**crop)
        return transformers.LlavaProcessor(image_processor=images, image_token="<image>", **settings)
    return transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**crop),
        video_processor=transformers.VideoLlavaVideoProcessor(**crop),
        **settings,
    )


def write_files(root: Path, options: argparse.Namespace) -> None:
    """A directory with config and processor, and a stream of one task whose samples have --length tokens."""
    family = FAMILIES[options.family]
    processor = make_processor(family, options.image_size)
    processor.save_pretrained(root / "base")
    family.config(true_shape(options)).save_pretrained(root / "base")
    generator = np.random.default_rng(0)
    files = [f"{n}{family.suffix}" for n in range(options.samples)]
    for file in files:
        write_media(root / file, generator, options.image_size)
    question = _question(processor, root / files[0], options.length)
    train = [
        {
            "id": n,
            family.media: file,
            "conversations": [
                {"from": "human", "value": f"<{family.media}>\n{question}"},
                {"from": "gpt", "value": ANSWER},
            ],
        }
        for n, file in enumerate(files)
    ]
    test = [
        {"question_id": n, family.media: file, "text": question, "answer": "w0"}
        for n, file in enumerate(files[: options.questions])
    ]
    task = {"name": "noise", "train": "train.json", "test": "test.json", "metric": "exact"}
    stream = {"name": "shape", "data_root": str(root), "tasks": [{**task, "max_new_tokens": 8}]}
    for name, content in (("train.json", train), ("test.json", test)):
        (root / name).write_text(json.dumps(content))
    (root / "stream.yaml").write_text(yaml.safe_dump(stream))


def write_media(file: Path, generator: np.random.Generator, side: int) -> None:
    """Noise: an image, or a clip of 16 frames."""
    if file.suffix == ".png":
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
        return
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for picture in generator.integers(0, 256, (16, side, side, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _question(processor: Any, file: Path, length: int) -> str:
    """As many words as fill a sample up to `length` tokens."""
    collator = ChatCollator(processor, None, VideoReader(VideoConfig(), None))

    def tokens(words: int) -> int:
        turn = Turn(" ".join(f"w{n % 100}" for n in range(words)), ANSWER)
        image, video = (file, None) if file.suffix == ".png" else (None, file)
        return int(collator([Sample("0", image, (turn,), video)])["input_ids"].shape[1])

    words = 1 + length - tokens(1)
    if words < 1 or tokens(words) != length:
        raise SystemExit(
            f"--length {length} is too short: media, answer and template take {tokens(1)} tokens"
        )
    return " ".join(f"w{n % 100}" for n in range(words))


def run_config(root: Path, options: argparse.Namespace, batch: int) -> RunConfig:
    """Settings of the stage."""
    device = resolve_device(ModelConfig())
    tower = TowerConfig(rank=options.rank)
    on_gpu = options.plan or device.type == "cuda"
    return RunConfig(
        run_dir=str(root / f"run{batch}"),
        stream=str(root / "stream.yaml"),
        model=ModelConfig(base_model=str(root / "base"), compute_dtype="bfloat16" if on_gpu else "float32"),
        language=tower,
        vision=tower,
        probe=ProbeConfig(fraction=1.0, max_samples=options.probe_batches * batch, batch_size=batch),
        train=TrainConfig(
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            activation_checkpointing=options.activation_checkpointing,
            logging_steps=1,
        ),
        evaluation=EvaluationConfig(batch_size=batch),
        cache_dir=str(root / "cache"),
        report_to=[],
    )


def measure(root: Path, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """One stage, in this process; phase -> seconds, measured and planned bytes."""
    config = run_config(root, options, batch)
    plan = make_plan(config)
    device = resolve_device(config.model)
    start_processes(cpu=device.type == "cpu")
    stream = load_stream(Path(config.stream))
    reader = VideoReader(config.video, None)
    records = load_training_records(stream, checker=MediaChecker(reader))
    processor = transformers.AutoProcessor.from_pretrained(config.model.base_model)
    run_dir = Path(config.run_dir)
    write_task_files(stream, run_dir / "eval_tasks")
    peaks = Peaks(device)
    with peaks.phase("building the model"):
        model = random_model(plan.memory.model.config, config.model, device)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    targets = find_targets(model, {name: tower.targets for name, tower in config.towers().items()})
    cached = Path(config.cache_dir).exists()  # by the batch size before
    with peaks.phase("weight bases, cached" if cached else "weight bases"):
        eps_w = {name: tower.eps_w for name, tower in config.towers().items()}
        files = weight_basis_files(model, targets, eps_w, Path(config.cache_dir))
    work = Workplace(
        config,
        load_method(config),
        stream,
        records,
        model,
        processor,
        reader,
        targets,
        files,
        run_dir,
        device,
    )

    class MeasuredClock(stage.Clock):
        @contextlib.contextmanager
        def phase(self, name: str) -> Iterator[None]:
            with super().phase(name), peaks.phase(name):
                yield

    stage.Clock = MeasuredClock  # type: ignore[misc]  # the stage's own phases, measured from here
    stage.run_stage(Stage(work, 1, stream.tasks[0], {}, []), {"data": {}})
    planned = {name: sum(items.values()) for name, items in plan.memory.phases().items()}
    for name, found in peaks.found.items():
        found["planned"] = planned[PLANNED[name]] if name in PLANNED else 0
    return {
        "batch": batch,
        "tokens": plan.memory.shape.tokens,
        "device": device_name(device),
        "phases": peaks.found,
    }


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


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--length", type=int, help="tokens of a sample, those of its media included")
    parser.add_argument("--image_size", type=int, help="pixels a side, a multiple of 14")
    parser.add_argument("--vocab", type=int, default=32064)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--probe_batches", type=int, default=2, help="of each probe pass")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--plan", action="store_true", help="measure nothing; print what the plan expects")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)  # set for the process of one batch size
    options = parser.parse_args()
    family = FAMILIES[options.family]
    options.length = options.length or family.length
    options.image_size = options.image_size or family.image_size
    return options


def main() -> None:
    """Starts a process for each batch size."""
    options = parse_options()
    if options.root is not None:
        result = measure(options.root, options, *options.batch_sizes)
        options.json.write_text(json.dumps(result))
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_files(root, options)
        for batch in options.batch_sizes:
            if options.plan:
                print_plan(run_config(root, options, batch), batch)
                continue
            file = root / f"{batch}.json"
            arguments = ["--root", temporary, "--batch_sizes", str(batch), "--json", str(file)]
            command = [sys.executable, __file__, *sys.argv[1:], *arguments]
            if subprocess.run(command, env={**os.environ, **RETURN_FREED}, check=False).returncode != 0:
                sys.exit(f"the stage at batch {batch} failed; its own message says why")
            results.append(json.loads(file.read_text()))
            print_result(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
