"""What the other tests rely on when they run a command as a fork: a process of its own, as `python` starts one."""

import signal
from pathlib import Path

import pytest

from tests import forked


def test_a_command_has_its_own_arguments_outputs_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_TEST", "of the test")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.environ['KEEPLORA_TEST'], os.path.exists('pyproject.toml'))\n"
        "print('no', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    done = forked.run([script, "a", "--b"])
    assert (done.returncode, done.stderr) == (3, "no\n")
    assert done.stdout == "__main__ ['a', '--b'] of the test True\n"
    helped = forked.run(["-m", "mllm_keeplora.commands.main", "--help"])
    assert helped.returncode == 0 and helped.stdout.startswith("usage: keeplora COMMAND")


def test_an_error_shows_its_traceback_and_a_kill_its_signal(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('no')\n")
    done = forked.run([script])
    assert done.returncode == 1 and "ValueError: no" in done.stderr
    script.write_text("import time\ntime.sleep(600)\n")
    process = forked.Forked([script])
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_processes_started_together_know_of_each_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "found = [None] * 2\n"
        "dist.all_gather_object(found, dist.get_rank())\n"
        "print(found)\n"
    )
    assert [done.stdout for done in forked.run_together([script])] == ["[0, 1]\n"] * 2
