"""The phases of a stage: computed once, written, hashed into the stage's record, read from then on."""

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
    found_hash,
    load_tensors,
    read_json,
    read_sealed,
    remove,
    remove_temporaries,
    save_tensors,
    sha256_file,
    write_json,
    write_sealed,
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
    hashes that it names. Otherwise it is computed again. The record
    carries a hash of itself, so that an edited one is refused.
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
            remove(folder)
        if not path.exists():
            write_sealed(path, {"inputs": inputs, "phases": {}})

    def phase(self, name: str, compute: Callable[[], Outcome], key: str = "") -> Phase:
        """The outcome of a phase: read where it is there, else computed and written.

        Args:
            name: one of `PHASE_STEMS`.
            compute: runs on every process; what the main one returns is written, and read by all.
            key: of what the phase depends on beside the stage's inputs; under another key it is computed again.
        """
        if not from_main(lambda: self._is_done(name, key)):
            from_main(lambda: self._clear(name))
            with self.timed(name):
                outcome = compute()
                from_main(lambda: self._write(name, outcome))
            from_main(lambda: self._note(name, key))
        self.timings[name] = self._read()["phases"][name]["seconds"]
        return Phase(*self._files(name))

    def _read(self) -> dict[str, Any]:
        return read_sealed(
            self.directory.record, f"delete {self.directory.path} to have the unfinished stage computed again"
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the block's wall time, in seconds, to `timings`."""
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def _is_done(self, name: str, key: str) -> bool:
        known = self._read()["phases"].get(name)
        if known is None or known["key"] != key:
            return False
        for file, expected in known["files"].items():
            path = self.directory.path / file
            if found_hash(path) != expected:
                logger.warning(f"{path} is not what phase {name!r} wrote; the phase is computed again")
                return False
        return True

    def _clear(self, name: str) -> None:
        """Removes what the phase left when it was computed before, and anything else in its place."""
        for path in (*self._files(name), *self.directory.sidecars(name)):
            remove(path)

    def _write(self, name: str, outcome: Outcome) -> None:
        tensors, facts = self._files(name)
        if outcome.tensors is not None:
            save_tensors(tensors, outcome.tensors)
        if outcome.facts is not None:
            write_json(facts, outcome.facts)

    def _note(self, name: str, key: str) -> None:
        record, folder = self._read(), self.directory.path
        found = [path for path in self._files(name) if path.exists()]
        for sidecar in self.directory.sidecars(name):
            found += sorted(sidecar.iterdir()) if sidecar.exists() else []
        files = {str(path.relative_to(folder)): sha256_file(path) for path in found}
        record["phases"][name] = {"files": files, "key": key, "seconds": self.timings[name]}
        write_sealed(self.directory.record, record)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.directory.tensors(name), self.directory.facts(name)
