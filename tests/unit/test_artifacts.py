"""Files: whole or absent, hashed, chained."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mllm_keeplora.runs.files import (
    ArtifactError,
    WriteError,
    load_or_compute,
    load_tensors,
    remove_temporaries,
    replaced_directory,
    save_tensors,
    sha256_file,
    sha256_json,
    write_json,
)
from mllm_keeplora.runs.manifests import MANIFEST, read_manifest, write_manifest


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    (tmp_path / "inputs.json").touch()
    remove_temporaries(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["evaluation", "inputs.json"]


def test_tensors_survive_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "empty": torch.zeros(0, 4)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_finished_phase_is_not_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    first = load_or_compute(path, lambda: {"a": torch.randn(2)})
    assert torch.equal(load_or_compute(path, lambda: {"a": torch.randn(2)})["a"], first["a"])


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
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "01-digits"
    directory.mkdir()
    (directory / "factors.safetensors").write_bytes(b"weights")
    write_manifest(directory, {"stage": 1, "previous": "abc", "scores": {"digits": 0.9}})
    return directory


def test_a_whole_stage_is_read_back(stage: Path) -> None:
    manifest = read_manifest(stage, "abc")
    assert manifest is not None
    assert manifest["files"] == {"factors.safetensors": sha256_file(stage / "factors.safetensors")}


def test_an_unfinished_stage_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, None) is None


def test_a_changed_file_is_found(stage: Path) -> None:
    (stage / "factors.safetensors").write_bytes(b"others!")
    with pytest.raises(ArtifactError, match="factors.safetensors"):
        read_manifest(stage, "abc")


def test_a_removed_file_is_found(stage: Path) -> None:
    (stage / "factors.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no file"):
        read_manifest(stage, "abc")


def test_an_edited_manifest_is_found(stage: Path) -> None:
    path = stage / MANIFEST
    path.write_text(path.read_text().replace("0.9", "0.95"))
    with pytest.raises(ArtifactError, match="was edited"):
        read_manifest(stage, "abc")


@pytest.mark.parametrize("content", ["[]", "null", "{}"])
def test_a_manifest_of_another_shape_is_found(stage: Path, content: str) -> None:
    (stage / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="was edited"):
        read_manifest(stage, "abc")


def test_a_truncated_manifest_is_found(stage: Path) -> None:
    path = stage / MANIFEST
    path.write_text(path.read_text()[:20])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_manifest(stage, "abc")


def test_another_predecessor_is_found(stage: Path) -> None:
    with pytest.raises(ArtifactError, match="earlier manifest was edited or redone"):
        read_manifest(stage, "def")
