"""Python commands in processes of their own, without the seconds that each would spend on imports.

A fork server imports once what commands import, and nothing else. Every command is a fork of it: it has its own
memory, files, signals and exit status, and is killed and awaited like any other process.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # as every command has it whose output is no terminal
}
_CONTEXT = multiprocessing.get_context("forkserver")


class Forked:
    """`python ARGUMENTS` in the repository's folder, with the names that `subprocess.Popen` has.

    Args:
        arguments: a script and what follows it, or `-m`, a module and what follows that.
        environment: what is set beside `ENVIRONMENT`.
        log: file that gets what it prints, behind what is there; None keeps it for `completed`.
    """

    def __init__(
        self, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        with mock.patch.dict(os.environ, ENVIRONMENT):
            _CONTEXT.set_forkserver_preload(["tests.forked_imports"])
            forkserver.ensure_running()
        self.args = [*map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._outputs = (log or folder / "stdout", log or folder / "stderr")
        changed = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._process = _CONTEXT.Process(target=_become, args=(self.args, changed, *self._outputs))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the end, so long at most; returns the exit status, below 0 for a signal, None while it runs."""
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal to it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def completed(self) -> subprocess.CompletedProcess[str]:
        """Waits for the end; what it wrote."""
        status = self.wait()
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self._outputs)
        return subprocess.CompletedProcess(self.args, status, stdout, stderr)


def run(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the repository's folder to its end."""
    return Forked(arguments).completed()


def run_together(
    arguments: Sequence[str | Path], processes: int = 2, environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """The same by several processes that know of each other, as `torchrun` starts them."""
    started = [Forked(arguments, {**(environment or {}), **rank}) for rank in ranks(processes)]
    return [process.completed() for process in started]


def ranks(processes: int) -> list[dict[str, str]]:
    """The environment in which `torchrun` starts each of several processes; nothing for a process alone."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _become(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a shell may have them ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the system's again, not that of the fork server
    os.environ.clear()
    os.environ.update(environment)  # what is read on import has been read before
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    if module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
