"""Files of a run: whole or absent, hashed, chained, held by one process; a phase is computed once."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm_keeplora.data.fetch_stream import FetchError
from mllm_keeplora.data.fetch_stream import _alone as fetch_alone
from mllm_keeplora.data.video.cache import FrameCache
from mllm_keeplora.runs.files import (
    ArtifactError,
    WriteError,
    check_hashes,
    found_hash,
    hash_files,
    load_tensors,
    read_json,
    read_sealed,
    remove,
    remove_temporaries,
    replaced_directory,
    save_tensors,
    sha256_file,
    sha256_json,
    write_hashes,
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
    def write_to_full_device(_tensors: object, _path: object, metadata: object) -> None:
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


def dead_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    own, dead = f"{os.uname().nodename}-{os.getppid()}", f"{os.uname().nodename}-{dead_process()}"
    (tmp_path / "evaluation").mkdir()
    for name in (f"evaluation/.digits.jsonl.{dead}.tmp", f".config.json.elsewhere-{dead_process()}.tmp"):
        (tmp_path / name).touch()
    old = tmp_path / ".retention.json.elsewhere-1.tmp"
    old.touch()
    os.utime(old, (0, 0))
    for name in (f".adapter.{dead}.tmp", f".adapter.{dead}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    for name in (f".basis.safetensors.{own}.tmp", "record.json", ".hidden.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    # Those of living processes, of another machine since less than a day, and what is not ours.
    assert left > {"evaluation", "record.json", f".basis.safetensors.{own}.tmp", ".hidden.tmp"}
    assert len(left) == 5 and not list((tmp_path / "evaluation").iterdir())


@pytest.mark.parametrize("kill_at", ["the file is written", "the old folder is aside"])
def test_a_writer_that_was_killed_leaves_what_the_next_start_removes(tmp_path: Path, kill_at: str) -> None:
    moment = "write" if kill_at == "the file is written" else "rename"
    code = f"""
import os, signal, sys
from pathlib import Path
from mllm_keeplora.runs.files import replaced_directory
target, renamed = Path(sys.argv[1]), Path.rename
def rename(self, to):
    renamed(self, to)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename if {moment!r} == "rename" else renamed
with replaced_directory(target) as new:
    (new / "a").write_text("2")
    if {moment!r} == "write":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "adapter").mkdir()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapter")], check=False)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".adapter.")]
    remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == (["adapter"] if moment == "write" else [])


def test_temporaries_are_no_files_of_a_stage(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / ".a.elsewhere-1.tmp").touch()
    assert list(hash_files(tmp_path)) == ["a"]


# What may lie where a file of a run is expected


def put_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def put_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [put_pipe, put_folder, put_device])
@pytest.mark.parametrize(
    "use",
    [
        read_json,
        load_tensors,
        sha256_file,
        lambda path: read_sealed(path, "restore it"),
        lambda path: write_json(path, {}),
        lambda path: save_tensors(path, {}),
        lambda path: only_run(path).__enter__(),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, put: Callable[[Path], None], use: Any) -> None:
    put(tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"x is a (folder|named pipe|character device).*expected a regular file"):
        use(tmp_path / "x")
    assert found_hash(tmp_path / "x") is None


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("circle", "nowhere"):
        for use in (read_json, load_tensors):
            with pytest.raises(ArtifactError, match=name):
                use(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000, "\ufeff{}", '{"a": "\udcff'], ids=range(8)
)
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"x\.json"):
        read_json(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"a": 1}', '{"a": 1e999, "self": "x"}'])
def test_what_was_not_sealed_is_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json was edited.*restore it"):
        read_sealed(tmp_path / "x.json", "restore it")


def test_a_folder_with_hashes_tells_what_was_changed(tmp_path: Path) -> None:
    hashes = tmp_path / "hashes.json"
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_hashes(hashes)
    check_hashes(hashes, "remedy")
    (tmp_path / "c").touch()
    with pytest.raises(ArtifactError, match=r"/c: hash None expected.*remedy"):
        check_hashes(hashes, "remedy")
    (tmp_path / "c").unlink()
    (tmp_path / "a").write_text("b")
    with pytest.raises(ArtifactError, match="/a: hash"):
        check_hashes(hashes, "remedy")


@pytest.mark.parametrize("kind", ["folder", "file", "pipe", "link", "nothing"])
def test_whatever_lies_there_is_removed(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    if kind == "folder":
        put_folder(path)
        os.mkfifo(path / "pipe")
    elif kind == "file":
        path.touch()
    elif kind == "pipe":
        put_pipe(path)
    elif kind == "link":
        path.symlink_to(other)
    remove(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["other", "kept"]


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
    with pytest.raises(ArtifactError, match=r"record.json was edited.*delete"):
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


def refusing_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)


WITHOUT_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.mark.parametrize("number", WITHOUT_LOCKS)
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing_locks(monkeypatch, number)
    for held, what in (
        (only_run(tmp_path / "run/.lock"), "a second run in this run_dir would not be noticed"),
        (fetch_alone(tmp_path / "data"), "a second fetch to .* would remove what this one has begun"),
    ):
        caplog.clear()
        with held:
            [warning] = caplog.messages
        assert re.search(f"{tmp_path}/.*without locks .{os.strerror(number)}.: {what}", warning)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_holds_is_no_missing_one(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX allows both answers, and network file systems give the rarer one."""
    refusing_locks(monkeypatch, number)
    with pytest.raises(ArtifactError, match="another process is running"), only_run(tmp_path / ".lock"):
        pass
    with pytest.raises(FetchError, match="another command is fetching"), fetch_alone(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDEADLK])
def test_a_lock_that_fails_otherwise_stays_an_error(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not called another process's, which nobody would find."""
    refusing_locks(monkeypatch, number)
    with pytest.raises(WriteError, match=f"cannot be locked: .*{os.strerror(number)}"), only_run(tmp_path / ".lock"):
        pass
    with pytest.raises(FetchError, match=f"cannot be locked: .*{os.strerror(number)}"), fetch_alone(tmp_path):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="name another"), only_run(tmp_path / "file" / ".lock"):
        pass


WRITERS: dict[str, Callable[[Path], object]] = {
    "JSON": lambda path: write_json(path, {}),
    "tensors": lambda path: save_tensors(path, {"a": torch.zeros(1)}),
    "a folder": lambda path: written_folder(path / "inside.safetensors"),
    "frames": lambda path: FrameCache(path.parent, 10**9).store(path.stem, np.zeros((1, 2, 2, 3), np.uint8), {}),
}


def written_folder(path: Path) -> None:
    with replaced_directory(path.parent) as folder:
        save_file({"a": torch.zeros(1)}, folder / path.name)  # as PEFT and transformers write


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("kind", WRITERS)
def test_files_have_the_mode_that_the_umask_leaves(kind: str, umask: int, tmp_path: Path) -> None:
    """safetensors writes 0600 by itself, which shuts out all others that share a cache or a run."""
    before = os.umask(umask)
    try:
        WRITERS[kind](tmp_path / "one.safetensors")
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.stat().st_mode & 0o777 for path in files] == [0o666 & ~umask]
    finally:
        os.umask(before)
