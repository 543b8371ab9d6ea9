"""Two processes in bf16 on NF4, each with the whole base or a share of it, against one: every family's real class."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mllm_keeplora.config import GeneralConfig, ModelConfig, ProbeConfig, RunConfig, TowerConfig, TrainConfig
from tests import forked
from tests.forked import run_together
from tests.modules.conftest import write_media
from tests.modules.test_classification import clip as clip  # a fixture, as those below
from tests.modules.test_classification import data as data
from tests.modules.test_families import MAIN_MEDIA, write_stream
from tests.modules.test_general import reference as reference
from tests.modules.tiny_families import WRITING, save_tiny

WORKER = "tests/recipes/processes_worker.py"
DEFAULT = ("llava_next", "llava_onevision")  # what the default suite runs, an image and a video family; --slow runs all
MODES = ("one", "ddp", "fsdp")
TASKS = ("colours", "again")
PHASES = ("probe", "train", "protect")
# The micro-batches are those of one process, so each is computed in the same bits in bf16; sums over them are made in
# fp32, and two of them to the same bits in any order. Other builds of torch may add up a process's own first.
AS_ONE = 1e-4


def config_of(root: Path, family: str, mode: str) -> RunConfig:
    """Stages of two steps on four samples; processes share the micro-batches of one process."""
    tower = TowerConfig(rank=2)
    return RunConfig(
        run_dir=str(root / mode / f"{family}-run"),
        stream=str(root / family / "stream.yaml"),
        model=ModelConfig(base_model=str(root / family / "base"), device="cpu", compute_dtype="bfloat16"),
        language=tower,
        vision=tower,
        probe=ProbeConfig(fraction=1.0, columns_per_rank=4, batch_size=3),
        train=TrainConfig(
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 if mode == "one" else 1,
            learning_rate=1e-2,
            activation_checkpointing=mode == "fsdp",
        ),
        cache_dir=str(root / mode / "cache"),
        report_to=[],
    )


@dataclass
class Computed:
    """What each process computed."""

    tensors: list[dict[str, torch.Tensor]]
    sharded: list[str]
    manifests: list[dict[str, Any]]  # a stage each


def launch(root: Path, families: tuple[str, ...], stages: int) -> dict[str, dict[str, Computed]]:
    """Family -> mode -> what came of it: one launch of one process, one of two."""
    (root / "media").mkdir()
    write_media(root / "media")
    for family in families:
        (root / family).mkdir()
        save_tiny(family, root / family / "base")
        write_stream(root / family, root / "media", MAIN_MEDIA[family], TASKS[:stages])
        for mode in MODES:
            folder = root / ("alone" if mode == "one" else "together")
            folder.mkdir(exist_ok=True)
            (folder / f"{family}-{mode}.yaml").write_text(yaml.safe_dump(asdict(config_of(root, family, mode))))
    command = [WORKER, "families"]
    for done in (forked.run([*command, root / "alone"]), *run_together([*command, root / "together"])):
        assert done.returncode == 0, done.stderr
    return {family: {mode: computed(root, family, mode) for mode in MODES} for family in families}


def computed(root: Path, family: str, mode: str) -> Computed:
    folder = root / ("alone" if mode == "one" else "together")
    files = sorted(folder.glob(f"{family}-{mode}-*.safetensors"))
    assert len(files) == (1 if mode == "one" else 2)
    sharded = []
    for file in files:
        with safe_open(file, "pt") as opened:
            sharded.append(opened.metadata()["sharded"])
    manifests = sorted((root / mode / f"{family}-run").glob("stages/*/manifest.json"))
    return Computed([load_file(file) for file in files], sharded, [json.loads(m.read_text()) for m in manifests])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(found: dict[str, Computed], stages: int) -> None:
    """What each process computed itself: A, B and the directions to protect of every stage, and M."""
    [expected], rows = found["one"].tensors, [stage["scores"] for stage in found["one"].manifests]
    names = [f"{number:02d}-{task}" for number, task in enumerate(TASKS[:stages], start=1)]
    assert {key.rsplit("/", 1)[0] for key in expected} == {"M", *(f"{name}/{p}" for name in names for p in PHASES)}
    assert all(expected[key].any() for key in expected if key.endswith(".B"))
    for mode in ("ddp", "fsdp"):
        first, second = found[mode].tensors
        assert found[mode].sharded == [str(mode == "fsdp")] * 2
        assert first.keys() == second.keys() == expected.keys()
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
        assert all(tensor.shape == expected[key].shape for key, tensor in first.items())
        errors = {key: relative_error(t, expected[key]) for key, t in first.items() if t.any()}
        assert max(errors.values()) < AS_ONE, max(errors, key=lambda key: errors[key])
        assert [stage["scores"] for stage in found[mode].manifests] == rows
        assert [stage["num_processes"] for stage in found[mode].manifests] == [2] * (stages + 1)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Computed]]:
    """One stage of each of two families."""
    return launch(tmp_path_factory.mktemp("families"), DEFAULT, 1)


@pytest.mark.parametrize("family", DEFAULT)
def test_two_processes_compute_what_one_does(launched: dict[str, dict[str, Computed]], family: str) -> None:
    check(launched[family], 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", WRITING)
def test_two_processes_compute_two_stages_as_one_does(family: str, tmp_path: Path) -> None:
    """The second on top of what the first has learnt and protected."""
    check(launch(tmp_path, (family,), 2)[family], 2)


def test_two_processes_keep_what_a_clip_could_do_as_one_does(
    clip: Path, data: Path, reference: Path, tmp_path: Path
) -> None:
    """General pictures in each batch, and what each process lets the model say of its share of past ones.

    Sketches of inputs (G2) are other random numbers on two processes: nothing is protected by them here.
    """
    general = GeneralConfig(samples=str(reference), eps_g=None, share=0.5, rehearsed=5, budget=1.0)
    for mode, folder in (("one", "alone"), ("ddp", "together")):
        config = config_of(tmp_path, "clip", mode)
        model = ModelConfig(base_model=str(clip), device="cpu", compute_dtype="float32")
        config = replace(config, stream=str(data / "stream.yaml"), model=model, general=general)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"clip-{mode}.yaml").write_text(yaml.safe_dump(asdict(config)))
    command = [WORKER, "families"]
    for done in (forked.run([*command, tmp_path / "alone"]), *run_together([*command, tmp_path / "together"])):
        assert done.returncode == 0, done.stderr
    [expected], (first, second) = (computed(tmp_path, "clip", mode).tensors for mode in ("one", "ddp"))
    assert first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    finite = {key: tensor for key, tensor in first.items() if tensor.any() and not key.endswith("log_rest")}
    assert {key.split("/")[1] for key in finite if key.startswith("02")} == {*PHASES, "recall"}
    # The second stage learns along directions that differ by rounding already.
    assert max(relative_error(t.float(), expected[key].float()) for key, t in finite.items()) < 10 * AS_ONE
    guards = [[stage["guard"] for stage in computed(tmp_path, "clip", mode).manifests[1:]] for mode in ("one", "ddp")]
    assert [found["after"] for found in guards[1]] == pytest.approx([found["after"] for found in guards[0]], rel=1e-3)
