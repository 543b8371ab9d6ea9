"""The phases of a stage: computed once, written, hashed into the stage's record, read from then on."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from torch import Tensor

from mllm_keeplora.distributed.processes import from_main
from mllm_keeplora.runs.files import (
    ArtifactError,
    load_tensors,
    read_json,
    remove_temporaries,
    save_tensors,
    sha256_file,
    write_json,
)
from mllm_keeplora.runs.run_directory import StageDirectory

logger = get_logger(__name__)


class Outcome(NamedTuple):
    """What a phase leaves: tensors, which may be none, and facts as JSON; None where it leaves no such file."""

    tensors: Mapping[str, Tensor] | None = None
    facts: Any = None


class Phase:
    """A phase that is done.

    Attributes:
        facts: what it wrote as JSON, or None.
    """

    def __init__(self, tensors: Path, facts: Path) -> None:
        self._tensors = tensors
        self.facts: Any = read_json(facts) if facts.exists() else None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What it wrote as safetensors, read on first use; a phase that wrote none has none."""
        return load_tensors(self._tensors) if self._tensors.exists() else {}


class StageRecord:
    """What an unfinished stage was begun with, and which of its phases are done.

    A killed stage continues from here. A phase is done when the record names its files and they still have the
    hashes that it names. Otherwise it is computed again.
    """

    def __init__(self, directory: StageDirectory, inputs: Mapping[str, Any]) -> None:
        """Claims the stage's folder; to be called on every process.

        A folder that was begun with other inputs is emptied: nothing in it was computed under these.
        """
        self.directory = directory
        self.timings: dict[str, float] = {}
        from_main(lambda: self._claim(dict(inputs)))

    def _claim(self, inputs: dict[str, Any]) -> None:
        folder, path = self.directory.path, self.directory.record
        remove_temporaries(folder)
        if folder.exists() and not (path.exists() and self._read()["inputs"] == inputs):
            logger.warning(f"{folder} was begun with other settings or data and not finished; it begins anew")
            shutil.rmtree(folder)
        if not path.exists():
            write_json(path, {"inputs": inputs, "phases": {}})

    def phase(self, name: str, compute: Callable[[], Outcome], key: str = "") -> Phase:
        """The outcome of a phase: read where it is there, else computed and written.

        Args:
            name: one of `PHASE_STEMS`.
            compute: runs on every process; what the main one returns is written, and read by all.
            key: of what the phase depends on beside the stage's inputs; under another key it is computed again.
        """
        if not from_main(lambda: self._is_done(name, key)):
            with self.timed(name):
                outcome = compute()
                from_main(lambda: self._write(name, outcome))
            from_main(lambda: self._note(name, key))
        self.timings[name] = self._read()["phases"][name]["seconds"]
        return Phase(*self._files(name))

    def _read(self) -> dict[str, Any]:
        record = read_json(self.directory.record)
        if not isinstance(record, dict) or not {"inputs", "phases"} <= record.keys():
            raise ArtifactError(
                f"{self.directory.record} is no record of a stage: it was edited. Delete {self.directory.path} "
                "to have the stage computed again"
            )
        return record

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the block's wall time, in seconds, to `timings`."""
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.directory.tensors(name), self.directory.facts(name)

    def _is_done(self, name: str, key: str) -> bool:
        known = self._read()["phases"].get(name)
        if known is None or known["key"] != key:
            return False
        for file, expected in known["files"].items():
            path = self.directory.path / file
            if not path.exists() or sha256_file(path) != expected:
                logger.warning(f"{path} is not what phase {name!r} wrote; the phase is computed again")
                return False
        return True

    def _write(self, name: str, outcome: Outcome) -> None:
        tensors, facts = self._files(name)
        for path in (tensors, facts):
            path.unlink(missing_ok=True)
        if outcome.tensors is not None:
            save_tensors(tensors, outcome.tensors)
        if outcome.facts is not None:
            write_json(facts, outcome.facts)

    def _note(self, name: str, key: str) -> None:
        record = self._read()
        files = {path.name: sha256_file(path) for path in self._files(name) if path.exists()}
        record["phases"][name] = {"files": files, "key": key, "seconds": self.timings[name]}
        write_json(self.directory.record, record)
