"""What the first hour on a GPU should tell: the gpu tests, the small default, a 7B-shaped stage and a Qwen step.

    bash scripts/first_gpu_hour.sh                 on a GPU; everything lands in ./first_gpu_hour, the table last
    bash scripts/first_gpu_hour.sh --quick         tiny sizes on whatever is there: only shows that it works

A part that fails does not stop the others: its row names its log. Nothing is downloaded.
"""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
from measure import device_name, in_own_process
from shapes import all_linear, random_factors, random_model, settings_for
from transformers import Qwen2_5_VLConfig

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import STAGE, activate, attach
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.modeling.low_rank import one_low_rank_path
from mllm_keeplora.units import GB

ROOT = Path(__file__).resolve().parents[1]
IMAGE, GRID = 644 * 476, (1, 34, 46)  # patches of 14 pixels: VGA, as Qwen's processor scales it
WORDS, SUPERVISED, RANK = 256, 16, 32


@dataclass(frozen=True)
class Hour:
    """Where results go, and how much is done."""

    out: Path
    quick: bool
    device: torch.device

    def run(self, name: str, *arguments: str) -> None:
        """A Python command of this repository; what it prints goes to its log, and it has to succeed."""
        log = self.log(name)
        with log.open("w") as file:
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=file, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"status {done.returncode}, see {log}")

    def log(self, name: str) -> Path:
        """What a part printed."""
        return self.out / f"{name}.log"


def gpu_tests(hour: Hour) -> str:
    """tests/gpu, all of them."""
    report = hour.out / "gpu_tests.xml"
    try:
        hour.run("gpu_tests", "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}")
    except RuntimeError as error:
        raise RuntimeError(f"{counted(report)}; {error}") from error
    return counted(report)


def counted(report: Path) -> str:
    """What a JUnit file counts."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    numbers = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    bad = numbers["failures"] + numbers["errors"]
    return f"{numbers['tests'] - bad - numbers['skipped']} passed, {bad} failed, {numbers['skipped']} skipped"


def small_default(hour: Hour) -> str:
    """The small image default."""
    run_dir = hour.out / "small_default"
    few = ("--train.max_steps", "3", "--evaluation.limit", "10", "--evaluation.general_limit", "10")
    command = ("recipes/vqa.py", "--run_dir", str(run_dir), "--model.device", hour.device.type)
    hour.run("small_default", *command, *(few if hour.quick else ()))
    retention = json.loads((run_dir / "retention.json").read_text())
    metrics = retention["metrics"]
    seconds = [
        json.loads(path.read_text())["timings"]["train"] for path in sorted(run_dir.glob("stages/*/manifest.json"))[1:]
    ]
    return (
        f"MFT {metrics['mft']:.1%}, Last {metrics['last']:.1%}, BWT {100 * metrics['bwt']:+.1f}; "
        f"training {min(seconds):.0f} to {max(seconds):.0f} s a stage"
    )


def llava_stage(hour: Hour) -> str:
    """One stage at LLaVA-1.5-7B's shape, batches of 1 and 8."""
    found = hour.out / "llava_stage.json"
    script = ("benchmarks/true_shape.py", "--activation_checkpointing")
    if hour.quick:  # its widths are the true ones, which take a CPU long
        hour.run("llava_stage", *script, "--plan")
        return " ".join(hour.log("llava_stage").read_text().splitlines())
    hour.run("llava_stage", *script, "--json", str(found))
    return "; ".join(of_a_batch(result) for result in json.loads(found.read_text()))


def of_a_batch(result: Mapping[str, Any]) -> str:
    """A stage's peak beside the planned one, and what its phases took."""
    phases = result["phases"]
    peak, planned = (max(phase[key] for phase in phases.values()) / GB for key in ("bytes", "planned"))
    seconds = ", ".join(f"{name} {phase['seconds']:.1f}" for name, phase in phases.items())
    return f"batch {result['batch']}: peak {peak:.1f} GB (planned {planned:.1f}); seconds: {seconds}"


def qwen_step(hour: Hour) -> str:
    """Forward and backward of one sample at Qwen2.5-VL-7B's widths, B of every linear layer trained."""
    found: dict[str, Any] = in_own_process(measure_qwen, hour.device.type, hour.quick)
    return f"loss {found['loss']:.3f}; forward {found['forward']:.3f} s, backward {found['backward']:.3f} s" + (
        f"; peak {found['peak'] / GB:.1f} GB" if found["peak"] else ""
    )


def measure_qwen(device_type: str, quick: bool) -> dict[str, Any]:
    """The second of two steps, in this process."""
    device = torch.device(device_type)
    config = qwen_config(layers=1, vision_layers=1, vocabulary=2048) if quick else qwen_config()
    base = random_model(config, settings_for(device), device)
    targets = all_linear(base)
    model: Any = attach(base, STAGE, random_factors(targets, RANK, "stage", device), {t.name: 0.5 for t in targets})
    activate(model, [STAGE], STAGE, "B")
    batch = qwen_batch(config, device, next(base.parameters()).dtype if device.type == "cuda" else torch.float32)
    with one_low_rank_path(model.train()):
        for _ in range(2):  # the first one allocates and tunes
            started = time.perf_counter()
            loss = model(**batch).loss
            value = float(loss.detach())  # waits for the device
            forward = time.perf_counter()
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            ended = time.perf_counter()
    if not torch.isfinite(torch.tensor(value)):
        raise RuntimeError(f"the loss is {value}")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"loss": value, "forward": forward - started, "backward": ended - forward, "peak": peak}


def qwen_config(layers: int = 28, vision_layers: int = 32, vocabulary: int = 152064) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's, with so many layers and words."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [block for block in (7, 15, 23, 31) if block < vision_layers],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=vocabulary - 1)


def qwen_batch(config: Qwen2_5_VLConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An image of VGA size and some words, of which the last are supervised."""
    generator = torch.Generator().manual_seed(0)
    patches = GRID[1] * GRID[2]
    shown = torch.full((1, patches // 4), config.image_token_id)
    ids = torch.cat([shown, torch.randint(0, 1000, (1, WORDS), generator=generator)], dim=1)
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    pixels = torch.randn(patches, 3 * 2 * 14 * 14, generator=generator).to(dtype)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "labels": labels,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([GRID]),
    }
    return {name: value.to(device) for name, value in batch.items()}


PARTS: Mapping[str, Callable[[Hour], str]] = {
    "gpu_tests": gpu_tests,
    "small_default": small_default,
    "llava_stage": llava_stage,
    "qwen_step": qwen_step,
}


def table(hour: Hour, rows: Sequence[tuple[str, str, float]]) -> str:
    """All rows, under what they were made with."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    made = [f"{name} {version(name)}" for name in packages]
    if hour.device.type == "cuda":
        made += [f"CUDA {torch.version.cuda}", f"{torch.cuda.get_device_properties(0).total_memory / GB:.0f} GB"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {device_name(hour.device)}, {', '.join(made)}, "
        f"commit {commit.stdout.strip() or 'unknown'}{', --quick: its figures mean nothing' if hour.quick else ''}",
        "",
        "| part | result | minutes |",
        "|---|---|---|",
        *(f"| {name} | {result} | {seconds / 60:.1f} |" for name, result, seconds in rows),
    ]
    return "\n".join(lines)


def main() -> int:
    """Runs every part; status 1 if one failed."""
    parser = OptionParser("bash scripts/first_gpu_hour.sh", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: only shows that it works")
    parser.add_argument("--out", type=Path, default=Path("first_gpu_hour"), help="folder (default: %(default)s)")
    given = parser.read(sys.argv[1:])
    device = resolve_device(ModelConfig(device="auto" if given.quick else "cuda"))
    given.out.mkdir(parents=True, exist_ok=True)
    hour, rows, failed = Hour(given.out.absolute(), given.quick, device), [], False
    for name, part in PARTS.items():
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        try:
            result = part(hour)
        except (Exception, SystemExit) as error:  # the other parts tell something, too
            hour.log(f"{name}.error").write_text(traceback.format_exc())
            result, failed = f"FAILED: {error}", True
        rows.append((name, " ".join(result.split()), time.monotonic() - started))
    found = table(hour, rows)
    (hour.out / "table.md").write_text(f"{found}\n")
    print(f"\n{found}\n\nthe same is in {hour.out / 'table.md'}")
    return int(failed)


if __name__ == "__main__":
    with command():
        sys.exit(main())
