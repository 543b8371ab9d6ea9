"""Where long work stands: a bar on a terminal, lines in a log, and one process alone says it."""

import fcntl
import io
import logging
import os
import struct
import termios
import time

import pytest

from mllm_keeplora.distributed import progress as module
from mllm_keeplora.distributed.progress import progress


class Terminal(io.StringIO):
    """Standard error as a terminal shows it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """No terminal; a line is due after 20 ms."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(module, "LINE_SECONDS", 0.02)
    caplog.set_level(logging.INFO)
    return caplog


def test_a_log_gets_a_line_when_one_is_due(lines: pytest.LogCaptureFixture) -> None:
    with progress("training", "steps", total=40, initial=10) as bar:
        for _ in range(6):
            time.sleep(0.011)
            bar.set_postfix_str("loss 0.5", refresh=False)
            bar.update()
    assert 2 <= len(lines.messages) <= 5, "not one a step"
    for message in lines.messages:
        assert message.startswith("training: 1") and message.endswith(" left, loss 0.5")
        assert " of 40 steps, 00:00 so far, 00:0" in message


def test_a_log_gets_no_line_of_what_is_quick(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 30.0)
    assert list(progress("weight bases", "modules", range(50))) == list(range(50))
    assert not lines.messages


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_without_columns_gets_lines(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """A bar would be nothing at all there."""
    reads, writes = os.openpty()
    fcntl.ioctl(writes, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    with os.fdopen(writes, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(module, "BAR_SECONDS", 0)
        for _ in progress("answering", "questions", range(4)):
            time.sleep(0.03)
        terminal.flush()
        shown = os.read(reads, 10_000).decode() if columns else ""
    os.close(reads)
    assert ("answering:" in shown, bool(lines.messages)) == (columns > 0, columns == 0)


@pytest.mark.parametrize("work", [(), (1, 2, 3)])
def test_a_terminal_gets_a_bar_that_goes_when_the_phase_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, work: tuple[int, ...]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(module, "BAR_SECONDS", 0)
    caplog.set_level(logging.INFO)
    assert tuple(progress("answering", "questions", work)) == work
    shown = terminal.getvalue()
    assert f"answering:   0%|          | 0/{len(work)}" in shown if work else "answering: 0questions" in shown
    assert shown.rpartition("\r")[2].strip() == "" and not caplog.messages


def test_one_process_alone_says_it(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for _ in progress("answering", "questions", range(4)):
        time.sleep(0.03)
    assert not lines.messages
