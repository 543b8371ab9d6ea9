"""Every file of a run is damaged in every way: the run ends in the same bits, or an error names the file.

A tiny run is made once, and copied after each phase, checkpoint and stage. Hypothesis takes a copy, damages one file of
it and starts the run again.
"""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import yaml
from accelerate.state import PartialState
from hypothesis import HealthCheck, given, note, settings
from PIL import Image

import mllm_keeplora.continual.stage as stage_module
import mllm_keeplora.continual.trainer as trainer
from mllm_keeplora.config import EvaluationConfig, ModelConfig, ProbeConfig, RunConfig, TowerConfig, TrainConfig
from mllm_keeplora.continual.history import add_backfill, read_backfill
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.stage import Stage
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.runs.files import ArtifactError, sha256_file, write_json
from mllm_keeplora.runs.record import StageRecord
from mllm_keeplora.runs.run_directory import StageDirectory
from tests.modules.conftest import batch

TASKS = ("reds", "blues")


class Made(NamedTuple):
    """A finished run and the states that it went through.

    Attributes:
        config: of the run.
        states: folder that holds a copy of the run directory of every moment.
        result: hashes of what it came to.
    """

    config: RunConfig
    states: Path
    result: dict[str, str]


def result(run_dir: Path) -> dict[str, str]:
    """What two equal runs have in common: tensors, scores, replies, and how the adapter is to be read."""
    names = ("*.safetensors", "evaluation/*.jsonl", "evaluation.json", "retention.json", "adapter_config.json")
    found = sorted({path for name in names for path in run_dir.rglob(name)})
    return {str(path.relative_to(run_dir)): sha256_file(path) for path in found}


def write_stream(root: Path) -> Path:
    """Two tasks and a benchmark about one picture each."""
    for number, name in enumerate((*TASKS, "scenes")):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (60 * number, 90, 200)).save(root / name / "x.png")
        answer = ("red", "no", "yes")[number]
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": answer}]
        record = {"id": "0", "image": "x.png", "conversations": turns}
        (root / name / "train.json").write_text(json.dumps([{**record, "id": str(n)} for n in range(4)]))
        question = {"question_id": "0", "image": "x.png", "text": "what is this ?", "answer": answer}
        (root / name / "test.json").write_text(json.dumps([question]))
    entries = [
        {"name": name, "test": f"{name}/test.json", "media_root": name, "metric": "exact", "max_new_tokens": 2}
        for name in (*TASKS, "scenes")
    ]
    tasks = [{**entry, "train": f"{entry['name']}/train.json"} for entry in entries[:-1]]
    stream = {"name": "tiny", "data_root": str(root), "tasks": tasks, "general": entries[-1:]}
    (root / "stream.yaml").write_text(yaml.safe_dump(stream))
    return root / "stream.yaml"


def score_by_logits(model: Any, processor: Any, stream: Any, tasks: Path, output: Path, **_: Any) -> dict[str, Any]:
    """In place of lmms-eval, whose start takes a second a row: any change of the model is seen in the score."""
    with torch.no_grad():
        value = float(model.eval()(**batch(size=1)).logits.double().std())
    scores = {}
    for spec in stream.specs:
        write_json(output / f"{spec.name}.jsonl", {"reply": value})
        scores[spec.name] = {"value": value, "native": value, "native_max": 1.0, "stderr": None, "n": 1}
    return scores


@pytest.fixture(scope="module")
def made(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The run, and a copy of its directory after each phase, checkpoint and stage."""
    root = tmp_path_factory.mktemp("fuzz")
    tower = TowerConfig(rank=2)
    config = RunConfig(
        run_dir=str(root / "run"),
        cache_dir=str(root / "cache"),
        stream=str(write_stream(root / "data")),
        model=ModelConfig(base_model=str(tiny_llava), quantization="none", device="cpu"),
        language=tower,
        vision=tower,
        probe=ProbeConfig(max_samples=2),
        train=TrainConfig(max_steps=3, per_device_train_batch_size=2, save_steps=1, learning_rate=1e-2),
        evaluation=EvaluationConfig(batch_size=1),
        report_to=[],
    )
    states = root / "states"

    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as whole:
        whole.setattr(stage_module, "evaluate_row", score_by_logits)

        def copy_after(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def and_copy(*args: Any, **kwargs: Any) -> Any:
                value = original(*args, **kwargs)
                number = len(list(states.iterdir())) if states.exists() else 0
                shutil.copytree(config.run_dir, states / f"{number:02d}")
                return value

            patch.setattr(owner, name, and_copy)

        copy_after(StageRecord, "_note")
        copy_after(trainer, "_write_mark")
        copy_after(Stage, "_write_manifest")
        run_stream(config)
        patch.undo()
        yield Made(config, states, result(Path(config.run_dir)))


def damage(path: Path, kind: str, place: float, bit: int, other: Path) -> None:
    """Spoils one file.

    Args:
        path: the file.
        kind: how.
        place: where in the file, a fraction.
        bit: which bit of that byte.
        other: another run's or stage's file of this name.
    """
    content = bytearray(path.read_bytes())
    if kind == "flip" and content:
        content[int(place * len(content))] ^= 1 << bit
        path.write_bytes(content)
    elif kind == "truncate":
        path.write_bytes(content[: int(place * len(content))])
    elif kind == "zeros":
        path.write_bytes(bytes(len(content)))
    elif kind == "append":
        path.write_bytes(content + b"\n")
    elif kind == "other":
        shutil.copyfile(other, path)
    elif kind in ("delete", "folder", "pipe"):
        path.unlink()
        {"delete": lambda: None, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()


def damage_folder(path: Path, kind: str) -> None:
    """Removes one folder, or puts a file or a pipe in its place."""
    shutil.rmtree(path)
    if kind == "file":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)


KINDS = ("flip", "flip", "flip", "truncate", "zeros", "append", "other", "delete", "folder", "pipe")


@contextmanager
def again(made: Made, state: Path) -> Iterator[RunConfig]:
    """Settings of a copy of a state of the run."""
    run = made.states.parent / "again"
    shutil.copytree(state, run)
    try:
        yield replace(made.config, run_dir=str(run))
    finally:
        shutil.rmtree(run)


def assert_same_or_named(made: Made, config: RunConfig, path: Path) -> None:
    """Outcome of a start: the same bits, or an error that names the damaged file, or the folder that it is in."""
    try:
        run_stream(config)
    except KeepLoRAError as error:
        note(f"refused: {error}")
        assert any(part.name in str(error) for part in (path, path.parent)), str(error)
    else:
        assert result(Path(config.run_dir)) == made.result


# (examples in the default suite, examples under --slow) of each test
UNFINISHED, FINISHED, LONG = 7, 40, 1500
FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
DAMAGE = st.tuples(
    st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.integers(0, 10**6), st.booleans()
)


def try_one(made: Made, state: Path, choice: tuple[str, float, int, int, bool]) -> None:
    """Damages one file of a copy of a state, now and then a folder, and starts the run again."""
    kind, place, bit, number, is_folder = choice
    with again(made, state) as config:
        run = Path(config.run_dir)
        found = sorted(path for path in run.rglob("*") if path.is_dir() == (is_folder and kind in ("delete", "pipe")))
        path = found[number % len(found)]
        note(f"{kind} {path.relative_to(run)} in state {state.name}, place {place}, bit {bit}")
        if path.is_dir():
            damage_folder(path, kind)
        else:
            same_name = sorted(other for other in made.states.rglob(path.name) if other.is_file()) or [path]
            damage(path, kind, place, bit, same_name[number % len(same_name)])
        assert_same_or_named(made, config, path)


@settings(max_examples=UNFINISHED, derandomize=True, **FUZZ)
@given(state=st.integers(0, 10**6), choice=DAMAGE)
@pytest.mark.timeout(300)
def test_a_damaged_file_of_an_unfinished_run(made: Made, state: int, choice: tuple[str, float, int, int, bool]) -> None:
    states = sorted(made.states.iterdir())[:-1]
    try_one(made, states[state % len(states)], choice)


@settings(max_examples=FINISHED, derandomize=True, **FUZZ)
@given(choice=DAMAGE)
@pytest.mark.timeout(300)
def test_a_damaged_file_of_a_finished_run(made: Made, choice: tuple[str, float, int, int, bool]) -> None:
    try_one(made, Path(made.config.run_dir), choice)


@pytest.mark.slow
@settings(max_examples=LONG, **FUZZ)
@given(state=st.integers(0, 10**6), choice=DAMAGE)
@pytest.mark.timeout(4 * 3600)
def test_many_damaged_files(made: Made, state: int, choice: tuple[str, float, int, int, bool]) -> None:
    states = [*sorted(made.states.iterdir()), Path(made.config.run_dir)]
    try_one(made, states[state % len(states)], choice)


# Members of the same kinds, each by itself


def in_the_middle(made: Made) -> Path:
    """The first state that holds a checkpoint."""
    return next(state for state in sorted(made.states.iterdir()) if list(state.rglob("checkpoint-2/complete")))


@pytest.mark.parametrize("name", ["stage.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_that_was_changed_is_not_continued(made: Made, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(in_the_middle(made), tmp_path / "run")) / "stages/01-reds/checkpoints"
    PartialState()
    assert trainer.last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    damage(folder / "checkpoint-2" / name, "flip", 0.9, 3, folder)
    assert trainer.last_complete_checkpoint(folder) == str(folder / "checkpoint-1")
    assert not (folder / "checkpoint-2").exists()


def test_a_run_continues_in_another_folder_and_from_another_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(in_the_middle(made), tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_stream(replace(made.config, run_dir="moved"))
    assert result(tmp_path / "elsewhere" / "moved") == made.result
    monkeypatch.chdir(tmp_path)
    run_stream(replace(made.config, run_dir="elsewhere/moved"))
    assert result(tmp_path / "elsewhere" / "moved") == made.result


@pytest.mark.parametrize("room", [200, 2_000, 20_000])
def test_without_room_a_file_is_named_and_the_run_continues_when_there_is(
    made: Made, tmp_path: Path, room: int
) -> None:
    """The kernel refuses files beyond a size as it refuses them on a full disk."""
    shutil.copytree(in_the_middle(made), tmp_path / "run")
    config = replace(made.config, run_dir=str(tmp_path / "run"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(KeepLoRAError, match=r"cannot write .*/run.*[Mm]ake room.* the same command again"):
            run_stream(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob(".*.tmp"))
    run_stream(config)
    assert result(tmp_path / "run") == made.result


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "quantization_config.json"])
def test_a_changed_adapter_of_a_run_is_not_loaded_and_comes_back(made: Made, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(made.config.run_dir, tmp_path / "run"))
    damage(run / "adapter" / name, "append", 0, 0, run)
    with pytest.raises(KeepLoRAError, match=f"{name}: hash .*start its run again"):
        load_run(run).load_model()
    run_stream(replace(made.config, run_dir=str(run)))
    assert result(run) == made.result
    load_run(run).load_model()


def test_a_run_does_not_start_from_an_adapter_in_its_own_folder(made: Made, tmp_path: Path) -> None:
    for inside in (tmp_path / "run" / "adapter", tmp_path / "run" / ".." / "run"):
        with pytest.raises(KeepLoRAError, match=r"lies in run_dir .*copy it elsewhere"):
            replace(made.config, run_dir=str(tmp_path / "run"), initial_adapter=str(inside))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llava"}', "[]", "not JSON"])
def test_a_folder_of_somebodys_own_stays_as_it_is(made: Made, tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter").mkdir()
    for name, content in (("config.json", config), ("report.html", "mine"), ("adapter/a", "mine")):
        (tmp_path / name).write_text(content)
    with pytest.raises(KeepLoRAError, match="no directory of a run"):
        run_stream(replace(made.config, run_dir=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == config
    assert (tmp_path / "report.html").read_text() == (tmp_path / "adapter/a").read_text() == "mine"


def test_a_chat_template_counts_by_what_it_says(made: Made, tmp_path: Path) -> None:
    """A file that was edited under its name gives other prompts; one that was moved gives the same."""
    own = Path(made.config.model.base_model, "chat_template.jinja").read_text()
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text(own)

    def start(name: str) -> None:
        model = replace(made.config.model, chat_template=str(tmp_path / name))
        run_stream(replace(made.config, run_dir=str(tmp_path / "run"), model=model))

    start("a.jinja")
    start("b.jinja")
    (tmp_path / "b.jinja").write_text(own + "{# #}")
    with pytest.raises(KeepLoRAError, match=r"written with other settings \(model.chat_template"):
        start("b.jinja")
    for name, content in (("latin.jinja", b"\xe4"), ("none.jinja", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KeepLoRAError, match=f"model.chat_template .*{name} cannot be read"):
            start(name)


@pytest.mark.parametrize("folder", ["stages", "adapter", "adapter/cache", "eval_tasks", "tensorboard/../stages/x"])
def test_a_cache_in_the_runs_own_folders_is_refused(made: Made, tmp_path: Path, folder: str) -> None:
    config = replace(made.config, run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "run" / folder))
    with pytest.raises(KeepLoRAError, match=r"cache_dir .* lies in run_dir .*; name another"):
        run_stream(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", [".", "..", "data", "base", "cache", "data/..", "x/../data"])
def test_a_run_does_not_write_among_other_files(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Nor above them: who deletes a run deletes its folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("data").symlink_to(Path(made.config.stream).parent.resolve())
    Path("base").symlink_to(Path(made.config.model.base_model).resolve())
    config = replace(made.config, run_dir=path, cache_dir="cache")
    with pytest.raises(KeepLoRAError, match=r"(is|lies in) run_dir .*; name another run_dir"):
        run_stream(config)
    assert sorted(found.name for found in Path().iterdir()) == ["base", "data"]


@pytest.mark.parametrize("name", ["run_dir", "cache_dir"])
def test_a_folder_below_a_file_cannot_be_made(made: Made, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    places = {"run_dir": str(tmp_path / "run"), name: str(tmp_path / "file" / "a" / "b")}
    with pytest.raises(KeepLoRAError, match=f"{name} .* cannot be made: .*file is a file"):
        run_stream(replace(made.config, **places))


def test_a_path_that_no_folder_can_have_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path / ("x" * 300), tmp_path / "circle" / "run"):
        with pytest.raises(KeepLoRAError, match=r"cannot be (read|written): .*name another"):
            run_stream(replace(made.config, run_dir=str(path)))


@pytest.mark.parametrize("edited", ["backfill.json", "backfill/reds.jsonl"])
def test_cells_that_were_measured_later_are_read_as_they_were_written(tmp_path: Path, edited: str) -> None:
    stage = StageDirectory(tmp_path)
    for name in ("reds", "blues"):
        write_json(stage.backfilled_replies / f"{name}.jsonl", name)
        add_backfill(stage, {name: {"data": "d", "score": {"value": 0.5}}})
    assert {name: cell["score"] for name, cell in read_backfill(stage).items()} == {
        "reds": {"value": 0.5},
        "blues": {"value": 0.5},
    }
    path = tmp_path / edited
    path.write_text(path.read_text().replace("0.5", "0.6", 1).replace("reds", "rods", 1))
    with pytest.raises(ArtifactError, match=r"backfill.*delete .*backfill: true"):
        read_backfill(stage)
