"""Several processes (DDP over gloo) against one: the same gradients, files and scores, and nobody waits."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mllm_keeplora.linalg.sketch import extend_basis_from_sketch
from tests.forked import Forked, ranks, run_together
from tests.recipes.conftest import ROOT, TASKS, TEST, Recipe, checked

WORKER = "tests/recipes/processes_worker.py"
DEFAULT = "recipes/configs/vqa/small.yaml"
HALF = ("--train.per_device_train_batch_size", "4")  # two processes then take the 8 samples of one
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
FSDP = [*LAUNCH, "recipes/accelerate/fsdp.yaml", "--num_processes", "2", "--main_process_port", "0"]


def run(recipe: Recipe, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=recipe.environment(), capture_output=True, text=True, check=False, timeout=300
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def mixed(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two tasks with samples of unequal lengths: half of the first without an image, the second uneven."""
    root = tmp_path_factory.mktemp("mixed")
    shutil.copytree(data_root, root / "embedded")
    for number, (task, count) in enumerate((("charts", 64), ("digits", 61))):
        path = root / "embedded" / task / "train.json"
        records = json.loads(path.read_text())[:count]
        for index, record in enumerate(records):
            record["conversations"] = record["conversations"][: 2 * (1 + index % 3)]
            if number == 0 and index % 16 >= 8:
                del record["image"]
                question = record["conversations"][0]
                question["value"] = question["value"].replace("<image>\n", "")
        path.write_text(json.dumps(records))
    return Recipe(root / "run", root / "embedded", ("charts", "digits"))


@dataclass
class Compared:
    """What the worker of one run wrote, a process each."""

    tensors: list[dict[str, torch.Tensor]]
    seen: list[dict[str, Any]]
    run_dir: Path


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` tells the processes of its kind of run; which of them each is, `ranks` says."""
    launched = subprocess.run([*FSDP, "--no_python", "env"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = dict(line.split("=", 1) for line in launched.stdout.splitlines() if "=" in line)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def worker(mixed: Recipe, processes: int, job: str, name: str) -> list[str]:
    recipe = replace(mixed, directory=mixed.directory / name)
    recipe.directory.mkdir(parents=True)
    settings = {
        "train.max_steps": 10,
        "train.gradient_accumulation_steps": 2,
        "train.per_device_train_batch_size": 4 // processes,
        "train.max_grad_norm": 1e9,  # the gradients that are compared are those before clipping
        "train.save_steps": 0,
        "train.activation_checkpointing": str(name == "fsdp"),
        "probe.batch_size": 8,
        "general.samples": mixed.data_root / "scenes/general.json",
        "general.max_samples": 12,
        "general.share": 0.5,  # 4 samples beside 4, or 2 beside 2 on each of two processes
        "general.max_new_tokens": 4,
        "general.rehearsed": 5,  # one batch: the second process has none
        "train_overrides": '{"digits": {"max_steps": -1}}',
    }
    arguments = (text for key, value in settings.items() for text in (f"--{key}", str(value)))
    options = recipe.command(*arguments)[2:]
    path = recipe.directory / "stream.yaml"
    stream = yaml.safe_load(path.read_text())
    stream["tasks"][0]["allow_text_only"] = True
    path.write_text(yaml.safe_dump(stream))
    return [WORKER, job, str(mixed.directory / name), DEFAULT, *options]


def compare(mixed: Recipe, processes: int, name: str) -> Compared:
    command = worker(mixed, processes, "compare", name)
    all_done = run_together(command, processes, fsdp_environment() if name == "fsdp" else None)
    assert [done.returncode for done in all_done] == [0] * len(all_done), all_done[0].stderr
    assert ("spreading the language layers" in all_done[0].stderr) == (name == "fsdp")
    files = [mixed.directory / name / f"process-{rank}" for rank in range(processes)]
    seen = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    tensors = [load_file(file.with_suffix(".safetensors")) for file in files]
    return Compared(tensors, seen, mixed.directory / name / "run")


@pytest.fixture(scope="module")
def one(mixed: Recipe) -> Compared:
    """One process; it writes the A that all train with."""
    return compare(mixed, 1, "one")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(request: pytest.FixtureRequest, mixed: Recipe, one: Compared) -> Compared:
    """Two processes on the same batches, with copies of the base or (recomputing activations) parts of it."""
    return compare(mixed, 2, request.param)


def named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {key.removeprefix(f"{prefix}/"): t for key, t in tensors.items() if key.startswith(f"{prefix}/")}
    assert len(found) > 50
    return found


@pytest.mark.parametrize("probe", ["three_batches", "text_on_one", "one_batch"])
def test_a_probe_shared_out_is_the_same_gradient(one: Compared, two: Compared, probe: str) -> None:
    """Also where the second process has text alone, or no batch."""
    expected, found = named(one.tensors[0], probe), named(two.tensors[0], probe)
    assert max(relative_error(found[name], sketch) for name, sketch in expected.items()) < 1e-5


def test_a_shared_out_probe_protects_the_same_directions(one: Compared, two: Compared) -> None:
    bases = named(one.tensors[0], "basis")
    for name, sketch in named(one.tensors[0], "three_batches").items():
        expected = extend_basis_from_sketch(bases[name], sketch, 0.99)
        found = extend_basis_from_sketch(bases[name], two.tensors[0][f"three_batches/{name}"], 0.99)
        assert abs(found.basis.shape[1] - expected.basis.shape[1]) <= 1, name
        assert abs(found.captured - expected.captured) < 1e-4, name


def test_the_first_step_has_the_same_gradient(one: Compared, two: Compared) -> None:
    """Two batches a step, of unequal numbers of supervised tokens on the two processes."""
    assert [sum(pair) for pair in zip(*(s["tokens"][:20] for s in two.seen), strict=True)] == one.seen[0]["tokens"][:20]
    assert two.seen[0]["tokens"][:2] != two.seen[1]["tokens"][:2]
    expected, found = named(one.tensors[0], "gradient"), named(two.tensors[0], "gradient")
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], gradient) for name, gradient in expected.items()) < 1e-5


def test_ten_steps_give_the_same_update(one: Compared, two: Compared) -> None:
    """A process whose batches leave the vision tower out trains it with the other's gradients."""
    assert all(seen["without_image"] >= 3 for seen in two.seen)
    assert one.seen[0]["steps"] == two.seen[0]["steps"] == 10
    b = named(one.tensors[0], "B")
    for name, a in named(one.tensors[0], "A").items():
        assert torch.equal(two.tensors[0][f"A/{name}"], a)
        assert relative_error(two.tensors[0][f"B/{name}"] @ a, b[name] @ a) < 1e-3, name


def test_samples_that_fill_no_batch_cost_no_step_more_and_are_counted(one: Compared, two: Compared) -> None:
    counts = [(s["uneven"]["steps"], s["uneven"]["repeated"]) for s in (*one.seen, *two.seen)]
    assert counts == [(8, 0), (8, 3), (8, 3)]  # 61 samples by 8; an epoch of 2 x 2 has 3 places left


def test_processes_hold_the_same_bits(two: Compared) -> None:
    first, second = two.tensors
    assert first.keys() == second.keys()
    assert {key.split("/")[0] for key in first} >= {"own_A", "B", "basis"}
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_prompts_of_past_tasks_get_the_same_replies(one: Compared, two: Compared) -> None:
    """Also where a process has none of them to ask."""
    assert two.seen[0]["recalled"] == two.seen[1]["recalled"] == one.seen[0]["recalled"]
    assert len(one.seen[0]["recalled"]["replies"]) == 5


def test_layers_are_gathered_once_for_all_tokens_of_an_evaluation(one: Compared, two: Compared) -> None:
    """The process that has nothing to answer helps to gather, and then rests."""
    for seen in (*one.seen, *two.seen):
        short, long = seen["told"]
        assert long["collectives"] == short["collectives"]
    assert [[told["runs"] for told in seen["told"]] for seen in (*one.seen, *two.seen)] == [[4, 24], [4, 24], [0, 0]]


@pytest.mark.parametrize("limit", [7, 1])
def test_no_question_is_lost_or_asked_twice(one: Compared, two: Compared, limit: int) -> None:
    row = two.seen[0][f"row_{limit}"]
    assert [score["n"] for score in row.values()] == [limit] * 3
    assert row == two.seen[1][f"row_{limit}"] == one.seen[0][f"row_{limit}"]
    files = sorted((one.run_dir / f"limit_{limit}").iterdir())
    assert len(files) == 3
    for file in files:
        assert (two.run_dir / f"limit_{limit}" / file.name).read_text() == file.read_text()


@pytest.mark.slow  # a launcher's start, and what it does
def test_a_process_that_fails_ends_the_run(mixed: Recipe) -> None:
    start = time.monotonic()
    done = run(mixed, [*TORCHRUN, *worker(mixed, 2, "fail", "fail")])
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert done.stderr.count("error: process 1 cannot go on") == 1


def test_an_error_of_the_main_process_alone_is_said_once(fresh: Recipe) -> None:
    (fresh.run_dir / "stages" / "07-other").mkdir(parents=True)
    both = run_together(fresh.command()[1:])
    assert all(done.returncode != 0 for done in both)
    said = "".join(done.stderr for done in both)
    assert said.count("07-other is not a stage of stream") == 1
    assert "Connection closed" not in said


@pytest.fixture(scope="module")
def doubled(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The short stream run by two processes to its end. Tests read it and leave it as it is."""
    recipe = Recipe(tmp_path_factory.mktemp("doubled"), data_root)
    for done in run_together(recipe.command(*HALF)[1:]):
        checked(done)
    return recipe


def stage_files(recipe: Recipe) -> dict[str, bytes]:
    root = recipe.run_dir / "stages" / "01-digits"
    return {name: (root / name).read_bytes() for name in ("lora_a.safetensors", "factors.safetensors")}


def manifests(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(recipe.run_dir.glob("stages/*/manifest.json"))]


def test_two_processes_end_in_one_processs_matrix(doubled: Recipe, finished: Recipe) -> None:
    assert [m["num_processes"] for m in manifests(doubled)] == [2, 2, 2]
    for row, expected in zip(doubled.retention()["rows"], finished.retention()["rows"], strict=True):
        for name, score in row["scores"].items():
            other = expected["scores"][name]
            assert score["n"] == TEST
            stderr = (score["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5
            assert abs(score["value"] - other["value"]) <= 2 * stderr
    files = {p.relative_to(finished.run_dir).parent for p in finished.run_dir.rglob("*") if p.is_file()}
    assert {p.relative_to(doubled.run_dir).parent for p in doubled.run_dir.rglob("*") if p.is_file()} == files
    assert not [p for p in doubled.run_dir.rglob("*") if p.name.endswith((".tmp", ".old"))]


@pytest.fixture(scope="module")
def killed(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two processes, of which one is killed after its first checkpoint; then the other, as launchers do."""
    recipe = Recipe(tmp_path_factory.mktemp("killed"), data_root, TASKS[:1])
    both = [Forked(recipe.command(*HALF)[1:], rank) for rank in ranks(2)]
    checkpoint = recipe.run_dir / "stages" / "01-digits" / "checkpoints" / "checkpoint-3" / "complete"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and both[1].poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert both[1].poll() is None, "the run ended before it could be killed"
    for process in reversed(both):
        process.kill()
        process.wait()
    assert len(manifests(recipe)) == 1
    return recipe


def copy_of(recipe: Recipe, directory: Path) -> Recipe:
    shutil.copytree(recipe.directory, directory, dirs_exist_ok=True)
    return replace(recipe, directory=directory)


def test_a_killed_run_continues_to_the_same_result(killed: Recipe, doubled: Recipe, tmp_path: Path) -> None:
    again = copy_of(killed, tmp_path)
    for done in run_together(again.command(*HALF)[1:]):
        assert "not continued" not in checked(done).stderr
    assert stage_files(again) == stage_files(doubled)


class Node:
    """A launcher with one process of two, as each of two machines has it, over loopback."""

    def __init__(self, recipe: Recipe, rank: int, port: int) -> None:
        file, self.log = recipe.directory / f"node-{rank}.log", ""
        recipe.directory.mkdir(parents=True, exist_ok=True)
        machine = ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
        main = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [*LAUNCH, "recipes/accelerate/ddp_cpu.yaml", *machine, *main, *recipe.command(*HALF)[1:]]
        with file.open("w") as log:
            self.process = psutil.Popen(command, cwd=ROOT, env=recipe.environment(), stdout=log, stderr=log)
        self._file = file

    def end(self, seconds: float) -> int:
        """Its exit status; what it wrote is in `log` then."""
        status = int(self.process.wait(seconds))
        self.log = self._file.read_text()
        return status

    def kill(self) -> None:
        """As a machine ends that loses its power: the launcher and all that it started, at once."""
        if self.process.is_running():
            for process in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


@pytest.fixture
def nodes() -> Iterator[Callable[[Recipe], list[Node]]]:
    """Starts both launchers of a run; whatever is left of them ends with the test."""
    started: list[Node] = []

    def start(recipe: Recipe) -> list[Node]:
        port = int(ranks(2)[0]["MASTER_PORT"])
        both = [Node(recipe, rank, port) for rank in range(2)]
        started.extend(both)
        return both

    yield start
    for node in started:
        node.kill()


@pytest.mark.slow  # four launchers
@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_over_two_machines_survives_the_loss_of_one(
    doubled: Recipe, data_root: Path, tmp_path: Path, nodes: Callable[[Recipe], list[Node]], lost: int
) -> None:
    """The other ends with a message, and the same two commands again end in the bits of a run that lost none."""
    recipe = Recipe(tmp_path, data_root, TASKS[:1])
    both = nodes(recipe)
    checkpoint = recipe.run_dir / "stages" / "01-digits" / "checkpoints" / "checkpoint-3" / "complete"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and both[lost].process.is_running() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert checkpoint.exists()
    both[lost].kill()
    other = both[1 - lost]
    assert other.end(120) != 0
    assert "another process of the run has ended" in other.log
    assert len(manifests(recipe)) == 1, "the stage was to be in its middle"

    again = nodes(recipe)
    assert [node.end(240) for node in again] == [0, 0], again[0].log
    assert "not continued" not in again[0].log
    assert stage_files(recipe) == stage_files(doubled)


def test_a_run_goes_on_with_another_number_of_processes(killed: Recipe, tmp_path: Path) -> None:
    """Complete stages are kept; a training in the middle begins anew."""
    again = copy_of(killed, tmp_path)
    base = again.run_dir / "stages" / "00-base" / "manifest.json"
    kept = base.read_bytes()
    done = again.run(*HALF)
    assert done.returncode == 0, done.stderr
    assert "the stages so far ran on 2 process(es), these on 1" in done.stderr
    assert "checkpoint-3 was written by 2 process(es) and the run now has 1: it is not continued" in done.stderr
    assert base.read_bytes() == kept
    assert [m["num_processes"] for m in manifests(again)] == [2, 1]
    assert manifests(again)[1]["counts"]["steps"] == 6
