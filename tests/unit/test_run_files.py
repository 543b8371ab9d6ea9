"""Files of a run: whole or absent, hashed, chained, held by one process; a phase is computed once."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_keeplora.runs.files import (
    ArtifactError,
    WriteError,
    load_tensors,
    read_json,
    remove_temporaries,
    replaced_directory,
    save_tensors,
    sha256_file,
    sha256_json,
    write_json,
)
from mllm_keeplora.runs.locks import only_run
from mllm_keeplora.runs.manifests import SCHEMA_VERSION, read_manifest, write_manifest
from mllm_keeplora.runs.record import Outcome, StageRecord
from mllm_keeplora.runs.run_directory import RunDirectory, StageDirectory


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("read", [read_json, load_tensors, sha256_file])
@pytest.mark.parametrize("kind", ["a named pipe", "a character device", "a folder"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(read, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    {
        "a named pipe": lambda: os.mkfifo(path),
        "a character device": lambda: path.symlink_to("/dev/zero"),
        "a folder": path.mkdir,
    }[kind]()
    with pytest.raises(ArtifactError, match=f"file is {kind}.*; expected a regular file"):
        read(path)


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(WriteError, match=r"scores.json: .*No space left.*run the same command again"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_reported_for_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_full_device(_tensors: object, _path: object) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    monkeypatch.setattr("mllm_keeplora.runs.files.save_file", write_to_full_device)
    with pytest.raises(WriteError, match="No space left"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with replaced_directory(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(RuntimeError), replaced_directory(target) as new:
        (new / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / ".digits.jsonl.77.tmp").touch()
    (tmp_path / ".adapter.tmp").mkdir()
    (tmp_path / ".adapter.tmp" / "half").touch()
    (tmp_path / "record.json").touch()
    remove_temporaries(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["evaluation", "record.json"]


def test_tensors_survive_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "empty": torch.zeros(0, 4)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_damaged_tensor_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="t.safetensors"):
        load_tensors(tmp_path / "t.safetensors")


def test_json_never_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})


def test_json_hash_ignores_order() -> None:
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 2, "b": 1})


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    directory = RunDirectory(tmp_path).stage(1, "digits")
    directory.path.mkdir(parents=True)
    directory.tensors("train").write_bytes(b"weights")
    write_manifest(directory, {"stage": 1, "previous": "abc", "scores": {"digits": 0.9}})
    return directory


def test_a_whole_stage_is_read_back(stage: StageDirectory) -> None:
    manifest = read_manifest(stage, "abc")
    assert manifest is not None
    assert manifest["files"] == {"factors.safetensors": sha256_file(stage.tensors("train"))}


def test_an_unfinished_stage_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(StageDirectory(tmp_path), None) is None


def test_a_changed_file_is_found(stage: StageDirectory) -> None:
    stage.tensors("train").write_bytes(b"others!")
    with pytest.raises(ArtifactError, match="factors.safetensors"):
        read_manifest(stage, "abc")


def test_a_removed_file_is_found(stage: StageDirectory) -> None:
    stage.tensors("train").unlink()
    with pytest.raises(ArtifactError, match="no file"):
        read_manifest(stage, "abc")


def test_an_edited_manifest_is_found(stage: StageDirectory) -> None:
    path = stage.manifest
    path.write_text(path.read_text().replace("0.9", "0.95"))
    with pytest.raises(ArtifactError, match="was edited"):
        read_manifest(stage, "abc")


@pytest.mark.parametrize("content", ["[]", "null", "{}"])
def test_a_manifest_of_another_shape_is_found(stage: StageDirectory, content: str) -> None:
    stage.manifest.write_text(content)
    with pytest.raises(ArtifactError, match="was edited"):
        read_manifest(stage, "abc")


def test_a_truncated_manifest_is_found(stage: StageDirectory) -> None:
    path = stage.manifest
    path.write_text(path.read_text()[:20])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_manifest(stage, "abc")


def test_another_predecessor_is_found(stage: StageDirectory) -> None:
    with pytest.raises(ArtifactError, match="earlier manifest was edited or redone"):
        read_manifest(stage, "def")


def test_a_run_of_another_version_is_refused_with_a_clear_word(stage: StageDirectory) -> None:
    manifest = json.loads(stage.manifest.read_text()) | {"schema_version": SCHEMA_VERSION - 1}
    del manifest["self"]
    write_json(stage.manifest, manifest | {"self": sha256_json(manifest)})
    with pytest.raises(ArtifactError, match="another version of mllm-keeplora wrote this run"):
        read_manifest(stage, "abc")


# The phases of a stage


def draw() -> Outcome:
    return Outcome({"x": torch.randn(3)}, {"drawn": float(torch.randn(()))})


def test_a_phase_is_computed_once(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    first = StageRecord(directory, {"seed": 1}).phase("train", draw)
    again = StageRecord(directory, {"seed": 1}).phase("train", draw)
    assert torch.equal(first.tensors["x"], again.tensors["x"])
    assert first.facts == again.facts


def test_a_phase_that_was_read_keeps_its_time(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    record, again = StageRecord(directory, {}), StageRecord(directory, {})
    record.phase("train", draw)
    again.phase("train", draw)
    assert record.timings == again.timings != {}


@pytest.mark.parametrize("name", ["factors.safetensors", "factors.json"])
@pytest.mark.parametrize("damage", ["removed", "other bytes", "zeros"])
def test_a_phase_whose_files_were_changed_is_computed_again(tmp_path: Path, name: str, damage: str) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    first = StageRecord(directory, {}).phase("train", draw)
    drawn, file = first.tensors["x"], directory.path / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(b"?" * 99 if damage == "other bytes" else bytes(file.stat().st_size))
    again = StageRecord(directory, {}).phase("train", draw)
    assert not torch.equal(drawn, again.tensors["x"])
    assert first.facts != again.facts


def test_a_file_that_no_phase_wrote_is_not_read(tmp_path: Path) -> None:
    """A kill between a phase's files and its entry in the record."""
    directory = StageDirectory(tmp_path / "01-digits")
    record = StageRecord(directory, {})
    save_tensors(directory.tensors("train"), {"x": torch.full((3,), torch.nan)})
    assert not record.phase("train", draw).tensors["x"].isnan().any()


def test_a_phase_that_depends_on_something_else_is_computed_again(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    first, same, other = (StageRecord(directory, {}).phase("evaluate", draw, key).facts for key in "aab")
    assert first == same != other


def test_a_stage_begun_with_other_inputs_begins_anew(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    first = StageRecord(directory, {"seed": 1}).phase("train", draw)
    (directory.path / "leftover").touch()
    again = StageRecord(directory, {"seed": 2}).phase("train", draw)
    assert first.facts != again.facts
    assert not (directory.path / "leftover").exists()


def test_a_phase_may_leave_nothing(tmp_path: Path) -> None:
    record = StageRecord(StageDirectory(tmp_path / "01-digits"), {})
    phase = record.phase("rehearse", Outcome)
    assert (phase.tensors, phase.facts) == ({}, None)
    assert [path.name for path in record.directory.path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", ["[]", "null", "{}", "3"])
def test_a_record_of_another_shape_is_named(tmp_path: Path, content: str) -> None:
    directory = StageDirectory(tmp_path / "01-digits")
    StageRecord(directory, {})
    directory.record.write_text(content)
    with pytest.raises(ArtifactError, match=r"record.json is no record of a stage.*Delete"):
        StageRecord(directory, {})


# One process at a time


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    other = f"{hold}; print(flush=True); sys.stdin.read()"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", other, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ArtifactError, match="another process is running"), only_run(lock):
            pass
        process.stdin.close()
    with only_run(lock):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_run(tmp_path / ".lock"):
        assert "without locks" in caplog.text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="name another"), only_run(tmp_path / "file" / ".lock"):
        pass
