"""Runs of the true command in processes that were forked after the imports, which take most of a short run's time."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.recipes.conftest import ROOT

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IMPORTED = [
    "mllm_keeplora.commands.run",
    "mllm_keeplora.continual.run_stream",
    "mllm_keeplora.evaluation.lmms_model",
    "mllm_keeplora.reports.page",
    "lmms_eval.evaluator",
    "lmms_eval.tasks",
    "transformers.models.llava.modeling_llava",
    "transformers.models.video_llava.modeling_video_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "tests.recipes.forked",
]
FORKED = multiprocessing.get_context("forkserver")


def fork(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> "multiprocessing.context.ForkServerProcess":
    """Starts `python SCRIPT ARGUMENTS` as a forked process, a session of its own.

    Args:
        command: what follows the interpreter.
        environment: variables beside this process's own.
        log: file that gets what it prints.
    """
    FORKED.set_forkserver_preload(IMPORTED)
    process = FORKED.Process(target=_run, args=(list(command), dict(environment), str(log)))
    process.start()
    return process


def _run(command: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a shell may have them ignored
        signal.signal(number, signal.SIG_DFL)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
