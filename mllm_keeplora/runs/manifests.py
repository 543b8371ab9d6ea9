"""The chain of stage manifests: each names its files by hash, and the manifest before it."""

from collections.abc import Mapping
from typing import Any

from mllm_keeplora.runs.files import (
    ArtifactError,
    hash_files,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from mllm_keeplora.runs.run_directory import StageDirectory

SCHEMA_VERSION = 3


def read_manifest(stage: StageDirectory, previous: str | None) -> dict[str, Any] | None:
    """The manifest of a complete stage, checked against its files and its predecessor; None where there is
    none yet.

    Args:
        stage: where it lies.
        previous: sha256 of the predecessor's manifest file, None for stage 0.

    Raises:
        ArtifactError: the manifest or a file it names was edited or removed, or it follows another
            predecessor.
    """
    path = stage.manifest
    if not path.exists():
        return None
    manifest = read_json(path)
    remedy = f"restore it, or delete {stage.path} and the stages after it to have them computed again"
    if not isinstance(manifest, dict) or manifest.get("self") != _self_hash(manifest):
        raise ArtifactError(f"{path} was edited: its own hash does not match; {remedy}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version {manifest.get('schema_version')}, expected {SCHEMA_VERSION}: another version "
            f"of mllm-keeplora wrote this run. Continue it with that version, or use another run_dir"
        )
    if manifest.get("previous") != previous:
        raise ArtifactError(
            f"{path} follows a manifest with hash {str(manifest.get('previous'))[:12]}, but the "
            "stage before it has "
            f"{str(previous)[:12]}: an earlier manifest was edited or redone; {remedy}"
        )
    for name, expected in manifest["files"].items():
        file = stage.path / name
        found = sha256_file(file) if file.exists() else "no file"
        if found != expected:
            raise ArtifactError(f"{file}: hash {expected[:12]} expected by the manifest, found {found[:12]}; {remedy}")
    return manifest


def write_manifest(stage: StageDirectory, manifest: dict[str, Any]) -> dict[str, Any]:
    """Completes a stage: hashes its files and writes the manifest last. Returns the manifest as written."""
    complete = {
        **manifest,
        "schema_version": SCHEMA_VERSION,
        "files": hash_files(stage.path, skip=(stage.manifest.name,)),
    }
    complete["self"] = _self_hash(complete)
    write_json(stage.manifest, complete)
    return complete


def _self_hash(manifest: Mapping[str, Any]) -> str:
    """The last stage has no successor to pin its manifest, so each carries a hash of itself."""
    return sha256_json({key: value for key, value in manifest.items() if key != "self"})
