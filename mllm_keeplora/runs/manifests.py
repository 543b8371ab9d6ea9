"""The chain of stage manifests: each names its files by hash, and the manifest before it."""

from typing import Any

from mllm_keeplora.runs.files import ArtifactError, found_hash, hash_files, read_sealed, write_sealed
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
    remedy = f"restore it, or delete {stage.path} and the stages after it to have them computed again"
    manifest = read_sealed(path, remedy)  # the last stage has no successor to pin its manifest
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
        found = found_hash(file) or "no file"
        if found != expected:
            raise ArtifactError(f"{file}: hash {expected[:12]} expected by the manifest, found {found[:12]}; {remedy}")
    return manifest


def write_manifest(stage: StageDirectory, manifest: dict[str, Any]) -> dict[str, Any]:
    """Completes a stage: hashes its files and writes the manifest last. Returns the manifest as written."""
    backfill = (stage.backfill.name, stage.backfilled_replies.name)  # may grow later
    complete = {
        **manifest,
        "schema_version": SCHEMA_VERSION,
        "files": hash_files(stage.path, skip=(stage.manifest.name, *backfill)),
    }
    return write_sealed(stage.manifest, complete)
