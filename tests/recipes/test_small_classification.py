"""The small classification stream: its data by their own script, and what the shipped CLIP knows of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_keeplora.config import GeneralConfig, ModelConfig
from mllm_keeplora.continual.general import check_unwatched, prompts
from mllm_keeplora.data.classification import process_pictures, tokenise
from mllm_keeplora.data.images import load_image
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import load_records
from mllm_keeplora.data.stream import Stream, load_stream, load_training_records
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.recipes.small import build_classification_data as build
from mllm_keeplora.recipes.small import streams
from mllm_keeplora.recipes.small.draw_classes import DOMAINS, SCENE_TEMPLATE, SCENES
from tests.recipes.conftest import ROOT

STREAM = ROOT / "recipes/streams/small_classification.yaml"
BASE = ModelConfig(base_model=str(ROOT / "recipes/small/clip_base"), compute_dtype="float32", device="cpu")


SIZES = {"TRAIN_IMAGES": 150, "TEST_QUESTIONS": 50, "GENERAL_PICTURES": 60, "GENERAL_SAMPLES": 90}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    root = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in SIZES.items():
            patch.setattr(build, name, count)
        build.write_all(root)
    return load_stream(STREAM, root)


def test_its_folders_are_read_and_name_the_classes_that_its_drawings_have(stream: Stream) -> None:
    records = load_training_records(stream, checker=Preflight())
    assert {task: len(samples) for task, (samples, _) in records.items()} == dict.fromkeys(DOMAINS, 150)
    for spec in stream.tasks:
        classes = stream.classes(spec)
        assert classes is not None
        assert set(classes.names) == set(DOMAINS[spec.name].names)
        assert classes.templates == (DOMAINS[spec.name].template,)
    general = stream.classes(stream.general[0])
    assert general is not None
    assert (set(general.names), general.templates) == (set(SCENES), (SCENE_TEMPLATE,))


def test_no_scan_is_in_both_halves(stream: Stream) -> None:
    halves = [
        {path.read_bytes() for path in (stream.data_root / "digits" / half).rglob("*.png")}
        for half in ("train", "test")
    ]
    assert len(halves[1]) == 50
    assert halves[0].isdisjoint(halves[1])


def test_general_samples_are_other_scenes_than_the_tested(stream: Stream) -> None:
    found = prompts(GeneralConfig(samples=str(stream.data_root / "scenes/general.yaml")), Preflight())
    assert len(found) == 90
    [classes] = {sample.classes for sample in found}
    assert classes is not None
    assert set(classes.prompts(classes.templates[0])) == {SCENE_TEMPLATE.replace("{}", name) for name in SCENES}
    check_unwatched(found, stream)
    asked = {path.read_bytes() for path in (stream.data_root / "scenes/test").rglob("*.png")}
    assert len(asked) == 60
    assert asked.isdisjoint(sample.media[0].path.read_bytes() for sample in found)


def test_the_same_seed_draws_the_same_pictures(stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in SIZES.items():
        monkeypatch.setattr(build, name, count)
    monkeypatch.setattr(build.draw_classes, "DOMAINS", {"grounds": DOMAINS["grounds"]})
    build.write_all(tmp_path)
    files = [path.relative_to(tmp_path) for path in sorted((tmp_path / "grounds").rglob("*.png"))]
    assert len(files) == 200
    assert all((tmp_path / file).read_bytes() == (stream.data_root / file).read_bytes() for file in files)


def test_a_run_draws_them_where_the_stream_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "write_all", drawn.append)
    streams.draw_small_stream(STREAM)
    assert len(drawn) == 1
    assert (tmp_path / "data/small_classification").is_dir()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_base_knows_what_no_task_trains(stream: Stream, quantization: str) -> None:
    model, processor = load_base(ModelConfig(**{**vars(BASE), "quantization": quantization}))
    [spec] = stream.general
    classes, source = stream.classes(spec), stream.test_file(spec)
    assert classes is not None
    assert source is not None
    samples, _ = load_records(source, stream.data_root, classes=classes, checker=None)
    features = model.prompt_features(**tokenise(processor, classes.prompts(classes.templates[0])))
    pictures = process_pictures(processor, [load_image(sample.media[0].path) for sample in samples])
    nearest = (model.picture_features(pictures) @ features.T).argmax(1).tolist()
    right = [classes.names[index] == s.answers[0] for index, s in zip(nearest, samples, strict=True)]
    assert sum(right) / len(right) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_larger_batches_take_as_much_more_memory_as_the_plan_says(stream: Stream, tmp_path: Path) -> None:
    """Of two runs, so that what the libraries load on first use, more than so small a model takes, is left out."""
    sizes = {"small": (24, 16), "large": (144, 128)}  # samples in training, in the probe
    found = {name: peaks(stream, tmp_path / name, *batches) for name, batches in sizes.items()}
    for phase in ("probe", "train"):
        measured, planned = (found["large"][phase][side] - found["small"][phase][side] for side in (0, 1))
        assert 0.7 < planned / measured < 1.5, (phase, planned, measured)


def peaks(stream: Stream, folder: Path, batch: int, probe: int) -> dict[str, list[int]]:
    settings = {
        "data_root": stream.data_root,
        "general.samples": stream.data_root / "scenes/general.yaml",
        "run_dir": folder / "run",
        "cache_dir": folder / "cache",
        "train.max_steps": 3,
        "train.per_device_train_batch_size": batch,
        "probe.fraction": 1.0,
        "probe.batch_size": probe,
        "report_to": "[]",
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    config = ROOT / "recipes/configs/classification/small.yaml"
    command = [sys.executable, "-m", "tests.recipes.peaks_worker", str(config), *options]
    freed = {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **freed}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return taken
